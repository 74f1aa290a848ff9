"""The table of what blocks took, made of the events of one host or of many."""

from __future__ import annotations

import math
from typing import Any

import pytest

from elastic_timer._command.block_table import block_table, measured, round_up

NONE: dict[str, Any] = {"left": 0, "longest": None, "pid": None, "rank": None, "histogram": []}


def durations(*seconds: float, pid: int = 4711, rank: int | None = None) -> dict[str, Any]:
    """What an event has on passes that took so long."""
    buckets = sorted(math.floor(math.log(each) / math.log(1.1)) for each in seconds)
    histogram = [[bucket, buckets.count(bucket)] for bucket in sorted(set(buckets))]
    found = {"left": len(seconds), "longest": max(seconds), "pid": pid, "rank": rank}
    return {**found, "histogram": histogram}


def block(
    scope: str,
    after: float | None,
    later: dict[str, Any] = NONE,
    first: dict[str, Any] = NONE,
    **more: int,
) -> dict[str, Any]:
    """What an event has on one block."""
    entered = later["left"] + first["left"] + sum(more.values())
    counts = {"scope": scope, "entered": entered, "expired": 0, "unfinished": 0, "after": after}
    return {**counts, **more, **later, "first": first}


def table(*blocks: dict[str, Any], **more: Any) -> list[str]:
    """The lines of a table on one host."""
    return block_table([{"blocks": blocks, "unmeasured": 0, "host": "a", **more}]).splitlines()


def test_table() -> None:
    """Aligned, the most frequent block first, by numbers that people read."""
    steps = durations(*[0.31] * 12_000, *[0.42] * 399, 1.9)
    lines = table(
        block("/job/ckpt.py#12", 60.0, durations(*[41.0] * 15, 52.1)),
        block("/job/train.py#86", 120.0, steps, durations(0.5)),
        block("few", 600.0, durations(*[11.0] * 12)),
        block("mine", 3600.0),
    )
    assert lines == [
        "scope        blocks  median     p99  longest    after  used  suggested",
        "train.py#86  12,401  0.30 s  0.40 s   1.90 s    120 s   2 %       60 s",
        "ckpt.py#12       16  39.2 s  52.1 s   52.1 s     60 s  87 %      300 s  too tight",
        "few              12  11.0 s  11.0 s   11.0 s    600 s   2 %    too few",
        "mine              0       -       -        -  3,600 s     -    too few",
    ]


@pytest.mark.parametrize(
    ("after", "longest", "first", "remark"),
    [
        (60, 30.0, 1.0, ""),
        (60, 30.6, 1.0, "too tight"),
        (60, 1.0, 31.0, "too tight, first 31.0 s"),
        (600, 0.6, 0.1, ""),
        (600, 0.59, 0.1, "generous"),
        (600, 0.59, 0.6, "first 0.60 s"),
        # Less is not suggested, so there is nothing to do about it.
        (60, 0.01, 0.01, ""),
    ],
)
def test_warnings(after: float, longest: float, first: float, remark: str) -> None:
    """Too tight above one half of the deadline, generous below a thousandth."""
    [_, line] = table(block("b", after, durations(*[longest] * 20), durations(first)))
    assert line.endswith(f" s  {remark}" if remark else " s"), line


def test_expired_are_told() -> None:
    """They may have hung, or have had too little time."""
    [_, line] = table(block("b", 60.0, durations(*[1.0] * 20), expired=2))
    assert line.endswith("  60 s  2 expired")


@pytest.mark.parametrize(
    ("later", "first", "suggested"),
    [
        ([1.0] * 15, [], "too few"),
        ([1.0] * 15, [1.0], "60 s"),
        ([1.0] * 15 + [13.0], [], "90 s"),
        # A first pass that is slower by far must not be killed by what is suggested.
        ([1.0] * 16, [100.0], "240 s"),
        # Each worker came once: there is nothing else to go by.
        ([], [40.0] * 16, "240 s"),
        ([], [40.0] * 15, "too few"),
    ],
)
def test_suggested(later: list[float], first: list[float], suggested: str) -> None:
    """Five times the longest, twice the longest first one, a minute; rounded up."""
    [_, line] = table(
        block("b", None, durations(*later) if later else NONE, durations(*first) if first else NONE)
    )
    assert f"  {suggested}" in line, line


@pytest.mark.parametrize(
    ("seconds", "rounded"),
    [
        (60, 60),
        (60.1, 90),
        (90.1, 120),
        (121, 180),
        (181, 240),
        (260.5, 300),
        (301, 600),
        (601, 900),
        (901, 1200),
        (1201, 1800),
        (1801, 2700),
        (2701, 3600),
        (3601, 7200),
        (86400, 86400),
        (86401, 2 * 86400),
    ],
)
def test_round_numbers(seconds: float, rounded: int) -> None:
    """Minutes, hours and days, never less."""
    assert round_up(seconds) == rounded


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "<1 ms"),
        (0.001, "1 ms"),
        (0.0312, "31 ms"),
        (0.09945, "99 ms"),
        (0.1, "0.10 s"),
        (0.3, "0.30 s"),
        (10.0, "10.0 s"),
        (10.56, "10.6 s"),
        (12.34, "12.3 s"),
        (100.0, "100 s"),
        (100.7, "101 s"),
        (4321.0, "4,321 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Three digits are enough."""
    [_, line] = table(block("b", 1e5, durations(*[seconds] * 16)))
    assert f"  {text}  " in line


def test_short_names() -> None:
    """A scope is shown without its folder where that tells it from the others."""
    scopes = ["/job/a/train.py#1", "/job/b/train.py#1", "/job/b/data.py#1", "a/", "x"]
    lines = table(*(block(scope, 1.0) for scope in scopes))
    shown = ["/job/a/train.py#1", "/job/b/train.py#1", "data.py#1", "a/", "x"]
    assert sorted(line.split()[0] for line in lines[1:]) == sorted(shown)


def test_scope_that_is_no_line() -> None:
    """A scope can't clear the terminal, or pretend to be another line."""
    lines = table(block("\x1b[2Jfree\nrow", 1.0))
    assert len(lines) == 2
    assert lines[1].startswith("[2Jfree row  ")


def test_slowest_is_named() -> None:
    """By rank, else by pid, and by host where there are several; not where there is one worker."""
    once = durations(2.0, 2.0, pid=1)
    [_, line] = table(block("b", 9.0, durations(3.0, pid=2, rank=5), once))
    assert line.endswith("slowest: rank 5")
    [_, line] = table(block("b", 9.0, durations(3.0, pid=2), once))
    assert line.endswith("slowest: pid 2")
    [_, line] = table(block("b", 9.0, durations(3.0, pid=2), durations(2.0)))
    assert "slowest" not in line


def test_hosts_are_merged() -> None:
    """Counts and histograms are added, the longest is that of the slowest host."""
    events = [
        {
            "host": host,
            "blocks": [
                block(
                    "b",
                    after,
                    durations(*[typical] * 99, longest, rank=rank),
                    durations(0.5, rank=rank),
                    expired=1,
                )
            ],
            "unmeasured": 2000,
        }
        for host, rank, after, typical, longest in (
            ("a", 0, 60.0, 0.2, 2.0),
            ("b", 8, 120.0, 0.2, 9.0),
            ("c", 16, 60.0, 0.4, 3.0),
        )
    ]
    _, line, more = block_table(events).splitlines()
    cells = line.split("  ")
    assert [cell.strip() for cell in cells if cell] == [
        "b",
        "306",
        "0.21 s",
        "0.40 s",
        "9.00 s",
        "120 s",
        "8 %",
        "60 s",
        "3 expired, slowest: rank 8 on b",
    ]
    assert more == "more than can be measured: 6,000 blocks of other scopes"


def test_short_deadlines_and_durations() -> None:
    """What is not known is not taken for a second."""
    [_, line] = table(block("b", 0.8, durations(*[0.2] * 20)))
    assert line.split()[-6:] == ["0.8", "s", "25", "%", "60", "s"]
    [_, line] = table(block("b", None, durations(*[0.2] * 20)))
    assert line.split()[-5:] == ["s", "-", "-", "60", "s"]
    [_, line] = table(block("b", 0.8), block("b", None, durations(*[0.2] * 20)))
    assert "  0.8 s  " in line


@pytest.mark.parametrize(("longest", "used"), [(1.0, "  1 %  "), (0.5, "  0.5 %  ")])
def test_small_shares(longest: float, used: str) -> None:
    """Below a hundredth with one more digit."""
    [_, line] = table(block("b", 100.0, durations(*[longest] * 20)))
    assert used in line


def test_first_of_equally_slow_hosts() -> None:
    """It is the one that is named."""
    measured = [block("b", 9.0, durations(3.0, 3.0), durations(1.0, 1.0))]
    events = [{"host": host, "blocks": measured, "unmeasured": 0} for host in "ab"]
    assert block_table(events).endswith("slowest: pid 4711 on a")


def test_event_is_read() -> None:
    """Of what anybody may have written, what the table needs, as plain values."""
    later = {"left": 2, "longest": 3, "pid": 5, "rank": 7, "histogram": [[2000, 1], [-2000, 1]]}
    given = {"scope": "b", "entered": 3, "expired": 1, "unfinished": 9, "after": 60, "more": 1}
    event = {"time": 1, "since": 0, "host": "a", "run_id": "r", "unmeasured": 7, "more": 1}
    found = measured({**event, "blocks": [{**given, **later, "first": NONE}]})
    assert found == {
        "time": 1.0,
        "since": 0.0,
        "host": "a",
        "run_id": "r",
        "blocks": [
            {
                "scope": "b",
                "entered": 3,
                "expired": 1,
                "after": 60.0,
                **later,
                # No duration is outside of these.
                "histogram": [(1000, 1), (-1000, 1)],
                "first": NONE,
            }
        ],
        "unmeasured": 7,
    }


@pytest.mark.parametrize("longest", [None, -0.001, 1e15, math.nan])
def test_event_with_no_duration(longest: float | None) -> None:
    """Where there are some, the longest is one."""
    event = {"time": 1, "since": 0, "host": "a", "run_id": "r", "unmeasured": 0}
    given = {"left": 1, "pid": 5, "rank": None, "histogram": [[0, 1]]}
    for value in (0.0, 9e14):
        measured({**event, "blocks": [block("b", value, {**given, "longest": value})]})
    with pytest.raises(ValueError, match="duration"):
        measured({**event, "blocks": [block("b", 1.0, {**given, "longest": longest})]})
    if longest is not None:
        with pytest.raises(ValueError, match="duration"):
            measured({**event, "blocks": [block("b", longest)]})
