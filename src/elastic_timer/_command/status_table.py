"""What `elastic-timer status` shows of a server, as lines of text. Pure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from elastic_timer._evidence.facts import one_line

_BAR = 20
_SHORT_BAR = 10
_SHORTEST_SCOPE = 12

# From which share of its time on a timer is yellow, and red.
_YELLOW = 0.5
_RED = 0.8

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}

# Stopped, traced, in the kernel where nothing reaches it, ended.
_BAD_STATES = ("T", "t", "D", "Z", "X")


class Style(NamedTuple):
    """What lines are made for.

    Attributes:
        width: How many columns there are; None for as many as it takes.
        is_coloured: Whether to colour them.
    """

    width: int | None = None
    is_coloured: bool = False

    def paint(self, text: str, colour: str) -> str:
        """The text in a colour, if there are any."""
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self.is_coloured else text

    def cut(self, text: str) -> str:
        """The text without what does not fit on a line."""
        return text if self.width is None else text[: self.width]


def table(server: Mapping[str, Any], style: Style) -> list[str]:
    """A line on the server, and one for each timer, the one with the least time left first.

    Args:
        server: What it has answered, and of each timer the state of its process.
        style: What the lines are made for.
    """
    head = "  ".join(
        [
            f"run {one_line(server['run_id'])}",
            f"pid {server['pid']}",
            f"up {_duration(server['uptime'])}",
            *(
                f"{server[f'{what}_count']} {what}{'s' * (server[f'{what}_count'] != 1)}"
                for what in ("worker", "timer")
            ),
            f"{server['reaped_count']} reaped",
        ]
    )
    lines = [style.paint(style.cut(head), "bold")]
    if server["timers"]:
        lines += _rows(sorted(server["timers"], key=lambda timer: timer["left"]), style)
    return lines


def _rows(timers: list[Mapping[str, Any]], style: Style) -> list[str]:
    left = ["LEFT", *(_seconds(timer["left"], 1) for timer in timers)]
    after = ["AFTER", *(_seconds(timer["after"], int(timer["after"] < 10)) for timer in timers)]
    scopes = ["SCOPE", *(_short_name(timer["scope"]) for timer in timers)]
    rank = ["RANK", *(_or_dash(timer["rank"]) for timer in timers)]
    pid = ["PID", *(str(timer["pid"]) for timer in timers)]
    state = ["STATE", *(_or_dash(timer["state"]) for timer in timers)]
    entered = ["PASS", *(_or_dash(timer["pass"]) for timer in timers)]

    others = sum(2 + max(map(len, column)) for column in (left, after, rank, pid, state, entered))
    # One blank only in front of AFTER, which is seldom as wide as its column.
    room = None if style.width is None else style.width - others + 1
    bar, longest = _BAR, max(map(len, scopes))
    if room is not None:
        if longest + 2 + _BAR > room:
            bar = _SHORT_BAR
        longest = min(longest, max(room - bar - 2, _SHORTEST_SCOPE))
    scopes = [_shortened(scope, longest) for scope in scopes]

    shares = [_share(timer) for timer in timers]
    used = [
        "USED".ljust(bar),
        *(("#" * math.ceil(share * bar)).ljust(bar, "-") for share in shares),
    ]
    lines = []
    for row in range(len(timers) + 1):
        time_left = f"{_aligned(left, row, row > 0)}  {used[row]}"
        letter = _aligned(state, row, False)
        if row:
            time_left = style.paint(time_left, _colour(shares[row - 1]))
            if state[row] in _BAD_STATES:
                letter = style.paint(letter, "red")
        line = (
            f"{time_left} {_aligned(after, row, row > 0)}  {_aligned(scopes, row, False)}  "
            f"{_aligned(rank, row, True)}  {_aligned(pid, row, True)}  {letter}  {entered[row]}"
        )
        lines.append(line if row else style.paint(line, "dim"))
    return lines


def _aligned(column: list[str], row: int, to_the_right: bool) -> str:
    width = max(map(len, column))
    return column[row].rjust(width) if to_the_right else column[row].ljust(width)


def _share(timer: Mapping[str, Any]) -> float:
    """How much of its time a timer has used, from 0 to 1."""
    after: float = timer["after"]
    return min(max(1 - timer["left"] / after, 0.0), 1.0) if after > 0 else 1.0


def _colour(share: float) -> str:
    return "red" if share >= _RED else "yellow" if share >= _YELLOW else "green"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _seconds(seconds: float, digits: int) -> str:
    return f"{seconds:.{digits}f} s" if abs(seconds) < 10_000 else f"{seconds / 3600:.1f} h"


def _duration(seconds: float) -> str:
    minutes, hours, days = (int(seconds // unit) for unit in (60, 3600, 86400))
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _short_name(scope: str) -> str:
    """A scope without the folder of the file that it names."""
    return one_line(os.path.basename(scope) if scope.startswith("/") else scope)


def _shortened(text: str, longest: int) -> str:
    # Its end has the number of the line.
    return text if len(text) <= longest else ".." + text[len(text) - longest + 2 :]
