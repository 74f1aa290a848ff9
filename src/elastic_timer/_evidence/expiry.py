"""What an expired worker and its descendants were doing, put into words. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from elastic_timer._evidence.facts import Activity, Facts, one_line
from elastic_timer._evidence.place import is_native
from elastic_timer._evidence.stacks import Stacks, ThreadStack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in the kernel, not interruptible",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "ended, not waited for",
    "I": "idle",
}

_WORDS: dict[str, Callable[[Any], str]] = {
    "state": lambda state: f"state {state} ({_STATES.get(state, 'unknown')})",
    "system_call": "in system call {}".format,
    "wait_channel": "waiting in {}".format,
    "threads": lambda count: "1 thread" if count == 1 else f"{count} threads",
    "resident_bytes": lambda size: f"{size / 2**20:.1f} MiB resident",
    "age_seconds": "{:.1f} s old".format,
}

# A thread that runs in no other files is one that a library keeps in the background. User code may
# be in site-packages: of what is there, only these few are known to be none.
_LIBRARY_FILE = re.compile(
    r"^<frozen |/lib(64)?/python3\.\d+t?/(?!(site|dist)-packages/)"
    r"|/torch/utils/data/_utils/pin_memory\.py$|/tqdm/_monitor\.py$"
    r"|/elastic_timer/(_server/\w+|_file_server|api|local_timer|file_based_local_timer)\.py$"
)
# Where such threads wait for something to do.
_WAITING = re.compile(
    r"/(threading|queue|selectors|multiprocessing/\w+|concurrent/futures/\w+)\.py:"
    # As one does of a process that shares files, such as a loader of torch has.
    r"|/socket\.py:(socket\.)?accept$"
)


class Descendant(Activity, Stacks):
    """A process that an expired worker has started, or that such a process has."""

    pid: int


class Evidence(Facts, Stacks):
    """All that is known of one expired worker; can be written as JSON as it is."""

    run_id: str
    pid: int
    rank: int | None
    local_rank: int | None
    scopes: list[str]
    seconds_late: float
    descendants: list[Descendant]


def log_fields(values: Mapping[str, object]) -> dict[str, object]:
    """What a log record on a timer has as `extra`, so that all such records name things alike."""
    return {f"timer_{name}": value for name, value in values.items()}


def describe_expiry(evidence: Evidence) -> str:
    """Which worker is past its deadline, and by how much, on one line."""
    scopes = ", ".join(map(repr, evidence["scopes"]))
    rank = "" if evidence["rank"] is None else f" (rank {evidence['rank']})"
    return (
        f"worker {evidence['pid']}{rank} of run {evidence['run_id']!r} is past its deadline: "
        f"{scopes}, {evidence['seconds_late']:.3f} s late"
    )


def describe(evidence: Evidence) -> str:
    """The evidence on one worker as text of several lines."""
    lines = [describe_expiry(evidence)]
    if evidence["command"]:
        lines.append(f"  command: {evidence['command']}")
    if facts := _in_words(evidence):
        lines.append(f"  {facts}")
    lines += [f"  {line}" for line in describe_stacks(evidence)]
    for descendant in evidence["descendants"]:
        told = [descendant["command"] or "", _in_words(descendant)]
        stacks = describe_stacks(descendant)
        # Of a process that runs no Python there is one line: the reason is on it, too.
        if descendant["stacks"] is None:
            told += stacks
            stacks = []
        lines.append(f"  descendant {descendant['pid']}: {'; '.join(filter(None, told))}")
        lines += [f"    {line}" for line in stacks]
    return "\n".join(lines)


def describe_stacks(taken: Stacks) -> list[str]:
    """The stacks as lines of text that read as a traceback does, or the reason for having none."""
    lines = []
    folded = []
    for index, thread in enumerate(taken["stacks"] or []):
        name = one_line(thread["name"] or str(thread["id"]))
        if index and _is_idle_helper(thread):
            folded.append(name)
            continue
        notes = ["active" if thread["active"] else "idle"]
        if thread["gil"]:
            notes.append("holds the GIL")
        lines.append(f"thread {name} ({', '.join(notes)}):")
        for frame in thread["frames"]:
            file, function = one_line(frame["file"]), one_line(frame["function"])
            # Of a frame in C there is none where its library has no debug information.
            line = f", line {frame['line']}" if frame["line"] else ""
            lines.append(f'  File "{file}"{line}, in {function}')
    if folded:
        threads = "1 idle thread" if len(folded) == 1 else f"{len(folded)} idle threads"
        lines.append(f"{threads} of libraries not shown: {one_line(', '.join(folded))}")
    if taken["stacks_missing"]:
        lines.append(f"no stacks: {taken['stacks_missing']}")
    return lines


def _is_idle_helper(thread: ThreadStack) -> bool:
    """Whether it is a thread of a library that waits for something to do."""
    frames = [frame for frame in thread["frames"] if not is_native(frame)]
    if thread["active"] or thread["gil"] or not frames:
        return False
    innermost = frames[-1]
    return (
        all(_LIBRARY_FILE.search(frame["file"]) for frame in frames)
        and _WAITING.search(f"{innermost['file']}:{innermost['function']}") is not None
        # One that cannot get rid of what it has is no idle one: a queue that nobody reads.
        and not innermost["function"].endswith("_send")
    )


def _in_words(known: Mapping[str, Any]) -> str:
    """What `/proc` told of a process, but for its command."""
    return ", ".join(
        say(known[name]) for name, say in _WORDS.items() if known.get(name) is not None
    )
