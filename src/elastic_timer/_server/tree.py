"""What a process has started: found in /proc, held, and killed with it.

No call names a process's descendants. /proc tells of each process its parent and its session, so:
whoever has one of them for a parent is one, and in a session that one of them leads is nobody else.
A process whose parent has ended has another one; in a session of its own it is not found any more.

To look takes a while, in which nobody is to wait: what does is a generator that does a piece of it
at a time, of some tens of microseconds, and yields whether it waits for something.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import operator
import os
import signal as signals
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Set
from typing import NamedTuple, TypeVar

from elastic_timer import _clock
from elastic_timer._server.callbacks import contained_logger, run_contained
from elastic_timer._server.process import (
    ProcessHandle,
    children_of,
    name_of,
    stat_of,
    state_of,
    user_of,
)

logger = contained_logger(__name__)

_Result = TypeVar("_Result")
Pieces = Generator[bool, None, _Result]

# A process that is still there so long after SIGKILL hangs in the kernel, where nobody can help.
UNKILLABLE_AFTER = 5.0

# How long, in seconds, a tree may grow while it is searched before the search is given up.
_LONGEST_SEARCH = 1.0

# A worker whose stop its parent would see is stopped when so many looks in a row found new ones.
_PATIENT_LOOKS = 3

# How long a process is waited for, in seconds, that was sent SIGSTOP and waits for something in the
# kernel. One that runs stops as soon as it gets a processor, which takes long on a busy machine.
_LONGEST_HANG = 0.05
_STOP_POLL = 0.0001

_STOPPED = ("T", "t")
# Also one that has ended, or is not there any more.
_STILL = frozenset({*_STOPPED, "Z", "X", "unknown"})

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
        self.made = _clock.monotonic()
        self.processes: dict[int, Known] = {}

    def refresh(self) -> Pieces[Mapping[int, Known]]:
        """Look again; returns the processes that there are now.

        Raises:
            OSError: There is no /proc, or no descriptor left to read it.
        """
        found = {}
        with os.scandir("/proc") as entries:
            for entry in entries:
                if not entry.name.isdecimal():
                    continue
                pid = int(entry.name)
                known = self.processes.get(pid)
                if known is None:
                    known = look_at(pid)
                    yield False
                if known is not None:
                    found[pid] = known
        self.processes = found
        return found


def at_once(pieces: Pieces[_Result]) -> _Result:
    """Do all the pieces, one after the other; what they come to."""
    while True:
        try:
            if next(pieces):
                time.sleep(_STOP_POLL)
        except StopIteration as end:
            result: _Result = end.value
            return result


def ancestors(processes: Mapping[int, Known], pid: int) -> Iterator[int]:
    """The process itself, its parent and so on."""
    while (known := processes.get(pid)) is not None:
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
            reached += [each for each in children[pid] if _may_have_begun(processes.get(pid), each)]
            reached += members[pid]
        pending = []
    return found


def _may_have_begun(parent: Known | None, child: Known) -> bool:
    """Whether a parent is not younger: then it is another one, who has the number since."""
    return parent is None or int(parent.start) <= int(child.start)


class _Held(NamedTuple):
    process: ProcessHandle
    known: Known
    is_stopped: bool = False  # By us.
    # It was seen to have come to the stop: it starts no others, nor becomes another user's.
    is_still: bool = False


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
        # Whose stop was waited for, whether it came or not.
        self._awaited: set[int] = set()

    def pids(self) -> list[int]:
        """The processes that are held, nearest first."""
        return list(self._held)

    def starts(self) -> dict[int, str]:
        """The processes that are held, and when they began."""
        return {pid: held.known.start for pid, held in self._held.items()}

    def chase(
        self, table: ProcessTable, root: Known, is_stopped: bool, until: float
    ) -> Pieces[None]:
        """Stop what is held, and its children as soon as they are there, and wait until all stand.

        A fork that is under way comes to its end, and the child that it makes would be missed by a
        look before. So one that runs is waited for until it has had a processor. Where the kernel
        lists no children (CONFIG_PROC_CHILDREN), `find` alone finds them.

        Args:
            table: Where the server's ancestors are.
            root: The process to begin with, besides those that are held.
            is_stopped: Whether it was sent SIGSTOP.
            until: How long those are waited for that run, in monotonic seconds.
        """
        self._stop(list(self._held))
        spared = {os.getpid(), *ancestors(table.processes, os.getpid())}
        known = [root, *(held.known for held in self._held.values())]
        pending = deque(each for each in known if each.pid not in self._awaited)
        since: dict[int, float] = {}
        idle = 0
        while pending:
            parent = pending.popleft()
            held = self._held.get(parent.pid)
            is_sent = is_stopped if held is None else held.is_stopped
            moving = set()
            if is_sent:
                for state in _states_of_threads(parent.pid):
                    moving.add(state)
                    yield False
                moving -= _STILL
            now, count = _clock.monotonic(), len(pending)
            # After its state: what has stopped has no other children later.
            for child in _children_of(parent):
                if child.pid not in spared and child.pid not in self.others and self.hold(child):
                    self._stop([child.pid])
                    pending.append(child)
                yield False
            hangs_until = since.setdefault(parent.pid, now) + _LONGEST_HANG
            if moving and now < (until if "R" in moving else min(until, hangs_until)):
                idle = idle + 1 if len(pending) == count else 0
                pending.append(parent)
            else:
                idle = 0
                if is_sent:
                    self._awaited.add(parent.pid)
                if is_sent and held is not None:
                    self._held[parent.pid] = held._replace(is_still=not moving)
            if 0 < len(pending) <= idle:
                idle = 0
                yield True

    def find(
        self, table: ProcessTable, roots: Iterable[int] = (), stop: bool = False
    ) -> Pieces[bool]:
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
        processes = yield from table.refresh()
        ours = os.getpid()
        alive = []
        for pid, held in self._held.items():
            # A number counts that was the same process's when the table was made, and still is.
            if _is(held.known):
                alive.append(pid)
            yield False
        sessions = {processes[pid].session for pid in alive if pid in processes}
        seeds = [*roots, *alive]
        found = descendants(processes, seeds, sessions & self._sessions, ours)
        self._sessions |= {known.session for known in found if known.session == known.pid}
        self._sessions |= {pid for pid in roots if _leads(processes.get(pid))}
        spared = {*ancestors(processes, ours), *self.others}
        is_new = False
        for known in found:
            if known.pid not in spared and self.hold(known):
                is_new = True
                if stop:
                    # At once: what it starts and leaves before its stop is nobody's child.
                    self._stop([known.pid])
            yield False
        return is_new

    def resume(self) -> None:
        """Let those go on that were stopped here."""
        self._awaited.clear()
        for pid, held in self._held.items():
            if held.is_stopped:
                self._send(pid, signals.SIGCONT)
                self._held[pid] = held._replace(is_stopped=False, is_still=False)

    def send(self, signal: int) -> None:
        """Send a signal to each that is held, but to none that is another user's by now."""
        allowed = [pid for pid, held in self._held.items() if held.is_still or self._may(pid)]
        # Without a pause, and the farthest first: the kernel has a stopped process group go on when
        # a parent of it in another one ends, and then it might start others.
        for pid in reversed(allowed) if signal == signals.SIGKILL else allowed:
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
            self._held[known.pid] = _Held(process, known)
            return True
        process.close()
        if is_there:
            self.others[known.pid] = known.start
        return False

    def _may(self, pid: int) -> bool:
        user = user_of(pid)
        # Not known for want of a descriptor, most likely: it was theirs.
        return user is None or user in self._users

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


def _children_of(parent: Known) -> list[Known]:
    """The children that the kernel lists; of very many not all."""
    found = [look_at(pid) for pid in children_of(parent.pid)]
    # Asked last: it is its children that were listed.
    if not _is(parent):
        return []
    return [child for child in found if child is not None and child.parent == parent.pid]


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

    Attributes:
        stops: What `search` was called with for what is held now; None where that is out of date.
        search_on: The search that is under way.
        spent: How many seconds were spent on it.
        is_condemned: Whether all is killed at its end.

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
        self.is_stopped = False
        self.stops: bool | None = None
        self.search_on: Pieces[None] | None = None
        self.spent = 0.0
        self.is_condemned = False
        self.tree = Tree({user})

    def search(self, table: ProcessTable, stop: bool) -> Pieces[None]:
        """Look for what the worker has started.

        Args:
            table: Where to look.
            stop: Stop it all, and the worker, and look until there is nothing new.
        """
        end = _clock.monotonic() + _LONGEST_SEARCH
        looks = 0
        try:
            if stop and not self.is_condemned:
                # So that most has been read by the time that they are stopped.
                yield from table.refresh()
            while True:
                if stop:
                    self._stop_patiently(looks)
                    yield from self.tree.chase(table, self._known, self.is_stopped, end)
                roots = [self.pid] if _is(self._known) else []
                is_new = yield from self.tree.find(table, roots, stop)
                looks += 1
                if not stop:
                    return
                if _clock.monotonic() >= end:
                    break
                if not is_new:
                    return
        except OSError as error:
            _tell_of_no_search(self.name, error)
            return
        logger.warning(
            "What worker %s has started could not all be found in %.0f s: some may be left of it",
            self.name,
            _LONGEST_SEARCH,
        )

    def kill_tree(self) -> dict[int, str]:
        """Kill all that is held of what the worker has started; their pids and starts."""
        self.tree.forget_ended()
        self.tree.send(signals.SIGKILL)
        return self.tree.starts()

    def resume(self) -> None:
        """Let go on what was stopped."""
        self.tree.resume()
        if self.is_stopped:
            self._send(signals.SIGCONT)
            self.is_stopped = False

    def close(self) -> None:
        """Let go of all."""
        self._process.close()
        self.tree.close()

    def _stop_patiently(self, looks: int) -> None:
        if self.is_condemned or self.is_stopped or state_of(self.pid) in _STOPPED:
            return
        if looks >= _PATIENT_LOOKS or not _stops_with(self._known):
            self._send(signals.SIGSTOP)
            self.is_stopped = True

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
    """What workers have started, from the signal to a worker until its tree is gone with it.

    It is looked for by `work`, a piece at a time.
    """

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}
        # Those of whom a search is under way, also if they have ended and are no workers any more.
        self._busy: list[_Worker] = []
        # How many of them had to wait in turn.
        self._waiting = 0
        self._killed: list[_Killed] = []
        # One for all that are looked for at the same time.
        self._table: ProcessTable | None = None

    def hold(self, worker: ProcessHandle, stop: bool, name: str) -> bool:
        """Hold what a worker has started, before it is signalled.

        Args:
            worker: The worker's process. Of one that has ended nothing is held.
            stop: Stop all of it, and the worker: it is about to be killed.
            name: What the log is to call the worker.

        Returns:
            Whether all is held that can be. Else `work` has to find it first.
        """
        if worker.pid not in self._workers:
            try:
                self._workers[worker.pid] = _Worker(worker, name)
            except ProcessLookupError:
                return True
            except OSError as error:
                _tell_of_no_search(name, error)
                return True
        held = self._workers[worker.pid]
        if held.stops is not stop:
            self._search(held, stop)
        return held.search_on is None

    def is_searching(self, pid: int) -> bool:
        """Whether what a worker has started is being looked for."""
        return pid in self._workers and self._workers[pid].search_on is not None

    def has_work(self) -> bool:
        """Whether there is something to do for `work`."""
        return bool(self._busy)

    def work(self, until: float) -> bool:
        """Do at least a piece of what is to be done; whether a search has come to its end.

        Args:
            until: When to stop, in monotonic seconds.
        """
        while self._busy:
            if self._advance():
                return True
            if _clock.monotonic() >= until:
                return False
        return False

    def finish(self) -> None:
        """Do all that is to be done."""
        while self._busy:
            self.work(math.inf)

    def held(self) -> list[int]:
        """The workers of whom all that they have started is held for a signal, or about to be."""
        return [pid for pid, worker in self._workers.items() if worker.stops is not None]

    def resume(self, pid: int) -> None:
        """Let a worker go on that was stopped, and what it has started; they stay held."""
        if pid in self._workers:
            self._resume(self._workers[pid])

    def let_go(self, pid: int) -> None:
        """Hold no longer what a worker has started that lives on."""
        if pid in self._workers:
            self._resume(self._workers[pid])
            self._workers.pop(pid).close()

    def kill(self, pid: int) -> None:
        """Kill what is held of a worker that was killed or has ended, and what is found then."""
        worker = self._workers.pop(pid, None)
        if worker is None:
            return
        worker.is_condemned = True
        if worker.search_on is None and worker.is_stopped:
            self._kill(worker)
        elif worker.search_on is None or not worker.stops:
            self._search(worker, stop=True)

    def _kill(self, worker: _Worker) -> None:
        try:
            starts = worker.kill_tree()
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
        if not self._busy:
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
        """Kill what is to be killed, and let go of all else."""
        for pid in list(self._workers):
            self.let_go(pid)
        self.finish()
        self._killed = []

    def forget_parent(self) -> None:
        """Let go, in a forked child, of what the parent holds; nobody is signalled."""
        for worker in [*self._workers.values(), *self._busy]:
            worker.close()
        self._workers = {}
        self._busy.clear()
        self._killed = []

    def _search(self, worker: _Worker, stop: bool) -> None:
        self._resume(worker)
        if self._table is None or self._table.made < _clock.monotonic() - _LONGEST_SEARCH:
            self._table = ProcessTable()
        worker.stops, worker.search_on = stop, worker.search(self._table, stop)
        worker.spent = 0.0
        self._busy.append(worker)

    def _resume(self, worker: _Worker) -> None:
        if worker.search_on is not None:
            self._busy.remove(worker)
        worker.stops = worker.search_on = None
        worker.resume()

    def _advance(self) -> bool:
        """Do the next piece; whether a search has come to its end with it."""
        # One that has few is not to wait for one that has many.
        worker = min(self._busy, key=operator.attrgetter("spent"))
        assert worker.search_on is not None
        before = _clock.monotonic()
        try:
            waits = next(worker.search_on)
            self._waiting = self._waiting + 1 if waits else 0
            if self._waiting >= len(self._busy):
                self._waiting = 0
                time.sleep(_STOP_POLL)
            worker.spent += max(_STOP_POLL if waits else 0.0, _clock.monotonic() - before)
            return False
        except StopIteration:
            pass
        # Without memory, for instance. The worker itself is reaped all the same.
        except BaseException:
            logger.exception("Error looking for what worker %s has started", worker.name)
        self._busy.remove(worker)
        worker.search_on = None
        if worker.is_condemned:
            run_contained(functools.partial(self._kill, worker))
        return True


def _in_words(what: Iterable[object]) -> str:
    return ", ".join(map(str, what))
