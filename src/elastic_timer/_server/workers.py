"""The workers of a server: their processes, held by more than a number, and their timers."""

from __future__ import annotations

import contextlib
import math
import signal as signals
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from elastic_timer import _clock
from elastic_timer._server.blocks import Blocks, block_of
from elastic_timer._server.callbacks import contained_logger
from elastic_timer._server.events import named
from elastic_timer._server.process import (
    ProcessHandle,
    SpareDescriptor,
    environment_of,
    is_running,
    refusal,
)
from elastic_timer._server.table import TimerTable

if TYPE_CHECKING:
    from elastic_timer._server.job import Standing
    from elastic_timer._server.loop import Loop

logger = contained_logger(__name__)

# A difference of the two clocks that grew by more than this since it was last looked at is a step
# of the wall clock. What is below it is only the time between reading the one and the other.
_CLOCK_STEP = 0.001

# How often the two are read again because there was a pause in between.
_READINGS = 5

# Of how many blocks a worker's passes are counted: scopes may be made up without end.
_MOST_BLOCKS = 1000

# A worker that others say they have killed and that is heard of after so many seconds lives.
_DYING = 0.2


class Request(Protocol):
    """What a server needs to know of a request, whichever way it came."""

    worker_id: Any
    scope_id: str
    expiration_time: float


_Request = TypeVar("_Request", bound=Request)


class EpochClock:
    """Turns epoch seconds, which the wire speaks, into monotonic ones, which nobody can set."""

    def __init__(self) -> None:
        self._difference = self._measure()
        self._present: tuple[float, float] | None = None

    @contextlib.contextmanager
    def present(self) -> Iterator[float]:
        """Give the present in epoch seconds; until the end it stands for the monotonic present.

        Steps of the wall clock meanwhile, however small or large, do not move it.
        """
        self._present = _clock.epoch(), _clock.monotonic()
        try:
            yield self._present[0]
        finally:
            self._present = None

    def to_monotonic(self, epoch: float) -> float:
        """The monotonic time that is as far from now as the wall clock says `epoch` is."""
        present = self._present
        if present is not None and epoch == present[0]:
            return present[1]
        return epoch - self._measured()

    def to_epoch(self, monotonic: float) -> float:
        """What the wall clock, as it is set now, shows at a monotonic time."""
        return monotonic + self._measured()

    def _measured(self) -> float:
        difference = self._measure()
        if abs(difference - self._difference) > _CLOCK_STEP:
            self._difference = difference
        return self._difference

    @staticmethod
    def _measure() -> float:
        # A pause between the readings looks like a step: on a busy machine, or where the server was
        # stopped for a moment, it would make a deadline wrong by as much.
        for _ in range(_READINGS):
            before, epoch, after = _clock.monotonic(), _clock.epoch(), _clock.monotonic()
            if after - before < _CLOCK_STEP / 2:
                break
        # By the last reading: what is left of a pause makes deadlines later, never earlier.
        return epoch - after


class _Worker:
    def __init__(self, pid: int, process: ProcessHandle | None) -> None:
        # Not before: a process that only sends has no workers.
        from elastic_timer._server.job import job_of, ranks

        # None: gone before it could be held, though it is claimed to run.
        self.process = process
        environment = environment_of(pid) if pid > 0 else {}
        self.rank, self.local_rank = ranks(environment)
        self.job = job_of(environment)
        self.watched_fd: int | None = None
        # How often it has entered each block.
        self.passes: dict[str, int] = {}
        # Until then, in monotonic seconds, its requests are those of a process about to die.
        self.deaf_until = 0.0

    def count_pass(self, block: str) -> None:
        if block in self.passes:
            self.passes[block] += 1
        elif len(self.passes) < _MOST_BLOCKS:
            self.passes[block] = 1


class Gone(NamedTuple):
    """A worker that has exited, and the scopes whose timers it had not released."""

    pid: int
    rank: int | None
    local_rank: int | None
    scopes: list[str]


class Workers(Generic[_Request]):
    """Holds timers, and of each worker that ever acquired one the process, until it exits.

    Args:
        loop: Where the exits of the workers are waited for.
    """

    def __init__(self, loop: Loop) -> None:
        self.table: TimerTable[int, _Request] = TimerTable()
        self.clock = EpochClock()
        # What its blocks take; None where nobody asks.
        self.blocks: Blocks | None = None
        self._loop = loop
        self._workers: dict[int, _Worker] = {}
        # Processes whose exit no descriptor tells of, and which have to be asked.
        self._unwatched: set[int] = set()
        self._spare: SpareDescriptor | None = None
        # The servers' public methods may be called from any thread.
        self._lock = threading.RLock()

    def open(self) -> None:
        """Make ready to hold workers; undone by `close`.

        The timers that are left from before a `close` are dropped: their releases may be lost.
        """
        with self._lock:
            for pid in self.table.workers():
                if pid not in self._workers:
                    self.table.clear(pid)
            self._spare = SpareDescriptor()

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

    def register(
        self, requests: Iterable[_Request], claims_to_run: Callable[[int], bool], read_since: float
    ) -> list[_Request]:
        """Acquire and release timers as asked; those of workers that are gone are dropped.

        Args:
            requests: In the order of their arrival.
            claims_to_run: The last word on whether a worker that seems to be gone is.
            read_since: What was sent before this, in monotonic seconds, is among what was read.

        Returns:
            The requests that counted.
        """
        counted = []
        with self._lock:
            now, blocks = _clock.monotonic(), self.blocks
            for request in requests:
                pid, scope = request.worker_id, request.scope_id
                if request.expiration_time < 0:
                    self.table.release(pid, scope)
                    if blocks is not None:
                        blocks.released(pid, scope)
                    self._forget_idle_group(pid)
                elif self._hold(pid, claims_to_run):
                    deadline = self.clock.to_monotonic(request.expiration_time)
                    worker, block = self._workers[pid], block_of(scope)
                    if self.table.acquire(pid, scope, request, deadline, now):
                        worker.count_pass(block)
                    if blocks is not None:
                        is_first = worker.passes.get(block) == 1
                        blocks.acquired(pid, worker.rank, scope, is_first, deadline, now)
                else:
                    logger.debug("Dropped a timer of worker %s, which is gone: %s", pid, scope)
                    continue
                counted.append(request)
            if blocks is not None:
                blocks.settle(now)
                # Not `now`: what was sent since is read in a later round.
                blocks.note_all_read(read_since)
        return counted

    def clear(self, pids: Iterable[int]) -> None:
        """Drop all timers of these workers."""
        with self._lock:
            for pid in pids:
                self.table.clear(pid)
                if self.blocks is not None:
                    self.blocks.ended(pid)
                self._forget_idle_group(pid)

    def drop(self, timers: Iterable[_Request]) -> None:
        """Drop these timers, but none that was acquired since in their place."""
        with self._lock:
            for timer in timers:
                if self.table.get((timer.worker_id, timer.scope_id)) is timer:
                    self.table.release(timer.worker_id, timer.scope_id)
                    self._forget_idle_group(timer.worker_id)

    def measure(self) -> None:
        """Count and time the blocks from now on."""
        with self._lock:
            if self.blocks is None:
                self.blocks = Blocks(_clock.monotonic())

    def note_all_read(self, now: float) -> None:
        """Take note that what was sent before `now`, in monotonic seconds, has been read."""
        if self.blocks is not None:
            self.blocks.note_all_read(now)

    def measured(self) -> tuple[list[Mapping[str, object]], int]:
        """What was measured, and how often blocks were entered that were too many for that."""
        with self._lock:
            return (
                ([], 0) if self.blocks is None else (self.blocks.records(), self.blocks.unmeasured)
            )

    def count_expired(self, timers: Iterable[_Request]) -> None:
        """Count the blocks whose timers have expired."""
        with self._lock:
            if self.blocks is not None:
                for timer in timers:
                    self.blocks.expired(timer.worker_id, timer.scope_id)

    def expired(self, epoch: float) -> dict[int, list[_Request]]:
        """The timers that have expired when the wall clock shows `epoch`, by worker."""
        with self._lock:
            return self.table.expired(self.clock.to_monotonic(epoch))

    def settle(self, epoch: float) -> None:
        """Take note that what has expired when the wall clock shows `epoch` was looked at."""
        with self._lock:
            self.table.settle(self.clock.to_monotonic(epoch))

    def next_deadline(self) -> float | None:
        """The earliest deadline that was not looked at, in monotonic seconds."""
        with self._lock:
            return self.table.next_deadline()

    def seconds_late(self, timer: _Request) -> float:
        """How long ago a timer was due; by the wall clock where it is not held."""
        deadline = self.table.deadline(timer.worker_id, timer.scope_id)
        if deadline is None:
            deadline = self.clock.to_monotonic(timer.expiration_time)
        return _clock.monotonic() - deadline

    def expiration_now(self, timer: _Request) -> float:
        """A timer's expiration time, moved along where the wall clock was set since it came."""
        deadline = self.table.deadline(timer.worker_id, timer.scope_id)
        if deadline is None:
            return timer.expiration_time
        moved = self.clock.to_epoch(deadline)
        is_moved = abs(moved - timer.expiration_time) > 2 * _CLOCK_STEP
        return moved if is_moved else timer.expiration_time

    def signal(self, pid: int, signal: int) -> bool:
        """Signal a worker: the very process that acquired its timers, and never the server.

        Returns:
            Whether it was signalled or is gone. What kept it from that is logged.
        """
        reason = refusal(pid)
        if reason is not None:
            logger.warning("Refused to signal %s: %s", self.name(pid), reason)
            return False
        try:
            self._send(pid, signal)
        except ProcessLookupError:
            logger.info("Worker %s is gone already", self.name(pid))
        except OSError as error:
            logger.error("Worker %s can't be sent signal %d: %s", self.name(pid), signal, error)
            return False
        return True

    def count(self) -> int:
        """How many workers are held."""
        return len(self._workers)

    def ranks(self, pid: int) -> tuple[int | None, int | None]:
        """The rank of a worker in its job and on this host; None where it has none."""
        worker = self._workers.get(pid)
        return (None, None) if worker is None else (worker.rank, worker.local_rank)

    def name(self, pid: int) -> str:
        """A worker as the log has it."""
        return named(pid, self.ranks(pid)[0])

    def passes(self, pid: int) -> Mapping[str, int]:
        """How often a worker has entered each block; an acquire of a timer it holds is no entry."""
        worker = self._workers.get(pid)
        return {} if worker is None else worker.passes

    def process(self, pid: int) -> ProcessHandle | None:
        """The process of a worker; None for a group, and where it could not be held."""
        worker = self._workers.get(pid)
        return None if worker is None or pid < 0 else worker.process

    def standings(self, pids: Iterable[int]) -> list[Standing]:
        """Where workers are, and all others of their jobs; those without a job alone."""
        with self._lock:
            named = {pid: self._workers[pid] for pid in pids if pid in self._workers}
            jobs = {worker.job for worker in named.values()} - {None}
            others = self._workers.items() if jobs else ()
            of_jobs = {pid: each for pid, each in others if each.job in jobs}
            return [self._standing(pid, each) for pid, each in (named | of_jobs).items()]

    def _standing(self, pid: int, worker: _Worker) -> Standing:
        from elastic_timer._server.job import Standing

        standing = Standing(pid, worker.rank, worker.local_rank, worker.job)
        urgent = self.table.most_urgent(pid)
        passes = dict(worker.passes)
        if urgent is None:
            return standing._replace(passes=passes)
        scope, deadline, since = urgent
        now = _clock.monotonic()
        return standing._replace(
            block=block_of(scope),
            deadline=deadline,
            seconds=now - since,
            passes=passes,
            expired=deadline <= now,
        )

    def was_killed(self, pid: int) -> bool:
        """Whether the worker was sent SIGKILL: no more timers of it are accepted."""
        return pid in self._workers and self._workers[pid].deaf_until == math.inf

    def presume_dead(self, pid: int) -> None:
        """Accept no timers for a moment of a worker of which somebody says that it was killed."""
        if pid in self._workers and not self.was_killed(pid):
            self._workers[pid].deaf_until = _clock.monotonic() + _DYING

    def is_held(self, pid: int) -> bool:
        """Whether the worker is known and, as far as was noticed, has not exited."""
        return pid in self._workers

    def is_gone(self, pid: int, claims_to_run: Callable[[int], bool]) -> bool:
        """Whether a worker that is held has exited, asked right now."""
        with self._lock:
            return pid in self._workers and self._has_exited(pid, claims_to_run)

    def has_unwatched(self) -> bool:
        """Whether there are workers whose exit only asking reveals."""
        return bool(self._unwatched)

    def drop_exited(self, pids: Iterable[int], claims_to_run: Callable[[int], bool]) -> list[Gone]:
        """Forget the workers that are gone, and their timers.

        Args:
            pids: Those whose descriptors tell so; the ones without are looked at anyway.
            claims_to_run: The last word on whether a worker that seems to be gone is.
        """
        gone = []
        with self._lock:
            for pid in pids:
                if pid in self._workers:
                    # It stays readable for good: watched on, it would keep the watchdog awake.
                    self._unwatch(self._workers[pid])
                    self._unwatched.add(pid)
            for pid in list(self._unwatched):
                if self._has_exited(pid, claims_to_run):
                    gone.append(Gone(pid, *self.ranks(pid), self.table.scopes(pid)))
                    self.table.clear(pid)
                    self._release_process(pid)
        for worker in gone:
            if worker.scopes:
                logger.info(
                    "Worker %s has exited without releasing its timers; dropped them",
                    named(worker.pid, worker.rank),
                )
        return gone

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
                if signal == signals.SIGKILL:
                    worker.deaf_until = math.inf

    def _hold(self, pid: int, claims_to_run: Callable[[int], bool]) -> bool:
        """Whether the worker's timers count, which they do from a process that can be held."""
        worker = self._workers.get(pid)
        if worker is not None:
            return not worker.deaf_until or worker.deaf_until <= _clock.monotonic()
        process: ProcessHandle | None
        try:
            process = ProcessHandle(pid, self._spare)
        except ProcessLookupError:
            process = None
        # Whatever else is held for this number is from before a `close`, and maybe not its own.
        self.table.clear(pid)
        self._workers[pid] = worker = _Worker(pid, process)
        if self._has_exited(pid, claims_to_run):
            self._release_process(pid)
            return False
        if pid > 0 and not self._watch(worker, pid):
            self._unwatched.add(pid)
        return True

    def _watch(self, worker: _Worker, pid: int) -> bool:
        if worker.process is None or worker.process.pidfd is None:
            return False
        try:
            self._loop.watch(worker.process.pidfd, pid)
        # The system's limit on watched descriptors. Whatever it is, the timer itself counts.
        except (OSError, ValueError) as error:
            logger.warning("The exit of worker %s can't be waited for: %s", pid, error)
            return False
        worker.watched_fd = worker.process.pidfd
        return True

    def _has_exited(self, pid: int, claims_to_run: Callable[[int], bool]) -> bool:
        process = self._workers[pid].process
        if process is not None and not process.has_exited():
            return False
        if not _claims(pid, claims_to_run):
            return True
        # Somebody insists that it runs. Where a process of that number really does, the number
        # was given away, and ours is gone all the more.
        return process is not None and is_running(pid)

    def _forget_idle_group(self, pid: int) -> None:
        # Nothing tells of a group's end. Held on, it would be taken for a later one of its number.
        if pid < 0 and not self.table.holds(pid) and pid in self._workers:
            self._release_process(pid)

    def _release_process(self, pid: int) -> None:
        worker = self._workers.pop(pid)
        if self.blocks is not None:
            self.blocks.ended(pid)
        self._unwatched.discard(pid)
        self._unwatch(worker)
        if worker.process is not None:
            worker.process.close()

    def _unwatch(self, worker: _Worker) -> None:
        if worker.watched_fd is not None:
            self._loop.unwatch(worker.watched_fd)
            worker.watched_fd = None


def _claims(pid: int, claims_to_run: Callable[[int], bool]) -> bool:
    try:
        return claims_to_run(pid)
    # Somebody's own. Whatever it raises, the deadlines of the others are kept.
    except BaseException:
        logger.exception("Error asking whether worker %s runs", pid)
        return False
