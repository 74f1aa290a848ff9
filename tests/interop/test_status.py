"""`elastic-timer status` of a job of torchrun's, while a rank hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

from tests.interop.conftest import Launch, Training
from tests.interop.test_torchrun import ONE_NODE, TORCHRUN
from tests.support import eventually

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")

SCHEMA = json.loads((resources.files("elastic_timer") / "status.schema.json").read_text())


def status(fifo: Path, *options: str) -> str:
    """What the command prints; it has to exit with 0."""
    command = [sys.executable, "-m", "elastic_timer", "status", "--timer-file", str(fifo)]
    return subprocess.run(
        [*command, *options], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    ).stdout


def test_rank_that_hangs(launch: Launch, training: Training, tmp_path: Path) -> None:
    """It is in its block with its rank, its pass and its stack; the watchdog is well throughout."""
    fifo = tmp_path / "timers"
    run = ["-m", "elastic_timer", "run", "--timer-file", str(fifo), "--", sys.executable]
    job = launch(*run, *TORCHRUN, *ONE_NODE, *training.command(hanging_local_rank=1, after=15))
    [hanging] = eventually(lambda: training.events("hanging"), timeout=60)
    # The others wait for it outside of their blocks.
    eventually(lambda: len(json.loads(status(fifo, "--json"))["timers"]) == 1, timeout=10)
    answer = json.loads(status(fifo, "--json", "--stacks"))
    jsonschema.validate(answer, SCHEMA)
    [timer] = answer["timers"]
    assert (timer["pid"], timer["rank"], timer["local_rank"]) == (hanging["pid"], 1, 1)
    assert (timer["pass"], timer["state"], answer["worker_count"]) == (3, "S", 2)
    assert abs(timer["acquired"] + timer["after"] - hanging["deadline"]) < 1
    [stack] = answer["stacks"]
    told = json.dumps(stack)
    assert (stack["pid"], stack["rank"]) == (hanging["pid"], 1)
    assert "train.py" in told or "no" in (stack["stacks_missing"] or ""), told
    assert "train.py#" in status(fifo)
    assert ": ok, " in status(fifo, "--check")
    assert job.wait() == 0, job.output
    assert not Path(f"{fifo}.sock").exists()
