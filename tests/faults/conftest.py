"""Fixtures of the tests of faults."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.support import Link, Server, ServerProcess, serve_questions
from tests.support import FAR, ForkedWorker


@pytest.fixture(params=["file", "queue"])
def link(request: pytest.FixtureRequest, fifo_path: str) -> Iterator[Link]:
    """Both ways from a worker to a server in turn."""
    with contextlib.closing(Link(request.param, fifo_path)) as made:
        yield made


@pytest.fixture
def file_link(fifo_path: str) -> Link:
    """The FIFO alone."""
    return Link("file", fifo_path)


@pytest.fixture
def serve(fork_worker: Callable[..., ForkedWorker], tmp_path: Path) -> Callable[..., ServerProcess]:
    """`serve(make_server, prepare=...)`: a ServerProcess; `prepare` is called in it first."""
    count = 0

    def start(
        make_server: Callable[[], Server], prepare: Callable[[], object] = lambda: None
    ) -> ServerProcess:
        nonlocal count
        count += 1
        log_path = tmp_path / f"server-{count}.log"
        return ServerProcess(fork_worker(serve_questions, make_server, log_path, prepare), log_path)

    return start


@pytest.fixture
def bystanders() -> Iterator[Callable[[int], list[int]]]:
    """`bystanders(count)`: the pids of so many processes that do nothing at all."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(count: int) -> list[int]:
        new = [subprocess.Popen(["sleep", str(FAR)]) for _ in range(count)]
        processes.extend(new)
        return [process.pid for process in new]

    yield start
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
