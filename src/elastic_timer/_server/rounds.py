"""The rounds of a watchdog over processes: wait, gather, look at the deadlines, reap."""

from __future__ import annotations

import signal as signals
import time
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from elastic_timer._server.callbacks import contained_logger, run_contained
from elastic_timer._server.process import refusal, state_of

if TYPE_CHECKING:
    from elastic_timer._server.loop import Watchdog
    from elastic_timer._server.workers import WorkerTimers
    from elastic_timer.api import TimerRequest

logger = contained_logger(__name__)

_Request = TypeVar("_Request", bound="TimerRequest")

# What `Watchdog.wait` returns for the descriptor that requests come from.
REQUESTS = "requests"

# Once the first request is there, the rest of its burst is waited for so long, in seconds. Without
# it an acquire and its release, sent back to back, would be seen apart, and each wake the server.
_GATHER = 0.01

# A selector counts in milliseconds, and rounds up twice. The last seconds, so many, before a
# deadline are waited for by a finer clock.
_FINE = 0.002

# The longest pause between two attempts to signal a worker that could not be signalled, and
# between two looks at workers whose exit no descriptor tells of.
_RETRY = 1.0

# A process that is still there so long after SIGKILL hangs in the kernel, where nobody can help.
_UNKILLABLE_AFTER = 5.0


class Server(Protocol[_Request]):
    """What the rounds ask of a timer server."""

    def register_timers(self, timer_requests: list[_Request], /) -> None:
        """Acquire and release timers."""

    def get_expired_timers(self, deadline: float, /) -> dict[int, list[_Request]]:
        """The timers expired at an epoch time, by worker."""
        ...

    def clear_timers(self, workers: set[int], /) -> None:
        """Drop all timers of these workers."""

    def _drain_requests(self) -> list[_Request]:
        """The requests that have arrived; never waits."""
        ...

    def _report_expired(self, expired_timers: dict[int, list[_Request]]) -> None:
        """Say which timers have expired, before any worker is signalled. Called in every round."""

    def _fatal_timer(self, timers: list[_Request], is_retry: bool) -> tuple[_Request, int] | None:
        """Which of a worker's expired timers, oldest first, it is signalled for; and the signal.

        None where none asks for that. The events of the timers go out, unless it is a retry.
        """
        ...

    def _signal_worker(self, pid: int, signal: int) -> bool:
        """Signal a worker; False if that failed and is to be tried again."""
        ...

    def _confirm_reaped(self, timer: _Request) -> None:
        """The worker was signalled for this timer."""


class Rounds(Generic[_Request]):
    """What the watchdogs of both servers do between one wait and the next.

    Args:
        server: Whose hooks are called.
        watchdog: Where to wait.
        workers: The timers and their processes.
        max_interval: The longest time between two rounds, in seconds.
        kill_after: How long a worker may outlive a signal before it gets SIGKILL, in seconds.
            None means for ever.
    """

    def __init__(
        self,
        server: Server[_Request],
        watchdog: Watchdog,
        workers: WorkerTimers[_Request],
        max_interval: float,
        kill_after: float | None = None,
    ) -> None:
        self._server = server
        self._watchdog = watchdog
        self._workers = workers
        self._max_interval = max_interval
        self._kill_after = kill_after
        self._exited: list[int] = []
        # Of the timers acquired up to this number, every deadline up to this monotonic time was
        # looked at: those that are still held wait for their retry, and must not keep the watchdog
        # awake. One that was overdue when it came has not been looked at.
        self._looked_until = 0.0
        self._looked_at_acquires = 0
        self._retry_at: dict[int, float] = {}
        # Signalled, and not gone yet: the signal, and until when they are given time.
        self._signalled: dict[int, tuple[int, float]] = {}

    def wait(self, timeout: float) -> bool:
        """Wait until there is something to do; requests that arrive are left to gather a moment.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether there is something to do. False after the timeout or `Watchdog.wake`.
        """
        due = self._next_due()
        ready = self._watchdog.wait(min(timeout, due - time.monotonic() - _FINE))
        if not ready and due - time.monotonic() <= _FINE:
            self._watchdog.pause(due - time.monotonic())
        self._exited += [pid for pid in ready if isinstance(pid, int)]
        if REQUESTS in ready:
            self._watchdog.pause(min(_GATHER, self._max_interval, due - time.monotonic()))
        return bool(ready) or due <= time.monotonic()

    def look_at_deadlines(self) -> None:
        """Forget the workers that are gone, reap those whose deadline is over."""
        exited, self._exited = self._exited, []
        self._workers.drop_exited(exited)
        self._looked_until = now = time.monotonic()
        self._looked_at_acquires = self._workers.table.acquires()
        expired = self._server.get_expired_timers(time.time())
        self._retry_at = {pid: at for pid, at in self._retry_at.items() if pid in expired}
        due = [pid for pid in expired if self._retry_at.get(pid, now) <= now]
        fresh = {pid: expired[pid] for pid in due if pid not in self._retry_at}
        # Contained: whatever is wrong with the report, the workers are reaped.
        run_contained(lambda: self._server._report_expired(fresh))
        reaped: set[int] = set()
        for pid in due:
            # A release that was written before the signal is honoured, however late it comes.
            last_minute = self._server._drain_requests()
            if last_minute:
                # First, or it would drop what a worker that lives on has acquired since.
                self._clear(reaped)
                self._server.register_timers(last_minute)
                expired = self._server.get_expired_timers(time.time())
            if pid in expired and self._reap(pid, expired[pid]):
                reaped.add(pid)
        self._clear(reaped)
        self._follow_up()

    def _clear(self, reaped: set[int]) -> None:
        if reaped:
            self._server.clear_timers(set(reaped))
            reaped.clear()

    def _reap(self, pid: int, timers: list[_Request]) -> bool:
        """Do with a worker what its expired timers ask for; False if it has to be tried again."""
        if self._workers.is_gone(pid):
            return True
        timers = sorted(timers, key=lambda timer: timer.expiration_time)
        fatal = self._server._fatal_timer(timers, is_retry=pid in self._retry_at)
        if fatal is None:
            logger.info("Worker %s is not signalled: its expired timers only report", pid)
            return True
        timer, signal = fatal
        # Asked here too, as to try again would help nobody.
        reason = refusal(pid)
        if reason is not None:
            logger.warning("Worker %s has overrun its deadline, and is left alone: %s", pid, reason)
            return True
        if not self._signal(pid, signal):
            logger.error("Worker %s could not be signalled; trying again until it can be", pid)
            self._retry_at[pid] = time.monotonic() + min(_RETRY, self._max_interval)
            return False
        self._retry_at.pop(pid, None)
        logger.warning(
            "Reaped worker %s with signal %s, %.3f s after its deadline: %s",
            pid,
            signal,
            time.time() - timers[0].expiration_time,
            [timer.scope_id for timer in timers],
        )
        self._note_signal(pid, signal)
        self._server._confirm_reaped(timer)
        return True

    def _signal(self, pid: int, signal: int) -> bool:
        try:
            return self._server._signal_worker(pid, signal)
        # The hook may be anybody's. Whatever it raises, the deadlines of others are kept.
        except BaseException:
            logger.exception("Error signalling worker %s", pid)
            return False

    def _note_signal(self, pid: int, signal: int) -> None:
        now = time.monotonic()
        if signal == signals.SIGKILL:
            self._workers.mark_killed(pid)
            self._signalled[pid] = signal, now + _UNKILLABLE_AFTER
        elif self._kill_after is not None:
            # Signalled again, they get no more time than at first.
            self._signalled.setdefault(pid, (signal, now + self._kill_after))

    def _follow_up(self) -> None:
        """See to the workers that were signalled and are still there."""
        now = time.monotonic()
        for pid, (signal, until) in list(self._signalled.items()):
            if not self._workers.is_held(pid):
                del self._signalled[pid]
            elif until > now:
                continue
            elif signal == signals.SIGKILL:
                del self._signalled[pid]
                logger.error(
                    "Worker %s is still there %.0f s after SIGKILL, in state %s; it hangs in the "
                    "kernel, which alone can end it",
                    pid,
                    _UNKILLABLE_AFTER,
                    state_of(pid),
                )
            elif self._signal(pid, signals.SIGKILL):
                logger.warning("Worker %s outlived signal %s; sent SIGKILL", pid, signal)
                self._note_signal(pid, signals.SIGKILL)
            else:
                self._signalled[pid] = signal, now + _RETRY

    def _next_due(self) -> float:
        """The monotonic time at which something has to be done; infinite where nothing has."""
        due = list(self._retry_at.values())
        due += [at for _, at in self._signalled.values()]
        deadline = self._workers.next_deadline(self._looked_until, self._looked_at_acquires)
        if deadline is not None:
            due.append(deadline)
        if self._workers.has_unwatched():
            due.append(self._looked_until + _RETRY)
        return min(due, default=float("inf"))
