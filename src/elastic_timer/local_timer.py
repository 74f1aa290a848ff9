"""Timers over a multiprocessing queue: the workers are children that were handed the queue."""

from __future__ import annotations

import functools
import io
import logging
import os
import pickle
import queue as queues
import signal as signals
import time
from typing import TYPE_CHECKING, Any, Protocol

from elastic_timer._server.callbacks import ROUND_ALLOWANCE, Callbacks, contained_logger
from elastic_timer._server.process import is_running
from elastic_timer._server.rounds import REQUESTS, Rounds
from elastic_timer._server.workers import WorkerTimers
from elastic_timer._transport import wire as _wire
from elastic_timer._transport.queue_pipe import (
    PipeReader,
    PipeWriter,
    has_readable_pipe,
    has_writable_pipe,
)
from elastic_timer.api import RequestQueue, TimerClient, TimerRequest, TimerServer
from elastic_timer.debug_info_logging import log_debug_info_for_expired_timers, stacks_timeout

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

__all__ = ["LocalTimerClient", "LocalTimerServer", "MultiprocessingRequestQueue"]

logger: logging.Logger = contained_logger(__name__)

# A queue without a pipe of its own can't be waited for together with other things. It is asked at
# this interval, in seconds, so that a stop and the exits of workers are noticed between.
_ASK_INTERVAL = 0.05

# How long a round is prolonged for requests that are counted by the queue and not there yet: their
# sender's thread has still to put them into the pipe.
_SENDER_PATIENCE = 1.0

# How many requests are taken from such a queue in one round: putting could else outrun taking.
_DRAIN_LIMIT = 10_000

# How many objects of one round that are no requests are named one by one: that takes time.
_NAMED_OBJECTS = 10

_RUN_ID = "local"  # The queue variant has no run id; the handlers of evidence are given this one.


class _HasPut(Protocol):
    def put(self, request: object, /) -> object: ...


class LocalTimerClient(TimerClient):
    """A worker's side of a `LocalTimerServer`, which reads the same queue.

    Over a `multiprocessing.Queue` on Linux the request is written to the queue's pipe by the call
    itself. That needs neither the queue's thread nor its lock, so neither a held GIL nor another
    worker's death can keep it back. For anything else that has a `put`, that is called.

    Not guaranteed: that objects of more than PIPE_BUF bytes, put into the same queue by others,
    arrive whole.

    Args:
        mp_queue: The queue.

    .. versionadded:: 0.1.0
    """

    def __init__(self, mp_queue: Queue[Any] | _HasPut) -> None:
        super().__init__()
        self._mp_queue = mp_queue
        self._send = PipeWriter(mp_queue).send if has_writable_pipe(mp_queue) else mp_queue.put

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Ask for a timer of this process; see `TimerClient.acquire`.

        Raises:
            BrokenPipeError: The queue was full for about a second: nobody reads it.
            RuntimeError: The request does not fit in one atomic write; shorten the scope.
            ValueError: The expiration time is NaN or infinite, or the queue is closed.
        """
        _wire.check_timer(os.getpid(), scope_id, expiration_time)
        self._send(TimerRequest(os.getpid(), scope_id, expiration_time))

    def release(self, scope_id: str) -> None:
        """Release a timer of this process; see `TimerClient.release`.

        Raises:
            BrokenPipeError: The queue was full for about a second: nobody reads it.
            RuntimeError: The request does not fit in one atomic write.
            ValueError: The queue is closed.
        """
        self._send(TimerRequest(os.getpid(), scope_id, -1))


class MultiprocessingRequestQueue(RequestQueue):
    """The requests in a queue of multiprocessing, or in one that has its `get` and `qsize`.

    It has to be the queue's only reader: it may read ahead, though never further than `size` tells.

    Args:
        mp_queue: The queue.

    .. versionadded:: 0.1.0
    """

    def __init__(self, mp_queue: Queue[Any]) -> None:
        super().__init__()
        self._mp_queue = mp_queue
        self._pipe = PipeReader(mp_queue) if has_readable_pipe(mp_queue) else None

    def size(self) -> int:
        """How many requests are waiting, or on their way in the thread of a sender.

        Zero where the queue can't tell: on macOS, and for a SimpleQueue.
        """
        try:
            return self._mp_queue.qsize()
        except (NotImplementedError, AttributeError):
            return 0

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Take requests out of the queue; what can't be unpickled is dropped with a warning.

        Args:
            size: How many at most.
            timeout: How many seconds to wait for them at most.
        """
        end = time.monotonic() + timeout
        requests: list[TimerRequest] = []
        while len(requests) < size:
            remaining = end - time.monotonic()
            taken = self._take(size - len(requests), max(0.0, remaining))
            if not taken and remaining <= 0:
                break
            requests += taken
        return requests

    def open(self) -> int | None:
        """Open what requests arrive at; the queue itself is open all the time.

        Returns:
            The descriptor that becomes readable when there are requests. None for a queue without
            a pipe of its own, which has to be asked again and again.
        """
        return None if self._pipe is None else self._pipe.fileno()

    def drain(self) -> list[TimerRequest]:
        """Take out the requests that have arrived, all that a pipe holds; never waits.

        What can't be a timer of a process is dropped with a warning. The others consist of plain
        values: whatever class was sent, none of its methods is called once it is here.
        """
        requests: list[TimerRequest] = []
        refused = 0
        for arrived in self._take_arrived():
            try:
                requests.append(_rebuilt(arrived if self._pipe is None else _load(arrived)))
            # Whatever an object of somebody's raises, or exits with, when it is looked at.
            except BaseException as error:
                refused += 1
                if refused <= _NAMED_OBJECTS:
                    logger.warning("Dropped what is no request: %s: %.100r", error, arrived)
        if refused > _NAMED_OBJECTS:
            logger.warning("Dropped %d more that are no requests", refused - _NAMED_OBJECTS)
        return requests

    def close(self) -> None:
        """Close what `open` opened; the queue itself stays open."""
        if self._pipe is not None:
            self._pipe.close()

    def _take_arrived(self) -> list[Any]:
        """What has arrived: pickles from a pipe, or the objects themselves."""
        if self._pipe is not None:
            self._pipe.read()
            return self._pipe.take()
        objects: list[Any] = []
        try:
            while len(objects) < _DRAIN_LIMIT:
                objects.append(self._mp_queue.get(True, 0))
        except queues.Empty:
            pass
        # The process that keeps the queue may have died. What was taken before that counts.
        except Exception:
            if not objects:
                raise
        return objects

    def _take(self, limit: int, timeout: float) -> list[TimerRequest]:
        if self._pipe is None:
            try:
                return [self._mp_queue.get(True, timeout)]
            except queues.Empty:
                return []
        frames = self._pipe.take(limit)
        if not frames:
            self._pipe.wait(timeout)
            self._pipe.read()
            frames = self._pipe.take(limit)
        return [request for frame in frames if (request := _unpickle(frame)) is not None]


class _Unpickler(pickle.Unpickler):
    """Reads upstream's requests as our own, so that the server needs no torch."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.distributed.elastic.timer.api", "TimerRequest"):
            return TimerRequest
        return super().find_class(module, name)


def _load(frame: bytes) -> Any:
    return _Unpickler(io.BytesIO(frame)).load()


def _unpickle(frame: bytes) -> TimerRequest | None:
    try:
        return _load(frame)  # type: ignore[no-any-return]  # The contract: what is put is one.
    # Whatever an object of somebody's raises, or exits with, while it is loaded.
    except BaseException as error:
        logger.warning("Dropped a request that can't be unpickled: %r: %.100r", error, frame)
        return None


def _rebuilt(request: Any) -> TimerRequest:
    """The request, of our class and of plain values; raises what looking at it raises."""
    worker, scope, expiration_time = map(
        _plain, (request.worker_id, request.scope_id, request.expiration_time)
    )
    _wire.check_timer(worker, scope, expiration_time)
    return TimerRequest(worker, scope, expiration_time)


def _plain(value: Any) -> Any:
    # By the methods of the plain types themselves: a subclass may raise in its own, or lie.
    if type(value) not in (bool, int, float, str):
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
    return value


class LocalTimerServer(TimerServer):
    """Reads requests from a queue, and kills the processes that overrun their timers.

    The queue has to be made before the workers, and handed to them. `with server:` starts the
    server and stops it. A forked child inherits nothing of it.

    Not guaranteed: the end of a process that hangs in the kernel, where even SIGKILL waits. Where
    the system has no pidfds (they are Linux's), that no other process is signalled which was given
    the pid of a worker that ended.

    Args:
        mp_queue: The queue. The server has to be its only reader.
        max_interval: The longest time between two rounds of the watchdog, in seconds. Deadlines
            and requests are seen to when they come, whatever it is.
        daemon: Whether the interpreter may exit while the watchdog runs.

    Raises:
        ValueError: `max_interval` is not a positive number.

    .. versionadded:: 0.1.0
    """

    _request_queue: MultiprocessingRequestQueue

    def __init__(self, mp_queue: Queue[Any], max_interval: float = 60, daemon: bool = True) -> None:
        if not max_interval > 0:
            raise ValueError(f"max_interval must be a positive number of seconds: {max_interval}")
        super().__init__(MultiprocessingRequestQueue(mp_queue), max_interval, daemon)
        self._reports = Callbacks()
        self._workers: WorkerTimers[TimerRequest] = WorkerTimers(self._watchdog, is_running)
        self._timers = self._workers.table
        self._rounds: Rounds[TimerRequest] = Rounds(
            self, self._watchdog, self._workers, max_interval
        )
        self._watched_fd: int | None = None

    def start(self) -> None:
        """Start the watchdog; does nothing where it runs already.

        The timers from before a `stop` are gone.

        Raises:
            RuntimeError: It was stopped while it was busy, and still is.
        """
        if self._watchdog.may_start():
            self._workers.open()
            super().start()

    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        """Acquire and release timers; requests of workers that are gone are dropped.

        Args:
            timer_requests: In the order of their arrival. A negative expiration time releases.
        """
        if timer_requests:
            self._workers.register(timer_requests)
            self._watchdog.wake_from_outside()

    def clear_timers(self, worker_ids: set[int]) -> None:
        """Drop all timers of some workers.

        Args:
            worker_ids: The workers.
        """
        self._workers.clear(worker_ids)

    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        """The timers whose expiration time is `deadline` or before, by worker.

        Args:
            deadline: Epoch seconds, by the wall clock as it is now: where it was set since a timer
                was registered, the timer's expiration time has moved along.
        """
        return self._workers.expired(deadline)

    def _run_watchdog(self) -> None:
        """Run one round: wait for requests, register them, reap the workers that overran."""
        self.register_timers(self._get_requests())
        self._rounds.look_at_deadlines()

    def _get_requests(self) -> list[TimerRequest]:
        """Wait until there is something to do, `max_interval` seconds at most."""
        end = time.monotonic() + self._max_interval
        while not self._stop_signaled:
            grace = _SENDER_PATIENCE if self._request_queue.size() else 0
            remaining = end + grace - time.monotonic()
            if remaining <= 0 or self._wait(remaining):
                break
        return self._drain_requests()

    def _wait(self, timeout: float) -> bool:
        """Wait; whether there may be something to do."""
        if self._watched_fd is None:
            fd = self._request_queue.open()
            if fd is None:
                self._rounds.wait(min(timeout, _ASK_INTERVAL))
                return True
            self._watchdog.watch(fd, REQUESTS)
            self._watched_fd = fd
        return self._rounds.wait(timeout)

    def _reap_worker(self, worker_id: int) -> bool:
        """Kill a worker: every signal goes out through this hook.

        Returns:
            Whether there is no more to do. False has it called again, until the worker is gone.
        """
        return self._workers.signal(worker_id, signals.SIGKILL)

    def _drain_requests(self) -> list[TimerRequest]:
        return self._request_queue.drain()

    def _report_expired(self, expired_timers: dict[int, list[TimerRequest]]) -> None:
        if not expired_timers:
            return
        as_json = {
            pid: [
                _wire.encode(1, pid, timer.scope_id, timer.expiration_time, signals.SIGKILL)
                for timer in timers
            ]
            for pid, timers in expired_timers.items()
        }
        report = functools.partial(log_debug_info_for_expired_timers, _RUN_ID, as_json)
        self._reports.run(report, stacks_timeout() + ROUND_ALLOWANCE)

    def _fatal_timer(self, timers: list[TimerRequest], is_retry: bool) -> tuple[TimerRequest, int]:
        return timers[0], signals.SIGKILL

    def _signal_worker(self, pid: int, signal: int) -> bool:
        return self._reap_worker_no_throw(pid)

    def _confirm_reaped(self, timer: TimerRequest) -> None:
        """Nobody is told of events in this variant."""

    def _release_resources(self) -> None:
        if self._watched_fd is not None:
            self._watchdog.unwatch(self._watched_fd)
            self._watched_fd = None
        self._request_queue.close()
        self._workers.close()
        super()._release_resources()

    def _forget_parent(self) -> None:
        self._reports = Callbacks()
        self._watched_fd = None
        self._request_queue.close()
        self._workers.forget_parent()
