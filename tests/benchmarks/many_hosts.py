"""How long does `elastic-timer report` take over the events of very many hosts?"""

from __future__ import annotations

import os
import sys
import tempfile
import time

from tests.benchmarks.harness import OURS, Results, Work, fork, progress
from tests.recorded_hosts import HOSTS, RANKS, STUCK, write_hosts

REPORT = Work(f"report over {HOSTS:,} hosts of {RANKS} ranks", "s")
MEMORY = Work(f"memory of a report over {HOSTS:,} hosts of {RANKS} ranks", "MiB")
RIGHT = Work("of these reports, those that named the right rank (1: yes)")

_ROUNDS = 3


def measure(results: Results) -> None:
    """Write the files once, and have them read."""
    with tempfile.TemporaryDirectory() as folder:
        progress(f"report: the events of {HOSTS} hosts are written")
        write_hosts(folder)
        for number in range(_ROUNDS):
            progress(f"report: round {number + 1} of {_ROUNDS}")
            seconds, mebibytes, told = report(folder)
            results.add(REPORT, OURS, seconds)
            results.add(MEMORY, OURS, mebibytes)
            results.add(RIGHT, OURS, float(f"suspect: rank {STUCK} (" in told))


def report(folder: str) -> tuple[float, float, str]:
    """The seconds and the memory, in MiB, that the command takes, and what it prints."""
    paths = sorted(entry.path for entry in os.scandir(folder))
    with tempfile.TemporaryFile() as output:

        def run() -> None:
            os.dup2(output.fileno(), 1)
            os.execv(sys.executable, [sys.executable, "-m", "elastic_timer", "report", *paths])

        began = time.monotonic()
        _, _, usage = os.wait4(fork(run), 0)
        seconds = time.monotonic() - began
        output.seek(0)
        return seconds, usage.ru_maxrss / 1024, output.read().decode()
