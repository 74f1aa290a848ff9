"""The reap is the cure: a job with a real process group goes on with its next attempt."""

from __future__ import annotations

import sys

import pytest

from tests.interop.conftest import JOBS, Launch
from tests.support import REPOSITORY

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")

RUN = ["-m", "elastic_timer", "run", "--"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "2"]
RANKS = 3


def assert_recovers(output: str, ranks: int) -> None:
    """Every rank came to the end of the second attempt; the first one's are all gone."""
    for rank in range(ranks):
        assert f"rank {rank} has finished attempt 1" in output, output


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("way", ["--standalone", "--nnodes=1"])
def test_one_node(way: str, where: str, launch: Launch) -> None:
    """All overrun, as they wait for the one that hangs; the restarted ranks find each other."""
    torchrun = [*TORCHRUN, way, "--local-addr", "127.0.0.1", "--nproc-per-node", str(RANKS)]
    job = launch(*RUN, *torchrun, str(JOBS / "all_reduce.py"), "1", where)
    assert job.wait() == 0, job.output
    assert_recovers(job.output, RANKS)


def test_two_nodes(launch: Launch, free_port: int) -> None:
    """With the c10d rendezvous both agents start over, and all ranks finish."""
    nodes = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "two-nodes"]
    nodes += ["--rdzv-endpoint", f"127.0.0.1:{free_port}", "--local-addr", "127.0.0.1"]
    script = [str(JOBS / "all_reduce.py"), "1", "outside"]
    command = [*RUN, *TORCHRUN, *nodes, "--nproc-per-node", "2", *script]
    first, second = launch(*command), launch(*command)
    output = f"{first.wait()} and {second.wait()}:\n{first.output}\n{second.output}"
    assert (first.process.returncode, second.process.returncode) == (0, 0), output
    for rank in range(4):
        assert f"rank {rank} has finished" in output, output


def test_the_users_own_value_wins(launch: Launch) -> None:
    """`run` sets what makes the restart reliable; what the user has set stays."""
    show = "import os; print(os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'])"
    for env, expected in (({}, "1"), ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}, "0")):
        job = launch(*RUN, sys.executable, "-c", show, env=env)
        assert job.wait() == 0, job.output
        assert job.output.strip() == expected


def test_documented() -> None:
    """The page on torchrun names the variable."""
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in (REPOSITORY / "docs" / "torchrun.md").read_text()
