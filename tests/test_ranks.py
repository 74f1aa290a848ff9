"""A worker's place in its job is read off its environment, and nothing else of that is."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_timer import FileTimerClient, FileTimerRequest, FileTimerServer
from elastic_timer._server.job import ranks
from elastic_timer._server.process import environment_of
from elastic_timer.debug_info_logging import log_debug_info_for_expired_timers, set_stacks_timeout
from tests.evidence_support import expired, logged
from tests.support import FAR, eventually

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")

JOB = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_RUN_ID": "nightly = 1",
    "SLURM_PROCID": "4",
    "OMPI_COMM_WORLD_RANK": "5",
}


@pytest.fixture
def sleeping() -> Iterator[Callable[[dict[str, str]], int]]:
    """`sleeping(environment)`: the pid of a process that was started with it alone."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(environment: dict[str, str]) -> int:
        processes.append(subprocess.Popen(["/bin/sleep", "600"], env=environment))
        # Popen returns a moment before the new program has its arguments and environment.
        eventually(Path(f"/proc/{processes[-1].pid}/cmdline").read_bytes)
        return processes[-1].pid

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_the_ranks_are_told(
    sleeping: Callable[[dict[str, str]], int], caplog: pytest.LogCaptureFixture
) -> None:
    """In the text and as fields; without them the text is as before, the fields are None."""
    set_stacks_timeout(0)
    ranked, unranked = sleeping(JOB), sleeping({})
    log_debug_info_for_expired_timers(
        "run", {pid: expired(pid) for pid in (ranked, unranked, -ranked)}
    )
    first, *others = logged(caplog)
    assert (first.timer_rank, first.timer_local_rank) == (3, 1)
    assert first.getMessage().startswith(f"worker {ranked} (rank 3) of run 'run' is past")
    for record in others:
        assert (record.timer_rank, record.timer_local_rank) == (None, None)
        assert record.getMessage().startswith(f"worker {record.timer_pid} of run 'run' is past")


def test_these_names_are_read_and_no_others(sleeping: Callable[[dict[str, str]], int]) -> None:
    """However similar the others are, and however long."""
    others = {"PASSWORD": "secret", "RANKS": "1", "MY_RANK": "2", "A": "x" * 100_000}
    assert environment_of(sleeping({**others, **JOB})) == JOB
    assert environment_of(sleeping(others)) == {}


def test_no_environment_of_a_process_that_is_gone() -> None:
    """Nor of a group."""
    process = subprocess.Popen(["true"], env=JOB)
    process.wait()
    assert environment_of(process.pid) == {}
    assert environment_of(-process.pid) == {}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (JOB, (3, 1)),
        ({"SLURM_PROCID": "4", "OMPI_COMM_WORLD_RANK": "5"}, (4, None)),
        ({"OMPI_COMM_WORLD_RANK": "5"}, (5, None)),
        ({"RANK": "none", "SLURM_PROCID": "4", "LOCAL_RANK": ""}, (4, None)),
        ({"RANK": "-1"}, (None, None)),
        ({"LOCAL_RANK": "0"}, (None, 0)),
        ({"RANK": "999999999"}, (999_999_999, None)),
        ({"RANK": "1" * 5000, "SLURM_PROCID": "4", "LOCAL_RANK": "1" * 10}, (4, None)),
    ],
)
def test_rank(environment: dict[str, str], expected: tuple[int | None, int | None]) -> None:
    """RANK, else Slurm's, else Open MPI's; what is no number counts as missing."""
    assert ranks(environment) == expected


def test_whatever_the_ranks_are(
    sleeping: Callable[[dict[str, str]], int], server: FileTimerServer, client: FileTimerClient
) -> None:
    """A worker is watched, and none of the requests is lost that come together with its own."""
    set_stacks_timeout(0)
    workers = [sleeping(dict.fromkeys(JOB, "1" * 5000)), sleeping({})]
    for pid in workers:
        client._send_request(FileTimerRequest(pid, "s", time.time() + FAR, signal.SIGKILL))
    eventually(lambda: all(map(server._timers.holds, workers)))
