"""Timers over a multiprocessing queue: the workers are children that were handed the queue."""

from __future__ import annotations

import functools
import io
import logging
import os
import pickle
import queue as queues
import signal as signals
import struct
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from elastic_timer import _clock
from elastic_timer._server.callbacks import contained_logger
from elastic_timer._server.server import ProcessServer
from elastic_timer._transport import wire
from elastic_timer._transport.pipe import at_once
from elastic_timer._transport.queue_pipe import (
    PipeReader,
    PipeWriter,
    has_readable_pipe,
    has_writable_pipe,
)
from elastic_timer._transport.rubbish import RubbishLog
from elastic_timer.api import RequestQueue, TimerClient, TimerRequest, TimerServer
from elastic_timer.debug_info_logging import (
    collectives,
    log_debug_info_for_expired_timers,
    native_stacks,
    stacks_timeout,
)

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

# How a pickle has a float and an integer of 32 bits. These two are found in no other place of a
# pickle that fits in a pipe: they have bytes of 0xff, of which UTF-8 has none.
_pack_time = struct.Struct(">d").pack
_pack_worker = struct.Struct("<i").pack
_SOME_TIME = -inf
_SOME_WORKER = 2**31 - 1

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
        self._send = (
            PipeWriter(mp_queue, _pickled).send if has_writable_pipe(mp_queue) else mp_queue.put
        )

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Ask for a timer of this process; see `TimerClient.acquire`.

        Raises:
            BrokenPipeError: The queue was full for about a second: nobody reads it.
            RuntimeError: The request does not fit in one atomic write; shorten the scope.
            ValueError: The expiration time is NaN or infinite, or the queue is closed.
        """
        pid = os.getpid()
        wire.check_timer(pid, scope_id, expiration_time)
        self._send(TimerRequest(pid, scope_id, expiration_time))

    def release(self, scope_id: str) -> None:
        """Release a timer of this process; see `TimerClient.release`.

        Raises:
            BrokenPipeError: The queue was full for about a second: nobody reads it.
            RuntimeError: The request does not fit in one atomic write.
            ValueError: The queue is closed.
        """
        self._send(TimerRequest(os.getpid(), scope_id, -1))

    def _at_once(self, method: Callable[..., object], *args: object) -> None:
        """Call a method of this client that does not wait for a full queue, but fails at once."""
        at_once(method, *args)


def _pickled(request: TimerRequest) -> bytes:
    """The pickle of a process's request, of plain values, several times as fast as by `dumps`."""
    start, middle, end = _pickle_around(request.scope_id)
    time, worker = _pack_time(request.expiration_time), _pack_worker(request.worker_id)
    return start + time + middle + worker + end


# A worker enters the same few blocks over and over. Its pid is not kept: a fork has another.
@functools.lru_cache(maxsize=64)
def _pickle_around(scope_id: str) -> tuple[bytes, bytes, bytes]:
    """What is before the time, between it and the worker, and behind that in a scope's pickles."""
    # Of plain text, as equal scopes of other classes are given the same.
    pickled = pickle.dumps(TimerRequest(_SOME_WORKER, str.__str__(scope_id), _SOME_TIME))
    start, _, rest = pickled.partition(_pack_time(_SOME_TIME))
    middle, _, end = rest.partition(_pack_worker(_SOME_WORKER))
    return start, middle, end


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
        self._rubbish = RubbishLog(logger)

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
        end = _clock.monotonic() + timeout
        requests: list[TimerRequest] = []
        while len(requests) < size:
            remaining = max(0.0, end - _clock.monotonic())
            arrived = self._arrived(size - len(requests), remaining)
            if not arrived and not remaining:
                break
            requests += self._each(self._loaded, arrived)
        return requests

    def open(self) -> int | None:
        """Open what requests arrive at; the queue itself is open all the time.

        Returns:
            The descriptor that becomes readable when there are requests. None for a queue without
            a pipe of its own, which has to be asked again and again.
        """
        return None if self._pipe is None else self._pipe.fileno()

    def drain(self, everything: bool = False) -> list[TimerRequest]:
        """Take out the requests that have arrived, in any case all that a pipe holds; never waits.

        What can't be a timer of a process is dropped with a warning. The others consist of plain
        values: whatever class was sent, none of its methods is called once it is here.

        Args:
            everything: Makes no difference here; other sources take less at a time without it.
        """
        arrived = self._arrived(inf if self._pipe else _DRAIN_LIMIT, 0)
        return self._each(lambda each: _rebuilt(self._loaded(each)), arrived)

    def has_descriptor(self) -> bool:
        """Whether there is something to wait on, or the queue has to be asked."""
        return self._pipe is not None

    def forget_parent(self) -> None:
        """Close, in a forked child, what belongs to the parent."""
        self.close()

    def close(self) -> None:
        """Close what `open` opened; the queue itself stays open."""
        if self._pipe is not None:
            self._pipe.close()

    def _arrived(self, limit: float, timeout: float) -> list[Any]:
        """What has arrived: pickles from a pipe, or the objects themselves.

        Args:
            limit: How many at most.
            timeout: How many seconds to wait for the first one at most.
        """
        if self._pipe is not None:
            return self._pipe.take(limit, timeout)
        objects: list[Any] = []
        try:
            while len(objects) < limit:
                objects.append(self._mp_queue.get(True, 0 if objects else timeout))
        except queues.Empty:
            pass
        # The process that keeps the queue may have died. What was taken before that counts.
        except Exception:
            if not objects:
                raise
        return objects

    def _each(
        self, make_request: Callable[[Any], TimerRequest], arrived: list[Any]
    ) -> list[TimerRequest]:
        requests = []
        for each in arrived:
            try:
                requests.append(make_request(each))
            # Whatever an object of somebody's raises, or exits with, when it is looked at.
            except BaseException as error:
                self._rubbish.add(each, error)
        return requests

    def _loaded(self, arrived: Any) -> Any:
        return arrived if self._pipe is None else _Unpickler(io.BytesIO(arrived)).load()


class _Unpickler(pickle.Unpickler):
    """Reads upstream's requests as our own, so that the server needs no torch."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.distributed.elastic.timer.api", "TimerRequest"):
            return TimerRequest
        return super().find_class(module, name)


def _rebuilt(request: Any) -> TimerRequest:
    """The request, of our class and of plain values; raises what looking at it raises."""
    worker, scope, expiration_time = map(
        _plain, (request.worker_id, request.scope_id, request.expiration_time)
    )
    wire.check_timer(worker, scope, expiration_time)
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


class LocalTimerServer(ProcessServer[TimerRequest], TimerServer):
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
        kill_tree: Whether a worker that is reaped takes what it has started along; see
            `FileTimerServer`.

            .. versionadded:: 0.2.0
        dry_run: Report who has overrun a deadline and would have been killed, and signal nobody.

            .. versionadded:: 0.2.0

    Raises:
        NotImplementedError: With `kill_tree`, where there is no /proc.
        ValueError: `max_interval` is not a positive number.

    .. versionadded:: 0.1.0
    """

    _request_queue: MultiprocessingRequestQueue
    _source: MultiprocessingRequestQueue

    def __init__(
        self,
        mp_queue: Queue[Any],
        max_interval: float = 60,
        daemon: bool = True,
        *,
        kill_tree: bool = False,
        dry_run: bool = False,
    ) -> None:
        super().__init__(
            lambda: MultiprocessingRequestQueue(mp_queue),
            _RUN_ID,
            max_interval,
            daemon,
            kill_tree=kill_tree,
            dry_run=dry_run,
        )
        self._request_queue = self._source

    def _watchdog_loop(self) -> None:
        """Run rounds until the server is stopped; an error in one of them ends nothing."""
        while not self._loop.is_stopping():
            self._loop.run_round(self._run_watchdog)

    def _run_watchdog(self) -> None:
        """Run one round: wait for requests, register them, reap the workers that overran."""
        self._round(self._get_requests)

    def _get_requests(self) -> list[TimerRequest]:
        """Wait until there is something to do, `max_interval` seconds at most."""
        end = self._end_of_wait()
        while not self._loop.is_stopping():
            grace = _SENDER_PATIENCE if self._request_queue.size() else 0
            remaining = end + grace - _clock.monotonic()
            if remaining <= 0:
                break
            if self._source.has_descriptor():
                is_due = self._wait(remaining)
            else:
                self._wait(min(remaining, _ASK_INTERVAL))
                is_due = True
            if is_due:
                break
        return self._drain()

    def clear_timers(self, worker_ids: set[int]) -> None:
        """Drop all timers of some workers.

        Args:
            worker_ids: The workers.
        """
        self._workers.clear(worker_ids)

    def _reap_worker(self, worker_id: int) -> bool:
        """Kill a worker: every signal goes out through this hook.

        Returns:
            Whether there is no more to do. False has it called again, until the worker is gone.
        """
        return self._workers.signal(worker_id, signals.SIGKILL)

    def _signal_for(self, timer: TimerRequest) -> int:
        return signals.SIGKILL

    def _send_signal(self, pid: int, signal: int) -> bool:
        return self._reap_worker_no_throw(pid)

    def _to_json(self, timer: TimerRequest, expiration_time: float) -> str:
        return wire.encode(1, timer.worker_id, timer.scope_id, expiration_time, signals.SIGKILL)

    def _call_debug_hook(self, expired: dict[int, list[str]]) -> object:
        return log_debug_info_for_expired_timers(self._run_id, expired) if expired else None

    def _evidence_wanted(self) -> tuple[float, bool, tuple[str, ...]]:
        return stacks_timeout(), native_stacks(), collectives()
