"""Jobs whose ranks wait for one of them, which hangs: who that is has to be seen, and told rightly.

Ranks are programs of their own, as the server reads a rank off the environment that a program was
started with.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from tests.soak.workers import Stage
from tests.support import SOURCE

_PATIENCE = 20.0
"""How many seconds a rank may be overdue, or take to end."""


def launch_ranks(stage: Stage) -> None:
    """Launch a job one rank of which hangs, with some of the others past their deadlines as well.

    The others are in their next pass: that is what tells them from the one that hangs.
    """
    size = stage.dice.randrange(3, 5)  # Of two neither is behind the others.
    stuck = stage.dice.randrange(size)
    passes = stage.dice.randrange(1, 4)
    overdue = {rank for rank in range(size) if stage.dice.random() < 0.4} - {stuck}
    ranks = [_launch(stage, rank, size, passes + (rank != stuck)) for rank in range(size)]
    try:
        for rank in ranks:
            assert _line_of(rank) == "there"
        stage.tell(b"J", stuck)
        after = stage.dice.uniform(0.2, 0.8)
        deadlines = {}
        for number in [stuck, *sorted(overdue)]:
            deadlines[number] = _hurry(ranks[number], after)
            after += stage.dice.uniform(0, 0.4)
        for number in sorted(deadlines, key=deadlines.__getitem__):
            code = ranks[number].wait(_PATIENCE)
            died = time.monotonic()
            assert code == -signal.SIGKILL, f"rank {number} ended with {code}"
            assert died >= deadlines[number], f"rank {number} died before its deadline"
            stage.tell(b"L", died - deadlines[number], ranks[number].pid)
        for number in set(range(size)).difference(deadlines):
            ranks[number].communicate(timeout=_PATIENCE)  # Closes its stdin, which lets it go on.
            code = ranks[number].returncode
            assert code == 0, f"rank {number} ended with {code}"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _launch(stage: Stage, rank: int, size: int, passes: int) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]),
        "TORCHELASTIC_RUN_ID": stage.name,
        "WORLD_SIZE": str(size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    return subprocess.Popen(
        [sys.executable, "-c", _RANK, stage.path, str(passes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )


def _line_of(rank: subprocess.Popen[str]) -> str:
    assert rank.stdout is not None
    return rank.stdout.readline().strip()


def _hurry(rank: subprocess.Popen[str], after: float) -> float:
    """Give a rank so many seconds for the block that it is in; its deadline (monotonic)."""
    assert rank.stdin is not None
    rank.stdin.write(f"{after}\n")
    rank.stdin.flush()
    return float(_line_of(rank))


_RANK = """
import sys, time
from elastic_timer import FileTimerClient, expires

FAR = 600
client = FileTimerClient(sys.argv[1])
for _ in range(int(sys.argv[2]) - 1):
    with expires(after=FAR, scope="step", client=client):
        pass
with expires(after=FAR, scope="step", client=client) as block:
    print("there", flush=True)
    after = sys.stdin.readline()
    if after:
        print(time.monotonic() + float(after), flush=True)
        block.reschedule(float(after))
        time.sleep(FAR)
"""
