"""What an expired worker was doing: facts from `/proc`, Python stacks from `py-spy`.

Nothing here needs the worker's cooperation, so it works on one that holds the GIL in C code or
is stopped. Local variables and the environment are never read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, TypedDict

from elastic_timer._server.process import refusal, stat_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_PARALLEL_DUMPS = 8
_FRAMES_KEPT = 100
_TEXT_KEPT = 300
_RUNS_KEPT = 8

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in the kernel, not interruptible",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "ended, not waited for",
    "I": "idle",
}

# The calls in which workers hang; others are reported by their number.
_SYSTEM_CALLS = {
    "x86_64": {
        0: "read", 1: "write", 7: "poll", 16: "ioctl", 23: "select", 34: "pause",
        35: "nanosleep", 42: "connect", 43: "accept", 44: "sendto", 45: "recvfrom",
        46: "sendmsg", 47: "recvmsg", 61: "wait4", 72: "fcntl", 73: "flock", 74: "fsync",
        202: "futex", 230: "clock_nanosleep", 232: "epoll_wait", 247: "waitid",
        257: "openat", 270: "pselect6", 271: "ppoll", 281: "epoll_pwait", 288: "accept4",
    },
    "aarch64": {
        22: "epoll_pwait", 25: "fcntl", 29: "ioctl", 32: "flock", 56: "openat", 63: "read",
        64: "write", 72: "pselect6", 73: "ppoll", 82: "fsync", 95: "waitid", 98: "futex",
        101: "nanosleep", 115: "clock_nanosleep", 202: "accept", 203: "connect",
        206: "sendto", 207: "recvfrom", 211: "sendmsg", 212: "recvmsg", 242: "accept4",
        260: "wait4",
    },
}  # fmt: skip


class Frame(TypedDict):
    """One line of a stack."""

    file: str
    line: int
    function: str


class ThreadStack(TypedDict):
    """One thread of a worker; `frames` end with the innermost, as a traceback does."""

    id: int
    name: str | None
    active: bool
    gil: bool
    frames: list[Frame]


class Facts(TypedDict):
    """What `/proc` tells of a process; `None` where it does not."""

    command: str | None
    state: str | None
    wait_channel: str | None
    system_call: str | None
    threads: int | None
    resident_bytes: int | None
    age_seconds: float | None


class Evidence(Facts):
    """All that is known of one expired worker; can be written as JSON as it is."""

    run_id: str
    pid: int
    scopes: list[str]
    seconds_late: float
    stacks: list[ThreadStack] | None
    stacks_missing: str | None


# How evidence gets from the hook, whose signature is upstream's, to `run --events` and the demo.
_latest: dict[str, dict[int, Evidence]] = {}


def collect(run_id: str, expired_timers: Mapping[int, list[str]], timeout: float) -> list[Evidence]:
    """Gather the evidence on the workers of one round; remembered until the run's next round.

    Args:
        run_id: The run of the server that found the timers expired.
        expired_timers: Pid to the JSON of its expired timers.
        timeout: Seconds for the stacks of all workers together; 0 for none.
    """
    now = time.time()
    # The facts come first: py-spy pauses the worker, and that would show in its state.
    facts = {pid: read_facts(pid) for pid in expired_timers}
    stacks = take_stacks({pid: known["state"] for pid, known in facts.items()}, timeout)
    evidence: dict[int, Evidence] = {}
    for pid, requests in expired_timers.items():
        timers = sorted(_expiration_and_scope(request) for request in requests)
        taken = stacks[pid]
        evidence[pid] = {
            "run_id": run_id,
            "pid": pid,
            "scopes": [scope for _, scope in timers],
            "seconds_late": max(0.0, now - timers[0][0]) if timers else 0.0,
            **facts[pid],
            "stacks": None if isinstance(taken, str) else taken,
            "stacks_missing": taken if isinstance(taken, str) else None,
        }
    _latest.pop(run_id, None)
    _latest[run_id] = evidence
    if len(_latest) > _RUNS_KEPT:  # a process that makes server after server must not grow
        _latest.pop(next(iter(_latest)), None)
    return list(evidence.values())


def latest(run_id: str, pid: int) -> Evidence | None:
    """The evidence on a worker if it was in its run's last round, else `None`."""
    return _latest.get(run_id, {}).get(pid)


def describe(evidence: Evidence) -> str:
    """The evidence on one worker as text of several lines."""
    scopes = ", ".join(map(repr, evidence["scopes"]))
    lines = [
        f"worker {evidence['pid']} of run {evidence['run_id']!r} is past its deadline: "
        f"{scopes}, {evidence['seconds_late']:.3f} s late"
    ]
    if evidence["command"]:
        lines.append(f"  command: {evidence['command']}")
    facts = ", ".join(_facts_in_words(evidence))
    if facts:
        lines.append(f"  {facts}")
    lines += [f"  {line}" for line in describe_stacks(evidence)]
    return "\n".join(lines)


def describe_stacks(evidence: Evidence) -> list[str]:
    """The stacks as lines of text that read as a traceback does, or the reason for having none."""
    lines = []
    for thread in evidence["stacks"] or []:
        notes = ["active" if thread["active"] else "idle"]
        if thread["gil"]:
            notes.append("holds the GIL")
        name = _one_line(thread["name"] or str(thread["id"]))
        lines.append(f"thread {name} ({', '.join(notes)}):")
        for frame in thread["frames"]:
            file, function = _one_line(frame["file"]), _one_line(frame["function"])
            lines.append(f'  File "{file}", line {frame["line"]}, in {function}')
    if evidence["stacks_missing"]:
        lines.append(f"no stacks: {evidence['stacks_missing']}")
    return lines


def read_facts(pid: int) -> Facts:
    """What `/proc` tells of a process; all `None` where it is gone or there is no `/proc`."""
    facts: Facts = {
        "command": None,
        "state": None,
        "wait_channel": None,
        "system_call": None,
        "threads": None,
        "resident_bytes": None,
        "age_seconds": None,
    }
    fields = stat_of(pid)
    if not fields:
        return facts
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    facts["state"] = fields[0]
    facts["threads"] = int(fields[17])
    facts["age_seconds"] = round(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 2)
    facts["resident_bytes"] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    channel = _read(pid, "wchan")
    if channel and channel != "0":  # "0": running, or not permitted
        facts["wait_channel"] = channel
    number = (_read(pid, "syscall") or "").partition(" ")[0]
    if number.isdigit():  # not "running", nor "-1": waiting outside a system call
        names = _SYSTEM_CALLS.get(os.uname().machine, {})
        facts["system_call"] = names.get(int(number), number)
    command = (_read(pid, "cmdline") or "").rstrip("\0").replace("\0", " ")
    facts["command"] = _one_line(command) or None
    return facts


def find_py_spy() -> str | None:
    """The `py-spy` installed beside this Python, else the one on `PATH`, else `None`."""
    beside = os.path.dirname(sys.executable) if sys.executable else ""
    return (beside and shutil.which("py-spy", path=beside)) or shutil.which("py-spy")


def take_stacks(
    states: Mapping[int, str | None], timeout: float
) -> dict[int, list[ThreadStack] | str]:
    """Dump the Python stacks of processes, in parallel, each in a `py-spy` of its own.

    Args:
        states: Pid to the letter of its state as `read_facts` found it.
        timeout: Seconds for all of them together; what then still runs is killed.

    Returns:
        For each pid its threads, main thread first, or the reason why there are none.
    """
    missing = {pid: _no_dump(pid, state, timeout) for pid, state in states.items()}
    wanted = [pid for pid, reason in missing.items() if reason is None]
    program = find_py_spy() if wanted else None
    if program is None:
        absent = "py-spy was not found: install it with \"pip install 'elastic-timer[stacks]'\""
        return {pid: reason or absent for pid, reason in missing.items()}
    taken = _dump_all(program, {pid: states[pid] for pid in wanted}, timeout)
    return {
        pid: reason or taken.get(pid, "py-spy did not end in time")
        for pid, reason in missing.items()
    }


def _no_dump(pid: int, state: str | None, timeout: float) -> str | None:
    """Why a process is not to be dumped; `None` where it is."""
    if timeout <= 0:
        return "switched off"
    # Above all not the server's own process: who would end a py-spy that has stopped it?
    reason = refusal(pid)
    if reason is not None:
        return reason
    if pid < 0:
        return "a process group, not a process"
    # Not read off a missing state: that may as well be for want of descriptors.
    gone = os.path.exists("/proc/self") and not os.path.exists(f"/proc/{pid}")
    return "the process has ended" if gone or state == "Z" else None


def _dump_all(
    program: str, states: Mapping[int, str | None], timeout: float
) -> dict[int, list[ThreadStack] | str]:
    deadline = time.monotonic() + timeout
    waiting = list(states)[::-1]
    taken: dict[int, list[ThreadStack] | str] = {}

    def work() -> None:
        while True:
            try:  # not asked before whether there is one: another thread may take it in between
                pid = waiting.pop()
            except IndexError:
                return
            try:
                taken[pid] = _dump(program, pid, states[pid], deadline)
            except Exception as error:  # a reap must never fail for want of a stack
                taken[pid] = f"py-spy: {_one_line(repr(error))}"

    helpers = []
    for _ in range(min(_PARALLEL_DUMPS, len(states)) - 1):
        helper = threading.Thread(target=work, name="elastic-timer-stacks", daemon=True)
        try:
            helper.start()
        except RuntimeError:  # no more threads to be had: fewer do it too
            break
        helpers.append(helper)
    work()
    for helper in helpers:
        helper.join(max(0.0, deadline - time.monotonic()) + 0.5)
    return dict(taken)  # a copy: a thread that is late may still write


def _dump(program: str, pid: int, state: str | None, deadline: float) -> list[ThreadStack] | str:
    left = deadline - time.monotonic()
    if left <= 0:
        return "the time for stacks was used up by other workers"
    command = [program, "dump", "--json", "--pid", str(pid)]
    if state in ("T", "t", "D"):
        # Such a process cannot be paused: py-spy would fail, or wait for it to the end. The
        # others must be: read while it runs, a busy worker's stack is often torn.
        command.append("--nonblocking")
    try:
        dump = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return f"py-spy could not be started: {_one_line(str(error))}"
    try:
        output, errors = dump.communicate(timeout=left)
        reason = _reason(errors.decode(errors="replace"))
    except subprocess.TimeoutExpired as expired:
        _kill(dump)
        # All of it may be there: a child forked meanwhile keeps the pipe open, not py-spy.
        output = expired.output or b""
        reason = "py-spy did not end in time"
    try:
        return _threads(output, pid)
    except (ValueError, KeyError, TypeError, AttributeError):
        return reason


def _kill(dump: subprocess.Popen[bytes]) -> None:
    """End a `py-spy` and whatever it started, without waiting for long."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(dump.pid, signal.SIGKILL)
        else:
            dump.kill()
    for pipe in filter(None, (dump.stdout, dump.stderr)):
        pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        dump.wait(timeout=0.3)


def _threads(output: bytes, pid: int) -> list[ThreadStack]:
    """Read what `py-spy dump --json` wrote. Raises ValueError, KeyError or TypeError."""
    threads = json.loads(output)
    threads.reverse()  # The oldest first, which is the main thread, except after some forks:
    threads.sort(key=lambda thread: thread["os_thread_id"] != pid)
    return [
        {
            "id": thread["thread_id"],
            # A program that never imported threading has given no names.
            "name": thread["thread_name"] or ("MainThread" if index == 0 else None),
            "active": thread["active"],
            "gil": thread["owns_gil"],
            "frames": [
                {"file": frame["filename"], "line": frame["line"], "function": frame["name"]}
                for frame in reversed(thread["frames"][:_FRAMES_KEPT])
            ],
        }
        for index, thread in enumerate(threads)
    ]


def _reason(errors: str) -> str:
    """One line from what a failed `py-spy` said, and what to do about it."""
    lines = errors.partition("Stack backtrace:")[0].splitlines()
    told = _one_line(" ".join(line for line in lines if "sudo" not in line))
    told = told or "it gave neither stacks nor a reason"
    if "permi" in errors.lower():  # permission denied, operation not permitted
        told += (
            " (it may not read the process: run the server as the workers' user; in a "
            "container add the capability SYS_PTRACE; see kernel.yama.ptrace_scope)"
        )
    return f"py-spy: {told}"


def _one_line(text: str) -> str:
    """The text on one line, without control characters, at a sane length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _TEXT_KEPT else line[: _TEXT_KEPT - 3] + "..."


def _expiration_and_scope(request: str) -> tuple[float, str]:
    """Of a request as JSON; of any other text, that text as a scope whose time is not known."""
    try:
        fields = json.loads(request)
        return float(fields["expiration_time"]), str(fields["scope_id"])
    except (ValueError, KeyError, TypeError):
        return math.inf, _one_line(str(request))


def _facts_in_words(facts: Facts) -> list[str]:
    words = []
    if facts["state"] is not None:
        words.append(f"state {facts['state']} ({_STATES.get(facts['state'], 'unknown')})")
    if facts["system_call"] is not None:
        words.append(f"in system call {facts['system_call']}")
    if facts["wait_channel"] is not None:
        words.append(f"waiting in {facts['wait_channel']}")
    if facts["threads"] is not None:
        words.append(f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}")
    if facts["resident_bytes"] is not None:
        words.append(f"{facts['resident_bytes'] / 2**20:.1f} MiB resident")
    if facts["age_seconds"] is not None:
        words.append(f"{facts['age_seconds']:.1f} s old")
    return words


def _read(pid: int, name: str) -> str | None:
    """A file of a process under `/proc`; `None` if it is gone, forbidden or there is none."""
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return None
