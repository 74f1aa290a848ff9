"""What a timer is, who asks for one and who keeps it: the interfaces, `configure` and `expires`."""

from __future__ import annotations

import abc
import contextlib
import functools
import logging
import operator
import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast

from elastic_timer._clock import epoch
from elastic_timer._server.callbacks import contained_logger
from elastic_timer._transport.pipe import UNREACHABLE_AFTER

if TYPE_CHECKING:
    import datetime
    from types import FrameType, TracebackType

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

# The longest deadline there is: the latest moment must stay a number of seconds.
_LONGEST = sys.float_info.max / 2

# How often a release is tried that further interrupts cut short.
_SETTLING_TRIES = 10

# How often `async with` tries to reach a server.
_ASYNC_TRIES = 10

# CO_GENERATOR and CO_ASYNC_GENERATOR, see the module inspect, which takes long to import.
_ANY_GENERATOR = 0x20 | 0x200

# Where in the code of its line an unnamed block stands, by `file#line`: the first one that is met
# there has this alone for its scope.
_first_calls: dict[str, int] = {}


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


def configure(timer_client: TimerClient | _Unset | None = _UNSET) -> None:
    """Set the client that `expires` uses in this process.

    Args:
        timer_client: The client. None unsets it. Without the argument it is a `FileTimerClient`
            for the FIFO that the environment variable `TORCHELASTIC_TIMER_FILE` names, which
            `elastic-timer run` and torchrun set.

    Raises:
        RuntimeError: Called without the argument, and the variable is not set.
        TypeError: The argument is no client; a path, say.

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
    # By its methods: it may be of any class, upstream's for one.
    if timer_client is not None and not hasattr(timer_client, "acquire"):
        raise TypeError(
            f"timer_client must be a client such as FileTimerClient(path), not {timer_client!r}"
        )
    _timer_client = timer_client
    if timer_client is None:
        logger.info("This process has no timer client any more")
    else:
        logger.info("Timer client set to %s", type(timer_client).__name__)


class _Hold(weakref.ref):  # type: ignore[type-arg]  # What it refers to is of no interest.
    """A timer that is released when an object dies, unless it was before.

    The object is what a `with` statement keeps on the stack of its frame, and nothing else refers
    to. It dies when the block is left in whatever way: an interrupt may come at the very entry of
    `__exit__`, and a traceback that is kept keeps the frames and the `expires` alive.
    """

    __slots__ = ("client", "scope")
    # A reference would be equal to all others to the same object.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    client: TimerClient
    scope: str | None  # None: there is nothing to release.

    def settle(self) -> None:
        """Release the timer now, or owe that where it would take a wait."""
        for _ in range(_SETTLING_TRIES):
            if self.scope is None:
                break
            try:
                _at_once(self.client, self.client.release, self.scope)
            except Exception as error:
                logger.debug("Timer %s could not be released: %s", self.scope, error)
                break
            except BaseException:
                continue  # A second interrupt; the first is on its way to the caller.
            self.scope = None
        if self.scope is not None:
            self.owe()
        with contextlib.suppress(ValueError):
            _owed.remove(self)

    def owe(self) -> None:
        """Have the release sent before the next request of the client."""
        owed = _Hold(_Hold)
        owed.client, owed.scope = self.client, self.scope
        _owed.append(owed)
        self.scope = None


def _release(hold: _Hold) -> None:
    """Release what a hold is for, after what its client owes."""
    if _owed:
        _send_owed(hold.client)
    hold.client.release(hold.scope)  # type: ignore[arg-type]  # There is one to release.


_owed: list[_Hold] = []
_Hold.on_death_1 = property(_owed.append)  # type: ignore[attr-defined]
_Hold.on_death_2 = property(_Hold.settle)  # type: ignore[attr-defined]
# Called when the object of a hold dies. The first attribute is looked up by C code alone: a second
# interrupt, which may come at the entry of settle(), loses no release.
_on_death = operator.attrgetter("on_death_1", "on_death_2")


def _send_owed(client: TimerClient) -> None:
    for hold in tuple(_owed):
        if hold.scope is not None and hold.client == client:
            try:
                client.release(hold.scope)
            except (RuntimeError, TypeError, ValueError) as error:
                logger.debug("Timer %s can't be released: %s", hold.scope, error)
            hold.scope = None
        if hold.scope is None:
            with contextlib.suppress(ValueError):
                _owed.remove(hold)


def _at_once(client: TimerClient, request: Callable[..., object], *args: object) -> None:
    """Send a request; where the client could wait for its server, it fails instead."""
    getattr(client, "_at_once", _call)(request, *args)


def _call(request: Callable[..., object], *args: object) -> None:
    request(*args)


async def _patiently(client: TimerClient | None, request: Callable[[], None]) -> None:
    """Send a request; waits for the client's server go without blocking the event loop."""
    asyncio = sys.modules.get("asyncio")
    at_once: Callable[[Callable[[], None]], None] | None = getattr(client, "_at_once", None)
    if at_once is None or asyncio is None or asyncio._get_running_loop() is None:
        request()
        return
    for _ in range(_ASYNC_TRIES):
        try:
            at_once(request)
            return
        except BrokenPipeError:
            await asyncio.sleep(UNREACHABLE_AFTER / _ASYNC_TRIES)
    at_once(request)


class _Exit(property):
    """An exit that the `with` statement gets anew for each block, to be watched by a `_Hold`.

    Looked up on the class, as ExitStack does, it is a plain callable.
    """

    def __init__(self, leave: Callable[..., object]) -> None:
        self._leave = leave
        partial = functools.partial

        def get(block: expires) -> Callable[..., object]:
            token = partial(leave, block)
            if block._hold is None or block._hold.scope is None:
                hold = _Hold(token, _on_death)
                hold.scope = None
                block._hold = hold
            return token

        super().__init__(get)

    def __call__(self, *args: object) -> object:
        return self._leave(*args)


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
        self._hold: _Hold | None = None
        self._is_named = scope is not None
        if scope is None:
            scope = _place(sys._getframe(1), self)
        elif not isinstance(scope, str):
            raise TypeError(f"scope must be a string, the block's name, and not {scope!r}")
        self._scope = scope

    def __enter__(self) -> None:
        client = _timer_client if self._client is None else self._client
        if client is None:
            raise RuntimeError(
                "there is no timer client: call elastic_timer.configure(...) first, or pass client="
            )
        hold = self._hold
        if hold is None or hold() is None:
            # Not called by a `with` statement: there is nothing to watch but this object.
            self._hold = hold = _Hold(self, _on_death)
        elif hold.scope is not None:
            raise RuntimeError(
                "this expires(...) is entered already; make one for each block that can be entered"
            )
        # From here on the timer is released whatever interrupts, though it is not acquired yet.
        hold.client = client
        hold.scope = scope = self._scope if self._is_named else self._scope + _thread_or_task()
        try:
            if _owed:
                _send_owed(client)
            client.acquire(scope, epoch() + self._after)
        except BrokenPipeError:  # The client's own word that nothing was sent.
            hold.scope = None
            raise
        except BaseException:
            hold.settle()
            raise

    async def __aenter__(self) -> None:
        client = _timer_client if self._client is None else self._client
        await _patiently(client, self.__enter__)

    def _leave(
        self, exc_type: type[BaseException] | None, exception: object, traceback: object
    ) -> None:
        hold = self._hold
        if hold is None or hold.scope is None:
            return
        try:
            if _owed:
                _send_owed(hold.client)
            hold.client.release(hold.scope)
        except BaseException as error:
            self._fail_to_leave(hold, error, exc_type)
        hold.scope = self._hold = None

    def _start_leaving(self, *exception: Any) -> Coroutine[object, object, None]:
        coroutine = self._leave_async(*exception)
        hold = self._hold
        if hold is not None and hold.scope is not None:
            # What was watched dies when this returns; from now on the block lasts as long as that.
            self._hold = _Hold(coroutine, _on_death)
            self._hold.client, self._hold.scope = hold.client, hold.scope
            hold.scope = None
        return coroutine

    async def _leave_async(
        self, exc_type: type[BaseException] | None, exception: object, traceback: object
    ) -> None:
        hold = self._hold
        if hold is None or hold.scope is None:
            return
        try:
            await _patiently(hold.client, lambda: _release(hold))
        except BaseException as error:
            self._fail_to_leave(hold, error, exc_type)
        hold.scope = self._hold = None

    def _fail_to_leave(
        self, hold: _Hold, error: BaseException, body_type: type[BaseException] | None
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
        __exit__ = _Exit(_leave)
        __aexit__ = _Exit(_start_leaving)

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
        # A function decorated twice has two deadlines.
        count = getattr(function, "__elastic_timer__", 0)
        if count:
            place += f"@{count}"

        def deadline() -> expires:
            block = expires(self._after, self._scope if self._is_named else place, self._client)
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


def _place(caller: FrameType, block: expires) -> str:
    """The default scope: `file#line`, and what tells it from others of the same line."""
    place = f"{caller.f_code.co_filename}#{caller.f_lineno}"
    if _first_calls.setdefault(place, caller.f_lasti) != caller.f_lasti:
        place += f"@{caller.f_lasti}"
    if caller.f_code.co_flags & _ANY_GENERATOR:
        # Several generators may be within their blocks at a time; as long as one is, it keeps this
        # object, so that no other has its address.
        place += f"@generator-{id(block):x}"
    return place


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
