"""What a timer is, who asks for one and who keeps it: the interfaces, `configure`, `expires`."""

from __future__ import annotations

import abc
import functools
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

from elastic_timer._clock import epoch, monotonic
from elastic_timer._server.callbacks import contained_logger
from elastic_timer._worker import environment
from elastic_timer._worker.handles import (
    QUIET_PART,
    Pause,
    checked,
    current_hold,
    handle_of,
)
from elastic_timer._worker.holds import (
    Exit,
    Hold,
    end_handle,
    get_innermost,
    handles,
    on_death,
    outer_hold,
    owed,
    patiently,
    release,
    send_owed,
    set_innermost,
)
from elastic_timer._worker.scopes import place, thread_or_task

if TYPE_CHECKING:
    import datetime
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import TypeVar

    from typing_extensions import ParamSpec, Self

    _P = ParamSpec("_P")
    _R = TypeVar("_R")

__all__ = [
    "RequestQueue",
    "TimerClient",
    "TimerRequest",
    "TimerServer",
    "configure",
    "current",
    "expires",
]

logger: logging.Logger = logging.getLogger(__name__)
# For what runs on the watchdog's thread, and must not be held up by a handler of the log.
_watchdog_logger = contained_logger(__name__)

# The longest deadline there is: the latest moment must stay a number of seconds.
_LONGEST = sys.float_info.max / 2


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
        for worker_id, timers in self.get_expired_timers(epoch()).items():
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
# What the environment says: by how much to multiply every `after`, and whom to ask instead of any
# client, if anybody.
_scale, _instead = environment.read_or_refuse()


def configure(timer_client: TimerClient | _Unset | None = _UNSET, *, required: bool = True) -> None:
    """Set the client that `expires` uses in this process.

    Args:
        timer_client: The client. None unsets it. Without the argument it is a `FileTimerClient`
            for the FIFO that the environment variable `TORCHELASTIC_TIMER_FILE` names, which
            `elastic-timer run` and torchrun set.
        required: Whether a block needs its timer. Where it is False, blocks run without a deadline
            while there is no variable, no client or no server that can be reached: that costs one
            warning in the log of each process, no error and no wait. The server is looked for
            again every 5 s at most, and by blocks of which it may still hold a timer. Clients of
            other libraries wait whenever it is looked for: torch's for a second.

    Raises:
        RuntimeError: Called without the argument, and the variable is not set.
        TypeError: The client is none; a path, say.
        ValueError: `ELASTIC_TIMER_SCALE` or `ELASTIC_TIMER_DISABLE` has a value of no use.

    .. versionadded:: 0.1.0
    """
    global _timer_client, _scale, _instead
    _scale, _instead = environment.read()
    if isinstance(timer_client, _Unset):
        timer_client = _client_of_the_environment(required)
    # By its methods: it may be of any class, upstream's for one.
    if timer_client is not None and not hasattr(timer_client, "acquire"):
        raise TypeError(
            f"timer_client must be a client such as FileTimerClient(path), not {timer_client!r}"
        )
    if not required:
        # Here, as others need it not.
        from elastic_timer._worker.optional import made_optional

        timer_client = made_optional(timer_client)
    _timer_client = timer_client
    if _instead is not None:
        logger.warning("This process has no timers, as %s=1", environment.DISABLE)
    elif timer_client is None:
        logger.info("This process has no timer client any more")
    else:
        logger.info("Timer client set to %s", type(timer_client).__name__)


def _client_of_the_environment(required: bool) -> TimerClient | None:
    path = os.environ.get("TORCHELASTIC_TIMER_FILE")
    if path:
        # Here, as that module imports this one.
        from elastic_timer.file_based_local_timer import FileTimerClient

        return FileTimerClient(path)
    if _instead is not None:
        return None
    if required:
        raise RuntimeError(
            "configure() without a client needs the environment variable TORCHELASTIC_TIMER_FILE; "
            "start this program with `elastic-timer run -- ...`, pass a client, or say "
            "configure(required=False) where it may run without deadlines"
        )
    from elastic_timer._worker.optional import warn_once

    warn_once("TORCHELASTIC_TIMER_FILE is not set: no `elastic-timer run` or torchrun is around")
    return None


def current() -> expires:
    """The innermost block that this thread or task is in, by its handle.

    For code that has no other way to it: in a function that `expires` decorates, or deep below a
    `with` statement. What runs in a copy of a block's context, such as an asyncio task that is
    started within it, is in that block as long as it lasts.

    Raises:
        RuntimeError: It is in no block, or in none that this process has entered: a forked child is
            not in the blocks of its parent.

    .. versionadded:: 0.2.0
    """
    return current_hold().block()


class expires:  # Upstream's name: it reads as a verb in `with expires(after=60):`.
    """Sets a deadline for a block: a worker that is still in it when the time is up is reaped.

    It goes around the block::

        with expires(after=60):
            step()

    What it gives, `with expires(after=60) as timer:`, is its handle, by which a block can ask for
    more time: `when`, `reschedule`, `tick` and `paused`. `current()` gives that of the block one is
    in.

    It works as an asynchronous context manager too, and as a decorator for functions and coroutine
    functions, where every call has a deadline of its own. What reaping means is up to the client
    and its server; for those of this package the process is killed.

    Entering a scope that the process already holds acquires it anew: of a recursive function only
    the innermost call's deadline counts, and its end releases the scope.

    Not guaranteed: tasks of asynchronous frameworks other than asyncio are not told apart. Give
    them scopes of their own. Generator functions can't be decorated.

    Args:
        after: The deadline, in seconds from the moment the block is entered, or as a timedelta.
        scope: The name of the block, by which the server knows the timer. None means the place of
            this call as `file#line`, and for a decorator that of the function. In a thread other
            than the main one and in an asyncio task the thread's or task's identity follows it, so
            that two of them may be in the same block. In a generator, and for all but the first
            `expires` of a line, something follows as well.
        client: Whom to ask for the timer. None means the one set by `configure`.

    Raises:
        TypeError: An argument is of no use.
        ValueError: `after` is negative, NaN or infinite.
        RuntimeError: On entry: there is no client, or the block is entered twice at a time through
            the same object.
        BrokenPipeError: On entry or exit: the server can't be reached, as far as the client of
            this package can tell. An exception of the block itself is never replaced by it: then
            the failed release is logged.

    .. versionadded:: 0.1.0
    """

    __slots__ = ("__weakref__", "_after", "_client", "_hold", "_is_named", "_scope")

    def __init__(
        self,
        after: float | datetime.timedelta,
        scope: str | None = None,
        client: TimerClient | None = None,
    ) -> None:
        # float() also for the sake of numpy.float32: added to a float it stays one of 32 bits,
        # in which the present moment is rounded to two minutes.
        try:
            self._after = float(after)  # type: ignore[arg-type]  # What it refuses comes next.
        except (TypeError, ValueError):
            self._after = _seconds(after)
        if not 0 <= self._after <= _LONGEST:
            raise ValueError(
                f"after must be a finite number of seconds, zero or more, and not {after}"
            )
        self._client = client
        self._hold: Hold | None = None
        self._is_named = scope is not None
        if scope is None:
            scope = place(sys._getframe(1), self)
        elif not isinstance(scope, str):
            raise TypeError(f"scope must be a string, the block's name, and not {scope!r}")
        self._scope = scope

    def __enter__(self) -> Self:
        client = self._client if _instead is None else _instead
        if client is None:
            client = _timer_client
        if client is None:
            raise RuntimeError(
                "there is no timer client: call elastic_timer.configure(...) first, or pass client="
            )
        hold = self._hold
        if hold is None or hold() is None:
            # Not called by a `with` statement: there is nothing to watch but this object.
            self._hold = hold = Hold(self, on_death)
            hold.full = None
        elif hold.scope is not None:
            raise RuntimeError(
                "this expires(...) is entered already; make one for each block that can be entered"
            )
        full = self._after * _scale
        # From here on the timer is released whatever interrupts, though it is not acquired yet.
        hold.client = client
        hold.scope = scope = self._scope if self._is_named else self._scope + thread_or_task()
        try:
            if owed:
                send_owed(client)
            hold.entered = now = monotonic()
            hold.quiet_until = now + full * QUIET_PART
            hold.expiration_time = expiration_time = epoch() + full
            client.acquire(scope, expiration_time)
            hold.full = full
            # Not before: the handler of a signal may enter a block meanwhile, and leave this one
            # out, which has no deadline yet.
            hold.outer = None if get_innermost() is None else outer_hold()
            set_innermost(hold)
        except BrokenPipeError:  # The client's own word that nothing was sent.
            hold.scope = None
            raise
        except BaseException:
            hold.settle()
            raise
        return self

    async def __aenter__(self) -> Self:
        client = _timer_client if self._client is None else self._client
        await patiently(client, self.__enter__)
        return self

    def _leave(
        self, exc_type: type[BaseException] | None, exception: object, traceback: object
    ) -> None:
        hold = self._hold
        if hold is None or hold.scope is None:
            return
        hold.full = None
        try:
            if handles:
                end_handle(hold)
            if owed:
                send_owed(hold.client)
            hold.client.release(hold.scope)
        except BaseException as error:
            self._fail_to_leave(hold, error, exc_type)
        if get_innermost() is hold:
            set_innermost(hold.outer)
        hold.scope = self._hold = None

    def _start_leaving(self, *exception: Any) -> Coroutine[object, object, None]:
        coroutine = self._leave_async(*exception)
        hold = self._hold
        if hold is not None and hold.scope is not None:
            hold.full = None
            if handles:
                end_handle(hold)
            if get_innermost() is hold:
                set_innermost(hold.outer)
            # What was watched dies when this returns; from now on the block lasts as long as the
            # coroutine. Nothing may be called in between: a traceback would keep that.
            later = Hold(coroutine, on_death)
            later.full, later.client, later.scope = None, hold.client, hold.scope
            self._hold, hold.scope = later, None
        return coroutine

    async def _leave_async(
        self, exc_type: type[BaseException] | None, exception: object, traceback: object
    ) -> None:
        hold = self._hold
        if hold is None or hold.scope is None:
            return
        try:
            await patiently(hold.client, lambda: release(hold))
        except BaseException as error:
            self._fail_to_leave(hold, error, exc_type)
        hold.scope = self._hold = None

    def _fail_to_leave(
        self, hold: Hold, error: BaseException, body_type: type[BaseException] | None
    ) -> None:
        """Owe the release, and raise the error unless it would hide the body's own."""
        scope = hold.scope
        if isinstance(error, BrokenPipeError):
            hold.owe()
        else:
            hold.settle()
        self._hold = None
        if body_type is None or not isinstance(error, Exception):
            raise error
        logger.warning(
            "Timer %s could not be released after an exception in its block, which is tried again "
            "before the next request: %s",
            scope,
            error,
        )

    if TYPE_CHECKING:

        def __exit__(
            self,
            exc_type: type[BaseException] | None,
            exception: BaseException | None,
            traceback: TracebackType | None,
        ) -> None: ...

        async def __aexit__(
            self,
            exc_type: type[BaseException] | None,
            exception: BaseException | None,
            traceback: TracebackType | None,
        ) -> None: ...

    else:
        __exit__ = Exit(_leave)
        __aexit__ = Exit(_start_leaving)

    def when(self) -> float:
        """The deadline as the server was told it last, in epoch seconds; infinite in a pause.

        Raises:
            RuntimeError: Called outside of the block, or in a forked child of its process.

        .. versionadded:: 0.2.0
        """
        return checked(self._hold).expiration_time

    def reschedule(self, after: float | datetime.timedelta) -> None:
        """Have the deadline be so long from now on; `tick` then gives as much time again.

        Args:
            after: The time, in seconds or as a timedelta. In a pause it begins at its end.

        Raises:
            TypeError: `after` is of no use.
            ValueError: `after` is negative, NaN or infinite.
            RuntimeError: Called outside of the block, or in a forked child of its process.
            BrokenPipeError: The server can't be reached; the deadline is as before.

        .. versionadded:: 0.2.0
        """
        handle_of(self._hold).extend(expires(after, "")._after * _scale)

    def tick(self) -> None:
        """Tell that there was progress: the full time begins again.

        It is sent where a tenth of that time has passed; otherwise nothing is, and the call takes
        less than 0.3 us. So the deadline comes up to a tenth earlier than by the last tick.

        Raises:
            RuntimeError: Called outside of the block, or in a forked child of its process.
            BrokenPipeError: The server can't be reached; the deadline is as before.

        .. versionadded:: 0.2.0
        """
        hold = checked(self._hold)
        if monotonic() >= hold.quiet_until:
            handle_of(hold).extend(cast("float", hold.full))

    def paused(self) -> AbstractContextManager[None]:
        """A part of the block without a deadline: `with timer.paused():`.

        What was left of the time begins to run again at its end, in whatever way that comes. Pauses
        may be nested, and overlap in several threads: then the last one's end counts. The server
        still holds the timer, with a deadline tens of thousands of years away.

        Raises:
            RuntimeError: Called outside of the block, or in a forked child of its process.

        .. versionadded:: 0.2.0
        """
        return Pause(self._hold)

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
        its_place = f"{code.co_filename}#{code.co_firstlineno}" if code else self._scope
        # A function decorated twice has two deadlines.
        count = getattr(function, "__elastic_timer__", 0)
        if count:
            its_place += f"@{count}"

        def deadline() -> expires:
            block = expires(self._after, self._scope if self._is_named else its_place, self._client)
            block._is_named = self._is_named
            return block

        async def wait(awaitable: Awaitable[Any]) -> Any:
            async with deadline():
                return await awaitable

        async def call_async(*args: _P.args, **kwargs: _P.kwargs) -> Any:
            async with deadline():
                return await cast("Callable[_P, Awaitable[Any]]", function)(*args, **kwargs)

        def call(*args: _P.args, **kwargs: _P.kwargs) -> Any:
            with deadline():
                result = function(*args, **kwargs)
            if not hasattr(type(result), "__await__"):
                return result
            if hasattr(result, "send"):
                return wait(cast("Awaitable[Any]", result))
            raise TypeError(
                f"{function!r} returned {result!r}, and the deadline was over before that is done; "
                "decorate an `async def` function that awaits it"
            )

        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            type(function).__call__
        )
        wrapper = functools.wraps(function)(call_async if is_async else call)
        wrapper.__elastic_timer__ = count + 1  # type: ignore[attr-defined]
        return cast("Callable[_P, _R]", wrapper)


def _seconds(after: object) -> float:
    """The seconds of a timedelta, told by its method: importing datetime takes long."""
    if hasattr(after, "total_seconds"):
        return float(after.total_seconds())
    raise TypeError(f"after must be a number of seconds or a timedelta, and not {after!r}")
