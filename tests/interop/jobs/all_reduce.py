"""A training job that all-reduces in every step; one rank, or its data loader, hangs once.

Usage, below torchrun: all_reduce.py FOLDER HANGING_RANK WHERE

WHERE is what hangs in the third step: "outside" of the collective, which all others wait in then,
"inside" of another one, that nobody joins, the process of the data loader, with a deadline around
the rank's step ("loader") or around its own work ("item"). Or a rank hangs behind the last
collective ("end"), when the others have finished.

Every process appends one JSON object a line to FOLDER/record: what it came to, and who it is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset

import elastic_timer

STEPS = 5
HANGING_STEP = 2
FOLDER, HANGING_RANK, WHERE = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
RANK = int(os.environ["RANK"])


def note(event: str, **facts: float) -> None:
    """Append a line that stays whoever kills this process."""
    line = json.dumps({"event": event, "rank": RANK, "pid": os.getpid(), **facts}) + "\n"
    with (FOLDER / "record").open("ab", buffering=0) as record:
        record.write(line.encode())


def hang(step: int, where: str) -> bool:
    """Whether this is to hang now; true once for all attempts."""
    if (RANK, step, where) != (HANGING_RANK, HANGING_STEP, WHERE):
        return False
    try:
        (FOLDER / "hangs").touch(exist_ok=False)
    except FileExistsError:
        return False
    note("hangs")
    return True


class Summands(Dataset):
    """For each step the number one, by a process of its own."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> torch.Tensor:
        if hang(step, "loader"):
            time.sleep(600)
        # The rank and the others wait for longer than this.
        with elastic_timer.expires(after=2, scope="item"):
            if hang(step, "item"):
                time.sleep(600)
        return torch.ones(1)


def main() -> None:
    """Take the steps, each with a deadline around all of it."""
    note("started")
    elastic_timer.configure()
    with elastic_timer.expires(after=30, scope="start"):
        distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
        alone = distributed.new_group()
        summands = iter(DataLoader(Summands(), batch_size=None, num_workers=int(WHERE in LOADED)))
        distributed.barrier()
    for step in range(STEPS):
        with elastic_timer.expires(after=20 if WHERE == "item" else 3, scope="step"):
            summand = next(summands)
            if hang(step, "outside"):
                time.sleep(600)
            if hang(step, "inside"):
                distributed.barrier(alone)
            distributed.all_reduce(summand)
    with elastic_timer.expires(after=3, scope="end"):
        if hang(HANGING_STEP, "end"):
            time.sleep(600)
    note("finished", sum=summand.item(), world=distributed.get_world_size())
    distributed.destroy_process_group()


LOADED = ("loader", "item")

main()
