"""Fixtures of the tests of faults."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.support import FAR


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
