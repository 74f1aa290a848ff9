"""What `/proc` tells of a process.

Nothing here needs the process's cooperation: it may hold the GIL in C code, or be stopped.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, TypedDict, cast

from elastic_timer import _clock
from elastic_timer._server.process import children_of, read_file, stat_of, status_field

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

_TEXT_KEPT = 300
_MOST_SIBLINGS = 256

# The calls in which workers hang; others are reported by their number.
_SYSTEM_CALLS = {
    "x86_64": {
        0: "read", 1: "write", 7: "poll", 16: "ioctl", 23: "select", 34: "pause", 35: "nanosleep",
        42: "connect", 43: "accept", 44: "sendto", 45: "recvfrom", 46: "sendmsg", 47: "recvmsg",
        61: "wait4", 72: "fcntl", 73: "flock", 74: "fsync", 202: "futex", 230: "clock_nanosleep",
        232: "epoll_wait", 247: "waitid", 257: "openat", 270: "pselect6", 271: "ppoll",
        281: "epoll_pwait", 288: "accept4",
    },
    "aarch64": {
        22: "epoll_pwait", 25: "fcntl", 29: "ioctl", 32: "flock", 56: "openat", 63: "read",
        64: "write", 72: "pselect6", 73: "ppoll", 82: "fsync", 95: "waitid", 98: "futex",
        101: "nanosleep", 115: "clock_nanosleep", 202: "accept", 203: "connect", 206: "sendto",
        207: "recvfrom", 211: "sendmsg", 212: "recvmsg", 242: "accept4", 260: "wait4",
    },
}  # fmt: skip


class Activity(TypedDict):
    """What a process is and waits for; `None` where `/proc` does not tell."""

    command: str | None
    state: str | None
    system_call: str | None


class Facts(Activity):
    """What `/proc` tells of a process; `None` where it does not."""

    wait_channel: str | None
    threads: int | None
    resident_bytes: int | None
    age_seconds: float | None


def read_facts(pid: int) -> Facts:
    """What `/proc` tells of a process; all `None` where it is gone or there is no `/proc`."""
    facts = cast("Facts", dict.fromkeys(Facts.__annotations__))
    fields = stat_of(pid)
    if not fields:
        return facts
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    facts["state"] = fields[0]
    facts["threads"] = int(fields[17])
    facts["age_seconds"] = round(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 2)
    facts["resident_bytes"] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    facts["wait_channel"] = _read(pid, "wchan").lstrip("0") or None  # "0": running, or forbidden
    number = _read(pid, "syscall").partition(" ")[0]
    if number.isdigit():  # not "running", nor "-1": waiting outside a system call
        names = _SYSTEM_CALLS.get(os.uname().machine, {})
        facts["system_call"] = names.get(int(number), number)
    command = _read(pid, "cmdline").rstrip("\0").replace("\0", " ")
    facts["command"] = one_line(command) or None
    return facts


def descendants_of(pid: int, but: Container[int], most: int) -> list[int]:
    """The processes that a process has started, and those that these have, nearest first.

    Args:
        pid: The process.
        but: Pids to leave out, with their descendants.
        most: How many to find at most.
    """
    found = [pid]
    for parent in found:  # which grows meanwhile
        for child in children_of(parent):
            # One that changed its parent between two reads is in two lists.
            if child not in but and child not in found:
                found.append(child)
        if len(found) > most:
            break
    return found[1 : most + 1]


def parent_of(pid: int) -> int:
    """The process that has started another one; 0 where that is not known."""
    fields = stat_of(pid)
    return int(fields[1]) if fields else 0


def is_traced(pid: int) -> bool:
    """Whether somebody traces a process just now, as a debugger does, or a py-spy."""
    return status_field(pid, "TracerPid") not in (None, "0")


def processes_beside(pid: int, until: float) -> Iterator[int]:
    """The processes of a process's user, its siblings first.

    Args:
        pid: The process.
        until: When to stop looking, in monotonic seconds.
    """
    siblings = descendants_of(parent_of(pid), {}, _MOST_SIBLINGS)
    others: list[int] = []
    with contextlib.suppress(OSError):
        user = os.stat(f"/proc/{pid}").st_uid
        others = sorted({int(name) for name in os.listdir("/proc") if name.isdecimal()})
    for each in dict.fromkeys([*siblings, *others]):
        if _clock.monotonic() >= until:
            break
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{each}").st_uid == user:
                yield each


def one_line(text: str) -> str:
    """The text on one line, without control characters, at a sane length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _TEXT_KEPT else line[: _TEXT_KEPT - 3] + "..."


def _read(pid: int, name: str) -> str:
    """A file of a process under `/proc`; empty if it is gone, forbidden or there is none."""
    try:
        return read_file(f"/proc/{pid}/{name}")
    except OSError:
        return ""
