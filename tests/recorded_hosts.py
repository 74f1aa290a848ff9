"""The events of a hang of very many hosts, made of those that two hosts have recorded."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

HOSTS = 1000
RANKS = 8
"""Of each host."""

STUCK = 4321
"""The rank that hangs all others."""

CLOCKS = 2.0
"""How many seconds the clocks of two hosts are apart at most."""

_RECORDED = Path(__file__).parent / "recorded_hang"
_RECORDED_STUCK = 6


def write_hosts(folder: str | os.PathLike[str], hosts: int = HOSTS) -> list[int]:
    """Write a file of events for each host.

    Returns:
        The ranks of the hosts that were cut off in the middle of that line, of which no file tells.
    """
    events = [json.loads(line) for line in (_RECORDED / "node-b.jsonl").read_text().splitlines()]
    [hang] = [event for event in events if event["event"] == "job hangs"]
    members = {member["rank"]: member for member in hang["picture"]["members"]}
    waits = next(member for rank, member in members.items() if rank != _RECORDED_STUCK)
    chance = random.Random(STUCK)
    missing: list[int] = []
    for number in range(hosts):
        ranks = range(number * RANKS, (number + 1) * RANKS)
        event = _on_host(
            hang,
            f"node-{number:04}",
            [(rank, members[_RECORDED_STUCK] if rank == STUCK else waits) for rank in ranks],
            hosts * RANKS,
        )
        event["time"] += chance.uniform(0, CLOCKS)
        line = json.dumps(event) + "\n"
        if number % 50 == 7:
            line = line[: len(line) // 2]
            missing += ranks
        Path(folder, f"node-{number:04}.jsonl").write_text(line)
    return missing


def _on_host(
    event: dict[str, Any], host: str, ranks: list[tuple[int, dict[str, Any]]], world_size: int
) -> dict[str, Any]:
    """The event, as a host would have it that has these ranks, each as another one was seen."""
    place = {"host": host}
    members = [
        {**seen, **place, "rank": rank, "local_rank": rank % RANKS, "pid": 4000 + rank}
        for rank, seen in ranks
    ]
    job = {**event["picture"]["job"], "world_size": world_size}
    return {**event, **place, "picture": {**event["picture"], "job": job, "members": members}}
