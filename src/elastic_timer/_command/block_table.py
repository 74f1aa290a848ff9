"""The table of what blocks took, of any number of hosts, with the deadlines that fit. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from elastic_timer._evidence.facts import one_line
from elastic_timer._server.blocks import percentile

# Of fewer passes the longest tells little.
_ENOUGH = 16
# The suggested deadline is so many times the longest pass, and so many seconds at least.
_SPARE = 5
_LEAST = 60
# Of a deadline, the shares used by which it is too tight, and generous.
_TIGHT = 0.5
_GENEROUS = 0.001

# More seconds than a float can be rounded of to whole ones.
_LONGEST = 1e15

_MINUTES = (1, 1.5, 2, 3, 4, 5, 10, 15, 20, 30, 45)

_COLUMNS = ("scope", "blocks", "median", "p99", "longest", "after", "used", "suggested")


class Measured(TypedDict):
    """What an event "blocks" tells."""

    time: float
    since: float
    host: str
    run_id: str
    blocks: list[Mapping[str, Any]]
    unmeasured: int


class _Durations:
    """What the passes of a block took, on all hosts."""

    def __init__(self) -> None:
        self.left = 0
        self.longest = 0.0
        self.slowest: tuple[int | None, int | None, str | None] | None = None
        self.histogram: Counter[int] = Counter()

    def add(self, record: Mapping[str, Any], host: str | None) -> None:
        self.left += record["left"]
        if record["left"] and (self.slowest is None or record["longest"] > self.longest):
            self.longest = record["longest"]
            self.slowest = record["rank"], record["pid"], host
        self.histogram.update(dict(record["histogram"]))

    def percentile(self, share: float) -> float | None:
        found = percentile(self.histogram.items(), share)
        return None if found is None else min(found, self.longest)


class _Block:
    def __init__(self) -> None:
        self.entered = self.expired = 0
        self.after = 0.0
        self.first, self.later = _Durations(), _Durations()

    def add(self, record: Mapping[str, Any], host: str | None) -> None:
        self.entered += record["entered"]
        self.expired += record["expired"]
        self.after = max(self.after, record["after"] or 0.0)
        self.first.add(record["first"], host)
        self.later.add(record, host)

    def usual(self) -> _Durations:
        """What the passes took but for the first ones, unless no worker came a second time."""
        return self.later if self.later.left else self.first

    def used(self) -> float | None:
        """The share of its deadline that the longest pass has used, the first ones among them."""
        if not self.after or not self.usual().left:
            return None
        return max(self.first.longest, self.later.longest) / self.after

    def suggested(self) -> int | None:
        """The deadline that fits, in seconds; None where too little is known."""
        if self.first.left + self.later.left < _ENOUGH:
            return None
        # The first passes may be longer by far, and are not to come near it.
        needed = max(_SPARE * self.usual().longest, self.first.longest / _TIGHT)
        return round_up(max(needed, _LEAST))


def block_table(events: Iterable[Mapping[str, Any]]) -> str:
    """The table as lines of text.

    Args:
        events: The last event "blocks" of each server. Where they have a `host`, and it
            is not always the same, those of the slowest passes are told.
    """
    events = list(events)
    hosts = {event.get("host") for event in events}
    blocks: dict[str, _Block] = {}
    for event in events:
        host = event.get("host") if len(hosts) > 1 else None
        for record in event["blocks"]:
            blocks.setdefault(record["scope"], _Block()).add(record, host)
    names = _short(blocks)
    order = sorted(blocks, key=lambda scope: (-blocks[scope].entered, scope))
    rows = [(*_cells(names[scope], blocks[scope]), _remarks(blocks[scope])) for scope in order]
    lines = _aligned([(*_COLUMNS, ""), *rows])
    unmeasured = sum(event["unmeasured"] for event in events)
    if unmeasured:
        lines.append(f"more than can be measured: {unmeasured:,} blocks of other scopes")
    return "\n".join(lines)


def measured(event: Mapping[str, Any]) -> Measured:
    """What an event has, of which it is not known who wrote it.

    Raises:
        KeyError, OverflowError, TypeError, ValueError: It is not as it should be.
    """
    return {
        "time": float(event["time"]),
        "since": float(event["since"]),
        "host": str(event["host"]),
        "run_id": str(event["run_id"]),
        "blocks": [
            {
                "scope": str(block["scope"]),
                "entered": int(block["entered"]),
                "expired": int(block["expired"]),
                "after": _seconds(block["after"]),
                **_durations(block),
                "first": _durations(block["first"]),
            }
            for block in event["blocks"]
        ],
        "unmeasured": int(event["unmeasured"]),
    }


def _durations(given: Mapping[str, Any]) -> Mapping[str, Any]:
    found = {
        "left": int(given["left"]),
        "longest": _seconds(given["longest"]),
        "pid": None if given["pid"] is None else int(given["pid"]),
        "rank": None if given["rank"] is None else int(given["rank"]),
        # No duration is outside of these buckets, and no number too large for a float.
        "histogram": [
            (max(-1000, min(int(number), 1000)), int(count)) for number, count in given["histogram"]
        ],
    }
    if found["left"] and found["longest"] is None:
        raise ValueError("the longest of some durations is missing")
    return found


def _seconds(given: Any) -> float | None:
    """Seconds, or None where there are none."""
    seconds = None if given is None else float(given)
    if seconds is not None and not 0 <= seconds < _LONGEST:
        raise ValueError(f"not a duration: {seconds}")
    return seconds


def round_up(seconds: float) -> int:
    """The next round number of seconds: of minutes, from an hour on of hours, then of days."""
    for minutes in _MINUTES:
        if seconds <= 60 * minutes:
            return int(60 * minutes)
    unit = 3600 if seconds <= 86400 else 86400
    return math.ceil(seconds / unit) * unit


def _cells(name: str, block: _Block) -> tuple[str, ...]:
    used, suggested, usual = block.used(), block.suggested(), block.usual()
    return (
        name,
        f"{block.entered:,}",
        _duration(usual.percentile(0.5)),
        _duration(usual.percentile(0.99)),
        _duration(usual.longest if usual.left else None),
        f"{block.after:,.10g} s" if block.after else "-",
        "-" if used is None else f"{100 * used:,.{0 if used >= 0.01 else 1}f} %",
        "too few" if suggested is None else f"{suggested:,} s",
    )


def _remarks(block: _Block) -> str:
    used, remarks = block.used(), []
    if used is not None and used > _TIGHT:
        remarks.append("too tight")
    # What is asked for can't be less than what would be suggested.
    if used is not None and used < _GENEROUS and block.after > _LEAST:
        remarks.append("generous")
    if block.expired:
        remarks.append(f"{block.expired:,} expired")
    if block.later.left and block.first.longest > block.later.longest:
        remarks.append(f"first {_duration(block.first.longest)}")
    if block.first.left > 1 and (slowest := block.usual().slowest):  # There are several workers.
        rank, pid, host = slowest
        who = f"pid {pid}" if rank is None else f"rank {rank}"
        remarks.append(f"slowest: {who}" + (f" on {host}" if host else ""))
    return ", ".join(remarks)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 0.001:
        return "<1 ms"
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    digits = 2 if seconds < 10 else 1 if seconds < 100 else 0
    return f"{seconds:,.{digits}f} s"


def _short(scopes: Iterable[str]) -> dict[str, str]:
    """Each scope on one line, without its folder as far as that tells it from all others."""
    scopes = list(scopes)
    last = {scope: scope.rpartition("/")[2] for scope in scopes}
    often = Counter(last.values())
    return {
        scope: one_line(last[scope] if last[scope] and often[last[scope]] == 1 else scope)
        for scope in scopes
    }


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The columns one below the other: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for scope, *numbers, remarks in rows:
        cells = [scope.ljust(widths[0])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=False)]
        lines.append("  ".join([*cells, remarks]).rstrip())
    return lines
