"""What every benchmark stands on: samples, alternating rounds, progress, host processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

OURS = "elastic-timer"

# Children start from a fresh interpreter: one that inherited torch or a thread from
# this process would be measured with it.
SPAWN = multiprocessing.get_context("spawn")

# Inherited, so that all processes of a run count from its start.
_started = float(os.environ.setdefault("BENCHMARKS_STARTED", str(time.monotonic())))
_shown = ("", 0.0)


def progress(text: str) -> None:
    """Show what runs right now, with the seconds since the start."""
    global _shown
    now = elapsed()
    if sys.stderr.isatty():
        print(f"\r\x1b[K[{now:5.0f} s] {text}", end="", file=sys.stderr, flush=True)
    elif (stage := text.partition(":")[0]) != _shown[0] or now - _shown[1] > 5:
        # In a log, a line for every round would bury everything else.
        print(f"[{now:5.0f} s] {text}", file=sys.stderr, flush=True)
        _shown = (stage, now)


def elapsed() -> float:
    """Seconds since the run started."""
    return time.monotonic() - _started


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        title: Its name in the tables.
        unit: The unit of every sample, empty for counts.
        varied: What it is measured at several values of, empty where there is nothing.
    """

    title: str
    unit: str = ""
    varied: str = ""


@dataclass
class Series:
    """The samples of one contestant at one work, one a round.

    Attributes:
        at: The value of what the work is varied over, None where nothing is varied.
    """

    work: Work
    contestant: str
    at: float | None = None
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def worst(self) -> float:
        return max(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles between which the middle half of the samples lies."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


class Results:
    """All series of a run, and the peers that could not take part."""

    def __init__(self) -> None:
        self.about: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.series: list[Series] = []

    def add(self, work: Work, contestant: str, sample: float, at: float | None = None) -> None:
        """Append one sample to its series, which begins with the first."""
        series = self.find(work, contestant, at)
        if series is None:
            series = Series(work, contestant, at)
            self.series.append(series)
        series.samples.append(sample)

    def find(self, work: Work, contestant: str, at: float | None = None) -> Series | None:
        """The series of that work, None where it was not measured."""
        for series in self.series:
            if (series.work, series.contestant, series.at) == (work, contestant, at):
                return series
        return None

    def to_json(self) -> str:
        """Everything that was measured, as JSON."""
        return json.dumps(
            {
                "about": self.about,
                "skipped": self.skipped,
                "series": [
                    {**asdict(series), "median": series.median, "spread": series.spread}
                    for series in self.series
                ],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The run that `to_json` wrote down."""
        results, content = cls(), json.loads(text)
        results.about = content["about"]
        results.skipped = content["skipped"]
        for entry in content["series"]:
            del entry["median"], entry["spread"]
            results.series.append(Series(Work(**entry.pop("work")), **entry))
        return results


def alternate(contestants: Sequence[Any], rounds: int, what: str) -> Iterator[Any]:
    """Yield every contestant once a round, each round beginning with another one.

    A machine's drift then meets all of them alike, and no one always runs behind the same
    neighbour.
    """
    for round_number in range(rounds):
        progress(f"{what}: round {round_number + 1} of {rounds}")
        first = round_number % len(contestants)
        yield from contestants[first:]
        yield from contestants[:first]


class Host:
    """A process of its own that runs `target(connection, *args)`; see `hosted`."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self.connection, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=target, args=(theirs, *args))
        self._process.start()
        theirs.close()
        self.pid = self._process.pid or 0

    def ask(self, question: Any = None) -> Any:
        """Send a question and return the answer."""
        self.connection.send(question)
        return self.answer()

    def answer(self) -> Any:
        """Wait for the next message of the host."""
        if not self.connection.poll(60):
            raise TimeoutError(f"host {self.pid} does not answer")
        return self.connection.recv()

    def cpu_seconds(self) -> float:
        """Processor time that the process has used, as the kernel counts it."""
        # The clock id of another process's CPU clock, as clock_getcpuclockid(3) builds it.
        return time.clock_gettime((~self.pid << 3) | 2)

    def memory(self) -> int:
        """Bytes of memory that are resident for this process."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    def end(self) -> None:
        """End the process: a closed connection asks it to, a signal makes sure."""
        self.connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def hosted(target: Callable[..., None], *args: Any) -> Iterator[Host]:
    """Run `target(connection, *args)` in a fresh process while the block lasts."""
    host = Host(target, *args)
    try:
        yield host
    finally:
        host.end()


def serve(connection: Connection, answer: Callable[[Any], Any]) -> None:
    """In a host: answer every question until the other side closes the connection."""
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        connection.send(answer(question))


def fork(body: Callable[[], None]) -> int:
    """Run `body` in a forked child, which ends with it, and return the child's pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    finally:
        os._exit(status)


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Poll until `condition` holds; False where it does not within `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
