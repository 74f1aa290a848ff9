"""Many workers are due at one moment: when is the last of them dead?"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack

from tests.benchmarks import lateness
from tests.benchmarks.harness import Results, Work, alternate, hosted
from tests.benchmarks.lateness import Contest, Pidfd
from tests.benchmarks.peers import ELASTIC_TIMER, FLOOR, NVRX, UPSTREAM

MASS = Work("workers due at one moment: the last one dead", "ms", "workers")
UNREAPED = Work("of those due at one moment, still there at the end", varied="workers")

WITHOUT = f"{ELASTIC_TIMER.name}, file"
WITH = f"{ELASTIC_TIMER.name}, Python stacks, file"

_MAX_INTERVAL = 0.1
_ROUNDS = 5
_LEAD = 1.0
# Of 500 processes the last is long in dying; torch looks at 64 for a third of a second.
_MARGIN = 10.0


def contests(skipped: dict[str, str]) -> list[Contest]:
    """All contestants that can take part, each with every number of workers."""
    entries = [
        Contest(name, library, _MAX_INTERVAL, workers, takes_stacks=name == WITH)
        for name, library, numbers in (
            (WITHOUT, ELASTIC_TIMER, (1, 64, 500)),
            (WITH, ELASTIC_TIMER, (1, 64)),
            (f"{UPSTREAM.name}, file", UPSTREAM, (1, 64, 500)),
            # It has a process for each worker.
            (NVRX, None, (1, 64)),
            (FLOOR, None, (1, 64, 500)),
        )
        for workers in numbers
    ]
    return [entry for entry in entries if entry.name.split(",")[0] not in skipped]


def measure(results: Results) -> None:
    """Let all workers of a contestant overrun at once, one contestant after another."""
    for entry in alternate(contests(results.skipped), _ROUNDS, MASS.title):
        with (
            tempfile.TemporaryDirectory() as folder,
            hosted(lateness.stuck_workers, entry, folder, [_LEAD] * entry.workers) as host,
            ExitStack() as stack,
        ):
            workers = {stack.enter_context(Pidfd(pid)).fileno() for pid in host.answer()}
            start = time.time() + 0.2
            host.connection.send(start)
            deaths = lateness.watch(workers, start + _LEAD + _MARGIN, MASS.title)
            deadline = max(deadline for _, deadline in host.answer())
        results.add(UNREAPED, entry.name, len(workers) - len(deaths), entry.workers)
        if len(deaths) == len(workers):
            late = max(deaths.values()) - deadline
            results.add(MASS, entry.name, late * 1000, entry.workers)
