"""What the tests of pictures and of `report` share: ranks of a job, and events with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from elastic_timer._evidence.picture import Member, Picture
from elastic_timer._evidence.stacks import Frame, ThreadStack

RECORDED = Path(__file__).parent / "recorded"
"""Jobs of three ranks with torch 2.13 and gloo, as py-spy saw them; the last rank hangs them."""

TORCH = "/opt/venv/lib/python3.11/site-packages/torch"
NOW = 1795150503.25


def frame(place: str) -> Frame:
    """A frame from what the text of an answer has: `step (train.py:88)`."""
    function, _, where = place[:-1].partition(" (")
    file, _, line = where.rpartition(":")
    return {
        "file": file if "/" in file else f"/home/me/{file}",
        "line": int(line),
        "function": function,
    }


def thread(*places: str, **changes: Any) -> ThreadStack:
    """A thread in these places, innermost first, as the text of an answer has them."""
    return cast(
        "ThreadStack",
        {
            "id": 1,
            "name": "MainThread",
            "active": False,
            "gil": False,
            "frames": [frame(place) for place in reversed(places)],
            **changes,
        },
    )


MAIN = ("main (train.py:71)", "<module> (train.py:99)")
WRAPPER = f"_exception_logger.<locals>.wrapper ({TORCH}/distributed/c10d_logger.py:83)"
WAITS = (
    f"all_reduce ({TORCH}/distributed/distributed_c10d.py:2950)",
    WRAPPER,
    "step (train.py:88)",
)
BARRIER = (f"barrier ({TORCH}/distributed/distributed_c10d.py:5356)", WRAPPER, "step (train.py:90)")
LOADS = ("load (data.py:41)", "__next__ (data.py:77)")


def member(rank: int, *places: str, **changes: Any) -> Member:
    """A rank in pass 7 of the block `train.py#86`, in these places of its main thread."""
    return cast(
        "Member",
        {
            "host": f"node-{rank // 4}",
            "pid": 4000 + rank,
            "rank": rank,
            "local_rank": rank % 4,
            "scope": "/home/me/train.py#86",
            "passes": {"/home/me/train.py#86": 7},
            "seconds": 60.0,
            "expired": True,
            "state": "S",
            "stacks": [thread(*places, *MAIN)] if places else None,
            "stacks_missing": None if places else "switched off",
            "descendants": [],
            **changes,
        },
    )


def picture(members: Sequence[Member], **job: Any) -> Picture:
    """A picture of a job that has no other ranks."""
    size = max((each["rank"] for each in members), default=0) + 1
    return cast(
        "Picture",
        {
            "job": {"run_id": "nightly", "world_size": size, "restart_count": 0, **job},
            "members": list(members),
        },
    )


def recorded(name: str) -> list[Member]:
    """The ranks of a recorded job."""
    return cast("list[Member]", json.loads((RECORDED / f"{name}.json").read_text()))


def event(
    seen: Picture, time: float = NOW, host: str | None = None, **changes: Any
) -> dict[str, Any]:
    """The event "job hangs"."""
    return {
        "time": time,
        "event": "job hangs",
        "run_id": "run-4710",
        **dict.fromkeys(("pid", "scope", "expiration_time", "signal")),
        "host": host or seen["members"][0]["host"],
        "picture": seen,
        **changes,
    }
