"""Reads what `run --events` has written on any number of hosts, and keeps what `report` needs.

A line takes many times longer to parse than to look through. Most lines of a hang are the evidence
on each expired worker, so only those are parsed that may be wanted. A host that was cut off leaves
a line without its end, and where it went on writing later, the next one behind it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from elastic_timer._command.block_table import Measured, measured

if TYPE_CHECKING:
    from elastic_timer._evidence.expiry import Descendant
    from elastic_timer._evidence.picture import Member, Picture
    from elastic_timer._evidence.stacks import Frame, ThreadStack

_PICTURE = "job hangs"
_BLOCKS = "blocks"
# How such an event begins behind its time. Of many of one server the last is wanted.
_BLOCKS_EVENT = re.compile(rb'\{"time": [^,]+, "event": "blocks", (.*?), "blocks": ')
# Whatever else a file is, no more of it is in memory at once.
_LONGEST_LINE = 64 << 20
# What each event has.
_EVENT = b'"event"'
# How an event begins, and how many are looked for behind one that has no end.
_BEGINNING = b'{"time"'
_MOST_BEGINNINGS = 8

# No clock is so wrong, and no date can be made of more, in seconds.
_FAR = 1e12

_T = TypeVar("_T")


class Sighting(NamedTuple):
    """A picture of a job, and when (epoch seconds) and where it was taken."""

    time: float
    host: str
    picture: Picture


@dataclasses.dataclass
class File:
    """A file of events.

    Attributes:
        path: Where it is.
        error: Why it could not be read; None if it was.
        broken: How many of its lines were wanted and are no events, or have no end.
    """

    path: str
    error: str | None = None
    broken: int = 0


class EventReader:
    """Reads files of events, one after the other.

    Attributes:
        files: Those that were read.
        sightings: The pictures in them.
        blocks: What the blocks of each server's workers took, by the last that was told of it.
    """

    def __init__(self) -> None:
        self.files: list[File] = []
        self.sightings: list[Sighting] = []
        self.blocks: dict[tuple[str, str, float], Measured] = {}
        # The ranks of a job are mostly at few places: their stacks are kept once.
        self._known: dict[tuple[tuple[str, int, str], ...], list[Frame]] = {}

    def read(self, path: str) -> None:
        """Read a file; where that fails it is noted in `files`."""
        file = File(path)
        self.files.append(file)
        last: dict[bytes, bytes] = {}
        try:
            with open(path, "rb") as stream:
                line, has_any = b"", False
                for line in _lines(stream):
                    has_any = has_any or _EVENT in line
                    if _PICTURE.encode() in line:
                        file.broken += not self._take(line)
                    elif not line.endswith(b"\n"):
                        file.broken += 1
                    elif match := _BLOCKS_EVENT.match(line):
                        last[match[1]] = line
                if line and not has_any:
                    file.error = "there are no events in it"
        except OSError as error:
            file.error = error.strerror or str(error)
        for line in last.values():
            file.broken += not self._take(line)

    def _take(self, line: bytes) -> bool:
        """Keep what a line tells, if that is wanted; whether all of it was an event."""
        start = 0
        for _ in range(_MOST_BEGINNINGS):
            try:
                self._keep(json.loads(line[start:]))
                return start == 0
            # Of deep nesting json makes a RecursionError, of a huge number float an OverflowError.
            except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
                start = line.find(_BEGINNING, start + 1)
                if start < 0:
                    break
        return False

    def _keep(self, event: Any) -> None:
        if _a(dict, event)["event"] == _PICTURE:
            time = _seconds(event["time"])
            picture = self._picture(event["picture"])
            self.sightings.append(Sighting(time, _a(str, event["host"]), picture))
        elif event["event"] == _BLOCKS:
            found = measured(event)
            key = found["host"], found["run_id"], found["since"]
            if key not in self.blocks or found["time"] >= self.blocks[key]["time"]:
                self.blocks[key] = found

    def _picture(self, given: Any) -> Picture:
        job = given["job"]
        return {
            "job": {
                "run_id": _optional(str, job["run_id"]),
                "world_size": _optional(int, job["world_size"]),
                "restart_count": _optional(int, job["restart_count"]),
            },
            "members": [self._member(member) for member in _a(list, given["members"])],
        }

    def _member(self, given: Any) -> Member:
        return {
            "host": sys.intern(_a(str, given["host"])),
            "pid": _a(int, given["pid"]),
            "rank": _a(int, given["rank"]),
            "local_rank": _optional(int, given["local_rank"]),
            "scope": _optional(str, given["scope"]),
            "passes": {
                sys.intern(scope): _a(int, count)
                for scope, count in _a(dict, given["passes"]).items()
            },
            "seconds": None if given["seconds"] is None else _seconds(given["seconds"]),
            "expired": bool(given["expired"]),
            "state": _optional(str, given["state"]),
            "stacks": self._stacks(given["stacks"]),
            "stacks_missing": _optional(str, given["stacks_missing"]),
            "descendants": [self._descendant(child) for child in _a(list, given["descendants"])],
        }

    def _descendant(self, given: Any) -> Descendant:
        return {
            "pid": _a(int, given["pid"]),
            "command": _optional(str, given["command"]),
            "state": _optional(str, given["state"]),
            "system_call": _optional(str, given["system_call"]),
            "stacks": self._stacks(given["stacks"]),
            "stacks_missing": _optional(str, given["stacks_missing"]),
        }

    def _stacks(self, given: Any) -> list[ThreadStack] | None:
        if given is None:
            return None
        return [
            {
                "id": _a(int, thread["id"]),
                "name": _optional(str, thread["name"]),
                "active": bool(thread["active"]),
                "gil": bool(thread["gil"]),
                "frames": self._frames(thread["frames"]),
            }
            for thread in _a(list, given)
        ]

    def _frames(self, given: Any) -> list[Frame]:
        key = tuple([(frame["file"], frame["line"], frame["function"]) for frame in given])
        if key not in self._known:
            self._known[key] = [
                {
                    "file": sys.intern(_a(str, file)),
                    "line": _a(int, line),
                    "function": sys.intern(_a(str, function)),
                }
                for file, line, function in key
            ]
        return self._known[key]


def has_events(path: str) -> bool:
    """Whether a file begins with an event."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as stream:
        return _EVENT in stream.read(4096)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    while line := stream.readline(_LONGEST_LINE):
        yield line


def _a(kind: type[_T], value: Any) -> _T:
    """The value, which has to be of a kind."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"not a {kind.__name__}: {value!r:.40}")
    return value


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not abs(seconds) < _FAR:
        raise ValueError(f"not a time: {seconds}")
    return seconds


def _optional(kind: type[_T], value: Any) -> _T | None:
    return None if value is None else _a(kind, value)
