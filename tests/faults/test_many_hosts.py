"""`elastic-timer report` over the events of a thousand hosts."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.many_hosts import report
from tests.recorded_hosts import HOSTS, RANKS, STUCK, write_hosts


def test_a_thousand_hosts(tmp_path: Path) -> None:
    """The one rank that hangs them is named on one screen, though some of them were cut off.

    In seconds of the clock and MiB: that takes a tenth of either on a machine that is not busy.
    """
    missing = write_hosts(tmp_path)
    seconds, mebibytes, told = report(str(tmp_path))
    assert f"\nsuspect: rank {STUCK} (node-{STUCK // RANKS:04}, pid {4000 + STUCK}), " in told
    assert f"{HOSTS * RANKS - len(missing):,} ranks".replace(",", "") in told.replace(",", "")
    assert f"{missing[0]}-{missing[RANKS - 1]}" in told
    assert len(told.splitlines()) < 60
    assert seconds < 10
    assert mebibytes < 1024
