"""Jobs of torchrun with a real process group, one rank stuck: the right one is named.

Some of what `python -m tests.interop.who_hangs` measures.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.conftest import Launch, read_lines
from tests.interop.who_hangs import TOGETHER, command, is_right, verdict

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")

JOBS = [
    (2, "sleep", 1),
    (3, "another collective", 0),
    (2, "never enters", 1),
    (3, "data loader", 2),
    (3, TOGETHER, None),
]


@pytest.mark.parametrize(("ranks", "kind", "stuck"), JOBS)
def test_the_stuck_rank_is_named(
    ranks: int, kind: str, stuck: int | None, launch: Launch, tmp_path: Path
) -> None:
    """In the events as in the log, and the stacks of all ranks are there; nobody without one."""
    events = tmp_path / "events"
    job = launch(*command(events, ranks, kind, stuck, after=2.0)[1:])
    job.wait()
    result = {"ranks": ranks, "kind": kind, "stuck": stuck, **verdict(read_lines(events), ranks)}
    assert is_right(result), (result, job.output)
    assert result["without_stacks"] == []
    assert result["pictures"] == 1
    named = "no suspect: " if stuck is None else f"suspect: rank {stuck} ("
    assert f"\n{named}" in job.output
