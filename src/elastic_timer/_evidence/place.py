"""Where in a program a process is, so that many processes can be compared. Pure.

Two ranks that wait for the same thing are at the same place, though one of them may have been
looked at a line further on in a loop of a library. So the place is the innermost line of the
program's own and the name of what it called there; of what a library does further inside, nothing.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from elastic_timer._evidence.facts import one_line

if TYPE_CHECKING:
    from elastic_timer._evidence.stacks import Frame, ThreadStack

_MOST_SHOWN = 3

# Whose code a file is: of C, C++ or the like, which `py-spy --native` shows; some have but the
# interpreter's own file, as a library or a program; of what waits for other ranks;
# of Python or torch; of another installed package; of the program.
_NATIVE = re.compile(
    r"\.(so[\d.]*|c|cc|cpp|cxx|cu|cuh|h|hh|hpp|S|rs|pyx)$|(^|/)python(\d+\.\d+t?)?$"
)
# Not all of torch.distributed: its checkpoints hang in a disk, its FSDP and its DTensor compute,
# its `record` is around all of a program.
_COLLECTIVE = re.compile(
    r"(^|/)torch/distributed/(distributed_c10d|c10d_logger|_functional_collectives|rendezvous"
    r"|nn/functional|rpc/\w+|_symmetric_memory/\w+)\.py$"
)
_INTERNAL = re.compile(
    r"^<frozen |/lib(64)?/python3\.\d+t?/(?!(site|dist)-packages/)"
    r"|(^|/)(site|dist)-packages/torch/"
    r"|(^|/)torch/(_\w+\.py|(_\w+|autograd|cuda|distributed|nn/\w+|optim|utils/\w+)/)"
    r"|(^|/)elastic_timer/(?!_command/demo)(_\w+/\w+|\w+)\.py$"
)
_INSTALLED = re.compile(r"(^|/)(site|dist)-packages/")

# Functions that nobody calls by their names.
_HIDDEN = re.compile(r"<locals>|(^|\.)_\w+$")
_NATIVE_COLLECTIVE = re.compile(r"\bc10d::|\bgloo::")
_ENGINE = re.compile(r"(^|/)torch/autograd/(graph|__init__)\.py$")
_WAITS_FOR_THREAD = re.compile(
    r"/(threading\.py:(join|_shutdown)|concurrent/futures/_base\.py:result)$"
)
# Outside of it a forked process has the frames of the one that forked it.
_PROCESS = re.compile(r"/multiprocessing/process\.py$")
_FILE_AND_FUNCTION = re.compile(r"(.+\.\w+):([^:]+)")


class Place(NamedTuple):
    """Where a process is.

    Attributes:
        key: Equal for processes that are at the same place.
        path: Equal for those that came there by the same lines, too.
        shown: The few frames that tell it to a reader, innermost first.
        frames: All frames of the thread that tells it, but for those in C; outermost first.
        in_collective: Whether it waits there for other ranks.
        is_sure: Whether frames in C were there to tell that by.
        is_idle: Whether the thread neither computes nor keeps others from it.
    """

    key: tuple[str, ...]
    path: tuple[str, ...]
    shown: list[Frame]
    frames: list[Frame]
    in_collective: bool
    is_sure: bool
    is_idle: bool


def place_of(threads: Sequence[ThreadStack], collectives: Collection[str] = ()) -> Place | None:
    """Where a process is; `None` where it has no frames.

    Args:
        threads: Its threads, the main thread first.
        collectives: Functions that wait for other ranks, besides those of `torch.distributed`: by
            their names, or as `FILE:FUNCTION` with the end of the file's path.
    """
    stacks = [_Stack(thread) for thread in threads]
    stacks[1:] = [stack for stack in stacks[1:] if stack.frames]
    if not stacks or not stacks[0].frames:
        return None
    stack = _telling(stacks, collectives)
    innermost, *callers = stack.program
    collective = stack.collective
    called = collective or (stack.inside[-1] if stack.inside else None)
    key = (_where(innermost), _name(called) if called else "")
    shown = [called] if called else []
    shown += [frame for frame in stack.program if frame["function"] != "<module>"]
    return Place(
        key=key,
        path=(*key, *map(_where, callers)),
        shown=(shown or [innermost])[:_MOST_SHOWN],
        frames=stack.frames[::-1],
        in_collective=bool(collective) or stack.is_named(collectives) or stack.is_likely_collective,
        is_sure=bool(stack.native),
        is_idle=stack.is_idle,
    )


def is_at_work(threads: Sequence[ThreadStack] | None) -> bool:
    """Whether a child process is in code of the program's own; a loader's that waits is not."""
    return _Stack(threads[0]).has_own if threads else False


def is_native(frame: Frame) -> bool:
    """Whether it is a frame in C, or the like."""
    return _kind(frame["file"]) == "native"


def without_parents(threads: Iterable[ThreadStack]) -> list[ThreadStack]:
    """The threads of a process without the frames of the one that forked it."""
    return [{**thread, "frames": _since_fork(thread["frames"])} for thread in threads]


def describe_frames(frames: Iterable[Frame]) -> str:
    """Frames on one line, in their order."""
    return " < ".join(map(describe_frame, frames))


def describe_frame(frame: Frame) -> str:
    """A frame in few words."""
    return f"{one_line(_name(frame))} ({one_line(short(frame['file']))}:{frame['line']})"


def short(file: str) -> str:
    """The name of a file without its folder, but for names that tell nothing."""
    folder, name = os.path.split(file)
    return f"{os.path.basename(folder)}/{name}" if name.startswith("__") else name


class _Stack:
    """A thread's frames, innermost first, those in C apart."""

    def __init__(self, thread: ThreadStack) -> None:
        self.frames: list[Frame] = []
        self.native: list[Frame] = []
        self.is_idle = not thread["active"] and not thread["gil"]
        for frame in reversed(_since_fork(thread["frames"])):
            if not is_native(frame):
                self.frames.append(frame)
            elif not self.frames:
                self.native.append(frame)

        own = [frame for frame in self.frames if _kind(frame["file"]) == "own"]
        others = [frame for frame in self.frames if _kind(frame["file"]) == "installed"]
        # The program's own frames; failing that, those of packages, or else all.
        self.program = own or others or self.frames
        self.inside = self.frames[: _index(self.frames, self.program[0])] if self.frames else []
        self.has_own = bool(own)

    @property
    def is_pythons(self) -> bool:
        """Whether Python has started the thread."""
        return self.frames[-1]["function"].endswith("_bootstrap")

    @property
    def is_in_engine(self) -> bool:
        """Whether it waits for a backward pass, in which ranks wait for each other."""
        return bool(_ENGINE.search(self.frames[0]["file"]))

    @property
    def waits_for_thread(self) -> bool:
        """Whether what the process does is done by another of its threads."""
        return not self.has_own or any(
            _WAITS_FOR_THREAD.search(f"{frame['file']}:{_last_name(frame)}")
            for frame in self.inside
        )

    @property
    def collective(self) -> Frame | None:
        """The function of `torch.distributed` it waits in, as the program knows it."""
        found = None
        for frame in self.frames:
            kind = _kind(frame["file"])
            if kind == "collective" and (found is None or not _HIDDEN.search(frame["function"])):
                found = frame
            elif kind not in ("collective", "internal"):
                break
        return found

    @property
    def is_likely_collective(self) -> bool:
        """Whether it waits for other ranks by its frames in C or, without them, in all likelihood.

        In a backward pass the ranks wait for each other without a frame in Python that tells so.
        """
        if self.native:
            return any(_NATIVE_COLLECTIVE.search(frame["function"]) for frame in self.native)
        return self.is_in_engine and self.is_idle

    def is_named(self, names: Collection[str]) -> bool:
        """Whether it is in one of the functions that somebody has named."""
        return any(_is_named(frame, names) for frame in self.native + self.frames)


def _telling(stacks: Sequence[_Stack], collectives: Collection[str]) -> _Stack:
    """The thread that does what the process does, which mostly is the main thread."""
    main, *others = stacks
    if main.is_in_engine:
        # A backward pass on a device has a thread of its own, which Python has not started.
        others = [other for other in others if not other.is_pythons]
    elif main.waits_for_thread:
        others = [other for other in others if other.has_own]
    else:
        others = []
    waiting = [other for other in others if other.collective or other.is_named(collectives)]
    return [*waiting, *others, main][0]


def _since_fork(frames: list[Frame]) -> list[Frame]:
    """What is inside of the function that a process of multiprocessing begins with."""
    for index in range(len(frames) - 1, -1, -1):
        frame = frames[index]
        if frame["function"].endswith("_bootstrap") and _PROCESS.search(frame["file"]):
            return frames[index:]
    return frames


def _index(frames: Sequence[Frame], wanted: Frame) -> int:
    """Where a frame is; in a recursion there may be equal ones."""
    return next(index for index, frame in enumerate(frames) if frame is wanted)


@functools.lru_cache(maxsize=4096)
def _kind(file: str) -> str:
    """Whose code a file is."""
    if _NATIVE.search(file):
        return "native"
    if _COLLECTIVE.search(file):
        return "internal" if file.endswith("c10d_logger.py") else "collective"
    if _INTERNAL.search(file):
        return "internal"
    return "installed" if _INSTALLED.search(file) else "own"


def _is_named(frame: Frame, names: Collection[str]) -> bool:
    """Whether a frame is in one of the functions that somebody has named."""
    for name in names:
        match = _FILE_AND_FUNCTION.fullmatch(name)
        file, function = match.groups() if match else ("", name)
        if f".{frame['function']}".endswith(f".{function}") and (
            not file or f"/{frame['file']}".endswith(f"/{file}")
        ):
            return True
    return False


def _name(frame: Frame) -> str:
    """A function's name without the functions around its definition."""
    return frame["function"].rpartition("<locals>.")[2]


def _last_name(frame: Frame) -> str:
    """A function's name without its class: before Python 3.11 there is no other."""
    return frame["function"].rpartition(".")[2]


def _where(frame: Frame) -> str:
    # Without the folder: each host, or rank, may have a copy of the program in one of its own.
    return f"{_name(frame)} ({short(frame['file'])}:{frame['line']})"
