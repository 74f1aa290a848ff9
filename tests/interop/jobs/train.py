"""A training job in which one rank hangs in C code, the GIL held, at its first attempt.

Usage, below torchrun: train.py RECORD HANGING_LOCAL_RANK AFTER

RECORD is a file to which every rank appends one JSON object a line; with a HANGING_LOCAL_RANK
of -1 no rank of this node hangs. The ranks wait for each other over torchrun's own store,
outside of the timed block, so that only the hanging rank's timer can expire.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from datetime import timedelta

from torch.distributed import TCPStore

import elastic_timer as timer

STEPS = 4
HANGING_STEP = 2


def main() -> None:
    """Take the steps, each under a timer."""
    record = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
    after = float(sys.argv[3])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    hanging = os.environ["LOCAL_RANK"] == sys.argv[2] and attempt == 0

    def note(event: str, **facts: float) -> None:
        line = {"event": event, "time": time.time(), "rank": rank, "attempt": attempt}
        os.write(record, (json.dumps({**line, "pid": os.getpid(), **facts}) + "\n").encode())

    timer.configure(timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=60),
    )
    for step in range(STEPS):
        deadline = time.time() + after
        with timer.expires(after=after):
            note("step", step=step)
            if hanging and step == HANGING_STEP:
                note("hanging", deadline=deadline)
                ctypes.PyDLL(None).pause()  # PyDLL keeps the GIL: no Python code runs again
        # Keys without the attempt in them: after a failure on one node, the agents of the
        # other nodes restart their workers too, without counting it as a restart.
        store.set(f"step {step} of rank {rank}", "done")
        store.wait([f"step {step} of rank {other}" for other in range(world_size)])
    note("finished")


main()
