"""The pipe inside a queue: frames that come in pieces, and a client that can't open it anew."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import struct
import threading
import time
from typing import Any

import pytest

from elastic_timer import LocalTimerClient, MultiprocessingRequestQueue, TimerRequest
from elastic_timer._server.callbacks import flush_log
from elastic_timer._transport import queue_pipe as _queue_pipe
from elastic_timer._transport.pipe import has_room
from tests.instructions import interrupt
from tests.support import FAR, no_more_descriptors


def scopes(requests: list[TimerRequest]) -> list[str]:
    return [request.scope_id for request in requests]


# Reading ----------------------------------------------------------------------------------------


def whole_frame(pickled: bytes) -> bytes:
    return struct.pack("!i", len(pickled)) + pickled


def test_frame_in_pieces(mp_queue: Any) -> None:
    """Wherever a frame was cut, it is a request once all of it is there, and not before."""
    requests = MultiprocessingRequestQueue(mp_queue)
    data = whole_frame(pickle.dumps(TimerRequest(os.getpid(), "in pieces", 1.0)))
    pipe = mp_queue._writer.fileno()
    for cut in range(1, len(data)):
        os.write(pipe, data[:cut])
        assert requests.get(1, 0) == []
        os.write(pipe, data[cut:])
        assert scopes(requests.get(1, 5)) == ["in pieces"]


@pytest.mark.parametrize(
    "rubbish", [struct.pack("!i", -2), struct.pack("!i", 1 << 30), struct.pack("!iQ", -1, 1 << 62)]
)
def test_what_is_no_frame(mp_queue: Any, rubbish: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """A length that nothing has is dropped with all behind it that has arrived; the next counts."""
    requests = MultiprocessingRequestQueue(mp_queue)
    client = LocalTimerClient(mp_queue)
    client.acquire("before", 1.0)
    os.write(mp_queue._writer.fileno(), rubbish + b"lost")
    assert scopes(requests.get(2, 0)) == ["before"]
    assert flush_log(20)
    assert [record.getMessage() for record in caplog.records] == [
        f"Dropped {len(rubbish + b'lost')} bytes from the queue: no request"
    ]
    client.acquire("after", 1.0)
    assert scopes(requests.get(1, 5)) == ["after"]


# Writing where the pipe can't be opened anew ----------------------------------------------------


def fill(client: LocalTimerClient) -> tuple[int, float]:
    """Send until that fails; how many were sent, and how many seconds the failure took."""
    sent = 0
    while True:
        started = time.monotonic()
        try:
            client.acquire("x" * 3000, time.time() + FAR)
        except BrokenPipeError:
            return sent, time.monotonic() - started
        sent += 1


def test_full_pipe_that_could_block_costs_a_second(mp_queue: Any) -> None:
    """Through the descriptor that all share, which blocks, a client is told all the same."""
    with no_more_descriptors():
        sent, waited = fill(LocalTimerClient(mp_queue))
    assert 0.5 < waited < 5
    assert sent > 10
    assert os.get_blocking(mp_queue._writer.fileno())
    for _ in range(sent):
        assert mp_queue.get(timeout=5).scope_id == "x" * 3000
    assert mp_queue.empty()


def test_full_pipe_that_could_block_only_delays(
    mp_queue: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that waits for room there sends its request when the queue is read again."""
    waiting = threading.Event()

    def noted_has_room(fd: int, timeout: float) -> bool:
        if timeout > 0:
            waiting.set()
        return has_room(fd, timeout)

    client = LocalTimerClient(mp_queue)
    with no_more_descriptors():
        sent, _ = fill(client)
        monkeypatch.setattr(_queue_pipe, "has_room", noted_has_room)
        late = threading.Thread(target=client.acquire, args=("late", time.time() + FAR))
        late.start()
        try:
            assert waiting.wait(20)
            received = [mp_queue.get(timeout=5).scope_id for _ in range(sent + 1)]
        finally:
            late.join()
    assert received[-1] == "late"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_c4_interrupted_anywhere_places_are_as_many_as_requests(
    mp_queue: Any, handler: signal.Handlers
) -> None:
    """Whichever instruction an interrupt comes before: a place is taken for what was sent alone."""
    client, requests = LocalTimerClient(mp_queue), MultiprocessingRequestQueue(mp_queue)
    client.release("opens what it writes to")
    assert len(requests.drain()) == 1
    handler_before = signal.signal(signal.SIGPIPE, handler)
    sent: list[int] = []
    try:
        while interrupt(
            functools.partial(client.release, "s"), len(sent) + 1, *("queue_pipe.py", "pipe.py")
        ):
            places = mp_queue.qsize()
            sent.append(len(requests.drain()))
            assert places == sent[-1], len(sent)
    finally:
        signal.signal(signal.SIGPIPE, handler_before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})
    assert set(sent) == {0, 1}


def test_c5_descriptor_of_the_queue_that_is_somebody_elses(mp_queue: Any) -> None:
    """Where the queue's own descriptor has to do, it is an error, and nothing is closed."""
    writer = _queue_pipe.PipeWriter(mp_queue, pickle.dumps)
    with open(os.devnull) as other:
        with pytest.raises(OSError, match="closed the descriptor of the timers' queue"):
            writer._check(other.fileno())
        assert other.read() == ""
