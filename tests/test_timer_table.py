"""The table of timers against a plain dictionary, and what keeps it fast."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elastic_timer._server.table import TimerTable

WORKERS = st.integers(-2, 3)
SCOPES = st.sampled_from(["a", "b", "c"])
# Few values, so that ties and exact hits are frequent.
TIMES = st.integers(0, 12).map(float)


class AgainstADictionary(RuleBasedStateMachine):
    """Does everything to a table and to a dictionary: both must always tell the same."""

    def __init__(self) -> None:
        super().__init__()
        self.table: TimerTable[int, object] = TimerTable()
        self.model: dict[tuple[int, str], tuple[float, int, object]] = {}
        self.serial = 0
        self.now = 0.0
        # The numbers of those that were looked at when they were due.
        self.settled: set[int] = set()

    @rule(worker=WORKERS, scope=SCOPES, deadline=TIMES)
    def acquire(self, worker: int, scope: str, deadline: float) -> None:
        request = object()
        self.serial += 1
        self.table.acquire(worker, scope, request, deadline)
        self.model[worker, scope] = (deadline, self.serial, request)

    @rule(worker=WORKERS, scope=SCOPES)
    def release(self, worker: int, scope: str) -> None:
        self.table.release(worker, scope)
        self.model.pop((worker, scope), None)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release_what_is_held(self, data: st.DataObject) -> None:
        self.release(*data.draw(st.sampled_from(sorted(self.model))))

    @rule(worker=WORKERS)
    def clear(self, worker: int) -> None:
        self.table.clear(worker)
        for key in [key for key in self.model if key[0] == worker]:
            del self.model[key]

    @rule(now=TIMES)
    def set_time(self, now: float) -> None:
        self.now = now

    @rule(now=TIMES)
    def settle(self, now: float) -> None:
        self.table.settle(now)
        self.settled |= {serial for at, serial, _ in self.model.values() if at <= now}

    @rule(times=st.integers(60, 200))
    def acquire_and_release_often(self, times: int) -> None:
        for number in range(times):
            self.table.acquire(9, "often", object(), float(number % 5))
            self.table.release(9, "often")
        self.serial += times

    @invariant()
    def is_the_same_mapping(self) -> None:
        assert len(self.table) == len(self.model)
        assert dict(self.table) == {key: item[2] for key, item in self.model.items()}
        assert bool(self.table) == bool(self.model)
        assert set(self.table.workers()) == {worker for worker, _ in self.model}
        assert len(self.table.workers()) == len(set(self.table.workers()))
        for worker in range(-2, 4):
            assert self.table.holds(worker) == any(key[0] == worker for key in self.model)

    @invariant()
    def expires_the_same(self) -> None:
        expected: dict[int, list[object]] = {}
        for (worker, _), (deadline, _, request) in sorted(
            self.model.items(), key=lambda item: item[1][:2]
        ):
            if deadline <= self.now:
                expected.setdefault(worker, []).append(request)
        found = self.table.expired(self.now)
        assert found == expected
        # The worker that is due first comes first.
        assert list(found) == list(expected)

    @invariant()
    def is_due_at_the_same_time(self) -> None:
        waited_for = [at for at, serial, _ in self.model.values() if serial not in self.settled]
        assert self.table.next_deadline() == min(waited_for, default=None)

    @invariant()
    def tells_of_each_timer(self) -> None:
        for worker in range(-2, 4):
            held = {scope: item for (pid, scope), item in self.model.items() if pid == worker}
            assert sorted(self.table.scopes(worker)) == sorted(held)
            for scope in ("a", "b", "c"):
                expected = held[scope][0] if scope in held else None
                assert self.table.deadline(worker, scope) == expected

    @invariant()
    def heap_stays_small(self) -> None:
        assert len(self.table._heap) <= 2 * len(self.model) + 64
        # Once looked at again, nothing is left of those that were dropped.
        assert len(self.table._settled) <= self.serial


AgainstADictionary.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestAgainstADictionary = AgainstADictionary.TestCase
TestAgainstADictionary.__doc__ = "Whatever is done to it, a table tells what a dictionary tells."


@pytest.fixture
def table() -> TimerTable[Any, str]:
    """An empty one."""
    return TimerTable()


def test_reading_does_not_change_it(table: TimerTable[Any, str]) -> None:
    """What is expired stays, and is told of again, until it is released or cleared."""
    table.acquire(1, "a", "request", 5.0)
    for _ in range(3):
        assert table.expired(5.0) == {1: ["request"]}
        assert table.next_deadline() == 5.0
    assert table.expired(math.nextafter(5.0, 0)) == {}


def test_acquired_anew_only_the_last_deadline_counts(table: TimerTable[Any, str]) -> None:
    """An earlier or a later deadline replaces the one before it."""
    table.acquire(1, "a", "first", 5.0)
    table.acquire(1, "a", "later", 9.0)
    assert table.expired(8.0) == {}
    assert table.next_deadline() == 9.0
    table.acquire(1, "a", "sooner", 2.0)
    assert table.expired(8.0) == {1: ["sooner"]}
    table.release(1, "a")
    assert table.expired(100.0) == {}
    assert table.next_deadline() is None


def test_settled_timers_are_waited_for_no_more(table: TimerTable[Any, str]) -> None:
    """They stay expired; what came since counts, however overdue it was when it came."""
    table.acquire("worker", "known", "request", 1.0)
    table.acquire("worker", "later", "request", 6.0)
    table.settle(5.0)
    assert table.next_deadline() == 6.0
    assert table.expired(5.0) == {"worker": ["request"]}
    assert table.expired(0.5) == {}
    table.acquire("worker", "new", "request", 2.0)
    assert table.next_deadline() == 2.0
    table.acquire("worker", "known", "anew", 3.0)
    table.settle(2.0)
    assert table.next_deadline() == 3.0
    assert table.expired(5.0) == {"worker": ["request", "anew"]}
    table.clear("worker")
    assert table.expired(9.0) == {}
    table.settle(9.0)
    assert table._settled == []
    assert table.next_deadline() is None


def test_unknown_key_is_a_key_error(table: TimerTable[Any, str]) -> None:
    """The error names the whole key, for an unknown worker and for an unknown scope."""
    table.acquire(1, "a", "request", 5.0)
    for key in [(1, "b"), (2, "a")]:
        assert key not in table
        with pytest.raises(KeyError) as caught:
            table[key]
        assert caught.value.args == (key,)


def test_workers_are_never_compared(table: TimerTable[Any, str]) -> None:
    """Workers of any hashable kind may share a deadline: ties go to who came first."""
    workers = [object(), "text", 7, (1, 2)]
    for worker in workers:
        table.acquire(worker, "a", repr(worker), 5.0)
    assert list(table.expired(5.0)) == workers


def test_reading_it_while_it_changes(table: TimerTable[Any, str]) -> None:
    """Other threads may go through the timers while the watchdog registers and clears some."""
    for worker in range(3):
        table.acquire(worker, "a", "request", 5.0)
    keys = iter(table)
    assert next(keys) == (0, "a")
    table.acquire(0, "b", "request", 5.0)
    table.acquire(7, "a", "request", 5.0)
    table.clear(1)
    assert list(keys)[-1] == (2, "a")


def test_representation_shows_the_timers(table: TimerTable[Any, str]) -> None:
    """In a log or a failed assertion one sees what is held."""
    table.acquire(1, "a", "request", 5.0)
    assert repr(table) == "TimerTable({(1, 'a'): 'request'})"


def test_heap_stays_small(table: TimerTable[Any, str]) -> None:
    """Timers that are acquired anew leave no more behind than twice the live ones and some."""
    for worker in range(40):
        table.acquire(worker, "a", "request", 5.0)
    for _ in range(300):
        table.acquire(0, "a", "request", 5.0)
        assert len(table._heap) <= 2 * 40 + 64


class CountedTime(float):
    """A deadline that counts how often it was compared."""

    comparisons = 0

    def __le__(self, other: float) -> bool:
        CountedTime.comparisons += 1
        return float(self) <= other

    def __lt__(self, other: float) -> bool:
        CountedTime.comparisons += 1
        return float(self) < other

    def __gt__(self, other: float) -> bool:
        CountedTime.comparisons += 1
        return float(self) > other

    def __ge__(self, other: float) -> bool:
        CountedTime.comparisons += 1
        return float(self) >= other


def test_idle_work_does_not_grow_with_the_timers(table: TimerTable[Any, str]) -> None:
    """With nothing due, a look at 10,000 timers asks as few of them as a look at ten."""
    for count in (10, 10_000):
        for worker in range(count):
            table.acquire(worker, "a", "request", CountedTime(1000.0 + worker % 97))
        CountedTime.comparisons = 0
        assert table.expired(5.0) == {}
        table.settle(5.0)
        assert table.next_deadline() == 1000.0
        assert CountedTime.comparisons < 20


def test_release_of_a_scope_that_is_not_held(table: TimerTable[Any, str]) -> None:
    """By a worker that holds others: it changes nothing."""
    table.acquire(1, "a", "request", 5.0)
    table.release(1, "b")
    assert dict(table) == {(1, "a"): "request"}


def test_most_urgent_timer(table: TimerTable[Any, str]) -> None:
    """The one that is due first, with the time since when it is held, however often renewed."""
    assert table.most_urgent(1) is None
    table.acquire(1, "later", "request", 60.0, 1.0)
    table.acquire(1, "first", "request", 20.0, 2.0)
    table.acquire(2, "another's", "request", 3.0, 2.5)
    for now in (3.0, 4.0):
        table.acquire(1, "first", "request", 30.0, now)
    assert table.most_urgent(1) == ("first", 30.0, 2.0)
    table.release(1, "first")
    assert table.most_urgent(1) == ("later", 60.0, 1.0)
    table.release(1, "later")
    assert table.most_urgent(1) is None


def test_spans_are_from_the_acquire_to_the_deadline(table: TimerTable[Any, str]) -> None:
    """Of those timers that a worker still holds when they are looked at."""
    for number, scope in enumerate("abc"):
        table.acquire(1, scope, "request", 60.0 + number, float(number))
    table.acquire(2, "a", "request", 5.0)
    spans = table.spans(1)
    assert next(spans) == ("a", 0.0, 60.0)
    table.release(1, "b")
    table.acquire(1, "c", "request", 70.0, 5.0)
    table.acquire(1, "d", "request", 70.0, 5.0)
    assert list(spans) == [("c", 5.0, 70.0)]
    assert list(table.spans(3)) == []
