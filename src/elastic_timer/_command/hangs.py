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
        processes: Of each rank its host and its pid.
    """

    job: Job
    time: float
    last: float
    pictures: list[Picture]
    processes: dict[int, tuple[str, int]]

    def shows(self, sighting: Sighting) -> bool:
        """Whether a later picture may be one of this hang.

        The blocks of a hang overlap: the ranks wait for each other. What began after the others
        were seen is another hang, and so is one of other processes: of the same job later on, or of
        another one that has no name of its own.
        """
        if sighting.time - _longest(sighting.picture) > self.last + _SLACK:
            return False
        found = _processes(sighting.picture)
        return all(self.processes.get(rank, found[rank]) == found[rank] for rank in found)

    def add(self, sighting: Sighting) -> None:
        """Add a picture of this hang."""
        self.last = sighting.time
        self.pictures.append(sighting.picture)
        self.processes.update(_processes(sighting.picture))


def hangs_of(sightings: Iterable[Sighting]) -> list[Hang]:
    """The hangs that pictures show, in their order; pictures of nobody show none."""
    of_job: dict[tuple[object, ...], list[Hang]] = {}
    found: list[Hang] = []
    for sighting in sorted(sightings, key=_in_order):
        job = sighting.picture["job"]
        if not sighting.picture["members"]:
            continue
        hangs = of_job.setdefault((job["run_id"], job["world_size"], job["restart_count"]), [])
        hang = next((hang for hang in reversed(hangs) if hang.shows(sighting)), None)
        if hang is None:
            hang = Hang(job, sighting.time, sighting.time, [], {})
            hangs.append(hang)
            found.append(hang)
        hang.add(sighting)
    return found


def _in_order(sighting: Sighting) -> tuple[float, str, list[int]]:
    # Whatever the order of the files was, it comes out the same.
    return sighting.time, sighting.host, [member["pid"] for member in sighting.picture["members"]]


def _processes(picture: Picture) -> dict[int, tuple[str, int]]:
    return {member["rank"]: (member["host"], member["pid"]) for member in picture["members"]}


def _longest(picture: Picture) -> float:
    """For how long those whose time is over have been in their blocks."""
    return max(
        (member["seconds"] or 0.0 for member in picture["members"] if member["expired"]),
        default=0.0,
    )
