"""Which pictures show the same hang: of many hosts, whose clocks differ. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic_timer._command.event_reader import Sighting
    from elastic_timer._evidence.picture import Job, Picture

# Clocks of hosts are apart by two seconds at most; a host takes no two pictures within five.
_SLACK = 5.0


@dataclasses.dataclass
class Hang:
    """One hang of a job.

    Attributes:
        job: The job.
        time: When it was first seen, in epoch seconds.
        last: When it was last seen.
        pictures: What was seen, in its order.
        pids: Of each rank on each host the process.
    """

    job: Job
    time: float
    last: float
    pictures: list[Picture]
    pids: dict[tuple[str, int], int]

    def shows(self, sighting: Sighting) -> bool:
        """Whether a later picture may be one of this hang.

        The blocks of a hang overlap: the ranks wait for each other. What began after the others
        were seen is another hang, and so is one of other processes.
        """
        if sighting.time - _longest(sighting.picture) > self.last + _SLACK:
            return False
        members = sighting.picture["members"]
        return all(
            self.pids.get((member["host"], member["rank"]), member["pid"]) == member["pid"]
            for member in members
        )

    def add(self, sighting: Sighting) -> None:
        """Add a picture of this hang."""
        self.last = sighting.time
        self.pictures.append(sighting.picture)
        for member in sighting.picture["members"]:
            self.pids[member["host"], member["rank"]] = member["pid"]


def hangs_of(sightings: Iterable[Sighting]) -> list[Hang]:
    """The hangs that pictures show, in their order; pictures of nobody show none."""
    latest: dict[tuple[object, ...], Hang] = {}
    found: list[Hang] = []
    for sighting in sorted(sightings, key=_in_order):
        job = sighting.picture["job"]
        if not sighting.picture["members"]:
            continue
        # Of the same job are those with the same run id or, without one, with the same world size.
        size = job["world_size"] if job["run_id"] is None else None
        identity = job["run_id"], size, job["restart_count"]
        hang = latest.get(identity)
        if hang is None or not hang.shows(sighting):
            hang = latest[identity] = Hang(job, sighting.time, sighting.time, [], {})
            found.append(hang)
        hang.add(sighting)
    return found


def _in_order(sighting: Sighting) -> tuple[float, str, list[int]]:
    # Whatever the order of the files was, it comes out the same.
    return sighting.time, sighting.host, [member["pid"] for member in sighting.picture["members"]]


def _longest(picture: Picture) -> float:
    """For how long those whose time is over have been in their blocks."""
    return max(
        (member["seconds"] or 0.0 for member in picture["members"] if member["expired"]),
        default=0.0,
    )
