"""Where in a program a process is, so that many processes can be compared. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from elastic_timer._evidence.facts import one_line

if TYPE_CHECKING:
    from elastic_timer._evidence.stacks import Frame, ThreadStack

_MOST_SHOWN = 3

_STANDARD = re.compile(r"^<frozen |/lib(64)?/python3\.\d+t?/(?!(site|dist)-packages/)")
_INSTALLED = re.compile(r"/(site|dist)-packages/")
# Of these it is certain that what they call is their own affair, wherever they are installed.
_INTERNAL = re.compile(r"(^|/)(torch|elastic_timer)/(.*/)?\w+\.py$")
# Not all of torch.distributed: its checkpoints hang in a disk, its FSDP and its DTensor compute,
# its `record` is around all of a program.
_COLLECTIVE = re.compile(
    r"(^|/)torch/distributed/"
    r"(distributed_c10d|c10d_logger|_functional_collectives|rendezvous|nn/functional"
    r"|rpc/\w+|_symmetric_memory/\w+)\.py$"
)
_DECORATOR = re.compile(r"(^|/)torch/distributed/c10d_logger\.py$")


class Place(NamedTuple):
    """Where a process is.

    Attributes:
        key: Equal for processes that are at the same place: the innermost line of the program's
            own, and what it called there.
        path: Equal for those that came there in the same way, too.
        shown: The few frames that tell a reader, innermost first.
        in_collective: Whether it waits there for other ranks.
    """

    key: tuple[str, ...]
    path: tuple[str, ...]
    shown: tuple[Frame, ...]
    in_collective: bool


def place_of(threads: Sequence[ThreadStack], collectives: Collection[str] = ()) -> Place | None:
    """Where a process is; `None` where it has no frames.

    Args:
        threads: Its threads, the main thread first.
        collectives: Functions that wait for other ranks, besides those of `torch.distributed`: by
            their names, or as `FILE:FUNCTION` with the end of the file's path.
    """
    if not threads or not threads[0]["frames"]:
        return None
    inwards = threads[0]["frames"]
    frames = inwards[::-1]
    program = _of_program(frames)
    innermost = program[0]
    inside = frames[: frames.index(innermost)]
    called = _collective(frames, collectives) or (inside[-1] if inside else None)
    key = (_where(innermost), called["function"] if called else "")
    shown = ([called] if called and called is not innermost else []) + program
    return Place(
        key=key,
        path=(*key, *map(_where, program[1:])),
        shown=tuple(shown[:_MOST_SHOWN]),
        in_collective=_collective(frames, collectives) is not None,
    )


def describe_frames(frames: Iterable[Frame]) -> str:
    """Frames on one line, innermost first."""
    return " < ".join(
        f"{one_line(frame['function'])} ({one_line(short(frame['file']))}:{frame['line']})"
        for frame in frames
    )


def short(file: str) -> str:
    """The name of a file without its folder, but for names that tell nothing."""
    folder, name = os.path.split(file)
    return os.path.join(os.path.basename(folder), name) if name == "__init__.py" else name


def _of_program(frames: Sequence[Frame]) -> list[Frame]:
    """The frames that are the program's own; failing that, of a library, or else all of them."""
    own = [frame for frame in frames if not _is_library(frame["file"])]
    if not own:
        own = [frame for frame in frames if not _is_internal(frame["file"])]
    return own or list(frames)


def _is_internal(file: str) -> bool:
    return bool(_STANDARD.search(file) or _INTERNAL.search(file))


def _is_library(file: str) -> bool:
    return _is_internal(file) or bool(_INSTALLED.search(file))


def _collective(frames: Sequence[Frame], collectives: Collection[str]) -> Frame | None:
    """The frame of the collective that a thread is in, `frames` being innermost first."""
    found = None
    for frame in frames:
        if _COLLECTIVE.search(frame["file"]):
            if not _DECORATOR.search(frame["file"]):
                found = frame
        elif not _is_internal(frame["file"]):
            break
    if found is None:
        found = next((frame for frame in frames if _is_named(frame, collectives)), None)
    return found


def _is_named(frame: Frame, collectives: Collection[str]) -> bool:
    for name in collectives:
        file, _, function = name.rpartition(":")
        if frame["function"] == function and f"/{frame['file']}".endswith(
            f"/{file}" if file else ""
        ):
            return True
    return False


def _where(frame: Frame) -> str:
    return f"{frame['function']} {frame['file']}:{frame['line']}"
