"""A timer server over processes: the round, from the wait for requests to the signal and after."""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
import math
import operator
import os
import signal as signals
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from elastic_timer import _clock
from elastic_timer._server import callbacks
from elastic_timer._server.events import (
    BlocksMeasured,
    Event,
    Events,
    JobHangs,
    Listener,
    ServerStarted,
    ServerStopped,
    TimerAcquired,
    TimerExpired,
    TimerReleased,
    WatchdogRound,
    WorkerDue,
    WorkerExited,
    WorkerSignalled,
    WorkerSpared,
    named,
)
from elastic_timer._server.inquests import Inquests
from elastic_timer._server.process import is_running, refusal, state_of
from elastic_timer._server.tree import UNKILLABLE_AFTER, Trees
from elastic_timer._server.workers import Request, Workers

if TYPE_CHECKING:
    from typing_extensions import Self

logger = callbacks.contained_logger(__name__)

_R = TypeVar("_R", bound=Request)
_Result = TypeVar("_Result")

# What `Loop.wait` returns for the descriptor that requests come from.
REQUESTS = "requests"

# Once the first request is there, the rest of its burst is waited for so long, in seconds. Without
# it an acquire and its release, sent back to back, would be seen apart, and each wake the server.
_GATHER = 0.01

# A selector counts in milliseconds, and rounds up twice. The last seconds, so many, before a
# deadline are waited for by a finer clock.
_FINE = 0.002

# The shortest time between two rounds without work, in seconds. Less is a busy loop.
_SHORTEST_INTERVAL = 0.001

# How long, in seconds, all who are to be signalled in one round may wait together until listeners
# have heard of their expiry. One that blocks makes them late by so much.
_HEAD_START = 0.01

# A wait that takes longer than this, in seconds, was for something that was not there before it: on
# a busy machine one that finds something at once may take some milliseconds.
_AT_ONCE = 0.05

# How long, in seconds, a round waits for the evidence on those who are due, unless another deadline
# comes before. In most cases it is there by then; if not, the rounds go on without it.
_EVIDENCE_FIRST = 0.05

# So short a time after requests were read, in seconds, they are not read once more before a signal:
# amid rubbish without end that takes tens of milliseconds.
_MOMENT = 0.001

# The pause after requests could not be got: an error that comes back at once must not burn a core.
_ERROR_PAUSE = 0.1

# The pause before a worker that could not be signalled is tried again, in seconds. Where the hook
# raised, the first one is short, and each is twice the one before. The longest is also that between
# two looks at workers whose exit no descriptor tells of.
_FIRST_RETRY = 0.005
_RETRY = 1.0

# What is done besides, such as telling others how things stand, is done a piece at a time, each at
# least so many seconds before the next deadline.
_ROOM = 0.003

# What workers have started is looked for no longer than so many seconds at a time. Then comes what
# is due, or what there is to be read.
_SLICE = 0.001

# Those who listen to rounds are told of no more than one in so many seconds.
_ROUNDS_TOLD = 0.05

# What listeners get that do not say what they want: all that does not come with every block.
_RARE_EVENTS = (
    ServerStarted,
    ServerStopped,
    JobHangs,
    TimerExpired,
    WorkerSignalled,
    WorkerSpared,
    WorkerExited,
    BlocksMeasured,
)

# How often listeners are told what blocks take, in seconds.
_BLOCKS_INTERVAL = 600.0
# To put together what is told of a thousand blocks takes some hundredths of a second: not when a
# deadline is closer than this.
_BLOCKS_TAKE = 0.2


class Source(Protocol[_R]):
    """What requests come from: a FIFO, or the pipe of a queue."""

    def open(self) -> int | None:
        """Open it; the descriptor that becomes readable with a request, if there is one."""

    def drain(self, everything: bool = False) -> list[_R]:
        """Requests that have arrived; never waits.

        Args:
            everything: All of them. Else no more than a round can take in time for a deadline.
        """
        ...

    def close(self) -> None:
        """Give back what is open, however often it is called."""

    def forget_parent(self) -> None:
        """Give back, in a forked child, what its parent goes on using."""


class Aside(Protocol):
    """What is done on the watchdog's thread besides, while it would wait."""

    def open(self) -> None:
        """Begin; raises no error."""

    def pause(self) -> float:
        """How many seconds may pass until `serve` has something to do by itself."""
        ...

    def serve(self, ready: list[object], has_room: bool) -> list[object]:
        """Do a piece of it, of a millisecond at most.

        Args:
            ready: What `Loop.wait` has returned.
            has_room: Whether there is time for it before the next deadline.

        Returns:
            What of it is others' business, and something more where a round is wanted.
        """
        ...

    def close(self) -> None:
        """Give back what is open, however often it is called."""

    def forget_parent(self) -> None:
        """Give back, in a forked child, what its parent goes on using."""


class Progress:
    """How far a server has come since its start; in monotonic seconds where nothing is said."""

    def __init__(self) -> None:
        self.started_epoch = _clock.epoch()
        self.started = self.last_round = _clock.monotonic()
        self.rounds = 0
        # How many times a worker was signalled for its timers.
        self.reaped = 0


class _Retry(NamedTuple):
    """A worker that could not be signalled: when it is tried again, and the pause before that.

    `scope` is that of the timer which it was to be signalled for.
    """

    at: float
    pause: float
    scope: str


@dataclasses.dataclass(frozen=True)
class _Signalled(Generic[_R]):
    """A worker that was signalled for a timer: until when it is given time to end."""

    timer: _R
    signal: int
    until: float


class ProcessServer(abc.ABC, Generic[_R]):
    """What the servers over a FIFO and over a queue have in common, which is nearly everything.

    A subclass says where requests come from, which signal a timer asks for, and what is reported
    before a worker is signalled.

    Args:
        make_source: Makes what requests come from.
        run_id: A name for this run, for the logs.
        max_interval: The longest time between two rounds, in seconds.
        daemon: Whether the interpreter may exit while the watchdog runs.
        kill_after: How many seconds a worker may outlive a signal other than SIGKILL before it
            gets SIGKILL. None means for ever.
        kill_tree: Whether what a worker has started is killed with it.
        dry_run: Whether nobody is signalled, and those who would be are only reported.

    Raises:
        NotImplementedError: With `kill_tree`, where there is no /proc.
        ValueError: `max_interval` or `kill_after` is not a positive number.
    """

    def __init__(
        self,
        make_source: Callable[[], Source[_R]],
        run_id: str,
        max_interval: float,
        daemon: bool,
        kill_after: float | None = None,
        kill_tree: bool = False,
        dry_run: bool = False,
    ) -> None:
        if not max_interval > 0:
            raise ValueError(f"max_interval must be a positive number of seconds: {max_interval}")
        if kill_after is not None and not kill_after > 0:
            raise ValueError(f"kill_after must be a positive number of seconds: {kill_after}")
        if kill_tree and not os.path.exists("/proc/self/stat"):
            raise NotImplementedError("kill_tree needs /proc, which this system does not have")
        # Not before: its fork and exit hooks are no business of a process that has no server.
        from elastic_timer._server.loop import Loop, refuse_green_threads

        refuse_green_threads()
        self._source = make_source()
        self._run_id = run_id
        self._max_interval = max_interval
        self._daemon = daemon
        self._kill_after = kill_after
        self._kill_tree = kill_tree
        self._dry_run = dry_run
        self._made = _clock.epoch()
        self._stop_signaled = False
        self._is_open = False
        self._loop = Loop(
            f"elastic-timer {type(self).__name__}",
            daemon,
            self._open,
            self._watchdog_loop,
            self._close,
        )
        self._workers: Workers[_R] = Workers(self._loop)
        self._timers = self._workers.table
        self._events = Events()
        self._events.subscribe(self._log_signalled, WorkerDue, queue=callbacks.the_log())
        self._inquests = Inquests(
            run_id,
            lambda expired: self._call_debug_hook(expired),
            lambda picture: self._events.publish(JobHangs(_clock.epoch(), picture)),
            self._loop.wake,
        )
        self._before_signal: tuple[Callable[[TimerExpired[_R]], object], float] | None = None
        # When listeners are told next what blocks take.
        self._blocks_due = float("inf")
        # What a subclass adds that is served besides.
        self._aside: Aside | None = None
        self._progress = Progress()
        self._next_told = 0.0
        self._exited: list[int] = []
        # What listeners hear of once all who are due are signalled.
        self._outbox: list[Event] = []
        self._told_first_until = 0.0
        self._last_read = 0.0
        # What was sent before has been read, as soon as it is registered.
        self._reading_since = 0.0
        self._is_heard = True
        # What overdue workers were sent in this round.
        self._sent: list[int] = []
        self._looked_at = 0.0
        # In this round, by `_wait`.
        self._has_waited = False
        # A round that raises between the two has left workers to the next one, which must not wait.
        self._is_unfinished = False
        self._retries: dict[int, _Retry] = {}
        self._signalled: dict[int, _Signalled[_R]] = {}
        # Of workers that were signalled and may end; empty without `kill_tree`.
        self._trees = Trees()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the watchdog; does nothing where it runs already.

        When it returns, requests count. The timers from before a `stop` are gone.

        Raises:
            OSError: What requests come through can't be opened.
            RuntimeError: It was stopped while it was busy, and still is; or the threads of this
                process are eventlet's or gevent's.
        """
        self._stop_signaled = False
        if self._loop.start():
            logger.info(
                "Started %s: max_interval=%s, daemon=%s",
                type(self).__name__,
                self._max_interval,
                self._daemon,
            )

    def stop(self) -> None:
        """Stop the watchdog and wait for its thread; harmless when repeated.

        It ends a wait at once. When it returns, listeners were given a second at most to catch up.
        """
        self._stop_signaled = True
        self._loop.stop()

    def subscribe(self, listener: Listener, *kinds: type[Event]) -> None:
        """Have a listener called with what happens, in its order and on a thread of its own.

        Args:
            listener: Called with each record. What it raises is logged. It holds nobody up for
                more than 10 ms; while a thousand records wait for it, later ones are lost.
            kinds: The kinds of records. Without any it is all but acquires and releases of timers,
                and rounds. Blocks are measured from the first time that somebody asks for that.

        .. versionadded:: 0.2.0
        """
        self._events.subscribe(listener, *(kinds or _RARE_EVENTS))
        if self._events.wants(BlocksMeasured):
            self._workers.measure()
            self._blocks_due = _clock.monotonic() + _BLOCKS_INTERVAL

    def before_signal(self, callback: Callable[[TimerExpired[_R]], object], timeout: float) -> None:
        """Have something called for each worker that is about to be signalled for its timer.

        The signal waits for it; other workers do not, and each has a thread of its own. A worker
        that leaves its block meanwhile is not signalled. A server that is being stopped waits for
        nobody, and calls nothing.

        Args:
            callback: Called with the record of the expiry. What it raises is logged.
            timeout: How many seconds the signal waits at most.

        .. versionadded:: 0.2.0
        """
        self._before_signal = callback, timeout

    @staticmethod
    def is_process_running(pid: int) -> bool:
        """Whether a process runs; one that has ended but was not waited for does not.

        A process group is taken to run, as only a signal tells whether it has members.

        Args:
            pid: The process; negative means the process group of that number.
        """
        return is_running(pid)

    def register_timers(self, timer_requests: list[_R]) -> None:
        """Acquire and release timers; requests of workers that are gone are dropped.

        Args:
            timer_requests: In the order of their arrival. A negative expiration time releases.
        """
        if not timer_requests:
            return
        counted = self._workers.register(
            timer_requests, self.is_process_running, self._reading_since
        )
        if self._signalled:
            self._forgive(counted)
        if self._events.wants(TimerAcquired) or self._events.wants(TimerReleased):
            for request in counted:
                kind = TimerReleased if request.expiration_time < 0 else TimerAcquired
                pid = request.worker_id
                self._events.publish(kind(_clock.epoch(), pid, *self._workers.ranks(pid), request))
        self._loop.wake_from_outside()

    def clear_timers(self, worker_pids: set[int]) -> None:
        """Drop all timers of some workers, and of those that are gone.

        Args:
            worker_pids: The workers.
        """
        gone = [pid for pid in self._timers.workers() if not self.is_process_running(pid)]
        self._workers.clear([*worker_pids, *gone])

    def get_expired_timers(self, deadline: float) -> dict[int, list[_R]]:
        """The timers whose expiration time is `deadline` or before, by worker.

        Args:
            deadline: Epoch seconds, by the wall clock as it is now: where it was set since a timer
                was registered, the timer's expiration time has moved along.
        """
        return self._workers.expired(deadline)

    # What a subclass says ------------------------------------------------------------------------

    @abc.abstractmethod
    def _signal_for(self, timer: _R) -> int:
        """What to send the worker whose timer has expired; zero or less only reports it."""

    @abc.abstractmethod
    def _send_signal(self, pid: int, signal: int) -> bool:
        """Signal a worker through the hook of the contract; False has it tried again."""

    @abc.abstractmethod
    def _to_json(self, timer: _R, expiration_time: float) -> str:
        """A timer as the hook for debug information is given it."""

    @abc.abstractmethod
    def _call_debug_hook(self, expired: dict[int, list[str]]) -> object:
        """Say what expired workers were doing, through the hook of the contract; the evidence."""

    @abc.abstractmethod
    def _evidence_wanted(self) -> tuple[float, bool, tuple[str, ...]]:
        """How many seconds stacks may take, whether with C frames, and where ranks wait."""

    @abc.abstractmethod
    def _watchdog_loop(self) -> None:
        """Run rounds until the server is stopped; an error in one of them ends nothing."""

    # The rounds ----------------------------------------------------------------------------------

    def _round(self, get_requests: Callable[[], list[_R]]) -> None:
        """Run one round; all that a server does with a request is called from here.

        Args:
            get_requests: Waits until there is something to do, and takes the requests.
        """
        self._sent = []
        self._has_waited = False
        requests = self._contained(get_requests, self._pause_after_error)
        if requests or not self._has_waited:
            # Asked once more: a process that wrote what was just read under the number of another
            # one began after that one's end.
            self._note_ready(self._loop.wait(0))
        self._drop_exited()
        self._register(requests)

        self._looked_at = _clock.monotonic()
        self._is_unfinished = True
        with self._workers.clock.present() as now:
            expired = self._find_expired(now)
            self._workers.settle(now)
            self._reap_all(expired, now)
            if self._is_ending() and self._inquests.wait_for_all():
                self._reap_all(self._find_expired(now), now)
        self._follow_up()
        self._trees.follow_up()
        self._is_unfinished = False
        self._note_round()
        if self._blocks_due <= self._looked_at:
            deadline = self._workers.next_deadline()
            if deadline is not None and deadline - self._looked_at < _BLOCKS_TAKE:
                self._blocks_due = deadline + _BLOCKS_TAKE
            else:
                self._blocks_due = self._looked_at + _BLOCKS_INTERVAL
                self._publish_blocks()

    def _note_round(self) -> None:
        progress = self._progress
        progress.rounds += 1
        progress.last_round = _clock.monotonic()
        if self._events.wants(WatchdogRound) and progress.last_round >= self._next_told:
            self._next_told = progress.last_round + _ROUNDS_TOLD
            counts = self._workers.count(), len(self._timers), progress.reaped
            self._events.publish(WatchdogRound(_clock.epoch(), *counts))

    def _reap_all(self, expired: dict[int, list[_R]], now: float) -> None:
        """Report the workers whose timers have expired at `now` (epoch), and reap them.

        One is reaped as soon as the evidence on it and its peers is there, in this round or later.
        """
        if not expired and not self._is_anybody_due():
            # The rest would find nothing to do, in each round of an idle server.
            self._contained(lambda: self._report({}), lambda: None)
            return
        scopes = {pid: {timer.scope_id for timer in timers} for pid, timers in expired.items()}
        # A worker that has left the block meanwhile is not to die for another one unheard.
        self._retries = {
            pid: retry for pid, retry in self._retries.items() if retry.scope in scopes.get(pid, ())
        }
        self._let_trees_go()
        self._inquests.keep(scopes)
        fresh = {
            pid: timers
            for pid, timers in expired.items()
            if pid not in self._retries and pid not in self._inquests
        }
        self._contained(lambda: self._report(fresh), lambda: None)
        self._let_evidence_come()
        due = [pid for pid, timers in expired.items() if self._is_due(pid, timers)]
        # Later: the listeners' threads would take the interpreter's lock from the loop, for
        # milliseconds at a time.
        self._outbox = []
        self._is_heard = self._is_heard or self._events.flush(0)
        self._told_first_until = _clock.monotonic() + _HEAD_START if self._is_heard else 0.0
        for pid in due:
            # A release that was written before the signal is honoured, however late it comes.
            if self._take_last_minute():
                expired = self._find_expired(now)
            if pid in expired:
                self._reap(pid, expired[pid], self._inquests.forget(pid), now)
        for event in self._outbox:
            self._events.publish(event)
        killed = {pid for pid in due if self._workers.was_killed(pid)}
        if killed:
            self._contained(lambda: self.clear_timers(killed), lambda: self._workers.clear(killed))

    def _is_anybody_due(self) -> bool:
        """Whether something is kept of workers whose timers had expired."""
        return bool(self._retries or self._inquests or self._trees.held())

    def _let_evidence_come(self) -> None:
        """Wait a moment for what is being found out, unless there is something else to do.

        The thread that finds it out has the interpreter's lock the sooner.
        """
        if self._inquests.has_to_come() and not self._trees.has_work():
            left = self._next_work() - _FINE - _clock.monotonic()
            self._note_ready(self._loop.wait(min(left, _EVIDENCE_FIRST)))

    def _is_due(self, pid: int, timers: list[_R]) -> bool:
        """Whether the time has come to reap an expired worker."""
        if pid in self._retries:
            return self._retries[pid].at <= self._looked_at and not self._waits_for_tree(pid)
        if not self._inquests.is_over(pid):
            return self._inquests.is_concluded(pid) and self._is_ending()
        if not self._inquests.is_concluded(pid):
            evidence = self._inquests.conclude(pid, self._workers.name(pid))
            self._announce(pid, timers, evidence)
        return self._inquests.is_over(pid)

    def _announce(self, pid: int, timers: list[_R], evidence: Mapping[str, object] | None) -> None:
        """Have those know who want to that a worker is going to be signalled."""
        lethal = [timer for timer in timers if self._signal_for(timer) > 0]
        if self._before_signal is None or self._dry_run or self._is_ending():
            return
        if not lethal or refusal(pid):
            return
        callback, timeout = self._before_signal
        ranks, late = self._workers.ranks(pid), self._workers.seconds_late(lethal[0])
        event = TimerExpired(_clock.epoch(), pid, *ranks, lethal[0], late, evidence)
        self._inquests.wait_for(pid, lambda: callback(event), timeout)

    def _waits_for_tree(self, pid: int) -> bool:
        """Whether a signal has to wait until what its worker has started is found."""
        return self._trees.is_searching(pid) and self._may_search_on()

    def _may_search_on(self) -> bool:
        """Whether the wait of another round looks for what workers have started.

        A subclass may have a wait of its own.
        """
        return self._has_waited and not self._is_ending()

    def _let_trees_go(self) -> None:
        """Have those go on for whose signal all was held and who have left their block since."""
        for pid in self._trees.held():
            if pid in self._retries:
                continue
            if pid not in self._signalled:
                self._trees.let_go(pid)
            elif self._signalled[pid].until > self._looked_at:
                self._trees.resume(pid)

    def _is_ending(self) -> bool:
        """Whether there may be no other round."""
        return not self._loop.is_serving() or self._loop.is_stopping()

    def _wait(self, timeout: float) -> bool:
        """Wait until there is something to do; requests that arrive are left to gather a moment.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether there is something to do. False after the timeout or when woken.
        """
        self._has_waited = True
        due = self._next_due()
        before = _clock.monotonic()
        timeout = min(timeout, due - before - _FINE)
        if self._aside is not None and due - before > _ROOM:
            timeout = min(timeout, self._aside.pause())
        if self._trees.has_work():
            timeout = 0.0
        ready, is_found = self._loop.wait(timeout), False
        now = _clock.monotonic()
        if now - before > _AT_ONCE:
            self._workers.note_all_read(now)
        if self._aside is not None:
            ready = self._aside.serve(ready, due - now > _ROOM)
            now = _clock.monotonic()
        left = due - now
        if self._trees.has_work():
            is_found = self._trees.work(now + _SLICE)
        elif not ready and left <= _FINE:
            self._loop.pause(left)
        self._note_ready(ready)
        if REQUESTS in ready:
            end = min(now + min(_GATHER, self._max_interval), due)
            is_found = is_found or self._trees.work(end)
            if not is_found:
                self._loop.pause(end - _clock.monotonic())
        return bool(ready) or is_found or due <= _clock.monotonic()

    def _next_due(self) -> float:
        """The monotonic time at which something has to be done; infinite where nothing has."""
        return self._looked_at if self._is_unfinished else self._next_work()

    def _next_work(self) -> float:
        """The same, where the round before has come to its end."""
        due = [self._blocks_due, self._trees.next_due(), self._inquests.next_due()]
        if self._retries or self._signalled:
            searching = self._trees.is_searching
            due += [retry.at for pid, retry in self._retries.items() if not searching(pid)]
            due += [each.until for pid, each in self._signalled.items() if not searching(pid)]
        deadline = self._workers.next_deadline()
        if deadline is not None:
            due.append(deadline)
        if self._workers.has_unwatched():
            due.append(self._looked_at + _RETRY)
        return min(due)

    def _end_of_wait(self) -> float:
        """When a wait that begins now has lasted `max_interval`, in monotonic seconds."""
        return _clock.monotonic() + max(self._max_interval, _SHORTEST_INTERVAL)

    def _note_ready(self, ready: list[object]) -> None:
        self._exited += [pid for pid in ready if isinstance(pid, int)]

    def _drop_exited(self) -> None:
        exited, self._exited = self._exited, []
        for pid, rank, local_rank, scopes in self._workers.drop_exited(
            exited, self.is_process_running
        ):
            # Its number may be another one's, whose requests are read next.
            self._inquests.forget(pid)
            self._retries.pop(pid, None)
            self._signalled.pop(pid, None)
            self._with_tree(functools.partial(self._trees.kill, pid))
            self._events.publish(WorkerExited(_clock.epoch(), pid, rank, local_rank, scopes))

    def _register(self, requests: list[_R]) -> None:
        # Through the hook; where a subclass's raises, past it.
        self._contained(
            lambda: self.register_timers(requests),
            lambda: ProcessServer.register_timers(self, requests),
        )

    def _drain(self, everything: bool = False) -> list[_R]:
        self._reading_since = _clock.monotonic()
        return self._source.drain(everything)

    def _take_last_minute(self) -> bool:
        requests: list[_R] = self._contained(lambda: self._drain(everything=True), lambda: [])
        if requests:
            self._register(requests)
        self._last_read = _clock.monotonic()
        return bool(requests)

    def _find_expired(self, epoch: float) -> dict[int, list[_R]]:
        return self._contained(
            lambda: self.get_expired_timers(epoch), lambda: self._workers.expired(epoch)
        )

    def _reap(
        self, pid: int, timers: list[_R], evidence: Mapping[str, object] | None, now: float
    ) -> None:
        """Do with a worker what its timers ask for that have expired at `now` (epoch)."""
        if self._workers.is_gone(pid, self.is_process_running):
            return
        is_retry = pid in self._retries
        ranks = self._workers.ranks(pid)
        timers = sorted(timers, key=lambda timer: timer.expiration_time)
        if not is_retry:
            self._workers.count_expired(timers)
        for timer in timers:
            signal = self._signal_for(timer)
            late = self._workers.seconds_late(timer)
            if not is_retry:
                self._tell_first(TimerExpired(_clock.epoch(), pid, *ranks, timer, late, evidence))
            if signal > 0:
                break
        else:
            logger.info(
                "Worker %s is not signalled: its expired timers only report",
                self._workers.name(pid),
            )
            self._workers.drop(timers)
            return
        # Asked here too, as to try again would help nobody.
        reason = refusal(pid)
        if reason is not None:
            logger.warning(
                "Worker %s has overrun its deadline, and is left alone: %s",
                self._workers.name(pid),
                reason,
            )
            self._workers.drop(timers)
            return
        scopes = [expired.scope_id for expired in timers]
        if self._dry_run:
            late = self._workers.seconds_late(timers[0])
            self._workers.drop(timers)
            self._outbox.append(
                WorkerSpared(_clock.epoch(), pid, *ranks, timer, signal, late, scopes)
            )
            return

        def is_due() -> bool:
            left = self._find_expired(now).get(pid, ())
            return any(
                each.scope_id in scopes and self._signal_for(each) == signal for each in left
            )

        if not self._make_ready(pid, signal, is_due):
            # Looked at once more, as soon as its tree is found; or at once, for what else it has
            # overrun.
            pause = self._retries[pid].pause if is_retry else 0.0
            self._retries[pid] = _Retry(_clock.monotonic(), pause, timer.scope_id)
            return
        failed = self._signal(pid, signal)
        if failed is not None:
            logger.error(
                "Worker %s could not be signalled; trying again until it can be",
                self._workers.name(pid),
            )
            longest = min(_RETRY, self._max_interval)
            pause = min(longest, max(failed, 2 * self._retries[pid].pause if is_retry else 0.0))
            self._retries[pid] = _Retry(_clock.monotonic() + pause, pause, timer.scope_id)
            return
        self._sent.append(signal)
        self._progress.reaped += 1
        self._retries.pop(pid, None)
        late = self._workers.seconds_late(timers[0])
        self._note_signal(pid, timer, signal)
        # Only these: what else it holds counts on, where it outlives the signal.
        self._workers.drop(timers)
        self._outbox.append(
            WorkerSignalled(_clock.epoch(), pid, *ranks, timer, signal, late, scopes)
        )

    def _tell_first(self, event: Event) -> None:
        """Give listeners a moment to hear of an expiry before the worker is signalled."""
        left = self._told_first_until - _clock.monotonic()
        if left > 0:
            self._events.publish(event)
            self._is_heard = self._events.flush(left)
            if self._events.wants(type(event)):
                self._last_read = 0.0  # Whoever heard may have had a release written.
        else:
            self._outbox.append(event)

    def _signal(self, pid: int, signal: int) -> float | None:
        """Signal a worker; None if that is done, else the seconds before it is tried again.

        What is held of its tree is killed if the worker was. Else it goes on, and so does he.
        """
        pause: float | None = _FIRST_RETRY
        try:
            pause = None if self._send_signal(pid, signal) else _RETRY
        # The hook may be anybody's. Whatever it raises, the deadlines of others are kept.
        except BaseException:
            logger.exception("Error signalling worker %s", self._workers.name(pid))
        if self._workers.was_killed(pid):
            self._with_tree(lambda: self._trees.kill(pid))
        elif pause is None:
            self._with_tree(lambda: self._trees.resume(pid))
        else:
            self._with_tree(lambda: self._trees.let_go(pid))
        return pause

    def _make_ready(self, pid: int, signal: int, is_due: Callable[[], bool]) -> bool:
        """Do what takes a while before a signal, and see whether it is to be sent after that.

        With `kill_tree` what a worker has started is found, while it is the parent still.

        Args:
            pid: The worker, which with its tree is stopped where it is about to be killed.
            signal: What it is about to be sent.
            is_due: Whether it is to be sent that still.

        Returns:
            Whether it is. If not, the worker goes on, or its tree has to be found first.
        """
        process = self._workers.process(pid) if self._kill_tree else None

        def hold_tree() -> None:
            if process is not None:
                is_last, name = signal == signals.SIGKILL, self._workers.name(pid)
                is_held = self._trees.hold(process, stop=is_last, name=name)
                if not (is_held or self._may_search_on()):
                    self._trees.finish()

        self._with_tree(hold_tree)
        if self._trees.is_searching(pid):
            return False
        # Where this took a while, or the listeners did, a release may have been written before.
        if self._last_read < _clock.monotonic() - _MOMENT and self._take_last_minute():
            if not is_due():
                self._trees.let_go(pid)
                return False
            self._with_tree(hold_tree)  # Let go of where it was forgiven an earlier signal.
        return not self._trees.is_searching(pid)

    def _with_tree(self, step: Callable[[], object]) -> None:
        # Without descriptors, for instance: the worker itself is reaped all the same.
        self._contained(step, lambda: None)

    def _note_signal(self, pid: int, timer: _R, signal: int) -> None:
        now = _clock.monotonic()
        if self._workers.was_killed(pid):
            self._signalled[pid] = _Signalled(timer, signal, now + UNKILLABLE_AFTER)
        elif signal == signals.SIGKILL:
            self._workers.presume_dead(pid)
            if self._kill_tree:
                self._signalled[pid] = _Signalled(timer, signal, math.inf)
        elif self._kill_after is not None or self._kill_tree:
            # Signalled again, they get no more time than at first.
            until = now + (math.inf if self._kill_after is None else self._kill_after)
            self._signalled.setdefault(pid, _Signalled(timer, signal, until))

    def _forgive(self, requests: list[_R]) -> None:
        """Follow those no longer who have left, or entered anew, the block they were signalled for.

        One that was sent SIGKILL can't have: what is read now was written before.
        """
        for request in requests:
            followed = self._signalled.get(request.worker_id)
            if (
                followed is not None
                and followed.timer.scope_id == request.scope_id
                and not self._workers.was_killed(request.worker_id)
            ):
                del self._signalled[request.worker_id]
                self._trees.let_go(request.worker_id)

    def _follow_up(self) -> None:
        """See to the workers that were signalled and are still there."""
        now = _clock.monotonic()
        for pid, followed in list(self._signalled.items()):
            if not self._workers.is_held(pid):
                del self._signalled[pid]
            elif followed.until > now or self._waits_for_tree(pid):
                continue
            elif self._workers.was_killed(pid):
                del self._signalled[pid]
                state = state_of(pid)
                logger.error(
                    "Worker %s is still there %.0f s after SIGKILL, in state %s; %s",
                    self._workers.name(pid),
                    UNKILLABLE_AFTER,
                    state,
                    # At work on its end, which a busy processor or much memory makes long.
                    "it is about to end, and slow at that"
                    if state == "R"
                    else "it hangs in the kernel, which alone can end it",
                )
            elif (
                (self._take_last_minute() and pid not in self._signalled)
                or self._workers.is_gone(pid, self.is_process_running)
                or not self._make_ready(
                    pid, signals.SIGKILL, functools.partial(operator.contains, self._signalled, pid)
                )
            ):
                continue
            elif self._signal(pid, signals.SIGKILL) is None:
                logger.warning(
                    "Worker %s outlived signal %d; sent SIGKILL",
                    self._workers.name(pid),
                    followed.signal,
                )
                del self._signalled[pid]
                self._note_signal(pid, followed.timer, signals.SIGKILL)
            else:
                self._signalled[pid] = dataclasses.replace(followed, until=now + _RETRY)

    def _report(self, expired: dict[int, list[_R]]) -> None:
        """Have it found out, and told by the debug hook, what expired workers were doing.

        The hook is called in every round before any worker is reaped; it is silent where there is
        nothing to tell.
        """
        if not expired:
            self._call_debug_hook({})
            return
        texts = {
            pid: [self._to_json(timer, self._workers.expiration_now(timer)) for timer in timers]
            for pid, timers in expired.items()
        }
        scopes = {pid: [timer.scope_id for timer in timers] for pid, timers in expired.items()}
        standings = self._workers.standings(texts)
        self._inquests.ask(texts, scopes, standings, self._evidence_wanted())

    def _contained(self, hook: Callable[[], _Result], instead: Callable[[], _Result]) -> _Result:
        """What a hook returns, which may be anybody's; where it raises, what is done instead."""
        try:
            return hook()
        # Also SystemExit: it would end the watch without a word.
        except BaseException:
            logger.exception("Error in a round of the watchdog; it goes on")
            return instead()

    def _pause_after_error(self) -> list[_R]:
        self._loop.pause(min(_ERROR_PAUSE, self._next_due() - _clock.monotonic()))
        return []

    # The ends ------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._workers.open()
        fd = self._source.open()
        if fd is not None:
            self._loop.watch(fd, REQUESTS)
        self._progress = Progress()
        if self._aside is not None:
            self._aside.open()
        self._is_open = True
        self._events.publish(ServerStarted(_clock.epoch()))

    def _close(self, is_child: bool = False) -> None:
        """Give back what was opened; nothing of a round is left for the next start."""
        try:
            if self._aside is not None:
                (self._aside.forget_parent if is_child else self._aside.close)()
            if is_child:
                self._source.forget_parent()
            else:
                self._source.close()
        finally:
            if is_child:
                self._workers.forget_parent()
                self._events.forget_parent()
                self._inquests.forget_parent()
            else:
                self._workers.close()
            self._exited = []
            self._inquests.close()
            self._retries = {}
            self._signalled = {}
            (self._trees.forget_parent if is_child else self._trees.close)()
            was_open, self._is_open = self._is_open, False
        if was_open and not is_child:
            # By now it is known which blocks were never left.
            self._publish_blocks()
            self._events.publish(ServerStopped(_clock.epoch()))
            self._flush()

    def _publish_blocks(self) -> None:
        blocks, unmeasured = self._workers.measured()
        if blocks:
            self._events.publish(BlocksMeasured(_clock.epoch(), self._made, blocks, unmeasured))

    def _flush(self) -> None:
        """Let listeners and the log catch up, those that block for a second at most."""
        end = _clock.monotonic() + callbacks.PATIENCE
        self._inquests.flush(callbacks.PATIENCE)
        self._events.flush(end - _clock.monotonic())
        callbacks.flush_log(end - _clock.monotonic())

    def _log_signalled(self, event: Event) -> None:
        assert isinstance(event, WorkerDue)
        logging.getLogger(__name__).warning(
            # Python 3.10 writes the name of a signal's class for %s.
            "%s worker %s with signal %d, %.3f s after its deadline: %s",
            "Reaped" if isinstance(event, WorkerSignalled) else "Dry run: would have reaped",
            named(event.pid, event.rank),
            event.signal,
            event.seconds_late,
            event.scopes,
            extra={
                "timer_run_id": self._run_id,
                "timer_pid": event.pid,
                "timer_rank": event.rank,
                "timer_local_rank": event.local_rank,
                "timer_scopes": event.scopes,
                "timer_seconds_late": event.seconds_late,
                "timer_signal": event.signal,
            },
        )
