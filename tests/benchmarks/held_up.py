"""For how long is a worker stopped while its stacks are taken, one that is at work?"""

from __future__ import annotations

import importlib
import os
import threading
import time
from multiprocessing.connection import Connection

from tests.benchmarks.harness import Results, Work, alternate, hosted

HELD_UP = Work("longest stop of a worker whose stacks are taken", "ms", "threads")
THREADS = (1, 32, 128)

TAKEN = "stacks taken"
LEFT_ALONE = "left alone for as long"

_ROUNDS = 100
_FRAMES = 15
_LOOK = 0.001


def measure(results: Results) -> None:
    """Take a worker's stacks as a server does, and leave it alone for the same time."""
    stacks = importlib.import_module("elastic_timer._evidence.stacks")
    for threads in THREADS:
        with hosted(_worker, threads) as worker:
            worker.answer()
            took = 0.1
            for what in alternate((TAKEN, LEFT_ALONE), _ROUNDS, f"held up: {threads} threads"):
                worker.ask()
                began = time.monotonic()
                if what == TAKEN:
                    [taken] = stacks.take_stacks({worker.pid: "R"}, began + 20).values()
                    took = time.monotonic() - began
                    if taken["stacks"] is None:  # As now and then of one that is busy.
                        continue
                else:
                    time.sleep(took)
                results.add(HELD_UP, what, worker.ask() * 1000, threads)


def _worker(connection: Connection, threads: int) -> None:
    """Host: a worker with a busy thread; answers with the longest stop of it since it was asked.

    Where others have the processors it does not run either. How long it waited for one, the kernel
    counts, and that is left out.
    """
    for _ in range(threads - 1):
        threading.Thread(target=_wait, args=(_FRAMES, threading.Event()), daemon=True).start()
    counts = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    connection.send("ready")
    longest = 0.0
    while True:
        # What is counted before and after includes all that is in between.
        before, began = _waited(counts), time.perf_counter()
        gap, then = 0.0, began
        while then < began + _LOOK:
            now = time.perf_counter()
            gap, then = max(gap, now - then), now
        longest = max(longest, gap - (_waited(counts) - before))
        if connection.poll():
            try:
                connection.recv()
            except EOFError:
                return
            connection.send(longest)
            longest = 0.0


def _wait(frames: int, event: threading.Event) -> None:
    if frames:
        _wait(frames - 1, event)
    event.wait()


def _waited(counts: int) -> float:
    """For how many seconds this thread has waited for a processor."""
    return int(os.pread(counts, 99, 0).split()[1]) / 1e9
