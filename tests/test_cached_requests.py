"""What clients keep ready between blocks is never sent in the name of another process or scope."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from elastic_timer import FileTimerClient, FileTimerRequest


@pytest.fixture
def reader(fifo_path: str) -> Iterator[int]:
    """The reading end of a FIFO."""
    os.mkfifo(fifo_path, 0o600)
    fd = os.open(fifo_path, os.O_RDWR | os.O_NONBLOCK)
    yield fd
    os.close(fd)


def requests(reader: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in os.read(reader, 1 << 16).splitlines()]


def test_forked_child_sends_its_own_pid(reader: int, fifo_path: str) -> None:
    """A child that enters a block its parent was in before is a worker of its own."""
    client = FileTimerClient(fifo_path)
    client.acquire("s", 1.5)
    client.release("s")
    pid = os.fork()
    if pid == 0:
        client.acquire("s", 1.5)
        client.release("s")
        os._exit(0)
    os.waitpid(pid, 0)
    client.release("s")
    assert [each["pid"] for each in requests(reader)] == [os.getpid()] * 2 + [pid] * 2 + [
        os.getpid()
    ]


def test_scopes_and_signals_are_told_apart(reader: int, fifo_path: str) -> None:
    """Scopes that look like what is put into a line, and each client's signal, arrive as sent."""
    scopes = ["%", "%a", '"expiration_time": 0', "%(a)s%%", "s"]
    clients = [FileTimerClient(fifo_path, number) for number in (9, 15)]
    for client in clients * 2:
        for scope in scopes:
            client.acquire(scope, 1795150503.21)
    assert [
        (each["scope_id"], each["expiration_time"], each["signal"]) for each in requests(reader)
    ] == [(scope, 1795150503.21, number) for number in (9, 15) * 2 for scope in scopes]


def test_times_that_are_no_plain_floats(reader: int, fifo_path: str) -> None:
    """Whole numbers and subclasses of float are numbers on the wire; NaN is refused."""

    class Time(float):
        def __repr__(self) -> str:
            return "noon"

    client = FileTimerClient(fifo_path)
    client.acquire("s", 3)
    client.acquire("s", Time(2.5))
    assert [each["expiration_time"] for each in requests(reader)] == [3, 2.5]
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            client.acquire("s", wrong)


def test_overridden_send_request_gets_every_request(fifo_path: str) -> None:
    """A subclass that looks at the requests gets them all, as objects."""
    sent: list[FileTimerRequest] = []

    class Client(FileTimerClient):
        def _send_request(self, request: FileTimerRequest) -> None:
            sent.append(request)

    client = Client(fifo_path)
    client.acquire("s", 2.5)
    client.release("s")
    assert sent == [
        FileTimerRequest(os.getpid(), "s", 2.5, 9),
        FileTimerRequest(os.getpid(), "s", -1, 0),
    ]


def test_one_client_in_many_threads(reader: int, fifo_path: str) -> None:
    """Threads that share a client open the FIFO each for itself."""
    client = FileTimerClient(fifo_path)
    threads = [
        threading.Thread(target=lambda scope=scope: [client.release(scope) for _ in range(50)])
        for scope in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scopes = [each["scope_id"] for each in requests(reader)]
    assert sorted(scopes) == sorted("abcd" * 50)
