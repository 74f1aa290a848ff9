"""Whole servers to which anybody sends anything: nothing valid is lost, and nobody else is hit."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from elastic_timer import (
    FileTimerServer,
    LocalTimerServer,
    TimerRequest,
    file_based_local_timer,
    local_timer,
)
from elastic_timer.debug_info_logging import set_stacks_timeout
from tests.support import FAR, eventually, running, write_raw

# Stand for the pids of processes that are started later. Nothing runs under such a number.
PATIENT, WILD, STUCK, LAST, BYSTANDER, REFUSED = range(900_000_001, 900_000_007)
NOBODY = 2**31 - 1
NEVER_SIGNALLED = [0, 1, -1, os.getpid(), -os.getpgrp(), NOBODY]

SCOPES = st.sampled_from(["a", "b", '{"version"', "\n\u2028\U0001f9e8"])
PAST = st.integers(0, 10**9) | st.floats(0, 1e9)
FUTURE = st.integers(10**11, 10**300) | st.floats(1e11, sys.float_info.max)
RELEASE = st.integers(-9, -1) | st.floats(-1e300, -1e-300)
ANY_TIME = PAST | FUTURE | RELEASE
DEADLY = [int(signal.SIGKILL), int(signal.SIGTERM), int(signal.NSIG) - 1]
HARMLESS = [0, -1]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SCOPES, inner, max_size=4),
    max_leaves=6,
)
FRACTIONS = st.floats(0, 1, exclude_max=True)

_T = TypeVar("_T")

KEYS = ("pid", "scope_id", "expiration_time", "signal")


class Request(NamedTuple):
    """What a server is asked for, under the names that it has on the wire."""

    pid: Any
    scope_id: Any
    expiration_time: Any
    signal: Any

    def is_sound(self) -> bool:
        return (
            type(self.pid) is int
            and abs(self.pid) < 2**31
            and type(self.scope_id) is str
            and type(self.expiration_time) in (int, float)
            and abs(self.expiration_time) <= sys.float_info.max
            and type(self.signal) is int
            and self.signal < signal.NSIG
        )

    def has_expired(self) -> bool:
        return bool(0 <= self.expiration_time <= time.time())

    def is_deadly(self) -> bool:
        return self.has_expired() and self.signal > 0 and self.pid not in NEVER_SIGNALLED


def requests_in(stream: bytes) -> list[Request]:
    """The valid requests among the lines of a stream, by the rules of the wire alone."""
    found = []
    for line in stream.split(b"\n")[:-1]:
        # What was left in the pipe before it, without a newline, takes no request along.
        _, start, rest = line.rpartition(b'{"version"')
        found.append(_request(line) or _request(start + rest))
    return [request for request in found if request is not None]


def _request(text: bytes) -> Request | None:
    try:
        value = json.loads(text.decode().strip())
        request = Request(*(value[key] for key in KEYS))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return request if request.is_sound() else None


def to_line(value: object, is_ascii: bool = True) -> bytes:
    return json.dumps(value, ensure_ascii=is_ascii).encode() + b"\n"


def lines(
    pids: Sequence[int], times: st.SearchStrategy[float], signals: Sequence[int] = DEADLY
) -> st.SearchStrategy[bytes]:
    values = {
        "version": st.just(1),
        "pid": st.sampled_from(pids),
        "scope_id": SCOPES,
        "expiration_time": times,
        "signal": st.sampled_from(signals),
    }
    more = {"more": st.sampled_from([None, [{"version": 1}], "\u20ac", 9**99])}
    return st.builds(to_line, st.fixed_dictionaries(values, optional=more), st.booleans())


def some_of(*kinds: st.SearchStrategy[_T]) -> st.SearchStrategy[list[_T]]:
    # one_of() would make them the rarer the fewer variants they have.
    return st.lists(st.sampled_from(kinds).flatmap(lambda kind: kind), min_size=4, max_size=16)


def part(whole: bytes, cut: float, is_head: bool) -> bytes:
    at = int(cut * len(whole))
    return whole[:at] if is_head else whole[at:]


VALID = (
    lines([PATIENT], FUTURE | RELEASE)
    | lines([STUCK], PAST)
    | lines([WILD, REFUSED, NOBODY], ANY_TIME, DEADLY + HARMLESS)
    | lines([PATIENT], FUTURE).map(lambda whole: whole.replace(b'"version": 1, ', b""))
)
# As good as valid: what each of these makes of a line is no request.
SPOILERS = [
    (f'"{key}": '.encode(), f'"{key}": {bad}, "was": '.encode())
    for key, bads in {
        "pid": ["true", "1.0", str(2**31), str(-(2**31)), "null", "[]"],
        "scope_id": ["7", "null", "[]", "{}"],
        "expiration_time": ["1e999", "NaN", "-Infinity", "1" + 309 * "0", "false", '"1"'],
        "signal": ["9.0", str(int(signal.NSIG)), "null", "true"],
    }.items()
    for bad in bads
]
SPOILERS += [(b'"pid"', b'"pit"'), (b'"scope_id": "', b'"scope_id": "\xff'), (b"}", b"}}")]
SPOILT = st.builds(lambda whole, how: whole.replace(*how), VALID, st.sampled_from(SPOILERS))
BROKEN = st.builds(part, VALID, FRACTIONS, st.booleans())
JOINED = VALID.map(lambda whole: whole[:-1])
ANY_BYTES = st.binary(max_size=60)
ANY_JSON = JSON.map(to_line) | st.fixed_dictionaries(dict.fromkeys(KEYS, JSON)).map(to_line)
# Up to what no reader could keep or nest, and with no end.
TRAPS = st.sampled_from([b"\n", b'{"version"', b"x" * 10_000, b"[" * 5_000, b"[" * 5_000 + b"\n"])
RUBBISH = [SPOILT, BROKEN, JOINED, ANY_BYTES, ANY_JSON, TRAPS]
STREAMS = some_of(*[VALID] * len(RUBBISH), *RUBBISH).map(b"".join)

# Where a stream is cut into writes, each of which is read before the next one is made: in which of
# its lines or frames, and how far before its end.
CUTS = st.lists(st.tuples(FRACTIONS, st.integers(0, 150)), max_size=4)


class _Observed:
    """Notes whom a server would signal with what, and signals nobody but its own workers."""

    def observe(self, last: int, own: Collection[int] = ()) -> None:
        self.asked: list[tuple[int, int]] = []
        self.last = last
        self.own = own
        self.has_served_last = threading.Event()

    def note(self, pid: int, number: int) -> bool:
        self.asked.append((pid, number))
        if pid == self.last:
            self.has_served_last.set()
        return pid not in self.own


class FileServer(_Observed, FileTimerServer):
    def _reap_worker(self, worker_pid: int, signal: int) -> bool:
        return self.note(worker_pid, signal) or super()._reap_worker(worker_pid, signal)


class QueueServer(_Observed, LocalTimerServer):
    def _reap_worker(self, worker_id: int) -> bool:
        return self.note(worker_id, signal.SIGKILL) or super()._reap_worker(worker_id)


@contextlib.contextmanager
def sleepers() -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Processes that do nothing, by what stands for them; at the end they are killed."""
    with contextlib.ExitStack() as stack:
        started = {}
        for stand_in in (PATIENT, WILD, STUCK, LAST, BYSTANDER):
            started[stand_in] = process = subprocess.Popen(["sleep", str(FAR)])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield started


def pids_of(processes: Mapping[int, subprocess.Popen[bytes]]) -> dict[int, int]:
    return {stand_in: process.pid for stand_in, process in processes.items()}


@pytest.fixture
def pids() -> Iterator[dict[int, int]]:
    """The pids of processes that live on, whatever the server is asked for."""
    with sleepers() as processes:
        yield pids_of(processes)
        assert all(process.poll() is None for process in processes.values())


@pytest.fixture(autouse=True)
def no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's stacks are taken: that takes a moment, and the pids may be anybody's."""
    for module in (file_based_local_timer, local_timer):
        monkeypatch.setattr(module, "log_debug_info_for_expired_timers", lambda *_: None)
    set_stacks_timeout(0)


def with_pids(stream: bytes, pids: Mapping[int, int]) -> bytes:
    for stand_in, pid in pids.items():
        stream = stream.replace(str(stand_in).encode(), str(pid).encode())
    return stream


def pieces(units: Sequence[bytes], cuts: Sequence[tuple[float, int]]) -> Iterator[bytes]:
    stream = b"".join(units)
    ends = list(accumulate(map(len, units)))
    places = {max(0, ends[int(which * len(ends))] - back) for which, back in cuts}
    for start, end in pairwise(sorted({0, *places, len(stream)})):
        yield stream[start:end]


def wait_until_read(reader: int) -> None:
    eventually(lambda: not select.select([reader], [], [], 0)[0])


def assert_as_expected(
    server: Any, requests: Sequence[Request], alive: Collection[int], log: pytest.LogCaptureFixture
) -> None:
    """The timers and the signals are those that the valid requests ask for, and no round failed."""
    deadly = {(request.pid, request.signal) for request in requests if request.is_deadly()}
    assert set(server.asked) <= deadly
    timers: dict[tuple[int, str], float] = {}
    overrunning = {request.pid for request in requests if request.has_expired()}
    for request in requests:
        timers.pop((request.pid, request.scope_id), None)
        if request.expiration_time >= 0:
            timers[request.pid, request.scope_id] = request.expiration_time
    # What is left to those who overran depends on when the server looked.
    peaceful = set(alive) - overrunning
    held = {key: timer.expiration_time for key, timer in server._timers.items()}
    assert {key: held[key] for key in held if key[0] in peaceful} == {
        key: timers[key] for key in timers if key[0] in peaceful
    }
    assert NOBODY not in server._timers.workers()
    assert server.get_expired_timers(time.time()) == {}
    assert [record.getMessage() for record in log.records if record.exc_info] == []


def doomed(requests: Sequence[Request], alive: Collection[int]) -> set[int]:
    """Those that have to be signalled: they overran, and whatever else they sent is no excuse."""
    excused = {request.pid for request in requests if not request.is_deadly()}
    return {request.pid for request in requests} & set(alive) - excused


def examples(number: int) -> settings:
    # The fixtures may be shared: each example has a server of its own.
    return settings(
        max_examples=number,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# The FIFO ---------------------------------------------------------------------------------------

LAST_LINE = to_line(
    {"version": 1, "pid": LAST, "scope_id": "", "expiration_time": 1, "signal": signal.SIGKILL}
)


@pytest.mark.long
@examples(100)
@given(stream=STREAMS, cuts=CUTS, refused=st.sampled_from(NEVER_SIGNALLED))
@example(stream=b"x" * 10_000, cuts=[(0, 50)], refused=0)
@example(stream=b"[" * 5_000, cuts=[], refused=0)
def test_anything_written_to_the_fifo(
    stream: bytes,
    cuts: list[tuple[float, int]],
    refused: int,
    fifo_path: str,
    pids: dict[int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every valid line counts, wherever the writes end, and nobody is signalled for the rest."""
    caplog.clear()
    stream = with_pids(stream + LAST_LINE, {**pids, REFUSED: refused})
    requests = requests_in(stream)
    with running(FileServer(fifo_path, "run", max_interval=0.001)) as server:
        server.observe(last=pids[LAST])
        for piece in pieces(stream.splitlines(keepends=True), cuts):
            write_raw(fifo_path, piece)
            wait_until_read(server._source.fileno())
        server.run_once()
    assert server._request_count == len(requests)
    assert doomed(requests, pids.values()) <= {pid for pid, _ in server.asked}
    assert_as_expected(server, requests, pids.values(), caplog)


@examples(10)
@given(streams=st.tuples(STREAMS, STREAMS), cuts=CUTS)
def test_only_overrunners_die_amid_rubbish(
    streams: tuple[bytes, bytes],
    cuts: list[tuple[float, int]],
    fifo_path: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By their exit codes: who overran got a signal that a valid line named, and nobody else."""
    caplog.clear()
    stuck_line = LAST_LINE.replace(str(LAST).encode(), str(STUCK).encode())
    with sleepers() as processes:
        pids = pids_of(processes)
        stream = with_pids(stuck_line.join(streams) + LAST_LINE, {**pids, REFUSED: NOBODY})
        requests = requests_in(stream)
        # Halves of two lines may well be one that names somebody else, or a signal to stop at.
        assume({request.pid for request in requests} <= {*pids.values(), *NEVER_SIGNALLED})
        assume({request.signal for request in requests} <= {*DEADLY, *HARMLESS})
        # Whoever were overlooked in a round would die too late for this test.
        with running(FileServer(fifo_path, "run", max_interval=60)) as server:
            server.observe(last=pids[LAST], own=pids.values())
            for piece in pieces(stream.splitlines(keepends=True), cuts):
                write_raw(fifo_path, piece)
                wait_until_read(server._source.fileno())
            assert processes[LAST].wait(20) == -signal.SIGKILL
        assert server._request_count == len(requests)
        assert_as_expected(server, requests, pids.values(), caplog)
        for process in processes.values():
            process.send_signal(signal.SIGALRM)
            named = {r.signal for r in requests if r.pid == process.pid and r.is_deadly()}
            if process.pid not in doomed(requests, pids.values()):
                named.add(signal.SIGALRM)
            assert -process.wait(20) in named


# The queue --------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """A pickle in the pipe of a queue, and what it asks for, if it is a request."""

    pickled: bytes
    request: Request | None = None


class Exits:
    """Ends whatever unpickles it, if it can."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[()]]:
        return sys.exit, ()


class Touchy:
    """Ends whatever looks at it, if it can."""

    @property
    def worker_id(self) -> int:
        sys.exit()


def foreign_request(*values: Any) -> object:
    names = ("worker_id", "scope_id", "expiration_time")
    return SimpleNamespace(**dict(zip(names, values, strict=True)))


def frame(kind: Callable[..., object], request: Request) -> Frame:
    return Frame(pickle.dumps(kind(*request[:3])), request if request.is_sound() else None)


def frames(pid: Any, scope: Any, expiration_time: Any) -> st.SearchStrategy[Frame]:
    values = st.builds(Request, pid, scope, expiration_time, st.just(int(signal.SIGKILL)))
    return st.builds(frame, st.sampled_from([TimerRequest, foreign_request]), values)


VALID_FRAMES = (
    frames(st.just(PATIENT), SCOPES, FUTURE | RELEASE)
    | frames(st.just(STUCK), SCOPES, PAST)
    | frames(st.sampled_from([WILD, REFUSED, NOBODY]), SCOPES, ANY_TIME)
)
# Not just any bytes: a pickle is a program, and a random one may well ask for all memory.
RUBBISH_FRAMES = [
    frames(JSON | st.just(WILD), JSON | SCOPES, JSON | PAST),
    JSON.map(lambda value: Frame(pickle.dumps(value))),
    st.builds(lambda whole, cut: Frame(part(whole.pickled, cut, True)), VALID_FRAMES, FRACTIONS),
    st.binary(max_size=60).map(lambda data: Frame(b"\xff" + data)),
    st.sampled_from([Frame(b""), Frame(pickle.dumps(Exits())), Frame(pickle.dumps(Touchy()))]),
]
LAST_FRAME = frame(TimerRequest, Request(LAST, "", 1, int(signal.SIGKILL)))


def with_pid(sent: Frame, pids: Mapping[int, int]) -> Frame:
    if sent.request is None or sent.request.pid not in pids:
        return sent
    stand_in, pid = (
        b"J" + struct.pack("<i", number) for number in (sent.request.pid, pids[sent.request.pid])
    )
    request = sent.request._replace(pid=pids[sent.request.pid])
    return Frame(sent.pickled.replace(stand_in, pid), request)


@pytest.mark.long
@examples(60)
@given(
    sent=some_of(*[VALID_FRAMES] * len(RUBBISH_FRAMES), *RUBBISH_FRAMES),
    cuts=CUTS,
    refused=st.sampled_from(NEVER_SIGNALLED),
)
def test_anything_put_into_the_queue(
    sent: list[Frame],
    cuts: list[tuple[float, int]],
    refused: int,
    mp_queue: Any,
    pids: dict[int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every valid request counts, whatever lies around it, and nobody is signalled for the rest."""
    caplog.clear()
    sent = [with_pid(one, {**pids, REFUSED: refused}) for one in [*sent, LAST_FRAME]]
    requests = [one.request for one in sent if one.request is not None]
    units = [struct.pack("!i", len(pickled)) + pickled for pickled, _ in sent]
    with running(QueueServer(mp_queue, max_interval=0.001)) as server:
        server.observe(last=pids[LAST])
        for piece in pieces(units, cuts):
            assert os.write(mp_queue._writer.fileno(), piece) == len(piece)
            wait_until_read(mp_queue._reader.fileno())
        assert server.has_served_last.wait(20)
    assert doomed(requests, pids.values()) <= {pid for pid, _ in server.asked}
    assert_as_expected(server, requests, pids.values(), caplog)
