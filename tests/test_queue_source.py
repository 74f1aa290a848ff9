"""What a request queue hands to its server: plain requests, whatever was put into it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import (
    LocalTimerClient,
    LocalTimerServer,
    MultiprocessingRequestQueue,
    TimerRequest,
)
from elastic_timer._server.callbacks import flush_log
from tests.instructions import interrupt
from tests.support import FAR, eventually, no_more_descriptors, open_descriptors, running


@pytest.fixture
def mp_queue() -> Iterator[Any]:
    """A queue whose pipe is closed with it."""
    made: Any = multiprocessing.get_context("fork").Queue()
    yield made
    made.close()
    made._writer.close()


def frame(item: object) -> bytes:
    pickled = pickle.dumps(item)
    return struct.pack("!i", len(pickled)) + pickled


# The three verbs --------------------------------------------------------------------------------


def test_open_drain_and_close(mp_queue: Any) -> None:
    """The descriptor is readable once a request is there, and the queue outlives it."""
    requests = MultiprocessingRequestQueue(mp_queue)
    before = set(open_descriptors())
    descriptor = requests.open()
    assert descriptor is not None
    assert requests.open() == descriptor
    assert requests.drain() == []
    LocalTimerClient(mp_queue).acquire("a", 1.0)
    LocalTimerClient(mp_queue).acquire("b", 1.0)
    assert [request.scope_id for request in requests.drain()] == ["a", "b"]
    assert mp_queue.qsize() == 0
    requests.close()
    requests.close()
    assert descriptor not in open_descriptors()
    LocalTimerClient(mp_queue).acquire("c", 1.0)
    assert mp_queue.get(timeout=5).scope_id == "c"
    assert len(set(open_descriptors()) - before) <= 2  # The clients'.


def test_drain_takes_what_get_has_left(mp_queue: Any) -> None:
    """`get` may have read ahead: what it did not hand out comes first."""
    requests = MultiprocessingRequestQueue(mp_queue)
    client = LocalTimerClient(mp_queue)
    for scope in "abc":
        client.acquire(scope, 1.0)
    assert [request.scope_id for request in requests.get(1, 5)] == ["a"]
    client.acquire("d", 1.0)
    assert [request.scope_id for request in requests.drain()] == ["b", "c", "d"]


def test_queue_without_a_pipe() -> None:
    """It has no descriptor to wait on, and is drained all the same, so many at a time."""
    plain: Any = queue.Queue()
    requests = MultiprocessingRequestQueue(plain)
    assert requests.open() is None
    for number in range(10_001):
        plain.put(TimerRequest(number, "s", 1.0))
    assert len(requests.drain()) == 10_000
    assert len(requests.drain()) == 1
    assert requests.drain() == []
    requests.close()


def test_c4_open_that_fails_leaves_no_descriptor(mp_queue: Any) -> None:
    """Nor does one of a server whose start fails."""
    requests = MultiprocessingRequestQueue(mp_queue)
    server = LocalTimerServer(mp_queue, 60)
    before = set(open_descriptors())
    with no_more_descriptors(), pytest.raises(OSError, match="Too many open files"):
        requests.open()
    assert set(open_descriptors()) == before
    mp_queue._reader.close()
    with pytest.raises(OSError, match="closed"):
        requests.open()
    assert set(open_descriptors()) < before
    server.stop()


@pytest.mark.parametrize("what", ["open", "close"])
def test_c4_interrupted_anywhere_no_descriptor_is_left(mp_queue: Any, what: str) -> None:
    """Whichever instruction an interrupt comes before, `close` leaves no descriptor."""
    before = set(open_descriptors())
    at = 1
    was_interrupted = True
    while was_interrupted:
        requests = MultiprocessingRequestQueue(mp_queue)
        if what == "close":
            requests.open()
        files = ("local_timer.py", "queue_pipe.py", "pipe.py")
        was_interrupted = interrupt(getattr(requests, what), at, *files)
        requests.close()
        assert set(open_descriptors()) == before, at
        at += 1
    assert at > 10


# Objects of somebody's --------------------------------------------------------------------------


def explode(*_: object) -> Any:
    sys.exit("not for you")


class HostileInt(int):
    """A number that raises in whatever it is asked."""

    __hash__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __abs__ = __int__ = __index__ = explode
    __repr__ = __str__ = __format__ = explode

    def __reduce__(self) -> Any:
        return HostileInt, (int.__add__(self, 0),)


class HostileStr(str):
    """A string that raises in whatever it is asked."""

    __hash__ = __eq__ = __lt__ = __len__ = __repr__ = __str__ = __iter__ = explode
    __slots__ = ()

    def __reduce__(self) -> Any:
        return HostileStr, (str.__add__("", self),)


class HostileFloat(float):
    """A number that raises in whatever it is asked."""

    __hash__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __float__ = __neg__ = explode
    __repr__ = __str__ = __format__ = explode

    def __reduce__(self) -> Any:
        return HostileFloat, (float.__add__(self, 0.0),)


class HostileRequest(TimerRequest):
    """A request that can't be compared, shown or hashed."""

    __eq__ = __repr__ = __hash__ = __lt__ = explode


HOSTILE: list[Callable[[], object]] = [
    lambda: TimerRequest(HostileInt(os.getpid()), "hostile", 1e300),
    lambda: TimerRequest(os.getpid(), HostileStr("hostile"), 1e300),
    lambda: TimerRequest(os.getpid(), "hostile", HostileFloat(1e300)),
    lambda: TimerRequest(os.getpid(), "hostile", HostileInt(10**300)),
    lambda: HostileRequest(os.getpid(), "hostile", 1e300),
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=["int", "str", "float", "int-time", "request"])
def test_b2_requests_are_rebuilt_from_plain_values(
    mp_queue: Any, hostile: Callable[[], object]
) -> None:
    """What raises in its own methods is a request like others, of plain values, once it is here."""
    os.write(mp_queue._writer.fileno(), frame(hostile()))
    (request,) = MultiprocessingRequestQueue(mp_queue).drain()
    assert type(request) is TimerRequest
    assert type(request.worker_id) is int
    assert type(request.scope_id) is str
    assert type(request.expiration_time) in (int, float)
    assert request == TimerRequest(os.getpid(), "hostile", request.expiration_time)
    assert request.expiration_time in (1e300, 10**300)


def test_b2_hostile_requests_take_no_others_along(mp_queue: Any) -> None:
    """A server that reads them together with others keeps all of them, and reaps nobody."""
    with running(LocalTimerServer(mp_queue, 60)) as server:
        data = b"".join(frame(make()) for make in HOSTILE)
        ours = frame(TimerRequest(os.getpid(), "ours", time.time() + FAR))
        os.write(mp_queue._writer.fileno(), data + ours)
        eventually(lambda: len(server._timers) == 2)
        assert {scope for _, scope in server._timers} == {"hostile", "ours"}


def test_b2_lies_are_refused(mp_queue: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What only claims to be a number is none; ten such are named, the others counted."""
    requests = MultiprocessingRequestQueue(mp_queue)
    for _ in range(12):
        os.write(mp_queue._writer.fileno(), frame(TimerRequest(Liar(), "s", 1.0)))
    assert requests.drain() == []
    requests._rubbish._again_at = 0.0
    os.write(mp_queue._writer.fileno(), frame(TimerRequest(True, "s", 1.0)))
    assert requests.drain() == []
    assert flush_log(20)
    messages = [record.getMessage() for record in caplog.records]
    assert [message[:26] for message in messages[:10]] == ["Dropped what is no request"] * 10
    assert messages[10] == "Dropped 2 more that were no requests"
    assert "True is no process id" in messages[11]


class Liar:
    """Claims to be of another class."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int

    def __reduce_ex__(self, protocol: object) -> Any:
        return Liar, ()


class FailsAfter:
    """A queue whose owner dies after so many requests."""

    def __init__(self, count: int) -> None:
        self.left = count

    def get(self, block: bool, timeout: float) -> TimerRequest:
        if not self.left:
            raise EOFError("its owner is gone")
        self.left -= 1
        return TimerRequest(os.getpid(), str(self.left), 1.0)


def test_b2_what_was_taken_from_a_queue_that_fails_counts() -> None:
    """The requests read before the failure are handed out; then the failure is the caller's."""
    failing: Any = FailsAfter(3)
    requests = MultiprocessingRequestQueue(failing)
    assert [request.scope_id for request in requests.drain()] == ["2", "1", "0"]
    with pytest.raises(EOFError, match="its owner is gone"):
        requests.drain()


def test_b2_managers_queue_whose_manager_died(
    monkeypatch: pytest.MonkeyPatch, short_folder: Path
) -> None:
    """The same with a real one."""
    # Killed, it leaves its folder behind.
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    with multiprocessing.get_context("fork").Manager() as manager:
        requests = MultiprocessingRequestQueue(manager.Queue())  # type: ignore[arg-type]
        assert requests.drain() == []
        process = manager._process  # type: ignore[attr-defined]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with pytest.raises((EOFError, OSError)):
            requests.drain()


# `get`, whose workers may be anything -----------------------------------------------------------


def test_get_from_a_queue_without_a_pipe() -> None:
    """It takes what is there, and waits for no more than the timeout."""
    plain: Any = queue.Queue()
    requests = MultiprocessingRequestQueue(plain)
    plain.put(TimerRequest("anything", "s", 1.0))
    assert requests.get(2, 0.05) == [TimerRequest("anything", "s", 1.0)]


def test_get_drops_what_can_not_be_unpickled(
    mp_queue: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning; a worker that is no pid is not its business."""
    os.write(mp_queue._writer.fileno(), struct.pack("!i", 3) + b"\xffno")
    os.write(mp_queue._writer.fileno(), frame(TimerRequest("anything", "s", 1.0)))
    requests = MultiprocessingRequestQueue(mp_queue).get(1, 5)
    assert requests == [TimerRequest("anything", "s", 1.0)]
    assert flush_log(20)
    assert "Dropped what is no request: " in caplog.text
