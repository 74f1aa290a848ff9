"""What `run` says of a torchrun that it is to start: where a job would not survive a reap."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_timer._command import torchrun
from tests.support import CLI, Spawn

GOOD = ["torchrun", "--max-restarts", "3", "train.py"]
C10D = "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:29500 --max-restarts 3 train.py"

NO_RESTART = "torchrun has no restart"
STATIC_NODES = "torchrun's static rendezvous does not bring several nodes together"
STATIC = "torchrun's static rendezvous keeps its store"
SHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE is '0'"


WHAT_TO_DO = {
    NO_RESTART: "give it some with --max-restarts",
    STATIC_NODES: "instead of --master-addr, --master-port and --node-rank",
    STATIC: "or add --standalone",
}


def said(command: str, **environment: str) -> list[str]:
    return torchrun.warnings(command.split(), environment)


@pytest.mark.parametrize(
    "command",
    [
        "torchrun --max-restarts 3 train.py",
        "torchrun --standalone --nproc-per-node 8 --max-restarts=3 train.py",
        "torchrun --standalone --master-port 29500 --max-restarts=3 train.py",
        "torchrun --nnodes=1 --nproc_per_node 8 --max_restarts 1 train.py --max-restarts 0",
        "torchrun --nnodes 1:1 --max-restarts 3 -m train --standalone",
        C10D,
        "torchrun --nnodes 2 --rdzv-backend etcd --rdzv-endpoint a:1 --max-restarts 3 train.py",
    ],
)
def test_good_ways(command: str) -> None:
    """Of a job that recovers nothing is said."""
    assert said(command) == []


@pytest.mark.parametrize(
    "command",
    [
        "",
        "env",
        "nohup",
        "python",
        "python -m",
        "python -m torch",
        "python -c torchrun",
        "python train.py torchrun train.py",
        "pip install torchrun train.py",
        "grep torchrun train.py",
        "uv pip torchrun train.py",
        "env -i torchrun train.py",
        "srun -N 2 torchrun train.py",
        "bash -c 'torchrun train.py'",
        "accelerate launch train.py",
        "torchrun",
        "torchrun --help",
        "torchrun --nnodes many train.py",
        "torchrun --max-restarts some train.py",
        "torchrun --option-of-tomorrow value train.py",
    ],
)
def test_silent_where_not_sure(command: str) -> None:
    """What is no torchrun, or one that can't be read or starts nothing, is left alone."""
    assert said(command) == []


@pytest.mark.parametrize(
    ("command", "warning"),
    [
        ("torchrun train.py", NO_RESTART),
        ("torchrun --max-restarts 0 train.py", NO_RESTART),
        ("torchrun train.py --max-restarts 3", NO_RESTART),
        ("torchrun -r 3 -t 3 -m train --max-restarts 3", NO_RESTART),
        ("torchrun --standalone --max_restarts 0 train.py", NO_RESTART),
        ("torchrun --nnodes 2 --max-restarts 3 train.py", STATIC_NODES),
        ("torchrun --nnodes 1:4 --max-restarts 3 train.py", STATIC_NODES),
        (
            "torchrun --nnodes 2 --node-rank 1 --master-addr a --master-port 1 --max-restarts 3 t",
            STATIC_NODES,
        ),
        ("torchrun --nnodes 2 --rdzv-endpoint a:1 --max-restarts 3 train.py", STATIC_NODES),
        ("torchrun --master-port 29500 --max-restarts 3 train.py", STATIC),
        ("torchrun --rdzv-endpoint localhost:0 --max-restarts 3 train.py", STATIC),
    ],
)
def test_ways_that_fail(command: str, warning: str) -> None:
    """Each way that was seen to fail is warned of, with what to do."""
    [text] = said(command)
    assert text.startswith(warning)
    assert text.endswith(WHAT_TO_DO[warning])


def test_two_at_once() -> None:
    """Each reason is named."""
    without, static = said("torchrun --nnodes 2 train.py")
    assert without.startswith(NO_RESTART)
    assert static.startswith(STATIC_NODES)


@pytest.mark.parametrize(
    "command",
    [
        "/usr/local/bin/torchrun",
        "python -m torch.distributed.run",
        "/opt/venv/bin/python3.12 -u -B -m torch.distributed.run",
        "python3 -m torch.distributed.launch --use-env",
        "python3.14t /opt/venv/bin/torchrun",
        "env A=1 B=2 torchrun",
        "nohup uv run torchrun",
        "setsid poetry run python -m torch.distributed.run",
    ],
)
def test_ways_to_call_it(command: str) -> None:
    """It is found however it is called."""
    [text] = said(f"{command} train.py")
    assert text.startswith(NO_RESTART)
    assert said(f"{command} --max-restarts 3 train.py") == []


def test_defaults_from_the_environment() -> None:
    """Torchrun reads PET_ variables; what is on the command line counts more."""
    assert said("torchrun train.py", PET_MAX_RESTARTS="3") == []
    assert said("env PET_MAX_RESTARTS=3 torchrun train.py") == []
    assert said("torchrun --max-restarts 0 train.py", PET_MAX_RESTARTS="3")
    [text] = said(" ".join(GOOD), PET_NNODES="2")
    assert text.startswith(STATIC_NODES)
    assert said(" ".join(GOOD), PET_NNODES="2", PET_RDZV_BACKEND="c10d") == []
    assert said(" ".join(GOOD), PET_NNODES="2", PET_STANDALONE="1") == []
    assert said(" ".join(GOOD), PET_NNODES="2", PET_STANDALONE="0") == [text]
    assert said("torchrun train.py", PET_STANDALONE="yes") == []


@pytest.mark.parametrize("command", [" ".join(GOOD), C10D, C10D.replace("c10d", "etcd-v2")])
def test_shared_store(command: str) -> None:
    """The user's own value of the variable stays, and is spoken of where it matters."""
    [text] = said(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
    assert text.startswith(SHARED)
    assert text.endswith("unset the variable, or set it to 1")
    assert said(f"env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=0 {command}") == [text]
    assert said(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") == []
    other = C10D.replace("c10d", "etcd")
    assert said(other, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0") == []


words = st.text(max_size=20) | st.sampled_from(
    [
        *("torchrun", "python", "env", "nohup", "uv", "run", "-m", "-u", "torch.distributed.run"),
        *("--nnodes", "2", "1:2", "--standalone", "--max-restarts", "-", "--", "A=1", "train.py"),
    ]
)


@given(st.lists(words), st.dictionaries(st.sampled_from(["PET_NNODES", "PET_STANDALONE"]), words))
def test_any_command(command: list[str], environment: dict[str, str]) -> None:
    """Nothing that can be written on a command line stops the run."""
    before = list(command), dict(environment)
    assert all(isinstance(text, str) for text in torchrun.warnings(command, environment))
    assert (command, environment) == before


@given(st.lists(words))
def test_arguments_of_the_script(arguments: list[str]) -> None:
    """What stands behind the script is the script's own, however it looks."""
    assert torchrun.warnings([*GOOD, *arguments], {}) == []
    # Silent where argparse takes what could be short for several options as wrong even here.
    assert torchrun.warnings(["torchrun", "train.py", *arguments], {}) in ([], said("torchrun t"))


def test_run_warns(spawn: Spawn, tmp_path: Path) -> None:
    """`run` says it once on its log, and starts COMMAND all the same."""
    program = tmp_path / "torchrun"
    program.write_text("#!/bin/sh\necho started; exec cat > /dev/null\n")
    program.chmod(0o755)
    child = spawn(CLI, "run", "--", str(program), "train.py")
    assert child.readline() == "started"
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.wait() == 0
    [line] = child.stderr_text().splitlines()
    assert line.startswith("elastic-timer ")
    assert f": {NO_RESTART}" in line
