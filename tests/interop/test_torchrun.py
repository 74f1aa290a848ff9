"""torchrun, unmodified: a hanging rank is reaped, its group restarted, and the job finishes."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.interop.conftest import JOBS, UPSTREAM, Launch, Training, read_lines
from tests.support import REPOSITORY

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")

# Reaped late by more than this, a worker was not reaped by a deadline. Wide: busy machines.
LATE = 10
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
ONE_NODE = ["--standalone", "--local-addr", "127.0.0.1"]


def torchrun_under_run(events: Path) -> list[str]:
    """`elastic-timer run -- torchrun`, the server's events kept."""
    run = ["-m", "elastic_timer", "run", "--events", str(events), "--"]
    return [*run, sys.executable, *TORCHRUN]


@pytest.mark.parametrize("training", ["elastic_timer", UPSTREAM], indirect=True)
def test_one_node(launch: Launch, training: Training, tmp_path: Path) -> None:
    """Under `run`, the hanging rank alone is reaped and every rank finishes the next attempt.

    With torch's client as with ours, and where the environment asks torchrun for a server of
    its own: that one would replace the FIFO, so `run` has to keep the wish from torchrun.
    """
    events = tmp_path / "events"
    command = torchrun_under_run(events) + ONE_NODE + training.command(hanging_local_rank=1)
    job = launch(*command, env={"TORCHELASTIC_ENABLE_FILE_TIMER": "1"})
    assert job.wait() == 0, job.output
    assert_reaped_once(training, events, job.output)
    finished = training.events("finished")
    assert sorted((line["rank"], line["attempt"]) for line in finished) == [(0, 1), (1, 1)]


def test_two_nodes(launch: Launch, training: Training, tmp_path: Path, free_port: int) -> None:
    """The node with the hanging rank reaps it, both nodes rendezvous anew, every rank finishes."""
    nodes = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "two-nodes"]
    nodes += ["--rdzv-endpoint", f"127.0.0.1:{free_port}", "--local-addr", "127.0.0.1"]
    calm, hit = tmp_path / "events-1", tmp_path / "events-2"
    first = launch(*torchrun_under_run(calm), *nodes, *training.command(hanging_local_rank=None))
    second = launch(*torchrun_under_run(hit), *nodes, *training.command(hanging_local_rank=0))
    output = f"{first.wait()} and {second.wait()}:\n{first.output}\n{second.output}"
    assert (first.process.returncode, second.process.returncode) == (0, 0), output
    assert_reaped_once(training, hit, second.output)
    assert [line for line in read_lines(calm) if line["event"] == "kill worker process"] == []
    assert sorted(line["rank"] for line in training.events("finished")) == [0, 1, 2, 3]
    hanging = training.events("hanging")[0]
    first_steps = [line for line in training.events("step") if line["step"] == 0]
    again = {line["rank"] for line in first_steps if line["time"] > hanging["time"]}
    assert again == {0, 1, 2, 3}, "the nodes did not all start over"


def test_in_agent(launch: Launch, training: Training, tmp_path: Path) -> None:
    """Torch's own agent starts our server, is told its events and progress, and restarts."""
    alive = tmp_path / "alive"
    options = [*TORCHRUN[2:], *ONE_NODE, "--event-log-handler", "console"]
    job = launch(
        str(JOBS / "launch.py"),
        *(str(alive), *options, *training.command(hanging_local_rank=1, after=2)),
        env={
            "TORCHELASTIC_ENABLE_FILE_TIMER": "1",
            "TORCHELASTIC_HEALTH_CHECK_PORT": "0",
            # Under `run` it is set: without it the restarted ranks fail to find each other.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )
    assert job.wait() == 0, job.output
    (hanging,) = training.events("hanging")
    logged = watchdog_events(job.output)
    names = [event["watchdog_event"] for event in logged]
    started = ["watchdog started", "timer expired", "kill worker process", "watchdog stopped"]
    assert names == [*started, "watchdog started", "watchdog stopped"]
    assert {event["worker_pid"] for event in logged if "worker_pid" in event} == {
        str(hanging["pid"])
    }
    finished = training.events("finished")
    assert sorted((line["rank"], line["attempt"]) for line in finished) == [(0, 1), (1, 1)]
    progress = read_lines(alive)
    assert all(0 <= line["time"] - line["alive"] < LATE for line in progress)
    assert progress[-1]["alive"] - progress[0]["alive"] >= 2


def test_documented_line() -> None:
    """The line that docs/torchrun.md gives for the agent is the one that is tested here."""
    line = "\ntorch.distributed.elastic.timer.FileTimerServer = elastic_timer.FileTimerServer\n"
    assert line in (JOBS / "launch.py").read_text()
    assert line in (REPOSITORY / "docs" / "torchrun.md").read_text()


def assert_reaped_once(training: Training, events: Path, output: str) -> None:
    """Hold the server to having killed the hanging rank, soon after its deadline, and only it."""
    (hanging,) = training.events("hanging")
    (kill,) = [line for line in read_lines(events) if line["event"] == "kill worker process"]
    assert (kill["pid"], kill["signal"]) == (hanging["pid"], signal.SIGKILL)
    assert 0 <= kill["time"] - hanging["deadline"] < LATE
    # What the agent says is its own finding: the exit code that it read.
    assert re.search(rf"failed \(exitcode: -9\).*\(pid: {hanging['pid']}\)", output), output


def watchdog_events(output: str) -> list[dict[str, str]]:
    """What the agent logged of the events that it was told by its server."""
    lines = [line[line.index("{") :] for line in output.splitlines() if "watchdog_event" in line]
    return [json.loads(json.loads(line)["metadata"]["metadata"]) for line in lines]
