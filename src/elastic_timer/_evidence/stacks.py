"""The Python stacks of other processes, as `py-spy` reads them.

`py-spy` reads the process's memory, so the process has no part in it. Local variables are never
asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from subprocess import DEVNULL, PIPE
from typing import TYPE_CHECKING, TypedDict

from elastic_timer import _clock
from elastic_timer._evidence.facts import one_line
from elastic_timer._server.process import refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

_PARALLEL_DUMPS = 8
_FRAMES_KEPT = 100
_MOST_OUTPUT = 4 << 20  # bytes; 10,000 frames and more
_REAP_PATIENCE = 0.3  # seconds


class Frame(TypedDict):
    """One line of a stack."""

    file: str
    line: int
    function: str


class ThreadStack(TypedDict):
    """One thread of a process; `frames` end with the innermost, as a traceback does."""

    id: int
    name: str | None
    active: bool
    gil: bool
    frames: list[Frame]


class Stacks(TypedDict):
    """The threads of a process, main thread first, or the reason why there are none."""

    stacks: list[ThreadStack] | None
    stacks_missing: str | None


def find_py_spy() -> str | None:
    """The `py-spy` installed beside this Python, else the one on `PATH`, else `None`."""
    # Beside an unknown Python would be in the working directory, where anybody's may lie.
    beside = sys.executable and shutil.which("py-spy", path=os.path.dirname(sys.executable))
    return beside or shutil.which("py-spy")


def take_stacks(states: Mapping[int, str | None], deadline: float | None) -> dict[int, Stacks]:
    """Dump the Python stacks of processes, eight at a time, each in a `py-spy` of its own.

    Args:
        states: Pid to the letter of its state as `read_facts` found it.
        deadline: When what still runs is killed, in monotonic seconds. `None` takes none.

    Returns:
        The stacks of each pid.
    """
    taken = {
        pid: _missing(reason)
        for pid, state in states.items()
        if (reason := _no_dump(pid, state, deadline))
    }
    wanted = {pid: state for pid, state in states.items() if pid not in taken}
    reason = "the time for stacks was used up by other processes"
    if wanted and deadline is not None:
        try:
            if program := find_py_spy():
                _dump_all(program, wanted, deadline, taken)
            else:
                reason = 'py-spy was not found: install it with "pip install py-spy"'
        except Exception as error:  # a reap must never fail for want of a stack
            reason = f"py-spy: {one_line(repr(error))}"
    return {pid: taken.get(pid) or _missing(reason) for pid in states}


def _missing(reason: str) -> Stacks:
    return {"stacks": None, "stacks_missing": reason}


def _no_dump(pid: int, state: str | None, deadline: float | None) -> str | None:
    """Why a process is not to be dumped; `None` where it is."""
    if deadline is None:
        return "switched off"
    # Above all not the server's own process: who would end a py-spy that has stopped it?
    reason = refusal(pid)
    if reason is not None or pid < 0:
        return reason or "a process group, not a process"
    # Not read off a missing state: that may as well be for want of descriptors.
    gone = os.path.exists("/proc/self") and not os.path.exists(f"/proc/{pid}")
    return "the process has ended" if gone or state == "Z" else None


def _dump_all(
    program: str, states: Mapping[int, str | None], deadline: float, taken: dict[int, Stacks]
) -> None:
    """Add the stacks of those processes whose dump could be begun before the deadline."""
    dumps: list[_Dump] = []
    waiting = list(states.items())[::-1]
    # Not left to subprocess: it waits by a clock that may be frozen, and keeps without limit what
    # a py-spy writes.
    with selectors.DefaultSelector() as selector:
        try:
            while (left := deadline - _clock.monotonic()) > 0:
                running = sum(dump.pid not in taken for dump in dumps)
                if waiting and running < _PARALLEL_DUMPS:
                    dumps.append(_Dump(program, *waiting.pop(), selector))
                elif running:
                    for key, _ in selector.select(left):
                        dump: _Dump = key.data
                        if dump.pid not in taken and dump.has_all(key.fd):
                            taken[dump.pid] = dump.end()
                else:
                    break
        finally:
            for dump in dumps:
                if dump.pid not in taken:
                    # All of it may be there: a child forked meanwhile keeps the pipe open.
                    taken[dump.pid] = dump.end("py-spy did not end in time")
            # Killed they end at once, but where the kernel is in their way.
            while any(dump.process.poll() is None for dump in dumps) and (
                _clock.monotonic() < deadline + _REAP_PATIENCE
            ):
                time.sleep(0.0005)


class _Dump:
    """A `py-spy dump` that runs, and what it has written.

    Args:
        program: The `py-spy`.
        pid: The process to dump.
        state: The letter of the process's state.
        selector: Tells when there is something to read.

    Raises:
        OSError: `py-spy` could not be started.
    """

    def __init__(
        self, program: str, pid: int, state: str | None, selector: selectors.BaseSelector
    ) -> None:
        command = [program, "dump", "--json", "--pid", str(pid)]
        if state in ("T", "t", "D"):
            # Such a process cannot be paused: py-spy would fail, or wait for it to the end. The
            # others must be: read while it runs, a busy worker's stack is often torn.
            command.append("--nonblocking")
        self.pid = pid
        self.process = subprocess.Popen(
            command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True
        )
        self._selector = selector
        self._pipes = [pipe for pipe in (self.process.stdout, self.process.stderr) if pipe]
        self._open = {pipe.fileno(): bytearray() for pipe in self._pipes}
        self._written = list(self._open.values())
        for descriptor in self._open:
            selector.register(descriptor, selectors.EVENT_READ, self)

    def has_all(self, descriptor: int) -> bool:
        """Read what there is; whether that is the end of it, or too much."""
        chunk = os.read(descriptor, 1 << 16)
        self._open[descriptor] += chunk
        if not chunk:
            self._selector.unregister(descriptor)
            del self._open[descriptor]
        return not self._open or self._is_too_much()

    def end(self, reason: str | None = None) -> Stacks:
        """Kill it, with whatever it started.

        Args:
            reason: Why it has to end. `None`: it has written what it had to, or far more.

        Returns:
            The stacks, if it has written them.
        """
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for descriptor in self._open:
            self._selector.unregister(descriptor)
        for pipe in self._pipes:
            pipe.close()
        if self._is_too_much():
            return _missing(f"py-spy wrote more than {_MOST_OUTPUT >> 20} MiB")
        output, errors = self._written
        try:
            return {"stacks": _threads(output, self.pid), "stacks_missing": None}
        except Exception:  # whatever its output is
            return _missing(reason or _reason(errors.decode(errors="replace")))

    def _is_too_much(self) -> bool:
        return sum(map(len, self._written)) > _MOST_OUTPUT


def _threads(output: bytearray, pid: int) -> list[ThreadStack]:
    """Read what `py-spy dump --json` wrote; raises this or that where it is something else."""
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
    told = " ".join(line for line in lines if "sudo" not in line)
    told = one_line(told) or "it gave neither stacks nor a reason"
    if "permi" in errors.lower():  # permission denied, operation not permitted
        told += (
            " (it may not read the process: run the server as the workers' user; in a "
            "container add the capability SYS_PTRACE; see kernel.yama.ptrace_scope)"
        )
    return f"py-spy: {told}"
