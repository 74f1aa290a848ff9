"""A training job that all-reduces in every step; one rank hangs at its first attempt.

Usage, below torchrun: all_reduce.py HANGING_RANK WHERE

WHERE is "outside" or "inside": whether the rank hangs before it enters the collective, in which all
others wait for it then, each past its deadline, or in a call of its own that nobody joins.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
from torch import distributed

import elastic_timer

STEPS = 5
HANGING_STEP = 2


def main() -> None:
    """Take the steps, each with a deadline around all of it."""
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    elastic_timer.configure()
    with elastic_timer.expires(after=60, scope="init_process_group"):
        distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for step in range(STEPS):
        with elastic_timer.expires(after=2, scope="step"):
            if (rank, step, attempt) == (int(sys.argv[1]), HANGING_STEP, 0):
                if sys.argv[2] == "inside":
                    distributed.barrier()
                time.sleep(600)
            summand = torch.ones(1)
            distributed.all_reduce(summand)
        assert summand.item() == distributed.get_world_size()
    print(f"rank {rank} has finished attempt {attempt}", flush=True)
    distributed.destroy_process_group()


main()
