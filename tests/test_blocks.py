"""What blocks take: counted, timed and bounded, for given requests at given times."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_timer._server.blocks import Blocks, asked_for, percentile

PID, RANK = 4711, 3
NOW = 1000.0
GATHER = 0.0105
"""So long after it was sent a request is read, as a rule."""


class Measured:
    """Blocks that are called as a server calls them, with times of the workers' own."""

    def __init__(self) -> None:
        self.blocks = Blocks(0.0)
        self.seen: set[tuple[int, str]] = set()

    def acquire(
        self, at: float, after: float, scope: str = "b", pid: int = PID, late: float = GATHER
    ) -> None:
        """A worker acquires at a moment, and is heard somewhat later."""
        self.blocks.note_all_read(at)
        self.blocks.acquired(pid, RANK, scope, (pid, scope) not in self.seen, at + after, at + late)
        self.seen.add((pid, scope))

    def release(self, at: float, scope: str = "b", pid: int = PID, late: float = GATHER) -> None:
        """A worker releases, and nothing more is heard in that round."""
        self.blocks.released(pid, scope)
        self.blocks.settle(at + late)

    def one(self) -> dict[str, Any]:
        """The record of the only block."""
        [record] = self.blocks.records()
        return dict(record)


@pytest.fixture
def measured() -> Measured:
    return Measured()


# --- percentiles

DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "steady": lambda draw: draw.uniform(0.3, 0.32),
    "uniform": lambda draw: draw.uniform(0.01, 100),
    "lognormal": lambda draw: draw.lognormvariate(-1, 1),
    "exponential": lambda draw: 0.002 + draw.expovariate(1 / 30),
    "two peaks": lambda draw: draw.gauss(0.1, 0.005) if draw.random() < 0.95 else draw.gauss(40, 3),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_percentiles(measured: Measured, name: str, seed: int) -> None:
    """Within 10 % of the true ones, by what the server itself is told."""
    draw = random.Random(seed)
    durations = [DISTRIBUTIONS[name](draw) for _ in range(2000)]
    at = NOW
    for seconds in [1000, *durations]:  # The first one counts apart.
        measured.acquire(at, 3600, late=0)
        measured.release(at + seconds, late=0)
        at += seconds + 1
    record = measured.one()
    durations.sort()
    for share in (0.5, 0.99):
        exact = durations[math.ceil(share * len(durations)) - 1]
        assert percentile(record["histogram"], share) == pytest.approx(exact, rel=0.1)
    assert record["longest"] == pytest.approx(durations[-1], abs=1e-3)
    assert (record["entered"], record["left"], record["first"]["left"]) == (2001, 2000, 1)


@given(st.lists(st.floats(0.001, 1e6), min_size=1), st.floats(0.01, 1))
def test_percentiles_of_anything(durations: list[float], share: float) -> None:
    """Whatever the durations are, every percentile is within 10 %."""
    measured = Measured()
    for number, seconds in enumerate([0.0, *durations]):
        at = NOW + 1e7 * number
        measured.acquire(at, 1e7, late=0)
        measured.release(at + seconds, late=0)
    exact = sorted(durations)[math.ceil(share * len(durations)) - 1]
    found = percentile(measured.one()["histogram"], share)
    assert found == pytest.approx(exact, rel=0.1)


def test_percentile_of_nothing() -> None:
    """There is none; what is too short to be told apart has the shortest duration there is."""
    assert percentile([], 0.5) is None
    assert percentile([(-73, 5)], 0.5) == 0.001


# --- durations


@pytest.mark.parametrize("late", [0.0, GATHER, 0.03])
@pytest.mark.parametrize("after", [0.25, 0.5, 1.0, 1.5, 60.0, 90.0, 1800.0, 2.7e6])
def test_after_as_asked(after: float, late: float) -> None:
    """It is a round number, of which a part has passed before it is read."""
    assert asked_for(after - late, late, 0) == after


def test_after_that_is_not_round() -> None:
    """It is told within 10 ms; one that is known already exactly."""
    assert asked_for(12.3456 - GATHER, GATHER, 0) == pytest.approx(12.3456, abs=0.0101)
    assert asked_for(12.3456 - GATHER, GATHER, 12.3456) == 12.3456
    assert asked_for(57.3, 5, 60) == 60
    assert asked_for(57.3, 0.01, 60) == 57.3
    # What was told too little at first, on a busy machine, does not stay so.
    assert asked_for(59.98, GATHER, 0) == 60
    assert asked_for(59.988, GATHER, 59.99) == 60
    # It was due already when it was read.
    assert asked_for(-0.9, 1, 0) == 0
    assert asked_for(-0.9, 1, 0.05) == 0.05
    assert asked_for(-0.9, GATHER, 0) == 0
    # More than before, and less by more than the server may have been late.
    assert asked_for(120 - GATHER, GATHER, 60) == 120
    assert asked_for(30 - GATHER, GATHER, 60) == 30


def test_how_round_a_number_is() -> None:
    """Whole seconds if a hundredth of them is missing, else halves, tenths, twentieths."""
    assert asked_for(5.941, GATHER, 0) == 6
    assert asked_for(5.94, GATHER, 0) == 5.95
    assert asked_for(0.95, GATHER, 0) == 0.95
    assert asked_for(1.2, 0.3, 0) == 1.5
    assert asked_for(1.34, 0.06, 0) == 1.4
    assert asked_for(1.33, 0.02, 0) == 1.35
    assert asked_for(0.318, 0, 0) == 0.32


def test_duration_is_from_the_workers_own_clock(measured: Measured) -> None:
    """However late requests are read, where the worker's next one tells when they were sent."""
    measured.acquire(NOW, 60, late=0.001)
    measured.blocks.settle(NOW + 0.001)
    for step in range(1, 4):
        at = NOW + step * 0.3
        measured.blocks.released(PID, "b")
        measured.acquire(at, 60, late=0.25)
        measured.blocks.settle(at + 0.25)
    record = measured.one()
    assert record["first"]["longest"] == pytest.approx(0.3)
    assert record["longest"] == pytest.approx(0.3)
    assert (record["left"], record["after"], record["entered"]) == (2, 60, 4)


def test_two_blocks_that_are_left_together(measured: Measured) -> None:
    """One within the other, both ends read at once: each has its own duration."""
    measured.acquire(NOW, 60, "outer")
    measured.acquire(NOW + 1, 60, "inner")
    measured.blocks.released(PID, "inner")
    measured.release(NOW + 3, "outer")
    took = {
        record["scope"]: record["first"]["longest"]  # type: ignore[index]
        for record in measured.blocks.records()
    }
    assert took == {"outer": pytest.approx(3, abs=0.02), "inner": pytest.approx(2, abs=0.02)}


def test_release_that_nothing_follows(measured: Measured) -> None:
    """Its end is when it was read; what other workers send tells nothing of it."""
    measured.acquire(NOW, 60)
    measured.blocks.released(PID, "b")
    measured.acquire(NOW + 1, 60, pid=PID + 1, late=0)
    measured.blocks.settle(NOW + 2)
    assert measured.one()["first"]["longest"] == 2


def test_block_with_deadlines_anew(measured: Measured) -> None:
    """It is one pass, and counts by the longest time between two; `after` is the largest."""
    measured.acquire(NOW, 60)
    measured.acquire(NOW + 40, 60)
    measured.acquire(NOW + 90, 120)
    measured.acquire(NOW + 100, 30)
    measured.release(NOW + 110)
    record = measured.one()
    assert (record["entered"], record["after"]) == (1, 120)
    assert record["first"]["longest"] == pytest.approx(50, abs=0.02)


def test_block_without_a_deadline_for_a_while(measured: Measured) -> None:
    """What it does meanwhile does not count, and is no `after`."""
    measured.acquire(NOW, 60)
    measured.acquire(NOW + 10, 1e9)
    measured.acquire(NOW + 5000, 50)
    measured.release(NOW + 5020)
    record = measured.one()
    assert (record["entered"], record["after"]) == (1, 60)
    assert record["first"]["longest"] == pytest.approx(20, abs=0.02)


def test_less_than_a_second(measured: Measured) -> None:
    """It is told as any other; durations are told to a tenth of a millisecond."""
    measured.acquire(NOW, 0.95, late=0)
    measured.blocks.expired(PID, "b")
    measured.release(NOW + 1.23456, late=0)
    assert measured.one()["after"] == 0.95
    assert measured.one()["first"]["longest"] == 1.2346


def test_what_was_read_is_known_from_rounds(measured: Measured) -> None:
    """So a request is not taken for one that waited for long."""
    measured.blocks.note_all_read(NOW)
    measured.blocks.acquired(PID, RANK, "b", True, NOW + 57.3, NOW + 0.01)
    assert measured.one()["after"] == 57.3


def test_first_of_equally_slow_ones(measured: Measured) -> None:
    """It is the one that is named."""
    for pid in (1, 2):
        measured.acquire(NOW, 60, pid=pid, late=0)
        measured.release(NOW + 5, pid=pid, late=0)
    assert measured.one()["first"]["pid"] == 1


def test_more_than_a_year_is_no_deadline(measured: Measured) -> None:
    """One of a year is."""
    measured.acquire(NOW, 366 * 86400 + 100)
    assert measured.one()["after"] is None
    measured.acquire(NOW, 365 * 86400)
    assert measured.one()["after"] == 365 * 86400


def test_threads_tasks_and_ranks_are_one_block(measured: Measured) -> None:
    """And the slowest is named, of the first passes and of the others."""
    for number, pid in enumerate([1, 2, 3, 1, 2, 3]):
        scope = f"train.py#3@thread-{number}"
        seconds = [9, 5, 6, 2, 4, 3][number]
        measured.blocks.acquired(pid, pid + 10, scope, number < 3, NOW + 60, NOW)
        measured.release(NOW + seconds, scope, pid, late=0)
    record = measured.one()
    assert record["scope"] == "train.py#3"
    assert (record["entered"], record["left"], record["first"]["left"]) == (6, 3, 3)
    assert (record["longest"], record["pid"], record["rank"]) == (4, 2, 12)
    first = record["first"]
    assert (first["longest"], first["pid"], first["rank"]) == (9, 1, 11)


# --- blocks that are not left in time, or at all


def test_expired_and_left(measured: Measured) -> None:
    """It is counted once, and what it took counts; a deadline that it asks for anew counts on."""
    measured.acquire(NOW, 60)
    measured.blocks.expired(PID, "b")
    measured.blocks.expired(PID, "b")
    measured.acquire(NOW + 70, 60)
    measured.blocks.expired(PID, "b")
    measured.release(NOW + 150)
    record = measured.one()
    assert (record["entered"], record["expired"], record["unfinished"]) == (1, 2, 0)
    assert record["first"]["longest"] == pytest.approx(80, abs=0.02)


def test_worker_that_ends(measured: Measured) -> None:
    """Its blocks are unfinished, but for what expired before, and what it had left."""
    for scope in ("left", "expired", "unfinished"):
        measured.acquire(NOW, 60, scope)
    measured.blocks.expired(PID, "expired")
    measured.blocks.ended(PID)
    measured.release(NOW + 1, "left")
    for scope in ("expired", "unfinished"):  # Too late: they were not among what was there.
        measured.release(NOW + 2, scope)
    told = {
        record["scope"]: (dict(record)["first"]["left"], record["expired"], record["unfinished"])  # type: ignore[index]
        for record in measured.blocks.records()
    }
    assert told == {"left": (1, 0, 0), "expired": (0, 1, 0), "unfinished": (0, 0, 1)}


def test_next_worker_of_a_number(measured: Measured) -> None:
    """What the one before had not left is no pass of it."""
    measured.acquire(NOW, 60)
    measured.blocks.ended(PID)
    measured.acquire(NOW + 50, 60)
    measured.release(NOW + 51)
    record = measured.one()
    assert (record["entered"], record["unfinished"], record["first"]["left"]) == (2, 1, 0)
    assert record["longest"] == pytest.approx(1, abs=0.02)


def test_what_a_worker_overran_ends_with_it(measured: Measured) -> None:
    """The next one of its number enters the block anew; one that goes on does not."""
    for pid in (PID, PID + 1):
        measured.acquire(NOW, 60, pid=pid)
        measured.blocks.expired(pid, "b")
    measured.blocks.ended(PID)
    assert measured.one()["entered"] == 2
    for pid in (PID, PID + 1):
        for at in (70, 71):
            measured.acquire(NOW + at, 60, pid=pid)
        assert measured.one()["entered"] == 3


def test_unfinished_blocks_are_told_at_once(measured: Measured) -> None:
    """Before another round."""
    measured.acquire(NOW, 60)
    measured.blocks.ended(PID)
    assert measured.one()["unfinished"] == 1


def test_release_of_nothing(measured: Measured) -> None:
    """It is none."""
    measured.release(NOW)
    measured.acquire(NOW, 60)
    measured.release(NOW, "other")
    assert measured.one()["entered"] == 1
    assert measured.one()["first"]["left"] == 0


def test_deadline_in_the_far_past(measured: Measured) -> None:
    """The block did not take decades for that."""
    measured.acquire(NOW, -1.8e9)
    measured.blocks.expired(PID, "b")
    measured.release(NOW + 3)
    assert measured.one()["first"]["longest"] == pytest.approx(3, abs=0.12)


PIDS = st.sampled_from([1, 2, -3])
SCOPES = st.sampled_from(["a", "a@thread-1", "b"])
SECONDS = st.sampled_from([0.0, 0.01, 1.0, 60.0, 1e9]) | st.floats(0, 1e9)
CALLS = st.one_of(
    st.tuples(st.just("acquired"), PIDS, SCOPES, SECONDS | st.floats(-1e300, 1e300)),
    st.tuples(st.just("released"), PIDS, SCOPES, st.none()),
    st.tuples(st.just("expired"), PIDS, SCOPES, st.none()),
    st.tuples(st.just("ended"), PIDS, st.none(), st.none()),
    st.tuples(st.just("settle"), st.none(), st.none(), SECONDS),
)


@given(st.lists(CALLS))
def test_whatever_workers_do(calls: list[tuple[str, int, str, float]]) -> None:
    """Nothing is ever raised, which would lose requests; and every pass is counted once."""
    blocks, now = Blocks(NOW), NOW
    for name, pid, scope, seconds in [*calls, ("ended", 1, "", 0), ("ended", 2, "", 0)]:
        if name == "acquired":
            blocks.acquired(pid, None, scope, False, now + seconds, now)
        elif name == "settle":
            now += seconds
            blocks.settle(now)
        elif name == "ended":
            blocks.ended(pid)
        else:
            getattr(blocks, name)(pid, scope)
    blocks.ended(-3)
    blocks.settle(now)
    for record in json.loads(json.dumps(blocks.records())):
        gone_overdue = record["entered"] - record["left"] - record["unfinished"]
        assert 0 <= gone_overdue <= record["expired"] <= len(calls)
        assert sum(count for _, count in record["histogram"]) == record["left"]
        if record["left"]:
            assert 0 <= record["longest"] <= now - NOW + 0.1001


# --- bounds


def test_memory_is_bounded() -> None:
    """Of more than 1,000 scopes only the number is kept; of overrun ones the last 1,000."""
    measured = Measured()

    def fill(scopes: range) -> None:
        for number in scopes:
            measured.blocks.acquired(PID, None, f"scope {number}", False, NOW + 60, NOW)
            measured.release(NOW + 1.1 ** (number % 200 - 70), f"scope {number}")
            measured.blocks.acquired(PID, None, f"{number % 100}@thread-{number}", False, NOW, NOW)
            measured.blocks.expired(PID, f"{number % 100}@thread-{number}")

    tracemalloc.start()
    try:
        fill(range(5000))
        before, _ = tracemalloc.get_traced_memory()
        for scope in range(900):
            for bucket in range(40):
                measured.blocks.acquired(PID, None, f"scope {scope}", False, NOW + 60, NOW)
                measured.release(NOW + 1.1 ** (bucket - 70), f"scope {scope}")
        fill(range(5000, 15_000))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    records = measured.blocks.records()
    assert len(records) == 1000
    assert measured.blocks.unmeasured == 15_000 - 900
    assert sum(record["expired"] for record in records) == 15_000  # type: ignore[misc]
    # All 900 histograms have 40 buckets by now, some 0.9 MB; what came behind has added nothing.
    assert after - before < 2_000_000


def test_overrun_blocks_are_forgotten(measured: Measured) -> None:
    """All but the last 1,000; of the others nothing is told when they are left."""
    scopes = [f"b@thread-{number:x}" for number in range(1001)]
    for scope in scopes:
        measured.acquire(NOW, 60, scope)
        measured.blocks.expired(PID, scope)
    measured.release(NOW + 70, scopes[0])
    assert measured.one()["first"]["left"] == 0
    measured.release(NOW + 70, scopes[1])
    assert measured.one()["first"]["left"] == 1
