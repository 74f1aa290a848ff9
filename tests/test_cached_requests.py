"""What clients keep ready between blocks is never sent in the name of another process or scope."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import threading
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    LocalTimerClient,
    TimerClient,
    TimerRequest,
    expires,
)


@pytest.fixture
def reader(fifo_path: str) -> Iterator[int]:
    """The reading end of a FIFO."""
    os.mkfifo(fifo_path, 0o600)
    fd = os.open(fifo_path, os.O_RDWR | os.O_NONBLOCK)
    yield fd
    os.close(fd)


def requests(reader: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in os.read(reader, 1 << 16).splitlines()]


def send_before_and_after_fork(client: TimerClient) -> int:
    """Acquire and release in this process, then in a child, whose pid this is; release here."""
    client.acquire("s", 1.5)
    client.release("s")
    pid = os.fork()
    if pid == 0:
        client.acquire("s", 1.5)
        client.release("s")
        os._exit(0)
    os.waitpid(pid, 0)
    client.release("s")
    return pid


def test_forked_child_sends_its_own_pid(reader: int, fifo_path: str) -> None:
    """A child that enters a block its parent was in before is a worker of its own."""
    client = FileTimerClient(fifo_path)
    pid = send_before_and_after_fork(client)
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


def release_often(client: FileTimerClient, scope: str) -> None:
    for _ in range(50):
        client.release(scope)


def test_one_client_in_many_threads(reader: int, fifo_path: str) -> None:
    """Threads that share a client open the FIFO each for itself."""
    client = FileTimerClient(fifo_path)
    threads = [threading.Thread(target=release_often, args=(client, scope)) for scope in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scopes = [each["scope_id"] for each in requests(reader)]
    assert sorted(scopes) == sorted("abcd" * 50)


def test_clients_of_one_server_are_equal(fifo_path: str, tmp_path: Path) -> None:
    """They count as one where it matters who owes a release to whom."""
    assert len({FileTimerClient(fifo_path), FileTimerClient(fifo_path, 15)}) == 1
    assert FileTimerClient(fifo_path) != FileTimerClient(str(tmp_path / "other"))


class Failing(TimerClient):
    """Sends what it is asked to; raises what it is told to afterwards."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.errors: list[BaseException | None] = []

    def _send(self, kind: str, scope: str) -> None:
        self.sent.append((kind, scope))
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        self._send("acquire", scope_id)

    def release(self, scope_id: str) -> None:
        self._send("release", scope_id)


def test_a1_acquire_that_was_interrupted_behind_its_sending() -> None:
    """What may have been sent before an interrupt is released before the caller sees that."""
    client = Failing()
    client.errors = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt), expires(60, "s", client):
        pytest.fail("entered")
    assert client.sent == [("acquire", "s"), ("release", "s")]


def test_a10_owed_release_precedes_that_of_an_asynchronous_block() -> None:
    """What failed within an `async with` block is sent first when that is left."""
    client = Failing()

    async def main() -> None:
        async with expires(60, "outer", client):
            client.errors = [None, BrokenPipeError()]
            with pytest.raises(BrokenPipeError), expires(60, "inner", client):
                pass

    asyncio.run(main())
    assert client.sent[-3:] == [("release", "inner")] * 2 + [("release", "outer")]


# Over a queue -----------------------------------------------------------------------------------


class Epoch(float):
    """As numpy's: a float of another class, which the server may not have."""


class Name(str):
    """A scope of another class, as an enum may be."""

    __slots__ = ()


def taken(mp_queue: Any, count: int) -> list[TimerRequest]:
    return [mp_queue.get(timeout=20) for _ in range(count)]


def test_queue_forked_child_sends_its_own_pid(mp_queue: Any) -> None:
    """A child that enters a block its parent was in before is a worker of its own."""
    client = LocalTimerClient(mp_queue)
    pid = send_before_and_after_fork(client)
    assert taken(mp_queue, 5) == [
        TimerRequest(os.getpid(), "s", 1.5),
        TimerRequest(os.getpid(), "s", -1),
        TimerRequest(pid, "s", 1.5),
        TimerRequest(pid, "s", -1),
        TimerRequest(os.getpid(), "s", -1),
    ]


def test_queue_scopes_and_times(mp_queue: Any) -> None:
    """Whatever they look like, and of whatever class, they arrive as equal plain values."""
    client = LocalTimerClient(mp_queue)
    numbers = struct.pack(">d", -inf) + struct.pack("<i", 2**31 - 1)
    scopes = [Name("s"), "", "\udcff", "x" * 300, numbers.decode("latin-1"), repr(numbers)]
    times = [1795150503.21, Epoch(2.5), 7, -1, 2**53, 1.7e308]
    sent = [(scope, time) for scope in scopes for time in times]
    for scope, time in sent:
        client.acquire(scope, time)
    arrived = taken(mp_queue, len(sent))
    assert arrived == [TimerRequest(os.getpid(), scope, time) for scope, time in sent]
    assert {type(request.expiration_time) for request in arrived} == {float}
    assert {type(request.scope_id) for request in arrived} == {str}
