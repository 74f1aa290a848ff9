"""A training job to which its timer server is of use, but not needed.

Usage, below torchrun: optional.py FOLDER

Half-way each rank waits inside of a block until FOLDER/go is there. Every rank appends one JSON
object a line to FOLDER/record: that it is half-way, and when it has finished how long its slowest
block took to be entered and left.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import elastic_timer

STEPS = 200
FOLDER = Path(sys.argv[1])


def note(event: str, **facts: float) -> None:
    """Append a line."""
    line = json.dumps({"event": event, "pid": os.getpid(), **facts}) + "\n"
    with (FOLDER / "record").open("ab", buffering=0) as record:
        record.write(line.encode())


def main() -> None:
    """Take the steps, each with a deadline around all of it."""
    logging.basicConfig(format="process %(process)d: %(message)s")
    elastic_timer.configure(required=False)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    slowest = 0.0
    for step in range(STEPS):
        began = time.monotonic()
        with elastic_timer.expires(after=60, scope="step"):
            entered = time.monotonic()
            if step == STEPS // 2:
                note("half-way")
                while not (FOLDER / "go").exists():
                    time.sleep(0.01)
            distributed.all_reduce(torch.ones(1))
            leaving = time.monotonic()
        slowest = max(slowest, entered - began + time.monotonic() - leaving)
    note("finished", slowest=slowest)
    distributed.destroy_process_group()


main()
