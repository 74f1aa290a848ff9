"""The timers of processes, together with the processes themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Generic, TypeVar

from elastic_timer._server.callbacks import contained_logger
from elastic_timer._server.process import ProcessHandle, SpareDescriptor, is_running, refusal
from elastic_timer._server.table import TimerTable

if TYPE_CHECKING:
    from elastic_timer._server.loop import Watchdog
    from elastic_timer.api import TimerRequest

logger = contained_logger(__name__)

_Request = TypeVar("_Request", bound="TimerRequest")

# A difference of the two clocks that grew by more than this since it was last looked at is a step
# of the wall clock. What is below it is only the time between reading the one and the other.
_CLOCK_STEP = 0.001


class _EpochClock:
    """Turns epoch seconds, which the wire speaks, into monotonic ones, which nobody can set."""

    def __init__(self) -> None:
        self._difference = self._measure()

    def to_monotonic(self, epoch: float) -> float:
        """The monotonic time that is as far from now as the wall clock says `epoch` is."""
        difference = self._measure()
        if abs(difference - self._difference) > _CLOCK_STEP:
            self._difference = difference
        return epoch - self._difference

    @staticmethod
    def _measure() -> float:
        # In this order: a pause between the two readings makes deadlines later, never earlier.
        epoch = time.time()
        return epoch - time.monotonic()


class _Worker:
    def __init__(self, process: ProcessHandle | None) -> None:
        # None: gone before it could be held, though `is_said_to_run` insists that it runs.
        self.process = process
        self.watched_fd: int | None = None
        self.was_killed = False


class WorkerTimers(Generic[_Request]):
    """Holds timers, and of each worker that ever acquired one the process, until it exits.

    Args:
        watchdog: Where the exits of the workers are waited for.
        is_said_to_run: The last word on whether a worker that seems to be gone is.
    """

    def __init__(self, watchdog: Watchdog, is_said_to_run: Callable[[int], bool]) -> None:
        self.table: TimerTable[int, _Request] = TimerTable()
        self._watchdog = watchdog
        self._is_said_to_run = is_said_to_run
        self._workers: dict[int, _Worker] = {}
        # Processes whose exit no descriptor tells of, and which have to be asked.
        self._unwatched: set[int] = set()
        self._spare: SpareDescriptor | None = None
        self._clock = _EpochClock()
        # The servers' public methods may be called from any thread.
        self._lock = threading.RLock()

    def register(self, requests: Iterable[_Request]) -> None:
        """Acquire and release timers as asked; those of workers that are gone are dropped."""
        with self._lock:
            for request in requests:
                pid, scope = request.worker_id, request.scope_id
                if request.expiration_time < 0:
                    self.table.release(pid, scope)
                    self._forget_idle_group(pid)
                elif self._hold(pid):
                    deadline = self._clock.to_monotonic(request.expiration_time)
                    self.table.acquire(pid, scope, request, deadline)
                else:
                    logger.debug("Dropped a timer of worker %s, which is gone: %s", pid, scope)

    def clear(self, pids: Iterable[int]) -> None:
        """Drop all timers of these workers."""
        with self._lock:
            for pid in pids:
                self.table.clear(pid)
                self._forget_idle_group(pid)

    def open(self) -> None:
        """Make ready to hold workers; undone by `close`.

        The timers that are left from before a `close` are dropped: their releases may be lost.
        """
        with self._lock:
            self.clear(pid for pid in self.table.workers() if pid not in self._workers)
            if self._spare is None:
                self._spare = SpareDescriptor()

    def expired(self, epoch: float) -> dict[int, list[_Request]]:
        """The timers that have expired when the wall clock shows `epoch`, by worker."""
        with self._lock:
            return self.table.expired(self._clock.to_monotonic(epoch))

    def next_deadline(self, after: float, new_since: int) -> float | None:
        """The earliest deadline later than `after`, or of a new timer; times are monotonic."""
        with self._lock:
            return self.table.next_deadline(after, new_since)

    def signal(self, pid: int, signal: int) -> bool:
        """Signal a worker: the very process that acquired its timers, and never the server.

        Returns:
            Whether it was signalled or is gone. What kept it from that is logged.
        """
        reason = refusal(pid)
        if reason is not None:
            logger.warning("Refused to signal %s: %s", pid, reason)
            return False
        try:
            self._send(pid, signal)
        except ProcessLookupError:
            logger.info("Worker %s is gone already", pid)
        except OSError as error:
            logger.error("Worker %s can't be sent signal %s: %s", pid, signal, error)
            return False
        return True

    def mark_killed(self, pid: int) -> None:
        """Accept no more timers of a worker that can't survive the signal it was sent."""
        with self._lock:
            if pid in self._workers:
                self._workers[pid].was_killed = True

    def is_held(self, pid: int) -> bool:
        """Whether the worker is known and, as far as was noticed, has not exited."""
        return pid in self._workers

    def is_gone(self, pid: int) -> bool:
        """Whether a worker that is held has exited, asked right now."""
        with self._lock:
            return pid in self._workers and self._has_exited(pid)

    def has_unwatched(self) -> bool:
        """Whether there are workers whose exit only asking reveals."""
        return bool(self._unwatched)

    def drop_exited(self, pids: Iterable[int]) -> None:
        """Forget the workers that are gone.

        Args:
            pids: Those whose descriptors tell so; the ones without are looked at anyway.
        """
        with self._lock:
            for pid in pids:
                if pid in self._workers:
                    # It stays readable for good: watched on, it would keep the watchdog awake.
                    self._unwatch(self._workers[pid])
                    self._unwatched.add(pid)
            for pid in list(self._unwatched):
                if self._has_exited(pid):
                    self._forget(pid)

    def close(self) -> None:
        """Let go of all processes."""
        with self._lock:
            for pid in list(self._workers):
                self._release_process(pid)
            if self._spare is not None:
                self._spare.close()
                self._spare = None

    def forget_parent(self) -> None:
        """Let go, in a forked child, of what the parent holds."""
        self._lock = threading.RLock()  # The parent's may have been held during the fork.
        self.close()

    def _send(self, pid: int, signal: int) -> None:
        with self._lock:
            worker = self._workers.get(pid)
            if worker is None:
                with ProcessHandle(pid) as process:
                    process.send(signal)
            elif worker.process is None:
                raise ProcessLookupError(f"worker {pid} was gone before its timer arrived")
            else:
                worker.process.send(signal)

    def _hold(self, pid: int) -> bool:
        """Whether the worker's timers count, which they do from a process that can be held."""
        worker = self._workers.get(pid)
        if worker is not None:
            return not worker.was_killed
        process: ProcessHandle | None
        try:
            process = ProcessHandle(pid, self._spare)
        except ProcessLookupError:
            process = None
        self._workers[pid] = worker = _Worker(process)
        if self._has_exited(pid):
            self._release_process(pid)
            return False
        if pid > 0 and not self._watch(worker, pid):
            self._unwatched.add(pid)
        return True

    def _watch(self, worker: _Worker, pid: int) -> bool:
        if worker.process is None or worker.process.pidfd is None:
            return False
        try:
            self._watchdog.watch(worker.process.pidfd, pid)
        except OSError as error:  # The system's limit on watched descriptors.
            logger.warning("The exit of worker %s can't be waited for: %s", pid, error)
            return False
        worker.watched_fd = worker.process.pidfd
        return True

    def _has_exited(self, pid: int) -> bool:
        process = self._workers[pid].process
        if process is not None and not process.has_exited():
            return False
        if not self._is_said_to_run(pid):
            return True
        # Somebody insists that it runs. Where a process of that number really does, the number
        # was given away, and ours is gone all the more.
        return process is not None and is_running(pid)

    def _forget(self, pid: int) -> None:
        if self.table.holds(pid):
            logger.info("Worker %s has exited without releasing its timers; dropped them", pid)
        self.table.clear(pid)
        self._release_process(pid)

    def _forget_idle_group(self, pid: int) -> None:
        # Nothing tells of a group's end. Held on, it would be taken for a later one of its number.
        if pid < 0 and not self.table.holds(pid) and pid in self._workers:
            self._release_process(pid)

    def _release_process(self, pid: int) -> None:
        worker = self._workers.pop(pid)
        self._unwatched.discard(pid)
        self._unwatch(worker)
        if worker.process is not None:
            worker.process.close()

    def _unwatch(self, worker: _Worker) -> None:
        if worker.watched_fd is not None:
            self._watchdog.unwatch(worker.watched_fd)
            worker.watched_fd = None
