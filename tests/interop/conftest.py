"""What the interop tests share: commands whose processes and FIFOs can be accounted for."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import SOURCE, eventually, kill_marked, marked_processes

JOBS = Path(__file__).parent / "jobs"
MARK = "ELASTIC_TIMER_INTEROP_TEST"
UPSTREAM = "torch.distributed.elastic.timer"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where the folder is named on the command line; else the default holds."""
    parser.addoption(
        "--every-phase", action="store_true", help="hang in each phase of a job, not in some"
    )


@pytest.fixture(autouse=True)
def _leaves_no_process_and_no_fifo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_folder: Path
) -> Iterator[None]:
    """Hold each test to ending every process below it, orphans too, and removing every FIFO.

    The processes are told by a mark in the environment they were started with: workers live
    in sessions of their own, and an agent that is killed leaves them to init.
    """
    mark = f"{MARK}={uuid.uuid4()}"
    (tmp_path / "tmp").symlink_to(short_folder)
    monkeypatch.setenv(*mark.split("="))
    monkeypatch.setenv("TMPDIR", str(short_folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    try:
        eventually(lambda: not marked_processes(mark), timeout=10)
    except AssertionError:
        if left := kill_marked(mark):
            pytest.fail(f"left behind: {left}", pytrace=False)
    paths = [*tmp_path.rglob("*"), *short_folder.rglob("*")]
    fifos = [path for path in paths if stat.S_ISFIFO(path.lstat().st_mode)]
    assert not fifos, "left behind"


class Job:
    """A command in a session of its own; what it prints is kept in a file."""

    def __init__(self, output: Path, command: list[str], env: dict[str, str]) -> None:
        self._output = output
        with output.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(SOURCE), **env},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What the command and everything below it printed so far."""
        return self._output.read_text(errors="replace")

    def wait(self, timeout: float = 90) -> int:
        """The exit code; an AssertionError with the output where there is none in time."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None


Launch = Callable[..., Job]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """`launch(*command, env={})`: a Job that runs a Python command; ended with the test."""
    jobs: list[Job] = []

    def start(*command: str, env: dict[str, str] | None = None) -> Job:
        output = tmp_path / f"output-{len(jobs)}"
        jobs.append(Job(output, [sys.executable, *command], env or {}))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


class Training:
    """jobs/train.py with its timers taken from `library`, and what its ranks recorded."""

    def __init__(self, directory: Path, library: str) -> None:
        source = (JOBS / "train.py").read_text()
        ours = "import elastic_timer as timer\n"
        assert source.count(ours) == 1
        self._script = directory / "train.py"
        self._script.write_text(source.replace(ours, f"import {library} as timer\n"))
        self._record = directory / "record"
        self._record.touch()

    def command(self, hanging_local_rank: int | None, after: float = 1) -> list[str]:
        """The script and its arguments; with None no rank hangs."""
        hanging = -1 if hanging_local_rank is None else hanging_local_rank
        return [str(self._script), str(self._record), str(hanging), str(after)]

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of that event, in the order they were written."""
        return [line for line in read_lines(self._record) if line["event"] == name]


@pytest.fixture
def training(tmp_path: Path, request: pytest.FixtureRequest) -> Training:
    """The training job, with elastic_timer's timers unless the test is parametrised."""
    return Training(tmp_path, getattr(request, "param", "elastic_timer"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that has one a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def find_free_port() -> int:
    """A TCP port on which nobody listens.

    From below the range that the system hands out by itself: no connection of another
    process can take it between this look and its use.
    """
    while True:
        port = random.randint(15000, 31000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture
def free_port() -> int:
    """As `find_free_port` has it."""
    return find_free_port()
