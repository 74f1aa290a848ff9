"""`elastic-timer report`: who hung the job, from the events of all its hosts."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TextIO

from elastic_timer._command.block_table import block_table
from elastic_timer._command.event_reader import EventReader, File, has_events
from elastic_timer._command.hangs import Hang, hangs_of
from elastic_timer._evidence.facts import one_line
from elastic_timer._evidence.picture import (
    Answer,
    Seen,
    describe,
    fold_ranks,
    look,
    who_hangs,
)
from elastic_timer._evidence.place import describe_frame, is_at_work, place_of

UNREADABLE = 1

_MOST_FILES = 3  # named in one complaint
_MOST_DETAILS = 24  # lines on each suspect


def report(
    paths: Sequence[str],
    *,
    folded: str | None = None,
    as_json: bool = False,
    collectives: Collection[str] = (),
) -> int:
    """Print who hung the job, for each hang that files of events tell of.

    Args:
        paths: The files, in any order.
        folded: Where to write the stacks for a flame graph; None for nowhere.
        as_json: Whether to print all that is known as JSON instead.
        collectives: Functions that wait for other ranks, besides those of `torch.distributed`.

    Returns:
        The status to exit with: 1 where a file could not be read, else 0, with a hang or without.

    Raises:
        FileExistsError: There are events in `folded`, as where its name was left out.
        OSError: `folded` can't be written to.
    """
    if folded is not None and has_events(folded):
        raise FileExistsError(errno.EEXIST, "this has events, and is not written over", folded)
    reader = EventReader()
    for path in paths:
        reader.read(path)
    _complain(reader.files)
    hangs = hangs_of(reader.sightings)
    answers = [who_hangs(hang.pictures, collectives, offline=True) for hang in hangs]
    if folded is not None:
        with open(folded, "w", encoding="utf-8", errors="backslashreplace") as file:
            _write_folded(file, hangs, collectives)
    if as_json:
        _write_json(sys.stdout, reader, hangs, answers, collectives)
    else:
        _print_hangs(hangs, answers, sum(file.error is None for file in reader.files))
        if reader.blocks:
            print("\nwhat the blocks took")
            print(block_table(reader.blocks.values()))
    return UNREADABLE if any(file.error for file in reader.files) else 0


def _complain(files: Sequence[File]) -> None:
    """Say on stderr which files were read in part or not at all."""
    for file in files:
        if file.error:
            print(f"elastic-timer: cannot read {file.path}: {file.error}", file=sys.stderr)
    broken = [file.path for file in files if file.broken]
    if broken:
        more = f" and {len(broken) - _MOST_FILES} more" if len(broken) > _MOST_FILES else ""
        names = f"{', '.join(broken[:_MOST_FILES])}{more}"
        print(f"elastic-timer: cut off in the middle of a line: {names}", file=sys.stderr)


def _print_hangs(hangs: Sequence[Hang], answers: Sequence[Answer], files: int) -> None:
    if not hangs and files:
        print(f"elastic-timer: no hang in {files} {'file' if files == 1 else 'files'}")
    for number, (hang, answer) in enumerate(zip(hangs, answers, strict=True), 1):
        which = f"hang {number} of {len(hangs)}: " if len(hangs) > 1 else ""
        print(f"{which}{_title(hang)}")
        text = describe(answer, missing="no file tells of", details=_MOST_DETAILS)
        print(f"elastic-timer: {text}")
        if number < len(hangs):
            print()


def _title(hang: Hang) -> str:
    """When, and which job."""
    # Hosts may be in several time zones.
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(hang.time))
    told = [when]
    if hang.job["run_id"] is not None:
        told.append(f"run {one_line(hang.job['run_id'])}")
    if hang.job["world_size"] is not None:
        told.append(f"world size {hang.job['world_size']:,}")
    if hang.job["restart_count"] is not None:
        told.append(f"restart {hang.job['restart_count']}")
    return ", ".join(told)


def _write_json(
    file: TextIO,
    reader: EventReader,
    hangs: Sequence[Hang],
    answers: Sequence[Answer],
    collectives: Collection[str],
) -> None:
    """Write all that is known; report.schema.json describes it.

    In pieces: of a thousand hosts it is more than should be in memory at once.
    """
    files = json.dumps([*map(dataclasses.asdict, reader.files)])
    file.write(
        f'{{"version": 1, "files": {files}, "blocks": {json.dumps([*reader.blocks.values()])}, '
    )
    file.write('"hangs": [')
    for number, (hang, answer) in enumerate(zip(hangs, answers, strict=True)):
        head = json.dumps({"time": hang.time, "last_time": hang.last, **answer})
        file.write(f'{", " if number else ""}{head[:-1]}, "members": [')
        for index, seen in enumerate(look(hang.pictures, collectives)):
            file.write(", " if index else "")
            file.write(json.dumps({**seen.member, "in_collective": seen.waits}))
        file.write("]}")
    file.write("]}\n")


def _write_folded(file: TextIO, hangs: Sequence[Hang], collectives: Collection[str]) -> None:
    """Write the stacks as flame graph viewers read them; a stack's width is its ranks.

    At its tip it has their numbers. A process that waits for its child has the child's stack, too.
    """
    for number, hang in enumerate(hangs, 1):
        root = [f"hang {number}: {_title(hang)}"] if len(hangs) > 1 else []
        ranks: dict[tuple[str, ...], list[int]] = {}
        for seen in look(hang.pictures, collectives):
            ranks.setdefault((*root, *_folded(seen)), []).append(seen.member["rank"])
        for stack, found in ranks.items():
            tip = f"{'rank' if len(found) == 1 else 'ranks'} {fold_ranks(found)}"
            frames = [frame.replace(";", ",") for frame in (*stack, tip)]
            file.write(f"{';'.join(frames)} {len(found)}\n")


def _folded(seen: Seen) -> Iterator[str]:
    """A rank's stack from the outside in."""
    if seen.place is None:
        yield "no stacks"
        return
    yield from map(describe_frame, seen.place.frames)
    children = [] if seen.waits else seen.member["descendants"]
    at_work = (child["stacks"] or [] for child in children if is_at_work(child["stacks"]))
    place = place_of(next(at_work, []))
    if place is not None:
        yield "its child process"
        yield from map(describe_frame, place.frames)
