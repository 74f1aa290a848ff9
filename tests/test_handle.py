"""The handle of a block: what it asks for, when, and where it must not be used."""

from __future__ import annotations

import asyncio
import datetime
import functools
import gc
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from elastic_timer import TimerClient, configure, current, expires
from elastic_timer._worker import handles, holds
from elastic_timer._worker.handles import NEVER, Pause
from tests.instructions import interrupt
from tests.servers import Link
from tests.support import FAR, Fork, eventually, running

AFTER = 60.0


class Table(TimerClient):
    """Keeps the deadline of each scope, as a server does; raises what it is told to."""

    def __init__(self) -> None:
        self.deadlines: dict[str, float] = {}
        self.acquired = 0
        self.errors: list[BaseException] = []
        self.released = 0
        self.before_acquire: Callable[[], object] = lambda: None

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        self.before_acquire()
        if self.errors:
            raise self.errors.pop(0)
        self.acquired += 1
        self.deadlines[scope_id] = expiration_time

    def release(self, scope_id: str) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.released += 1
        self.deadlines.pop(scope_id, None)

    def left(self, scope: str = "s") -> float:
        """The seconds left of a scope's time."""
        return self.deadlines[scope] - time.time()


@pytest.fixture
def table() -> Iterator[Table]:
    """A table, in which nothing may be left at the end."""
    made = Table()
    # Of clients that other tests had.
    debts = holds.owed[:]
    holds.owed.clear()
    yield made
    assert made.deadlines == {}
    assert holds.handles == {}
    assert holds.owed == []
    holds.owed.extend(debts)


def pass_time(timer: expires, seconds: float) -> None:
    """Have so much of the time be over, for the client."""
    hold = timer._hold
    assert hold is not None
    hold.quiet_until -= seconds
    hold.expiration_time -= seconds


def test_when(table: Table) -> None:
    """The deadline is what the client was asked for."""
    with expires(AFTER, "s", table) as timer:
        assert timer.when() == table.deadlines["s"]
        assert table.left() == pytest.approx(AFTER, abs=1)


@pytest.mark.parametrize("after", [7200, datetime.timedelta(hours=2)])
def test_reschedule(table: Table, after: Any) -> None:
    """From now on so many seconds; a tick gives as much again."""
    with expires(AFTER, "s", table) as timer:
        before = time.time()
        timer.reschedule(after=after)
        assert timer.when() == table.deadlines["s"]
        # The two clocks differ by what they are read one after the other.
        assert before - 0.1 < table.deadlines["s"] - 7200 < time.time() + 0.1
        pass_time(timer, 1000)
        table.deadlines["s"] -= 1000
        timer.tick()
        assert table.left() == pytest.approx(7200, abs=1)


@pytest.mark.parametrize("after", [-1, math.nan, math.inf])
def test_reschedule_refuses_what_is_no_time(table: Table, after: float) -> None:
    """A mistake changes nothing."""
    with expires(AFTER, "s", table) as timer:
        with pytest.raises(ValueError, match="after must"):
            timer.reschedule(after)
        with pytest.raises(TypeError, match="after must"):
            timer.reschedule("soon")  # type: ignore[arg-type]
        assert table.acquired == 1


def test_tick_is_sent_once_in_a_tenth(table: Table) -> None:
    """Before a tenth of the time is over, nothing is sent; behind it once, with the full time."""
    with expires(AFTER, "s", table) as timer:
        timer.tick()
        pass_time(timer, AFTER / 10 - 1)
        timer.tick()
        assert table.acquired == 1
        pass_time(timer, 1)
        for _ in range(3):
            timer.tick()
        assert table.acquired == 2
        assert table.left() == pytest.approx(AFTER, abs=1)
        assert timer.when() == table.deadlines["s"]


def test_tick_of_no_time_at_all(table: Table) -> None:
    """A tenth of nothing is always over."""
    with expires(0, "s", table) as timer:
        timer.tick()
        assert table.acquired == 2


def test_pause(table: Table) -> None:
    """No deadline within, and behind it as much time as was left before."""
    with expires(AFTER, "s", table) as timer:
        pass_time(timer, 20)
        with timer.paused():
            assert table.deadlines["s"] == NEVER
            assert timer.when() == math.inf
        assert table.left() == pytest.approx(AFTER - 20, abs=1)
        assert timer.when() == table.deadlines["s"]
        timer.tick()
        assert table.left() == pytest.approx(AFTER, abs=1)


def test_nested_and_overlapping_pauses(table: Table) -> None:
    """The time begins to run again when the last one ends, in whatever order they do."""
    with expires(AFTER, "s", table) as timer:
        with timer.paused(), timer.paused():
            pass
        assert table.acquired == 3
        stack = ExitStack()
        stack.enter_context(timer.paused())
        with timer.paused():
            stack.close()
            assert table.deadlines["s"] == NEVER
        assert table.left() == pytest.approx(AFTER, abs=1)
        pause = timer.paused()
        with pause, pause:
            pass
        assert table.left() == pytest.approx(AFTER, abs=1)


def test_exception_within_a_pause(table: Table) -> None:
    """It passes through, and the block has its deadline again."""
    with expires(AFTER, "s", table) as timer:
        with pytest.raises(LookupError), timer.paused():
            raise LookupError
        assert table.left() == pytest.approx(AFTER, abs=1)


def test_tick_and_reschedule_within_a_pause(table: Table) -> None:
    """Both say what is left behind it; within it there is no deadline."""
    with expires(AFTER, "s", table) as timer:
        pass_time(timer, 50)
        with timer.paused():
            timer.tick()
            assert table.deadlines["s"] == NEVER
        assert table.left() == pytest.approx(AFTER, abs=1)
        with timer.paused():
            timer.reschedule(300)
            assert table.deadlines["s"] == NEVER
        assert table.left() == pytest.approx(300, abs=1)


def test_pause_that_is_left_with_its_block(table: Table) -> None:
    """Where the block is left first, the pause's end arms nothing."""
    stack = ExitStack()
    with expires(AFTER, "s", table) as timer:
        stack.enter_context(timer.paused())
    stack.close()
    assert table.acquired == 2


def test_requests_that_fail(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    """Each raises, and leaves the block with a deadline that the next tick renews."""
    with expires(AFTER, "s", table) as timer:
        before = timer.when()
        table.errors = [BrokenPipeError("1")]
        with pytest.raises(BrokenPipeError, match="1"):
            timer.reschedule(600)
        assert timer.when() == before
        table.errors = [BrokenPipeError("2")]
        with pytest.raises(BrokenPipeError, match="2"), timer.paused():
            pytest.fail("entered")
        assert table.deadlines["s"] == before
        with pytest.raises(BrokenPipeError, match="3"), timer.paused():
            table.errors = [BrokenPipeError("3")]
        timer.tick()
        assert table.left() == pytest.approx(AFTER, abs=1)
        with pytest.raises(LookupError), timer.paused():
            _fail_in(table)
        assert "could not be resumed" in caplog.text
        timer.tick()
        assert table.left() == pytest.approx(AFTER, abs=1)


def test_pause_behind_one_whose_end_failed(table: Table) -> None:
    """The block still has no deadline; behind the second one it has what was left before both."""
    with expires(AFTER, "s", table) as timer:
        pass_time(timer, 20)
        with pytest.raises(BrokenPipeError), timer.paused():
            table.errors = [BrokenPipeError()]
        with timer.paused():
            assert table.deadlines["s"] == NEVER
        assert table.left() == pytest.approx(AFTER - 20, abs=1)


def _fail_in(table: Table) -> None:
    table.errors = [BrokenPipeError("4")]
    raise LookupError


def test_owed_releases_precede_what_a_handle_sends(table: Table) -> None:
    """What failed before is sent first, as before every request."""
    with expires(AFTER, "s", table) as timer:
        with pytest.raises(BrokenPipeError), expires(AFTER, "owed", table):
            table.errors = [BrokenPipeError()]
        assert set(table.deadlines) == {"s", "owed"}
        timer.reschedule(AFTER)
        assert set(table.deadlines) == {"s"}


@pytest.mark.parametrize("leave", ["with", "async with"])
def test_owed_release_is_sent_when_the_block_around_is_left(table: Table, leave: str) -> None:
    """Not only when another block is entered: there may be none any more."""
    block = expires(AFTER, "outer", table)
    block.__enter__()
    with pytest.raises(BrokenPipeError), expires(AFTER, "owed", table):
        table.errors = [BrokenPipeError()]
    leave_block(block, leave)
    assert table.deadlines == {}


def leave_block(block: expires, statement: str) -> None:
    """As either statement leaves it."""
    if statement == "with":
        block.__exit__(None, None, None)
    else:
        with suppress(StopIteration):
            block.__aexit__(None, None, None).send(None)


def test_outside_of_the_block(table: Table) -> None:
    """Before it and behind it each method is an error that says where to call it."""
    block = expires(AFTER, "s", table)
    for _ in range(2):
        for call in (block.when, lambda: block.reschedule(1), block.tick, block.paused):
            with pytest.raises(RuntimeError, match="within the block"):
                call()
        with block:
            block.tick()
            late = block.paused()
        with pytest.raises(RuntimeError, match="within the block"), late:
            pytest.fail("entered")
    block = expires(AFTER, "s", table)
    table.errors = [BrokenPipeError()]
    with pytest.raises(BrokenPipeError), block:
        pytest.fail("entered")
    with pytest.raises(RuntimeError, match="within the block"):
        block.tick()


# current() ---------------------------------------------------------------------------------------


def test_current_is_the_innermost(table: Table) -> None:
    """Nested, recursive, decorated, behind a block that failed: always the one that one is in."""

    @expires(AFTER, "f", table)
    def descend(depth: int) -> list[expires]:
        return [current(), *(descend(depth - 1) if depth else []), current()]

    with expires(AFTER, "outer", table) as outer:
        with expires(AFTER, "inner", table) as inner:
            assert current() is inner
        assert current() is outer
        blocks = descend(2)
        assert blocks == [*blocks[:3], *reversed(blocks[:3])]
        assert len({id(block) for block in blocks}) == 3
        table.errors = [BrokenPipeError()]
        with pytest.raises(BrokenPipeError), expires(AFTER, "failed", table):
            pytest.fail("entered")
        assert current() is outer
        current().reschedule(600)
        assert table.left("outer") == pytest.approx(600, abs=1)
    with pytest.raises(RuntimeError, match=r"with expires"):
        current()


def test_current_of_a_block_that_was_entered_by_a_call(table: Table) -> None:
    """An exit stack's, too; a block that was dropped is none."""
    with ExitStack() as stack:
        block = stack.enter_context(expires(AFTER, "s", table))
        assert current() is block
    other: list[expires] = [expires(AFTER, "t", table)]
    other[0].__enter__()
    assert current() is other[0]
    other.clear()
    del block
    with pytest.raises(RuntimeError):
        current()


def test_block_that_could_not_be_entered_by_a_call(table: Table) -> None:
    """It is none that others are in."""
    block = expires(AFTER, "failed", table)
    table.errors = [BrokenPipeError()]
    with pytest.raises(BrokenPipeError):
        block.__enter__()
    with pytest.raises(RuntimeError):
        current()
    with expires(AFTER, "s", table) as timer:
        assert current() is timer


@pytest.mark.parametrize("leave", ["with", "async with"])
def test_current_where_the_outer_block_is_left_first(table: Table, leave: str) -> None:
    """One is still in the inner one."""
    outer, inner = expires(AFTER, "outer", table), expires(AFTER, "inner", table)
    outer.__enter__()
    inner.__enter__()
    leave_block(outer, leave)
    assert current() is inner
    leave_block(inner, leave)
    with pytest.raises(RuntimeError):
        current()


def test_current_with_generators_that_take_turns(table: Table) -> None:
    """Whoever left his block is skipped, however many there were: the chain of them stays short."""

    def generate() -> Generator[None, None, None]:
        with expires(AFTER, client=table):
            yield

    with expires(AFTER, "s", table) as timer:
        last = generate()
        next(last)
        for _ in range(50):
            following = generate()
            next(following)
            last.close()
            last = following
        hold, length = holds.get_innermost(), 0
        while hold is not None:
            hold, length = hold.outer, length + 1
        assert length <= 4
        last.close()
        assert current() is timer


def test_threads_are_told_apart(table: Table) -> None:
    """Another thread is in no block of this one, and may use its handle if it is given that."""
    told: list[object] = []

    def work(timer: expires) -> None:
        try:
            current()
        except RuntimeError as error:
            told.append(error)
        timer.reschedule(600)

    with expires(AFTER, "s", table) as timer:
        thread = threading.Thread(target=work, args=(timer,))
        thread.start()
        thread.join()
        assert table.left() == pytest.approx(600, abs=1)
    assert len(told) == 1


def test_tasks_are_told_apart(table: Table) -> None:
    """Each task has its own block; one that is started within a block is in that, till its end."""

    async def child(go_on: asyncio.Event) -> tuple[expires, bool]:
        inherited = current()
        async with expires(AFTER, client=table) as own:
            await go_on.wait()
            return inherited, current() is own

    async def main() -> None:
        go_on = asyncio.Event()
        async with expires(AFTER, "s", table) as timer:
            tasks = [asyncio.ensure_future(child(go_on)) for _ in range(2)]
            await asyncio.sleep(0)
            assert current() is timer
            assert len(table.deadlines) == 3
            go_on.set()
            assert await asyncio.gather(*tasks) == [(timer, True)] * 2
            timer.reschedule(600)
            assert table.left() == pytest.approx(600, abs=1)
        with pytest.raises(RuntimeError):
            current()

    asyncio.run(main())


def test_decorated_coroutine_function(table: Table) -> None:
    """Below it `current()` is its call's."""

    @expires(AFTER, "c", table)
    async def work() -> None:
        await asyncio.sleep(0)
        current().reschedule(600)
        assert table.left("c") == pytest.approx(600, abs=1)

    asyncio.run(work())


def test_nobody_is_kept_alive_behind_the_block() -> None:
    """What tells the innermost block refers to no client, and to its queue, when that is left."""

    async def asynchronous(client: Table) -> None:
        async with expires(AFTER, "s", client):
            pass

    def block(client: Table) -> None:
        with expires(AFTER, "s", client) as timer:
            timer.reschedule(AFTER)

    def fail(client: Table) -> None:
        client.errors = [BrokenPipeError()]
        with suppress(BrokenPipeError), expires(AFTER, "s", client):
            pytest.fail("entered")

    def asynchronously(client: Table) -> None:
        # Without a loop: the context is this one's.
        with suppress(StopIteration):
            asynchronous(client).send(None)

    def overlap(client: Table) -> None:
        outer = generate(client)
        next(outer)
        next(later)
        outer.close()

    def generate(client: Table) -> Generator[None, None, None]:
        with expires(AFTER, client=client):
            yield

    later = generate(Table())
    for leave in (block, asynchronously, fail, overlap):
        client = Table()
        reference = weakref.ref(client)
        leave(client)
        del client
        assert reference() is None, leave


# No timer is armed behind the block ---------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_request_of_another_thread_comes_before_the_release(table: Table, is_async: bool) -> None:
    """A block that is left while another thread sends waits for that."""
    entered, go_on = threading.Event(), threading.Event()
    timers: list[expires] = []

    def wait() -> None:
        entered.set()
        go_on.wait(20)

    def send() -> None:
        table.before_acquire = wait
        timers[0].reschedule(600)

    thread = threading.Thread(target=send)

    def body() -> None:
        thread.start()
        assert entered.wait(20)
        threading.Timer(0.05, go_on.set).start()

    async def main() -> None:
        async with expires(AFTER, "s", table) as timer:
            timers.append(timer)
            body()

    if is_async:
        asyncio.run(main())
    else:
        with expires(AFTER, "s", table) as timer:
            timers.append(timer)
            body()
    assert table.deadlines == {}
    thread.join()
    assert table.deadlines == {}


def test_handle_used_again_by_another_thread_while_its_block_is_left(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was on its way when the exit began lets nothing come behind the release."""
    sending, leaving, released, tried = (threading.Event() for _ in range(4))

    def wait() -> None:
        sending.set()
        leaving.wait(20)

    def release(scope: str) -> None:
        Table.release(table, scope)
        released.set()
        assert tried.wait(20)

    def send_twice() -> None:
        table.before_acquire = wait
        timer.reschedule(600)
        released.wait(20)
        with suppress(RuntimeError):
            timer.reschedule(600)
        tried.set()

    monkeypatch.setattr(table, "release", release)
    thread = threading.Thread(target=send_twice)
    with expires(AFTER, "s", table) as timer:
        hold = timer._hold
        assert hold is not None
        thread.start()
        assert sending.wait(20)
        threading.Thread(target=_set_when_left, args=(hold, leaving)).start()
    thread.join()
    assert table.deadlines == {}


def _set_when_left(hold: holds.Hold, leaving: threading.Event) -> None:
    eventually(lambda: hold.full is None)
    leaving.set()


def test_handle_used_while_its_block_is_being_left(table: Table) -> None:
    """What a signal handler does in the middle of the exit is an error, and arms nothing."""
    with expires(AFTER, "s", table) as timer:
        hold = timer._hold
        assert hold is not None
        handle = _handle(timer)
        hold.full = None  # As the exit does first.
        with pytest.raises(RuntimeError, match="within the block"):
            handle.extend(600)
        assert holds.handles == {}
        hold.full = AFTER
        with timer.paused():
            hold.full = None  # In another thread: the end of the pause is no error of this one.
        hold.full = AFTER
    # In another thread it may have waited for the exit.
    with pytest.raises(RuntimeError, match="within the block"):
        handle.extend(600)


@pytest.mark.parametrize("statement", ["with", "async with"])
def test_handle_used_by_a_signal_handler_anywhere(table: Table, statement: str) -> None:
    """At whatever instruction a block is entered or left: nothing is armed behind it."""
    blocks: list[expires] = []

    def reschedule() -> None:
        with suppress(RuntimeError):
            blocks[-1].reschedule(600)

    def block() -> None:
        blocks.append(expires(AFTER, "s", table))
        if statement == "with":
            with blocks[-1]:
                pass
        else:
            with suppress(StopIteration):
                asynchronous().send(None)

    async def asynchronous() -> None:
        async with blocks[-1]:
            pass

    blocks.append(expires(AFTER, "s", table))
    at = 1
    while interrupt(block, at, "api.py", handle=reschedule):
        assert table.deadlines == {}, at
        assert holds.handles == {}, at
        at += 1
    assert at > 100


@pytest.mark.parametrize("statement", ["with", "async with"])
def test_block_entered_by_a_signal_handler_anywhere(table: Table, statement: str) -> None:
    """At whatever instruction another block is entered or left: each finds its own."""

    def handle() -> None:
        with expires(AFTER, "handler", table) as timer:
            assert current() is timer

    def block() -> None:
        if statement == "with":
            with expires(AFTER, "s", table) as timer:
                assert current() is timer
        else:
            with suppress(StopIteration):
                asynchronous().send(None)
        assert current() is around

    async def asynchronous() -> None:
        async with expires(AFTER, "s", table) as timer:
            assert current() is timer

    with expires(AFTER, "around", table) as around:
        at = 1
        while interrupt(block, at, "api.py", "holds.py", handle=handle):
            assert set(table.deadlines) == {"around"}, at
            at += 1
    assert at > 100


@pytest.mark.parametrize("is_left", [False, True])
def test_interrupted_while_a_block_is_entered_or_left_by_a_call(
    table: Table, is_left: bool
) -> None:
    """Its timer is released then and there, not when the object dies."""
    block = expires(AFTER, "s", table)

    def interrupt() -> None:
        table.deadlines["s"] = table.acquired + AFTER
        raise KeyboardInterrupt

    if is_left:
        block.__enter__()
        table.errors = [KeyboardInterrupt()]
    else:
        table.before_acquire = interrupt
    with pytest.raises(KeyboardInterrupt):
        block.__exit__(None, None, None) if is_left else block.__enter__()
    assert table.deadlines == {}


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("statement", ["with", "async with"])
def test_interrupt_at_the_end_of_a_block_is_not_lost(table: Table, statement: str) -> None:
    """It reaches the caller, at whatever instruction: what was held dies before what it watches.

    Else it could come while a weak reference calls back, which tells nobody.
    """

    def leave(exits: list[Callable[..., Any]]) -> None:
        left = exits.pop()(None, None, None)
        if statement == "async with":
            with suppress(StopIteration):
                left.send(None)

    at, came_so_far = 1, True
    while came_so_far:
        block = expires(AFTER, "s", table)
        exits = [block.__exit__ if statement == "with" else block.__aexit__]
        block.__enter__()
        came_so_far = interrupt(functools.partial(leave, exits), at, "api.py", "holds.py")
        assert table.deadlines == {}, at
        at += 1
    assert at > 20


def test_exit_that_is_never_awaited(table: Table) -> None:
    """The block is left all the same."""
    block = expires(AFTER, "s", table)
    block.__enter__()
    leaving = block.__aexit__(None, None, None)
    with pytest.warns(RuntimeWarning, match="never awaited"):
        del leaving
    assert table.deadlines == {}


def test_asynchronous_block_is_released_once(table: Table) -> None:
    """Whoever refers to it: by the second time another may be in a block of that name."""
    pauses = []

    async def main() -> None:
        async with expires(AFTER, "s", table) as timer:
            pauses.append(timer.paused())

    asyncio.run(main())
    assert table.released == 1


def test_block_that_could_not_be_released_keeps_no_client() -> None:
    """Nor the client's queue: not longer than it is owed."""
    client = Table()
    configure(client)
    block = expires(AFTER, "s")
    block.__enter__()
    client.errors = [BrokenPipeError()]
    with pytest.raises(BrokenPipeError):
        block.__exit__(None, None, None)
    with expires(AFTER, "next"):
        pass
    configure(None)
    reference = weakref.ref(client)
    del client
    gc.collect()
    assert reference() is None


def _handle(timer: expires) -> Any:
    timer.reschedule(AFTER)
    assert timer._hold is not None
    return holds.handles[timer._hold]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("statement", ["with", "async with"])
def test_interrupted_anywhere(table: Table, statement: str) -> None:
    """At whatever instruction an interrupt comes, nothing is armed behind the block, or owed."""

    def use(timer: expires) -> None:
        timer.reschedule(600)
        with timer.paused():
            pass

    def block() -> None:
        with expires(AFTER, "s", table) as timer:
            use(timer)

    async def asynchronous() -> None:
        async with expires(AFTER, "s", table) as timer:
            use(timer)

    def drive() -> None:
        with suppress(StopIteration):
            asynchronous().send(None)

    at = 1
    files = ("api.py", "handles.py", "holds.py")
    while interrupt(block if statement == "with" else drive, at, *files):
        assert table.deadlines == {}, at
        assert holds.handles == {}, at
        assert holds.owed == [], at
        at += 1
    assert at > 200


def pause_once(timer: expires) -> None:
    with timer.paused():
        pass


def pause_twice(timer: expires) -> None:
    """One within the other, by one object."""
    pause = timer.paused()
    with pause, pause:
        pass


@pytest.mark.parametrize("pause", [pause_once, pause_twice])
def test_pause_interrupted_anywhere(pause: Callable[[expires], None]) -> None:
    """At whatever instruction an interrupt comes, the block has its deadline behind the pause."""
    table = Table()
    at = 1
    with expires(AFTER, "s", table) as timer:
        while interrupt(functools.partial(pause, timer), at, "handles.py"):
            assert table.left() == pytest.approx(AFTER, abs=5), at
            at += 1
    assert at > 100
    assert table.deadlines == {}


def test_end_of_a_pause_that_is_interrupted_again_and_again(
    table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    """Its resuming is tried again; where it fails in the end, the next tick tries again."""
    caplog.set_level(logging.DEBUG)
    for errors in ([KeyboardInterrupt()] * 3, [KeyboardInterrupt(), OSError("away")]):
        with expires(AFTER, "s", table) as timer:
            with pytest.raises(KeyboardInterrupt), timer.paused():
                table.errors = list(errors)
            timer.tick()
            assert table.left() == pytest.approx(AFTER, abs=1)
    assert caplog.messages == ["Timer s could not be resumed: away"]


def test_interrupt_at_the_end_of_a_pause_is_not_lost(table: Table) -> None:
    """At whatever instruction, and though the end of a pause within it was interrupted, too."""
    at, came_so_far = 1, True
    with expires(AFTER, "s", table) as timer:
        while came_so_far:
            pause = timer.paused()
            leave = [pause.__exit__]
            pause.__enter__()
            inner = pause.__exit__
            pause.__enter__()
            del inner  # As an interrupt has it that comes at the entry of the exit.
            came_so_far = interrupt(lambda: leave.pop()(None, None, None), at, "handles.py")  # noqa: B023
            at += 1
    assert at > 20


def test_pause_whose_end_was_interrupted_is_kept_by_nobody(table: Table) -> None:
    """Nor does it wait for the collection of garbage."""
    gc.disable()
    try:
        with expires(AFTER, "s", table) as timer:
            pause = timer.paused()
            with pytest.raises(KeyboardInterrupt), pause:
                table.errors = [KeyboardInterrupt()]
            reference = weakref.ref(pause)
            del pause
            assert reference() is None
    finally:
        gc.enable()


def test_end_of_a_pause_that_is_interrupted_for_good(table: Table) -> None:
    """It is given up; the block is released all the same."""
    with expires(AFTER, "s", table) as timer:
        with pytest.raises(KeyboardInterrupt), timer.paused():
            table.errors = [KeyboardInterrupt()] * 30
        assert 0 < len(table.errors) < 25
        table.errors.clear()


def test_pause_is_a_plain_context_manager_to_those_who_look_at_its_class() -> None:
    """Exit stacks look the method up there."""
    assert callable(Pause.__exit__)


# Forks -------------------------------------------------------------------------------------------


def misuse_in_a_fork(channel: Any, timer: expires, table: Table) -> None:
    """In a forked child: what the parent's handle says, and what a block of its own does."""
    told = []
    for call in (timer.when, timer.tick, lambda: timer.reschedule(1), timer.paused, current):
        try:
            call()
        except RuntimeError as error:
            told.append(str(error))
    with expires(AFTER, "own", table) as own:
        own.reschedule(600)
        assert current() is own
    with suppress(RuntimeError):
        current()
        told.append("in a block")
    channel.send((told, table.acquired))


def test_forked_child(table: Table, fork_worker: Fork) -> None:
    """A child does not hold its parent's timer: the handle is an error, and sends nothing."""
    with expires(AFTER, "s", table) as timer:
        timer.reschedule(AFTER)
        told, acquired = fork_worker(misuse_in_a_fork, timer, table).receive()
        assert acquired == table.acquired + 2
        assert len(told) == 5
        assert all("forked" in text for text in told[:4])
        assert "in no block of this process" in told[4]
        timer.reschedule(AFTER)
        pid = os.fork()
        if pid == 0:  # A child that leaves the block of its parent.
            timer.__exit__(None, None, None)
            os._exit(len(holds.handles))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_a_child_does_first(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fork on, blocks entered before are another process's."""
    monkeypatch.setattr(handles, "_forked_at", handles._forked_at)
    with expires(AFTER, "s", table) as timer:
        timer.reschedule(AFTER)
        handles._forget_parent()
        assert holds.handles == {}
        with pytest.raises(RuntimeError, match="forked"):
            timer.tick()
        with pytest.raises(RuntimeError, match="no block of this process"):
            current()
        with expires(AFTER, "own", table) as own:
            assert current() is own


# Over a server -----------------------------------------------------------------------------------


def extend_then_overrun(channel: Any, client: TimerClient) -> None:
    """A worker that lives on by its handle, longer than its `after`, and then hangs."""
    with expires(after=0.4, scope="s", client=client) as timer:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            timer.tick()
            time.sleep(0.01)
        with timer.paused():
            time.sleep(0.6)
        timer.reschedule(1)
        time.sleep(0.6)
        timer.reschedule(0.4)
        channel.send(time.monotonic() + 0.4)
        time.sleep(FAR)


def test_worker_lives_as_long_as_its_handle_asks(link: Link, fork_worker: Fork) -> None:
    """Over either kind of server: none of it ends the worker before its last deadline."""
    with running(link.server()) as server:
        worker = fork_worker(extend_then_overrun, link.client)
        deadline = worker.receive()
        assert worker.wait() == -9
        assert time.monotonic() >= deadline - 0.001
        eventually(lambda: not server._timers)
