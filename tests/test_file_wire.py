"""What the file client puts on the wire, and its requests."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest

from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
)
from tests.support import (
    FAR,
    Fork,
    eventually,
)


def test_acquire_on_the_wire(reader: int, client: FileTimerClient) -> None:
    """An acquire is this one line of JSON, byte by byte as `json.dumps` writes it."""
    client.acquire("train.py#42", 1795150503.21)
    expected = (
        f'{{"version": 1, "pid": {os.getpid()}, "scope_id": "train.py#42", '
        '"expiration_time": 1795150503.21, "signal": 9}\n'
    )
    assert os.read(reader, 65536) == expected.encode()


def test_release_on_the_wire(reader: int, client: FileTimerClient) -> None:
    """A release carries the expiration time -1 and the signal 0."""
    client.release("train.py#42")
    assert json.loads(os.read(reader, 65536)) == {
        "version": 1,
        "pid": os.getpid(),
        "scope_id": "train.py#42",
        "expiration_time": -1,
        "signal": 0,
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, 0, -1, 15])
def test_signal_on_the_wire(reader: int, fifo_path: str, number: int) -> None:
    """The client's signal travels as a plain number, whatever it is."""
    FileTimerClient(fifo_path, number).acquire("s", 1.0)
    line = os.read(reader, 65536)
    assert f'"signal": {int(number)}}}\n'.encode() in line


@pytest.mark.parametrize("scope", ['quo"te\\', "line\nbreak", "\u00e9\U0001f9e8\ud800", ""])
def test_any_scope_is_one_line(reader: int, client: FileTimerClient, scope: str) -> None:
    """Whatever the scope holds, the request is one line, and reading it gives the scope back."""
    client.acquire(scope, 1.0)
    data = os.read(reader, 65536)
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert json.loads(data)["scope_id"] == scope


def test_client_keeps_nothing_open(reader: int, client: FileTimerClient) -> None:
    """Between requests nobody has the FIFO open for writing: it reads as ended."""
    client.acquire("s", 1.0)
    assert os.read(reader, 65536)
    assert os.read(reader, 65536) == b""


def test_to_json_is_what_json_dumps_makes() -> None:
    """The JSON of a request is upstream's, for whole and broken times and any scope."""
    for scope in ("s", 'q"\u00e9\n'):
        for expiration in (-1, 0, 3, 1795150503.21, 1e300, 0.1):
            request = FileTimerRequest(12, scope, expiration, signal.SIGTERM)
            expected = {
                "version": 1,
                "pid": 12,
                "scope_id": scope,
                "expiration_time": expiration,
                "signal": 15,
            }
            assert request.to_json() == json.dumps(expected)


def test_file_request_fields() -> None:
    """A file request has its version, its pid under both names, and no signal by default."""
    request = FileTimerRequest(12, "s", 1.5)
    assert (request.version, request.worker_pid, request.worker_id) == (1, 12, 12)
    assert (request.scope_id, request.expiration_time, request.signal) == ("s", 1.5, 0)
    assert FileTimerRequest(
        worker_pid=12, scope_id="s", expiration_time=1.5, signal=9
    ) != FileTimerRequest(12, "s", 1.5, 15)
    assert repr(FileTimerRequest(12, "s", 1.5, 9)) == (
        "FileTimerRequest(worker_id=12, scope_id='s', expiration_time=1.5, signal=9)"
    )


def send_long_requests(channel: Any, client: FileTimerClient, number: int, count: int) -> None:
    for index in range(count):
        client.acquire(f"{number}-{index}-" + str(number) * (3000 + index), time.time() + FAR)
    channel.send("done")
    # Its timers would go with it.
    channel.recv()


def test_lines_of_concurrent_clients_are_never_mixed(
    server: FileTimerServer, client: FileTimerClient, fork_worker: Fork
) -> None:
    """Each request is one atomic write: of four clients' long lines none is torn."""
    clients = [fork_worker(send_long_requests, client, number, 60) for number in range(4)]
    assert [worker.receive() for worker in clients] == ["done"] * 4
    eventually(lambda: server._request_count == len(server._timers) == 240)
    for (pid, scope), request in list(server._timers.items()):
        number, index, tail = scope.split("-")
        assert tail == number * (3000 + int(index))
        assert request.worker_pid == pid == clients[int(number)].pid
