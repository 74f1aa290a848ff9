"""A training job in which one rank hangs in C code, the GIL held, at its first attempt.

Usage, below torchrun: train.py RECORD HANGING_LOCAL_RANK AFTER

RECORD is a file to which every rank appends one JSON object a line; with a HANGING_LOCAL_RANK
of -1 no rank of this node hangs. The ranks wait for each other in a process group, outside of the
timed block, so that only the hanging rank's timer can expire.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from datetime import timedelta

from torch import distributed

import elastic_timer as timer

STEPS = 4
HANGING_STEP = 2


def main() -> None:
    """Take the steps, each under a timer."""
    record = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
    after = float(sys.argv[3])
    rank = int(os.environ["RANK"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    hanging = os.environ["LOCAL_RANK"] == sys.argv[2] and attempt == 0

    def note(event: str, **facts: float) -> None:
        line = {"event": event, "time": time.time(), "rank": rank, "attempt": attempt}
        os.write(record, (json.dumps({**line, "pid": os.getpid(), **facts}) + "\n").encode())

    timer.configure(timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for step in range(STEPS):
        deadline = time.time() + after
        with timer.expires(after=after):
            note("step", step=step)
            if hanging and step == HANGING_STEP:
                note("hanging", deadline=deadline)
                ctypes.PyDLL(None).pause()  # PyDLL keeps the GIL: no Python code runs again
        distributed.barrier()
    note("finished")
    distributed.destroy_process_group()


main()
