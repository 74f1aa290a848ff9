"""A training job of several phases, each with a deadline that is read from a file.

Usage, below torchrun: phases.py DEADLINES RECORD EPOCHS [PHASE ...]

DEADLINES is a JSON object of seconds by phase, RECORD a file to which each rank appends a JSON
object a line. Attempt 0 hangs in the first PHASE that is given, attempt 1 in the second and so on:
the last rank is stuck in C code, the GIL held, and the others wait for it within the same phase.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import elastic_timer

STEPS = 3
HANGING_EPOCH = 1


def main() -> None:
    """Train for some epochs."""
    deadlines = json.loads(Path(sys.argv[1]).read_text())
    record = Path(sys.argv[2])
    epochs, hanging = int(sys.argv[3]), sys.argv[4:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def note(**facts: object) -> None:
        line = {"time": time.time(), "rank": rank, "attempt": attempt, "pid": os.getpid(), **facts}
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def phase(name: str, epoch: int) -> Iterator[None]:
        start = time.monotonic()
        with elastic_timer.expires(after=deadlines[name], scope=name):
            if [name] == hanging[attempt : attempt + 1] and (epoch, rank) == (
                HANGING_EPOCH,
                world - 1,
            ):
                note(event="hanging", phase=name)
                ctypes.PyDLL(None).pause()
            yield
            distributed.barrier()
        note(event="passed", phase=name, seconds=time.monotonic() - start)

    elastic_timer.configure()
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    data, saved = torch.randn(64, 64), record.with_name(f"checkpoint-{rank}")
    model = torch.nn.Linear(64, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for epoch in range(epochs):
        with phase("load", epoch):
            data = torch.randn(4096, 64)
            time.sleep(0.1)
        for batch in data.chunk(STEPS):
            with phase("step", epoch):
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                for parameter in model.parameters():
                    distributed.all_reduce(parameter.grad)
                optimizer.step()
                time.sleep(0.03)
        with phase("validate", epoch), torch.no_grad():
            distributed.all_reduce(model(data).square().mean())
            time.sleep(0.2)
        with phase("checkpoint", epoch):
            torch.save(model.state_dict(), saved)
            time.sleep(0.05)
    note(event="finished")
    distributed.destroy_process_group()


main()
