"""What mutation testing asked for: tests without which a wrong line went unnoticed."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_timer import TimerClient, expires
from elastic_timer._server.blocks import block_of
from elastic_timer._server.table import TimerTable
from elastic_timer._transport.wire import (
    SHORTEST_REQUEST,
    acquire_line,
    decode,
    release_line,
)
from elastic_timer._worker import holds


class Recorder(TimerClient):
    def __init__(self, failures: int = 0) -> None:
        self.scopes: list[str] = []
        self._failures = failures
        self.release_failures = 0
        self.before_release: Callable[[], object] = lambda: None

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        if self._failures:
            self._failures -= 1
            raise BrokenPipeError
        self.scopes.append(scope_id)

    def release(self, scope_id: str) -> None:
        self.before_release()
        if self.release_failures:
            self.release_failures -= 1
            raise BrokenPipeError


def test_heap_is_bounded_whatever_empties_the_table() -> None:
    """One scope acquired over and over, and workers cleared, leave no more than the slack."""
    table: TimerTable[int, str] = TimerTable()
    for number in range(1000):
        table.acquire(0, "same", "request", number)
        assert len(table._heap) < 100
    for worker in range(1000):
        table.acquire(worker, "scope", "request", worker)
    for worker in range(1000):
        table.clear(worker)
    assert len(table._heap) < 100


def test_rebuilt_heap_is_in_order() -> None:
    """After most of many timers were released the rest still come in the order of deadlines."""
    dice = random.Random(0)
    table: TimerTable[int, int] = TimerTable()
    deadlines = dice.sample(range(10_000), 1000)
    for deadline in deadlines:
        table.acquire(deadline, "scope", deadline, deadline)
    left = sorted(deadlines[::5])
    for deadline in set(deadlines) - set(left):
        table.release(deadline, "scope")
    for deadline in left:
        assert table.next_deadline() == deadline
        table.release(deadline, "scope")


def test_acquire_tells_whether_there_was_none() -> None:
    """By that the entries of a block are told from its timer's new deadlines."""
    table: TimerTable[int, str] = TimerTable()
    assert table.acquire(0, "scope", "request", 5.0) is True
    assert table.acquire(0, "scope", "request", 6.0) is False
    assert table.acquire(1, "scope", "request", 6.0) is True
    table.release(0, "scope")
    assert table.acquire(0, "scope", "request", 7.0) is True


def test_timer_is_due_at_its_deadline_itself() -> None:
    """Whether somebody has looked at it by then or not."""
    table: TimerTable[int, str] = TimerTable()
    table.acquire(0, "scope", "request", 5.0)
    for _ in range(2):
        assert table.expired(4.9) == {}
        assert table.expired(5.0) == {0: ["request"]}
        table.settle(5.0)
        assert table.next_deadline() is None


def test_lines_of_this_process() -> None:
    """Kept ready or not, they are what torch's client would write, byte for byte."""

    def line(scope: str, expiration_time: float, signal: int) -> bytes:
        request = {
            "version": 1,
            "pid": os.getpid(),
            "scope_id": scope,
            "expiration_time": expiration_time,
            "signal": signal,
        }
        return json.dumps(request).encode() + b"\n"

    for scope in ("train.py#86", '"expiration_time": 0', "%a"):
        for moment in (1795150503.21, 1795150503):
            assert acquire_line(scope, moment, 15) == line(scope, moment, 15)
        assert release_line(scope) == line(scope, -1, 0)


@pytest.mark.parametrize("number", [sys.float_info.max, -sys.float_info.max])
def test_largest_number_is_a_time(number: float) -> None:
    """The largest float there is is finite, as a deadline and as a release."""
    line = f'{{"pid": 2, "scope_id": "", "expiration_time": {number}, "signal": 9}}'
    assert decode(line.encode()).expiration_time == number


def test_shortest_request_counts() -> None:
    """What is shorter is dropped unread, so there must be nothing shorter that could be read."""
    line = b'{"pid":1,"scope_id":"","expiration_time":1,"signal":1}'
    assert decode(line) == (1, "", 1, 1)
    assert len(line) == SHORTEST_REQUEST


def test_reason_is_about_the_whole_line() -> None:
    """A line without any request in it is refused for what it lacks as a whole."""
    with pytest.raises(ValueError, match="'pid' is missing"):
        decode(b"{}")


def test_block_of_a_scope() -> None:
    """Whose it is does not count, and nothing else of it is left out."""
    for ending in ("", "@thread-12", "@task-7f3a", "@generator-b", "@task-1@generator-2"):
        assert block_of(f"train.py#86{ending}") == "train.py#86"
    for scope in ("", "a@b", "step@thread-", "@threads-12", "@Task-1", "mail@task-force"):
        assert block_of(scope) == scope


def test_block_of_a_scope_that_expires_has_made() -> None:
    """Of whichever thread, task or generator: it is told by its place alone, and counted by it."""
    client = Recorder()

    def generate() -> Iterator[None]:
        with expires(after=5, client=client):
            yield

    async def in_a_task() -> None:
        list(generate())

    list(generate())
    asyncio.run(in_a_task())
    thread = threading.Thread(target=list, args=(generate(),))
    thread.start()
    thread.join()
    assert len(set(client.scopes)) == 3
    assert {block_of(scope) for scope in client.scopes} == {client.scopes[0].partition("@")[0]}


def test_what_was_owed_and_sent_keeps_no_client() -> None:
    """It is forgotten then: a client's queue or descriptor may go with the client."""
    client = Recorder()
    client.release_failures = 1
    with pytest.raises(BrokenPipeError), expires(5, "s", client):
        pass
    with expires(5, "s", client):
        pass
    reference = weakref.ref(client)
    del client
    gc.collect()
    assert reference() is None


def test_block_entered_while_a_debt_is_being_paid() -> None:
    """As by a signal handler: the debt may be paid twice, and both blocks are entered and left."""
    client = Recorder()
    client.release_failures = 1
    with pytest.raises(BrokenPipeError), expires(5, "owed", client):
        pass

    def handle() -> None:
        client.before_release = lambda: None
        with expires(5, "inner", client):
            pass

    client.before_release = handle
    with expires(5, "outer", client):
        pass
    assert client.scopes == ["owed", "inner", "outer"]
    assert client not in [debt.client for debt in holds.owed]


def test_failed_entry_can_be_tried_again() -> None:
    """An `expires` whose acquire failed is not entered."""
    block = expires(after=5, client=Recorder(failures=1))
    with pytest.raises(BrokenPipeError):
        block.__enter__()
    with block:
        pass


def decorated_later() -> None:
    """Do nothing."""


def test_scope_of_a_decorated_function_is_its_own_place() -> None:
    """It is where the function is, not where it was decorated; in a thread it says which."""
    client = Recorder()
    call = expires(after=5, client=client)(decorated_later)
    place = f"{__file__}#{decorated_later.__code__.co_firstlineno}"
    idents: list[int | None] = []

    def in_a_thread() -> None:
        idents.append(threading.get_ident())
        call()

    call()
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert client.scopes == [place, f"{place}@thread-{idents[0]}"]


def test_scope_names_the_task() -> None:
    """In an asyncio task the default scope ends with the task's identity."""
    client = Recorder()

    async def enter() -> str:
        async with expires(after=5, client=client):
            task: Any = asyncio.current_task()
            return f"@task-{id(task):x}"

    ending = asyncio.run(enter())
    assert client.scopes[0].partition("@")[2] == ending[1:]
