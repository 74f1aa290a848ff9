"""Which pictures show the same hang: those of many hosts, and of one job that hangs again."""

from __future__ import annotations

import itertools
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from elastic_timer._command.event_reader import Sighting
from elastic_timer._command.hangs import Hang, hangs_of
from tests.picture_support import NOW, WAITS, member, picture


def sighting(
    number: int,
    time: float = 0.0,
    seconds: float | None = 60.0,
    job: dict[str, Any] | None = None,
    **changes: Any,
) -> Sighting:
    """A picture of the four ranks of a host."""
    ranks = [
        member(rank, *WAITS, **{"seconds": seconds, **changes})
        for rank in range(4 * number, 4 * number + 4)
    ]
    return Sighting(
        NOW + time, ranks[0]["host"], picture(ranks, **{"world_size": 16, **(job or {})})
    )


def hosts_of(hangs: list[Hang]) -> list[list[str]]:
    return [[each["members"][0]["host"] for each in hang.pictures] for hang in hangs]


def test_clocks_that_differ() -> None:
    """By two seconds, and the deadlines by more: while blocks overlap it is one hang."""
    seen = [sighting(0, 2.0, 60), sighting(1, 0.0, 60), sighting(2, 31.5, 90), sighting(3, 55, 30)]
    [hang] = hangs_of(seen)
    assert (hang.time, hang.last) == (NOW, NOW + 55)
    assert hosts_of([hang]) == [["node-1", "node-0", "node-2", "node-3"]]


def test_later_hang() -> None:
    """Blocks that began after the others were seen are of another one."""
    assert hosts_of(hangs_of([sighting(0), sighting(1, 70, 60)])) == [["node-0"], ["node-1"]]
    # Give or take what clocks differ by.
    assert len(hangs_of([sighting(0), sighting(1, 65, 60)])) == 1
    assert len(hangs_of([sighting(0), sighting(1, 65.5, 60)])) == 2
    # Of a worker whose time is not over, and of one in no block, it does not count for how long.
    later = sighting(1, 70, 60)
    first, second, *_ = later.picture["members"]
    first["seconds"], first["expired"] = 500.0, False
    second["seconds"] = None
    assert len(hangs_of([sighting(0), later])) == 2
    # Nor where there are only such.
    for unknown in ({"seconds": None}, {"expired": False}):
        assert len(hangs_of([sighting(0), sighting(1, 5.5, **unknown)])) == 2


def test_same_ranks_in_other_processes() -> None:
    """A job that was started again at once."""
    again = sighting(0, 3.0, 1.0, pid=99)
    assert len(hangs_of([sighting(0), again])) == 2
    assert len(hangs_of([sighting(0), sighting(0, 3.0)])) == 1


def test_several_jobs() -> None:
    """At one time: of other runs, of other sizes where there is no run, of other attempts."""
    jobs: list[dict[str, Any]] = [
        {"run_id": "a"},
        {"run_id": "b"},
        {"run_id": None},
        {"run_id": None, "world_size": 8},
        {"run_id": "a", "restart_count": 1},
    ]
    hangs = hangs_of([sighting(host, job=job) for job in jobs for host in range(2)])
    assert hosts_of(hangs) == [["node-0", "node-1"]] * 5


def test_jobs_of_one_name() -> None:
    """A job without one is called "none" by torchrun; it has each of its ranks once."""
    one = [sighting(0, time, pid=7) for time in (0.0, 5.5)]
    other = [sighting(0, time, host="node-9", pid=7) for time in (0.5, 6.0)]
    assert hosts_of(hangs_of([*one, *other])) == [["node-0"] * 2, ["node-9"] * 2]


def test_picture_of_nobody() -> None:
    """It is no hang, and others are none the less."""
    nobody = Sighting(NOW - 1, "node-0", picture([]))
    assert hangs_of([nobody]) == []
    assert len(hangs_of([nobody, sighting(0)])) == 1


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 200), st.integers(1, 90)),
        min_size=1,
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_order_of_files_does_not_matter(
    seen: list[tuple[int, int, int]], rng: random.Random
) -> None:
    """All pictures are in one hang each, in the order of time, however they were read."""
    # No host takes two pictures at one moment.
    sightings = [sighting(*each) for each in {each[:2]: each for each in seen}.values()]
    hangs = hangs_of(sightings)
    assert sorted(itertools.chain(*hosts_of(hangs))) == sorted(each.host for each in sightings)
    assert [hang.time for hang in hangs] == sorted(hang.time for hang in hangs)
    assert all(hang.time <= hang.last for hang in hangs)
    mixed = sightings.copy()
    rng.shuffle(mixed)
    assert hangs_of(mixed) == hangs
