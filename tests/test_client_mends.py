"""A10, A13, A14, C1, C3, C5, C6, S3, S6, S7: clients and `expires` where things go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import functools
import json
import logging
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import FileTimerClient, LocalTimerClient, TimerClient, configure, expires
from elastic_timer._transport import pipe
from tests.support import UNMEASURED, Child, no_more_descriptors


class Recorder(TimerClient):
    """Notes what it was asked; its first releases raise `errors`."""

    def __init__(self, *errors: BaseException) -> None:
        self.calls: list[tuple[str, str]] = []
        self.errors = list(errors)

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        self.calls.append(("acquire", scope_id))

    def release(self, scope_id: str) -> None:
        self.calls.append(("release", scope_id))
        if self.errors:
            raise self.errors.pop(0)

    @property
    def acquired(self) -> list[str]:
        return [scope for kind, scope in self.calls if kind == "acquire"]


@pytest.fixture
def fifo(fifo_path: str) -> Iterator[Callable[[], list[tuple[str, float]]]]:
    """A FIFO with a reader; called, it gives the scopes and times that have come."""
    os.mkfifo(fifo_path, 0o600)
    reader = os.open(fifo_path, os.O_RDWR | os.O_NONBLOCK)

    def read() -> list[tuple[str, float]]:
        with contextlib.suppress(BlockingIOError):
            requests = map(json.loads, os.read(reader, 1 << 16).splitlines())
            return [(request["scope_id"], request["expiration_time"]) for request in requests]
        return []

    yield read
    os.close(reader)


# A10 --------------------------------------------------------------------------------------------


def test_a10_failed_release_is_sent_before_the_next_request(
    fifo: Callable[[], list[tuple[str, float]]],
    fifo_path: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a block that raised could open nothing, its release precedes the next acquire."""
    limits = contextlib.ExitStack()

    def fail() -> None:
        fifo()
        limits.enter_context(no_more_descriptors())
        # Lifted when the failed release is logged.
        monkeypatch.setattr(caplog.handler, "emit", _lift(limits, caplog.handler.emit))
        raise LookupError("the body's own")

    with pytest.raises(LookupError), expires(60, "first", FileTimerClient(fifo_path)):
        fail()
    assert fifo() == []
    with expires(60, "second", FileTimerClient(fifo_path)):
        pass
    assert [(scope, moment < 0) for scope, moment in fifo()] == [
        ("first", True),
        ("second", False),
        ("second", True),
    ]


def _lift(limits: contextlib.ExitStack, emit: Callable[..., None]) -> Callable[..., None]:
    def lifting(record: logging.LogRecord) -> None:
        limits.close()
        emit(record)

    return lifting


def test_a10_release_after_chdir(
    fifo: Callable[[], list[tuple[str, float]]],
    fifo_path: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A relative path leads to where it led when the client was made."""
    monkeypatch.chdir(os.path.dirname(fifo_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with expires(60, "s", FileTimerClient(os.path.basename(fifo_path))):
        os.chdir(elsewhere)
    assert [moment < 0 for _, moment in fifo()] == [False, True]


def test_a10_owed_by_one_client_not_sent_by_another() -> None:
    """What a client owes waits for that client; it is sent on leaving, too, and sent once."""
    failing, other = Recorder(BrokenPipeError()), Recorder()
    with pytest.raises(BrokenPipeError), expires(60, "owed", failing):
        pass
    with expires(60, "s", other):
        pass
    assert other.calls == [("acquire", "s"), ("release", "s")]
    del failing.calls[:]
    for _ in range(2):
        with expires(60, "s", failing):
            pass
    assert failing.calls == [("release", "owed"), *[("acquire", "s"), ("release", "s")] * 2]


def test_a10_release_that_can_never_be_sent_is_forgotten() -> None:
    """What no server could take keeps no later block from its work."""
    client = Recorder(ValueError("1"), ValueError("2"), ValueError("3"))
    with pytest.raises(ValueError, match="1"), expires(60, "bad", client):
        pass
    with expires(60, "s", client):
        pass
    assert client.calls[-3:] == [("release", "bad"), ("acquire", "s"), ("release", "s")]


def test_a1_endless_interrupts_end() -> None:
    """A release that is interrupted whenever it is tried is given up, and owed."""
    client = Recorder(*[KeyboardInterrupt()] * 12)
    with pytest.raises(KeyboardInterrupt), expires(60, "s", client):
        pass
    assert 2 < len(client.calls) < 25
    client.errors.clear()
    del client.calls[:]
    with expires(60, "next", client):
        pass
    assert client.calls[0] == ("release", "s")


def test_a1_explicit_calls() -> None:
    """Entered by a call, a block that is dropped without being left is released."""
    client = Recorder()
    block = expires(60, "s", client)
    assert callable(block.__exit__)  # Looked at, and dropped.
    block.__enter__()
    block.__exit__(None, None, None)
    block.__exit__(None, None, None)
    assert client.calls == [("acquire", "s"), ("release", "s")]
    block.__enter__()
    del block
    assert client.calls[2:] == [("acquire", "s"), ("release", "s")]


def test_a1_exit_stacks() -> None:
    """Exit stacks, which look the methods up on the class, acquire and release."""
    client = Recorder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(expires(60, "a", client))

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(expires(60, "b", client))
        await expires(60, "c", client).__aexit__(None, None, None)

    asyncio.run(main())
    assert client.calls == [
        ("acquire", "a"),
        ("release", "a"),
        ("acquire", "b"),
        ("release", "b"),
    ]


# A13 --------------------------------------------------------------------------------------------


def test_a13_two_on_one_line() -> None:
    """The first of a line has the plain place, the second another scope, the same each time."""
    client = Recorder()
    for _ in range(2):
        with expires(60, client=client), expires(5, client=client):
            pass
    first, second = client.acquired[:2]
    assert client.acquired == [first, second] * 2
    assert first.rpartition("#")[2].isdigit()
    assert second.startswith(f"{first}@")


def test_a13_interleaved_generators() -> None:
    """Two generators within the same block hold a timer each."""
    client = Recorder()

    def generate() -> Iterator[None]:
        with expires(60, client=client):
            yield

    async def generate_async() -> AsyncIterator[None]:
        with expires(60, client=client):
            yield

    generators = [generate(), generate()]
    for generator in generators:
        next(generator)
    assert len(set(client.acquired)) == 2
    for generator in generators:
        assert next(generator, "end") == "end"
    assert sorted(client.acquired) == sorted(s for kind, s in client.calls if kind == "release")

    async def main() -> None:
        both = [generate_async(), generate_async()]
        for each in both:
            await each.__anext__()
        for each in both:
            await each.aclose()  # type: ignore[attr-defined]

    del client.calls[:]
    asyncio.run(main())
    assert len(set(client.acquired)) == 2


def test_a13_function_decorated_twice() -> None:
    """Each of two decorators of one function has a timer of its own."""
    client = Recorder()

    @expires(60, client=client)
    @expires(5, client=client)
    def function() -> None:
        pass

    function()
    assert len(set(client.acquired)) == 2


# A14 --------------------------------------------------------------------------------------------


def test_a14_call_that_returns_a_coroutine() -> None:
    """However a callable comes by its coroutine, the deadline spans the coroutine's run."""
    client = Recorder()

    async def body() -> str:
        assert client.calls[-1][0] == "acquire"
        await asyncio.sleep(0)
        assert client.calls[-1][0] == "acquire"
        return "done"

    class Callee:
        async def __call__(self) -> str:
            return await body()

    partial = functools.partial(body)
    functions: list[Callable[[], Awaitable[str]]] = [Callee(), lambda: body(), partial]
    for function in functions:
        assert asyncio.run(_awaited(expires(60, "s", client)(function))) == "done"
        assert client.calls[-1][0] == "release"


async def _awaited(function: Callable[[], Awaitable[str]]) -> str:
    return await function()


def test_a14_call_that_returns_another_awaitable() -> None:
    """Of what may long be running the deadline can be no more: an error, with what to write."""

    class Future:
        def __await__(self) -> Generator[None, None, None]:
            yield

    with pytest.raises(TypeError, match="async def"):
        expires(60, "s", Recorder())(Future)()


# S6, S3 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [-5, -1e308, 1.7e308, float("nan"), datetime.timedelta(-1)])
def test_s6_a14_no_deadline(after: Any) -> None:
    """A time before the entry, or none at all, is refused by the argument's name."""
    with pytest.raises(ValueError, match="after must"):
        expires(after)


def test_s6_timedelta(fifo: Callable[[], list[tuple[str, float]]], fifo_path: str) -> None:
    """A timedelta is as good as its seconds."""
    with expires(datetime.timedelta(minutes=1), "s", FileTimerClient(fifo_path)):
        pass
    assert abs(fifo()[0][1] - time.time() - 60) < 5


def test_s6_errors_name_the_argument(fifo_path: str) -> None:
    """What is of another type is refused with the argument's name and an example."""
    with pytest.raises(TypeError, match="after must be a number of seconds or a timedelta"):
        expires("soon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scope must"):
        expires(1, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"signal must be .* signal\.SIGTERM"):
        FileTimerClient(fifo_path, "SIGTERM")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"timer_client must be .* FileTimerClient\(path\)"):
        configure(fifo_path)  # type: ignore[arg-type]


def test_s3_unset_client_in_words(caplog: pytest.LogCaptureFixture) -> None:
    """The log says in words that there is no client any more."""
    with caplog.at_level(logging.INFO):
        configure(None)
    assert "NoneType" not in caplog.text
    assert "no timer client" in caplog.text


# C1, C3, C5, C6 ---------------------------------------------------------------------------------


def test_c1_file_in_the_place_of_the_fifo(
    fifo: Callable[[], list[tuple[str, float]]], fifo_path: str
) -> None:
    """A regular file that took the FIFO's place stays as it is."""
    client = FileTimerClient(fifo_path)
    client.release("s")
    os.unlink(fifo_path)
    precious = Path(fifo_path)
    precious.write_text("precious")
    with pytest.raises(BrokenPipeError, match="server"):
        client.release("s")
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("is_linux", [True, False])
def test_c1_check_of_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_linux: bool
) -> None:
    """By its size or by its status: a pipe passes, a file does not."""
    if is_linux and not pipe.CHECK:
        pytest.skip("a pipe's size is Linux's")
    check = pipe.check_pipe if is_linux else pipe.check_status
    ends = os.pipe()
    with open(tmp_path / "file", "w") as file, contextlib.ExitStack() as stack:
        for end in ends:
            stack.callback(os.close, end)
        check(ends[1], pipe.CHECK)
        with pytest.raises(OSError, match=r".*"):
            check(file.fileno(), pipe.CHECK)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_c3_fifo_of_another_user(
    fifo: Callable[[], list[tuple[str, float]]], fifo_path: str
) -> None:
    """Root's worker tells another user's FIFO nothing."""
    os.chown(fifo_path, 65534, 65534)
    with pytest.raises(BrokenPipeError, match="belongs to user 65534"):
        FileTimerClient(fifo_path).release("s")
    assert fifo() == []


def test_c5_queue_whose_descriptors_were_closed(tmp_path: Path) -> None:
    """Whatever file got the number of the client's descriptor, no request is written into it."""
    queue: Any = multiprocessing.get_context("spawn").Queue()
    client = LocalTimerClient(queue)
    client.release("s")
    writer = client._send.__self__  # type: ignore[union-attr]
    precious = tmp_path / "precious"
    with open(precious, "wb") as file:
        os.dup2(file.fileno(), writer._fd)
        number = writer._fd
        with pytest.raises(OSError, match="closed the descriptor") as caught:
            client.release("s")
        assert caught.value.errno == errno.EBADF
        client.release("s")  # By a new one.
        os.close(number)
        assert os.fstat(file.fileno()).st_size == 0
    os.close(writer._fd)
    with pytest.raises(OSError, match="closed the descriptor"):
        client.release("s")
    for _ in range(2):
        assert queue.get(timeout=20).scope_id == "s"
    queue.close()


SIGPIPE_WORKER = """
import os, signal, sys
from elastic_timer import FileTimerClient
from elastic_timer._transport.pipe import write
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
if sys.argv[1] == "blocked":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
reader, writer = os.pipe()
write(writer, b"read")
assert os.read(reader, 4) == b"read"
os.close(reader)
try:
    write(writer, b"not read")
except BrokenPipeError:
    print("alive", signal.SIGPIPE in signal.sigpending(), flush=True)
"""


@pytest.mark.parametrize("mask", ["open", "blocked"])
def test_c6_sigpipe_at_its_default(spawn: Callable[..., Child], mask: str) -> None:
    """A worker that lets SIGPIPE end it gets the error; its mask and what is pending stay."""
    child = spawn(SIGPIPE_WORKER, mask)
    assert child.readline() == f"alive {mask == 'blocked'}"
    assert child.wait() == 0


INTERRUPTED_WORKER = """
import os, random, signal
from elastic_timer._transport.pipe import write
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
reader, writer = os.pipe()
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
left_blocked = 0
for _ in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00001, 0.0001))
        while True:
            write(writer, b"s")
            os.read(reader, 1)
    except KeyboardInterrupt:
        pass
    left_blocked += signal.SIGPIPE in signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})
print("left blocked:", left_blocked, flush=True)
"""


def test_c6_interrupts_leave_sigpipe_as_it_was(spawn: Callable[..., Child]) -> None:
    """Else what the worker starts later inherits that it is blocked, and does not end by it."""
    child = spawn(INTERRUPTED_WORKER, env=UNMEASURED)
    assert child.readline() == "left blocked: 0"
    assert child.wait() == 0, child.stderr_text()


QUEUE_WORKER = """
import multiprocessing, signal
from elastic_timer import LocalTimerClient
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
queue = multiprocessing.get_context("fork").Queue()
client = LocalTimerClient(queue)
queue._reader.close()
try:
    client.release("s")
except BrokenPipeError:
    print("alive", queue.qsize(), flush=True)
"""


def test_c6_c4_queue_without_a_reader(spawn: Callable[..., Child]) -> None:
    """The same over a queue; the place that the request had taken is free again."""
    child = spawn(QUEUE_WORKER)
    assert child.readline() == "alive 0"


# S7 ---------------------------------------------------------------------------------------------


def test_s7_async_with_waits_for_the_server(fifo_path: str) -> None:
    """While a block waits for its server, other tasks run; the server may come meanwhile."""
    client = FileTimerClient(fifo_path)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    async def main() -> None:
        ticker = asyncio.ensure_future(tick())
        with pytest.raises(BrokenPipeError):
            async with expires(60, "s", client):
                pytest.fail("entered")
        assert ticks > 20
        os.mkfifo(fifo_path, 0o600)
        entering = asyncio.ensure_future(_enter_and_leave(client))
        await asyncio.sleep(0)
        reader = os.open(fifo_path, os.O_RDWR | os.O_NONBLOCK)
        await entering
        assert len(os.read(reader, 1 << 16).splitlines()) == 2
        os.close(reader)
        ticker.cancel()

    asyncio.run(main())


async def _enter_and_leave(client: TimerClient) -> None:
    async with expires(60, "s", client):
        pass


def test_s7_release_is_cancelled(fifo_path: str) -> None:
    """A task cancelled while its release waits ends at once, and owes it."""
    waiting = False

    class Away(Recorder):
        def release(self, scope_id: str) -> None:
            nonlocal waiting
            waiting = True
            super().release(scope_id)

        def _at_once(self, method: Callable[..., object], *args: object) -> None:
            method(*args)

    client = Away(*[BrokenPipeError()] * 3)

    async def main() -> None:
        task = asyncio.ensure_future(_enter_and_leave(client))
        while not waiting:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert client.calls == [("acquire", "s"), ("release", "s"), ("release", "s")]
    client.errors.clear()
    with expires(60, "next", client):
        pass
    assert client.calls[3] == ("release", "s")


def test_s7_async_with_without_a_loop_of_asyncio() -> None:
    """Under another framework, and for a client of another kind, the request is sent as it is."""
    client = Recorder(BrokenPipeError())
    with pytest.raises(BrokenPipeError):
        asyncio.run(_enter_and_leave(client))
    with pytest.raises(StopIteration):
        _enter_and_leave(client).send(None)
    assert client.calls[2:] == [("release", "s"), ("acquire", "s"), ("release", "s")]
