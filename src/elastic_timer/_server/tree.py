"""What a process has started: found in /proc, held, and killed with it.

No call names a process's descendants. /proc tells of each process its parent and its session, so:
whoever has one of them for a parent is one, and in a session that one of them leads is nobody else.
A process whose parent has ended has another one; in a session of its own it is not found any more.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal as signals
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import NamedTuple

from elastic_timer import _clock
from elastic_timer._server.callbacks import contained_logger
from elastic_timer._server.process import ProcessHandle, name_of, stat_of, state_of, user_of

logger = contained_logger(__name__)

# A process that is still there so long after SIGKILL hangs in the kernel, where nobody can help.
UNKILLABLE_AFTER = 5.0

# How long, in seconds, a tree may grow while it is searched before the search is given up.
_LONGEST_SEARCH = 1.0

# A worker whose stop its parent would see is stopped when so many looks in a row found new ones.
_PATIENT_LOOKS = 3

# How long a process is waited for, in seconds, that was sent SIGSTOP and still runs.
_LONGEST_STOP = 0.05

_STOPPED = ("T", "t")

# These wait for their child's stops, and stop with it; so do shells that give each job a group.
_STOP_WITH_THEIR_CHILD = frozenset({"sudo", "su", "runuser", "doas", "script", "strace", "gdb"})


class Known(NamedTuple):
    """What is known of a process that was seen in /proc; its start is that in /proc/PID/stat."""

    pid: int
    parent: int
    group: int
    session: int
    start: str


class ProcessTable:
    """The processes of this system.

    To look again costs a listing, and a read for each that was not there before.
    """

    def __init__(self) -> None:
        self.processes: dict[int, Known] = {}

    def refresh(self) -> None:
        """Look again.

        Raises:
            OSError: There is no /proc, or no descriptor left to read it.
        """
        before, self.processes = self.processes, {}
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            known = before.get(pid) or look_at(pid)
            if known is not None:
                self.processes[pid] = known

    def ancestors(self, pid: int) -> Iterator[int]:
        """The process itself, its parent and so on."""
        while (known := self.processes.get(pid)) is not None:
            yield pid
            pid = known.parent


def look_at(pid: int) -> Known | None:
    stat = stat_of(pid)
    return Known(pid, int(stat[1]), int(stat[2]), int(stat[3]), stat[19]) if stat else None


def descendants(
    processes: Mapping[int, Known], seeds: Iterable[int], sessions: Set[int], server: int
) -> list[Known]:
    """The processes below some others, nearest first.

    Args:
        processes: All there are.
        seeds: The pids to begin with; they are not in the result.
        sessions: In which there is nobody else.
        server: It is left out with all that it has started, and so is its session: that one of the
            seeds leads it says nothing of those in it whom the server has started.
    """
    children, members = defaultdict(list), defaultdict(list)
    for known in processes.values():
        children[known.parent].append(known)
        members[known.session].append(known)
    if server in processes:
        members.pop(processes[server].session, None)
    pending = list(seeds)
    seen = {server, *pending}
    found: list[Known] = []
    reached = [known for session in sessions for known in members[session]]
    while reached or pending:
        for known in reached:
            if known.pid not in seen:
                seen.add(known.pid)
                found.append(known)
                pending.append(known.pid)
        reached = []
        for pid in pending:
            reached += children[pid] + members[pid]
        pending = []
    return found


class _Held(NamedTuple):
    process: ProcessHandle
    known: Known
    is_stopped: bool  # By us.


class Tree:
    """The descendants of some processes, each of them held; `find` adds to them.

    Args:
        users: Whose processes are held. Those of others are only known, in `others`, with the time
            that they began.
    """

    def __init__(self, users: Set[int]) -> None:
        self.others: dict[int, str] = {}
        self._users = users
        self._held: dict[int, _Held] = {}
        # Led by one that was found; valid while a member is held, for then it is still that one.
        self._sessions: set[int] = set()

    def pids(self) -> list[int]:
        """The processes that are held, nearest first."""
        return list(self._held)

    def starts(self) -> dict[int, str]:
        """The processes that are held, and when they began."""
        return {pid: held.known.start for pid, held in self._held.items()}

    def find(self, table: ProcessTable, roots: Iterable[int] = (), stop: bool = False) -> bool:
        """Look for descendants and hold them.

        Args:
            table: Where to look; it is refreshed.
            roots: The processes to begin with, besides those that are held already.
            stop: Stop those that are held, so that they start no others.

        Returns:
            Whether there were new ones.

        Raises:
            OSError: There is no descriptor left to look with.
        """
        if stop:
            self._stop(list(self._held))
        table.refresh()
        ours = os.getpid()
        # A number counts that was the same process's when the table was made, and still is.
        alive = [pid for pid, held in self._held.items() if _is(held.known)]
        sessions = {table.processes[pid].session for pid in alive if pid in table.processes}
        seeds = [*roots, *alive]
        found = descendants(table.processes, seeds, sessions & self._sessions, ours)
        self._sessions |= {known.session for known in found if known.session == known.pid}
        self._sessions |= {pid for pid in roots if _leads(table.processes.get(pid))}
        spared = {*table.ancestors(ours), *self.others}
        new = [known for known in found if known.pid not in spared and self.hold(known)]
        if stop:
            self._stop([known.pid for known in new])
        return bool(new)

    def resume(self) -> None:
        """Let those go on that `find` has stopped."""
        for pid, held in self._held.items():
            if held.is_stopped:
                self._send(pid, signals.SIGCONT)
                self._held[pid] = held._replace(is_stopped=False)

    def send(self, signal: int) -> None:
        """Send a signal to each that is held, but to none that is another user's by now."""
        for pid in self._held:
            user = user_of(pid)
            # Not known for want of a descriptor, most likely: it was theirs.
            if user is None or user in self._users:
                self._send(pid, signal)

    def forget_ended(self) -> None:
        """Let go of those that have ended."""
        for pid, held in list(self._held.items()):
            if held.process.has_exited():
                held.process.close()
                del self._held[pid]

    def close(self) -> None:
        """Let go of all."""
        for held in self._held.values():
            held.process.close()
        self._held = {}

    def hold(self, known: Known) -> bool:
        """Hold a process that runs and may be signalled; whether it is a new one."""
        if known.pid in self._held:
            return False
        try:
            process = ProcessHandle(known.pid)
        except ProcessLookupError:
            return False
        user = user_of(known.pid)
        # Asked last: it is this process that all the answers were about.
        is_there = _is(known) and not process.has_exited()
        if is_there and user in self._users:
            self._held[known.pid] = _Held(process, known, is_stopped=False)
            return True
        process.close()
        if is_there:
            self.others[known.pid] = known.start
        return False

    def _stop(self, pids: Iterable[int]) -> None:
        for pid in pids:
            held = self._held[pid]
            # One that somebody else has stopped is not ours to let go on.
            if not held.is_stopped and state_of(pid) not in _STOPPED:
                self._send(pid, signals.SIGSTOP)
                self._held[pid] = held._replace(is_stopped=True)

    def _send(self, pid: int, signal: int) -> None:
        try:
            self._held[pid].process.send(signal)
        except ProcessLookupError:
            pass  # It has ended meanwhile.
        except OSError as error:
            logger.error("Process %s can't be sent signal %d: %s", pid, signal, error)


def _leads(known: Known | None) -> bool:
    return known is not None and known.session == known.pid


def _is(known: Known) -> bool:
    """Whether it is still this process that has the number; it may have ended."""
    stat = stat_of(known.pid)
    return bool(stat and stat[19] == known.start)


def _wait_until_stopped(pids: Iterable[int]) -> None:
    """Wait for the stop of those that were sent SIGSTOP: a fork that is under way comes to its end.

    The child that it made would be missed by a look before.
    """
    end = _clock.monotonic() + _LONGEST_STOP
    for pid in pids:
        while "R" in _states_of_threads(pid) and _clock.monotonic() < end:
            time.sleep(0.0002)


def _states_of_threads(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            yield state_of(f"{pid}/task/{thread}")


def still_there(starts: Mapping[int, str]) -> dict[int, str]:
    """Of processes and the times that they began at, those that run, and their states."""
    found = {}
    for pid, start in starts.items():
        stat = stat_of(pid)
        if stat and stat[19] == start and stat[0] not in ("Z", "X"):
            found[pid] = stat[0]
    return found


class _Worker:
    """A worker that is signalled, and what it has started.

    Args:
        worker: The worker's process.
        name: What the log calls it.

    Raises:
        OSError: No descriptor is left to look at it with.
        ProcessLookupError: It has ended.
    """

    def __init__(self, worker: ProcessHandle, name: str) -> None:
        self.name = name
        # Its own: the server lets go of a worker that has ended, and this is needed then.
        self._process = ProcessHandle(worker.pid)
        known, user = look_at(worker.pid), user_of(worker.pid)
        # Asked last: its number may be somebody else's by now, and what was read of him.
        has_exited = worker.has_exited()
        if known is None or user is None or has_exited:
            self._process.close()
            number = errno.ESRCH if has_exited else errno.EMFILE
            raise OSError(number, os.strerror(number))
        self.pid = worker.pid
        self._known = known
        self._is_stopped = False
        self.tree = Tree({user})

    def find(self, table: ProcessTable, stop: bool) -> None:
        """Look for what the worker has started.

        Args:
            table: Where to look.
            stop: Stop it all, and the worker, and look until there is nothing new.
        """
        end = _clock.monotonic() + _LONGEST_SEARCH
        looks = 0
        while _clock.monotonic() < end:
            if stop and (looks == _PATIENT_LOOKS or not _stops_with(self._known)):
                self._stop()
            if stop:
                _wait_until_stopped([*self.tree.pids(), *([self.pid] if self._is_stopped else [])])
            try:
                is_new = self.tree.find(table, [self.pid] if _is(self._known) else [], stop)
            except OSError as error:
                _tell_of_no_search(self.name, error)
                return
            looks += 1
            if not stop or not is_new:
                return
        logger.error("Of what worker %s has started not all was found: it grows faster", self.name)

    def kill(self, table: ProcessTable) -> dict[int, str]:
        """Kill all that the worker has started; their pids and starts."""
        if not self._is_stopped:
            self.find(table, stop=True)
        self.tree.forget_ended()
        self.tree.send(signals.SIGKILL)
        return self.tree.starts()

    def resume(self) -> None:
        """Let go on what was stopped."""
        self.tree.resume()
        if self._is_stopped:
            self._send(signals.SIGCONT)
            self._is_stopped = False

    def close(self) -> None:
        """Let go of all."""
        self._process.close()
        self.tree.close()

    def _stop(self) -> None:
        if not self._is_stopped and state_of(self.pid) not in _STOPPED:
            self._send(signals.SIGSTOP)
            self._is_stopped = True

    def _send(self, signal: int) -> None:
        with contextlib.suppress(OSError):
            self._process.send(signal)


def _tell_of_no_search(worker: str, error: OSError) -> None:
    logger.error("What worker %s has started can't be looked for: %s", worker, error)


def _stops_with(known: Known) -> bool:
    """Whether its parent would see a process stopped, and stop with it or take its terminal."""
    parent = look_at(known.parent)
    if parent is None:
        return False
    has_job_control = parent.session == known.session and parent.group != known.group
    return has_job_control or name_of(parent.pid) in _STOP_WITH_THEIR_CHILD


class _Killed(NamedTuple):
    worker: str
    starts: dict[int, str]
    until: float


class Trees:
    """What workers have started, from the signal to a worker until its tree is gone with it."""

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}
        self._killed: list[_Killed] = []
        # One for all that is done in one round.
        self._table: ProcessTable | None = None

    def hold(self, worker: ProcessHandle, stop: bool, name: str) -> None:
        """Hold what a worker has started, before it is signalled.

        Args:
            worker: The worker's process. Of one that has ended nothing is held.
            stop: Stop all of it, and the worker: it is about to be killed.
            name: What the log is to call the worker.
        """
        if worker.pid not in self._workers:
            try:
                self._workers[worker.pid] = _Worker(worker, name)
            except ProcessLookupError:
                return
            except OSError as error:
                _tell_of_no_search(name, error)
                return
        self._workers[worker.pid].find(self._processes(), stop)

    def resume(self, pid: int) -> None:
        """Let a worker go on that was stopped, and what it has started; they stay held."""
        if pid in self._workers:
            self._workers[pid].resume()

    def let_go(self, pid: int) -> None:
        """Hold no longer what a worker has started that lives on."""
        if pid in self._workers:
            self._workers[pid].resume()
            self._workers.pop(pid).close()

    def kill(self, pid: int) -> None:
        """Kill what is held of a worker that was killed or has ended."""
        if pid not in self._workers:
            return
        worker = self._workers.pop(pid)
        try:
            starts = worker.kill(self._processes())
        finally:
            # Whatever was stopped and is not killed: nobody else would let it go on.
            worker.resume()
            worker.close()
        if starts:
            logger.warning("Killed what worker %s had started: %s", worker.name, _in_words(starts))
            until = _clock.monotonic() + UNKILLABLE_AFTER
            self._killed.append(_Killed(worker.name, starts, until))
        if worker.tree.others:
            logger.warning(
                "Worker %s had started processes of other users, which are left alone: %s",
                worker.name,
                _in_words(worker.tree.others),
            )

    def follow_up(self) -> None:
        """Name what is still there some time after it was killed; the end of a round."""
        self._table = None
        while self._killed and self._killed[0].until <= _clock.monotonic():
            killed = self._killed.pop(0)
            left = still_there(killed.starts)
            if left:
                logger.error(
                    "Of what worker %s had started, is still there %.0f s after SIGKILL: %s",
                    killed.worker,
                    UNKILLABLE_AFTER,
                    _in_words(f"{pid} (state {state})" for pid, state in left.items()),
                )

    def next_due(self) -> float:
        """When `follow_up` has something to do, in monotonic seconds."""
        return self._killed[0].until if self._killed else math.inf

    def close(self) -> None:
        """Let go of all; nothing is signalled."""
        for worker in self._workers.values():
            worker.close()
        self._workers = {}
        self._killed = []

    def _processes(self) -> ProcessTable:
        if self._table is None:
            self._table = ProcessTable()
        return self._table


def _in_words(what: Iterable[object]) -> str:
    return ", ".join(map(str, what))
