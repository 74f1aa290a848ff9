"""A training job that all-reduces in every step; one rank gets stuck in a way of its own.

Usage, below torchrun: stuck.py KIND STUCK_RANK [AFTER]

KIND is one of those below, or "together": all ranks are stuck in the same call, as each receives
what no other sends.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed

import elastic_timer

STUCK_STEP = 2
FOR_GOOD = 600


def sleep() -> None:
    """Outside of the collective."""
    time.sleep(FOR_GOOD)


def in_c() -> None:
    """In C code, with the GIL."""
    ctypes.PyDLL(None).sleep(FOR_GOOD)


def locks() -> None:
    """Two threads, each with the lock that the other one wants."""
    mine, theirs = threading.Lock(), threading.Lock()
    met = threading.Barrier(2)

    def other_way_round() -> None:
        with theirs:
            met.wait()
            with mine:
                pass

    threading.Thread(target=other_way_round, daemon=True).start()
    with mine:
        met.wait()
        theirs.acquire()


def load(samples: multiprocessing.Queue[int]) -> None:
    """The loader: its disk does not answer."""
    time.sleep(FOR_GOOD)
    samples.put(0)


def loader() -> None:
    """A data loader that hangs."""
    context = multiprocessing.get_context("fork")
    samples = context.Queue()
    context.Process(target=load, args=(samples,), daemon=True).start()
    samples.get()


def stopped() -> None:
    """By a signal."""
    os.kill(os.getpid(), signal.SIGSTOP)


def other_collective() -> None:
    """One that nobody else is in."""
    distributed.barrier()


KINDS = {
    "sleep": sleep,
    "in C with the GIL": in_c,
    "locks of two threads": locks,
    "data loader": loader,
    "SIGSTOP": stopped,
    "another collective": other_collective,
    "never enters": sleep,
}


def step(stuck: Callable[[], None] | None) -> None:
    """One step of the training."""
    if stuck is not None:
        stuck()
    distributed.all_reduce(torch.ones(1))


def main() -> None:
    """Take the steps, each with a deadline around all of it."""
    kind, stuck_rank = sys.argv[1], int(sys.argv[2])
    after = float(sys.argv[3]) if len(sys.argv) > 3 else 2.0
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    elastic_timer.configure()
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for number in range(STUCK_STEP + 1):
        is_last = number == STUCK_STEP
        if is_last and kind == "never enters" and rank == stuck_rank:
            sleep()
        with elastic_timer.expires(after=after):
            if is_last and kind == "together":
                distributed.recv(torch.ones(1), src=(rank + 1) % ranks)
            step(KINDS[kind] if is_last and rank == stuck_rank else None)


main()
