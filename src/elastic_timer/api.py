"""What a timer is, who asks for one and who keeps it: the interfaces, `configure` and `expires`."""

from __future__ import annotations

import abc
import functools
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from elastic_timer._server.callbacks import contained_logger

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import ParamSpec, Self

    _P = ParamSpec("_P")
    _R = TypeVar("_R")

__all__ = [
    "RequestQueue",
    "TimerClient",
    "TimerRequest",
    "TimerServer",
    "configure",
    "expires",
]

logger: logging.Logger = logging.getLogger(__name__)
# For what runs on the watchdog's thread, and must not be held up by a handler of the log.
_watchdog_logger = contained_logger(__name__)


class TimerRequest:
    """Asks for a timer, or releases one.

    Args:
        worker_id: Who asks. What identifies a worker is up to the client and its server: for those
            of this package it is the process id.
        scope_id: What the timer is for. A worker has one timer for each scope.
        expiration_time: When it expires, in epoch seconds. Negative means release.

    .. versionadded:: 0.1.0
    """

    __slots__ = ["expiration_time", "scope_id", "worker_id"]

    worker_id: Any
    scope_id: str
    expiration_time: float

    def __init__(self, worker_id: Any, scope_id: str, expiration_time: float) -> None:
        self.worker_id = worker_id
        self.scope_id = scope_id
        self.expiration_time = expiration_time

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TimerRequest)
            and self.worker_id == other.worker_id
            and self.scope_id == other.scope_id
            and self.expiration_time == other.expiration_time
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(worker_id={self.worker_id!r}, scope_id={self.scope_id!r}, "
            f"expiration_time={self.expiration_time!r})"
        )


class TimerClient(abc.ABC):
    """A worker's side: asks a `TimerServer` for timers.

    .. versionadded:: 0.1.0
    """

    @abc.abstractmethod
    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Ask for a timer; one that this worker holds for the scope is replaced.

        Args:
            scope_id: What the timer is for.
            expiration_time: When it expires, in epoch seconds.
        """

    @abc.abstractmethod
    def release(self, scope_id: str) -> None:
        """Give the timer of a scope back; it will not expire any more.

        Args:
            scope_id: What the timer was acquired for.
        """


class RequestQueue(abc.ABC):
    """The requests on their way from the clients to a server.

    .. versionadded:: 0.1.0
    """

    @abc.abstractmethod
    def size(self) -> int:
        """How many requests are waiting.

        There may be more of them by the time `get` is called, but never fewer.
        """

    @abc.abstractmethod
    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Take requests out of the queue.

        Args:
            size: How many at most.
            timeout: How many seconds to wait for them at most.
        """


class TimerServer(abc.ABC):
    """Keeps the timers and reaps the workers that overrun theirs; the base for servers of any kind.

    `with server:` starts it and stops it.

    Not guaranteed: that a worker is reaped the moment its timer expires. It is looked at after
    `request_queue.get`, so up to `max_interval` late.

    Args:
        request_queue: Where the requests come from.
        max_interval: How long one wait for requests may take, in seconds.
        daemon: Whether the interpreter may exit while the watchdog runs.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self, request_queue: RequestQueue, max_interval: float, daemon: bool = True
    ) -> None:
        super().__init__()
        self._request_queue = request_queue
        self._max_interval = max_interval
        self._daemon = daemon
        self._stop_signaled = False
        # Not before: its fork and exit hooks are no business of a process that has no server.
        from elastic_timer._server.loop import Loop

        self._loop = Loop(
            f"elastic-timer {type(self).__name__}",
            daemon,
            # A queue of somebody's own is open, and stays so.
            open_all=lambda: None,
            run=self._watchdog_loop,
            close_all=lambda is_child: None,
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @abc.abstractmethod
    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        """Acquire and release timers as asked.

        Args:
            timer_requests: In the order of their arrival. A negative expiration time releases.
        """

    @abc.abstractmethod
    def clear_timers(self, worker_ids: set[Any]) -> None:
        """Drop all timers of some workers.

        Args:
            worker_ids: The workers.
        """

    @abc.abstractmethod
    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        """The timers that have expired, by worker.

        Args:
            deadline: In epoch seconds. What expires then or before has expired.
        """

    @abc.abstractmethod
    def _reap_worker(self, worker_id: Any) -> bool:
        """Reap a worker. True if it was reaped; False keeps its timers for another attempt."""

    def _reap_worker_no_throw(self, worker_id: Any) -> bool:
        """Reap a worker; where `_reap_worker` raises, that is logged and counts as reaped."""
        try:
            return self._reap_worker(worker_id)
        except Exception:
            _watchdog_logger.exception(
                "_reap_worker() raised for worker %s, which now counts as reaped; make it return "
                "False where it should be called again",
                worker_id,
            )
            return True

    def _watchdog_loop(self) -> None:
        """Run rounds until the server is stopped; an error in one of them ends nothing."""
        while not self._stop_signaled:
            self._loop.run_round(self._run_watchdog)

    def _run_watchdog(self) -> None:
        """Run one round: wait for requests, register them, reap the workers that overran."""
        size = max(1, self._request_queue.size())
        self.register_timers(self._request_queue.get(size, self._max_interval))
        reaped = set()
        for worker_id, timers in self.get_expired_timers(time.time()).items():
            _watchdog_logger.warning(
                "Reaping worker %s, whose timers have expired: %s",
                worker_id,
                self._get_scopes(timers),
            )
            if self._reap_worker_no_throw(worker_id):
                reaped.add(worker_id)
            else:
                _watchdog_logger.error(
                    "Worker %s could not be reaped; trying again next round", worker_id
                )
        self.clear_timers(reaped)

    def _get_scopes(self, timer_requests: list[TimerRequest]) -> list[str]:
        return [request.scope_id for request in timer_requests]

    def start(self) -> None:
        """Start the watchdog; does nothing where it runs already.

        Raises:
            RuntimeError: It was stopped while it was busy, and still is; or the threads of this
                process are eventlet's.
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
        """Stop the watchdog and wait for its thread; does nothing where it does not run.

        It ends a wait at once. A `RequestQueue` of your own can't be woken: there the thread ends
        when its `get` returns.
        """
        self._stop_signaled = True
        self._loop.stop()


class _Unset:
    """The type of a default that is none of the values a caller may mean."""


_UNSET = _Unset()
_timer_client: TimerClient | None = None


def configure(timer_client: TimerClient | _Unset | None = _UNSET) -> None:
    """Set the client that `expires` uses in this process.

    Args:
        timer_client: The client. None unsets it. Without the argument it is a `FileTimerClient`
            for the FIFO that the environment variable `TORCHELASTIC_TIMER_FILE` names, which
            `elastic-timer run` and torchrun set.

    Raises:
        RuntimeError: Called without the argument, and the variable is not set.

    .. versionadded:: 0.1.0
    """
    global _timer_client
    if isinstance(timer_client, _Unset):
        path = os.environ.get("TORCHELASTIC_TIMER_FILE")
        if not path:
            raise RuntimeError(
                "configure() without a client needs the environment variable "
                "TORCHELASTIC_TIMER_FILE; start this program with `elastic-timer run -- ...`, "
                "or pass a client"
            )
        # Here, as that module imports this one.
        from elastic_timer.file_based_local_timer import FileTimerClient

        timer_client = FileTimerClient(path)
    _timer_client = timer_client
    logger.info("Timer client set to %s", type(timer_client).__name__)


class expires:  # Upstream's name: it reads as a verb in `with expires(after=60):`.
    """Sets a deadline for a block: a worker that is still in it when the time is up is reaped.

    It goes around the block::

        with expires(after=60):
            step()

    It works as an asynchronous context manager too, and as a decorator for functions and coroutine
    functions, where every call has a deadline of its own. What reaping means is up to the client
    and its server; for those of this package the process is killed.

    Entering a scope that the process already holds acquires it anew: of a recursive function only
    the innermost call's deadline counts, and its end releases the scope.

    Not guaranteed: tasks of asynchronous frameworks other than asyncio are not told apart. Give
    them scopes of their own. Generator functions can't be decorated.

    Args:
        after: The deadline, in seconds from the moment the block is entered.
        scope: The name of the block, by which the server knows the timer. None means the place of
            this call as `file#line`, and for a decorator that of the function. In a thread other
            than the main one and in an asyncio task the thread's or task's identity follows it, so
            that two of them may be in the same block.
        client: Whom to ask for the timer. None means the one set by `configure`.

    Raises:
        ValueError: `after` is NaN or infinite.
        RuntimeError: On entry: there is no client, or the block is entered twice at a time through
            the same object.
        BrokenPipeError: On entry or exit: the server can't be reached, as far as the client of
            this package can tell. An exception of the block itself is never replaced by it: then
            the failed release is logged.

    .. versionadded:: 0.1.0
    """

    __slots__ = ("_after", "_client", "_held", "_is_named", "_scope")

    def __init__(
        self, after: float, scope: str | None = None, client: TimerClient | None = None
    ) -> None:
        # float() also for the sake of numpy.float32: added to a float it stays one of 32 bits,
        # in which the present moment is rounded to two minutes.
        self._after = float(after)
        if not math.isfinite(self._after):
            raise ValueError(f"after must be a finite number of seconds, not {after}")
        self._client = client
        self._held: tuple[TimerClient, str] | None = None
        self._is_named = scope is not None
        if scope is None:
            caller = sys._getframe(1)
            scope = f"{caller.f_code.co_filename}#{caller.f_lineno}"
        self._scope = scope

    def __enter__(self) -> None:
        client = _timer_client if self._client is None else self._client
        if client is None:
            raise RuntimeError(
                "there is no timer client: call elastic_timer.configure(...) first, or pass client="
            )
        if self._held is not None:
            raise RuntimeError(
                "this expires(...) is entered already; make one for each block that can be entered"
            )
        scope = self._scope if self._is_named else self._scope + _thread_or_task()
        self._held = client, scope
        try:
            client.acquire(scope, time.time() + self._after)
        except BaseException as error:
            self._held = None
            _undo_interrupted(client, scope, error)
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._held is None:
            return
        client, scope = self._held
        self._held = None
        try:
            client.release(scope)
        except BaseException as error:
            _undo_interrupted(client, scope, error)
            if exc_type is None or not isinstance(error, Exception):
                raise
            logger.warning(
                "Timer %s could not be released after an exception in its block: %s", scope, error
            )

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exception, traceback)

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """Decorate a function or a coroutine function: each of its calls has the deadline.

        Args:
            function: What to decorate.

        Raises:
            TypeError: It is a generator function; its body runs when its caller pleases.
        """
        import inspect  # Only when a function is decorated.

        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                "expires can't decorate a generator function: the call returns before its body "
                "runs; put `with expires(...):` into the body"
            )
        code = getattr(inspect.unwrap(function), "__code__", None)
        place = f"{code.co_filename}#{code.co_firstlineno}" if code else self._scope

        def deadline() -> expires:
            block = expires(self._after, self._scope if self._is_named else place, self._client)
            block._is_named = self._is_named
            return block

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: _P.args, **kwargs: _P.kwargs) -> Any:
                with deadline():
                    return await function(*args, **kwargs)

            return cast("Callable[_P, _R]", call_async)

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with deadline():
                return function(*args, **kwargs)

        return call


def _undo_interrupted(client: TimerClient, scope: str, error: BaseException) -> None:
    """Release a timer whose acquire or release was cut short, by Ctrl-C or a signal's handler.

    It may have been sent or not. Left behind, it would kill a process that is in no block at all.
    """
    if isinstance(error, BrokenPipeError):
        return  # The client's own word that there is no server: nothing was sent.
    try:
        client.release(scope)
    except Exception as second:
        logger.debug("Timer %s could not be released: %s", scope, second)


def _thread_or_task() -> str:
    """What tells the default scope of this thread or asyncio task from those of others."""
    # Not imported here: a process that has no asyncio has no tasks, and importing takes long.
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None:
        loop = getattr(asyncio, "_get_running_loop", lambda: None)()
        task = None if loop is None else asyncio.current_task(loop)
        if task is not None:
            return f"@task-{id(task):x}"
    thread = threading.get_ident()
    return "" if thread == threading.main_thread().ident else f"@thread-{thread}"
