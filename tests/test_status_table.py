"""The table of `elastic-timer status` at its limits: widths, shares, states, times."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_timer._command.status_table import Style, table
from tests.test_status import server_with


def rows(*timers: dict[str, Any], width: int | None = None) -> list[str]:
    """The lines below the one on the server, the columns' names first."""
    return table(server_with(*timers), Style(width))[1:]


def colours(**timer: Any) -> list[str]:
    """What of a timer's row is in which colour."""
    row = table(server_with(timer), Style(None, True))[2]
    return [part.partition("m")[0] for part in row.split("\x1b[")[1::2]]


@pytest.mark.parametrize(
    ("left", "colour"), [(10.1, "32"), (10.0, "33"), (4.1, "33"), (4.0, "31"), (-1.0, "31")]
)
def test_colours_change_at(left: float, colour: str) -> None:
    """Half of the time, and four fifths."""
    assert colours(after=20.0, left=left) == [colour]


@pytest.mark.parametrize("state", ["T", "t", "D", "Z", "X"])
def test_states_that_go_nowhere(state: str) -> None:
    """Each of them is red, whatever time is left; others have no colour."""
    assert colours(state=state, after=60.0, left=59.0) == ["32", "31"]
    assert colours(state="S", after=60.0, left=59.0) == ["32"]


@pytest.mark.parametrize(
    ("after", "shown"),
    [(9.94, "9.9 s"), (10.0, "10 s"), (10.9, "11 s"), (9999.0, "9999 s"), (10_000.0, "2.8 h")],
)
def test_full_times(after: float, shown: str) -> None:
    """Below 10 s with a tenth; from 10,000 s on in hours."""
    [_, row] = rows({"after": after, "left": 1.0, "scope": "s"})
    assert row.rpartition("  s")[0].endswith(f" {shown}")


def test_long_times() -> None:
    """An hour has 3,600 seconds, also of many of them."""
    [_, row] = rows({"after": 3600.0 * 5000, "left": 3600.0 * 4000})
    assert row.startswith("4000.0 h  ####---------------- 5000.0 h  ")
    [_, row] = rows({"after": 10_000.5, "left": 10_000.5})
    assert row.startswith("2.8 h  -------------------- 2.8 h")


def test_uptime_of_days() -> None:
    """A day has 24 hours."""
    head = table(server_with(uptime=86_400.0 * 900), Style())[0]
    assert "  up 900 d 0 h  " in head


def test_columns_are_as_wide_as_their_widest() -> None:
    """The first column's name too stands above what is in it, from the left."""
    assert rows(
        {"after": 5.0, "left": 1.0, "rank": 10, "pid": 7},
        {"after": 3600.0, "left": 700.0, "rank": 9, "pid": 1_000_000, "pass": 33},
    ) == [
        "LEFT     USED                 AFTER   SCOPE  RANK      PID  STATE  PASS",
        "  1.0 s  ################----  5.0 s  s        10        7  S      1",
        "700.0 s  #################--- 3600 s  s         9  1000000  S      33",
    ]


def test_room_for_the_scope() -> None:
    """As much as there is: the bar gets shorter first, and then it is cut off at its beginning."""
    scope = "/home/me/" + "long" * 10 + ".py#1234"
    short = scope.rpartition("/")[2]
    names, row = rows({"scope": scope})
    assert f"  ##########----------  60 s  {short}  " in row
    assert rows({"scope": scope}, width=len(names)) == [names, row]
    names, row = rows({"scope": scope}, width=len(names) - 1)
    assert f"  #####-----  60 s  {short}  " in row
    assert rows({"scope": scope}, width=len(names)) == [names, row]
    cut_names, cut = rows({"scope": scope}, width=len(names) - 1)
    assert len(cut_names) == len(names) - 1
    assert f"  #####-----  60 s  ..{short[3:]}  " in cut
    # What is left of it is enough to tell the line of the program.
    assert "  #####-----  60 s  ..ng.py#1234  " in rows({"scope": scope}, width=10)[1]
