"""The Python stacks of other processes, as `py-spy` reads them.

`py-spy` reads the process's memory, so the process has no part in it. Local variables are never
asked for.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from subprocess import DEVNULL, PIPE
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from elastic_timer import _clock
from elastic_timer._evidence.facts import is_traced, one_line
from elastic_timer._server.process import refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

_PARALLEL_DUMPS = 8
_FRAMES_KEPT = 100
_MOST_OUTPUT = 4 << 20  # bytes; 10,000 frames and more
_REAP_PATIENCE = 0.3  # seconds
_TRIES = 3  # of a process that somebody else has paused meanwhile


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
    """Dump the Python stacks of processes, and wait until that is done.

    Args:
        states: Pid to the letter of its state as `read_facts` found it.
        deadline: When what still runs is killed, in monotonic seconds. `None` takes none.

    Returns:
        The stacks of each pid.
    """
    taken: dict[int, Stacks] = {}
    with contextlib.closing(Dumps()) as dumps:
        for pid, state in states.items():
            dumps.order(pid, pid, state, deadline)
        while dumps.is_busy():
            taken.update(dumps.wait(math.inf))
    return taken


class _Order(NamedTuple):
    """A dump to be taken; the most urgent comes first, of these the one asked for first."""

    urgency: int
    number: int
    key: Any
    pid: int
    may_pause: bool
    deadline: float
    native: bool
    tries: int = 1


class Dumps:
    """Dumps of processes' stacks, eight at a time, each in a `py-spy` of its own."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, Stacks]] = []
        self._waiting: list[_Order] = []
        self._running: list[_Dump] = []
        self._ended: list[_Dump] = []
        self._ordered = 0
        self._selector: selectors.BaseSelector | None = None
        self._program: str | None = None

    def order(
        self,
        key: Any,
        pid: int,
        state: str | None,
        deadline: float | None,
        urgency: int = 0,
        native: bool = False,
    ) -> None:
        """Have a process dumped.

        Args:
            key: What `wait` returns the stacks with.
            pid: The process.
            state: The letter of its state as `read_facts` found it.
            deadline: When the dump is given up, in monotonic seconds. `None` takes none.
            urgency: Lower numbers come first.
            native: Whether to have C frames too.
        """
        reason = _no_dump(pid, state, deadline)
        if reason is not None or deadline is None:
            self._done.append((key, missing(reason or "switched off")))
            return
        self._ordered += 1
        order = _Order(urgency, self._ordered, key, pid, can_pause(state), deadline, native)
        heapq.heappush(self._waiting, order)

    def is_busy(self) -> bool:
        """Whether there is something that `wait` has not returned."""
        return bool(self._done or self._waiting or self._running)

    def wait(self, patience: float) -> list[tuple[Any, Stacks]]:
        """Wait until dumps have come to their end, for so many seconds at most.

        Returns:
            The keys of those that have, and their stacks or why there are none.
        """
        self._begin()
        if not self._done and self._running and self._selector is not None:
            left = min(dump.order.deadline for dump in self._running) - _clock.monotonic()
            for key, _ in self._selector.select(max(0.0, min(left, patience))):
                dump: _Dump = key.data
                if dump in self._running and dump.has_all(key.fd):
                    self._end(dump)
        now = _clock.monotonic()
        for dump in [dump for dump in self._running if dump.order.deadline <= now]:
            # All of it may be there: a child forked meanwhile keeps the pipe open.
            self._end(dump, "py-spy did not end in time")
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """End what still runs."""
        for dump in self._running.copy():
            self._end(dump, "py-spy was ended")
        if self._selector is not None:
            self._selector.close()
            self._selector = None
        # Killed they end at once, but where the kernel is in their way.
        give_up = _clock.monotonic() + _REAP_PATIENCE
        while any(dump.process.poll() is None for dump in self._ended) and (
            _clock.monotonic() < give_up
        ):
            time.sleep(0.0005)

    def _begin(self) -> None:
        now = _clock.monotonic()
        late = [order for order in self._waiting if order.deadline <= now]
        if late:
            used_up = missing("the time for stacks was used up by other processes")
            self._done += [(order.key, used_up) for order in late]
            self._waiting = [order for order in self._waiting if order.deadline > now]
            heapq.heapify(self._waiting)
        while self._waiting and len(self._running) < _PARALLEL_DUMPS:
            order = heapq.heappop(self._waiting)
            try:
                # Not left to subprocess: it waits by a clock that may be frozen, and keeps without
                # limit what a py-spy writes.
                if self._selector is None:
                    self._program = find_py_spy()
                    self._selector = selectors.DefaultSelector()
                if self._program is None:
                    install = 'py-spy was not found: install it with "pip install py-spy"'
                    self._done.append((order.key, missing(install)))
                else:
                    self._running.append(_Dump(self._program, order, self._selector))
            except Exception as error:  # a reap must never fail for want of a stack
                self._done.append((order.key, missing(f"py-spy: {one_line(repr(error))}")))

    def _end(self, dump: _Dump, reason: str | None = None) -> None:
        self._running.remove(dump)
        taken = dump.end(reason)
        again = dump.another_try() if reason is None and taken["stacks"] is None else None
        if again is None:
            self._done.append((dump.order.key, taken))
        else:
            heapq.heappush(self._waiting, again)
        self._ended = [ended for ended in self._ended if ended.process.poll() is None] + [dump]


def missing(reason: str) -> Stacks:
    """No stacks, and why."""
    return {"stacks": None, "stacks_missing": reason}


def can_pause(state: str | None) -> bool:
    """Whether a process in this state can be paused, as C frames need it."""
    return state not in ("T", "t", "D")


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


class _Dump:
    """A `py-spy dump` that runs, and what it has written.

    Args:
        program: The `py-spy`.
        order: Which process to dump, and how.
        selector: Tells when there is something to read.

    Raises:
        OSError: `py-spy` could not be started.
    """

    def __init__(self, program: str, order: _Order, selector: selectors.BaseSelector) -> None:
        command = [program, "dump", "--json", "--pid", str(order.pid)]
        if not order.may_pause:
            # Such a process cannot be paused: py-spy would fail, or wait for it to the end. The
            # others must be: read while it runs, a busy worker's stack is often torn.
            command.append("--nonblocking")
        elif order.native:
            command.append("--native")
        self.order = order
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
            return missing(f"py-spy wrote more than {_MOST_OUTPUT >> 20} MiB")
        output, errors = self._written
        try:
            return {"stacks": _threads(output, self.order.pid), "stacks_missing": None}
        except Exception:  # whatever its output is
            return missing(reason or _reason(errors.decode(errors="replace")))

    def another_try(self) -> _Order | None:
        """How to go on where the system has not permitted it; `None` where nothing would help.

        Only one at a time can pause a process, and another server may be looking at it.
        """
        order = self.order
        if not order.may_pause or not _is_refused(self._written[1].decode(errors="replace")):
            return None
        if order.tries < _TRIES and is_traced(order.pid):
            return order._replace(tries=order.tries + 1)
        # To read it needs no pause, but C frames do.
        return None if order.native else order._replace(may_pause=False)

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
    if _is_refused(errors):
        told += (
            " (it may not read the process: run the server as the workers' user; in a "
            "container add the capability SYS_PTRACE; see kernel.yama.ptrace_scope)"
        )
    return f"py-spy: {told}"


def _is_refused(errors: str) -> bool:
    return "permi" in errors.lower()  # permission denied, operation not permitted
