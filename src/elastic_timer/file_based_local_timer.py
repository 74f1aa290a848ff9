"""Timers over a FIFO: any process of the host that may write to it can be a worker."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal as signals
import stat
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from elastic_timer._clock import monotonic
from elastic_timer._transport.pipe import (
    CHECK,
    PIPE_BUF,
    SIGPIPE,
    UNREACHABLE_AFTER,
    at_once,
    check_pipe,
    has_room,
    may_wait,
    sigpipe_handler,
    too_large,
    write,
)
from elastic_timer._transport.wire import acquire_line, encode, encode_line, release_line
from elastic_timer.api import TimerClient, TimerRequest

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    from elastic_timer._file_server import FileTimerServer as FileTimerServer
    from elastic_timer._worker.optional import Lookout
    from elastic_timer.debug_info_logging import (
        log_debug_info_for_expired_timers as log_debug_info_for_expired_timers,
    )

    _P = ParamSpec("_P")

_R = TypeVar("_R")

__all__ = ["FileTimerClient", "FileTimerRequest", "FileTimerServer"]

# What `__getattr__` gives.
_OF_THE_SERVER = ("FileTimerServer", "log_debug_info_for_expired_timers")

logger: logging.Logger = logging.getLogger(__name__)

# A client whose server can't be reached tries so often.
_TRIES = 10

if sys.platform == "win32":
    _DEFAULT_SIGNAL = signals.CTRL_C_EVENT
else:
    _DEFAULT_SIGNAL = signals.SIGKILL

# Windows has no O_NONBLOCK, and no FIFO that could be opened.
_OPEN_FLAGS = os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)


def _retry(max_retries: int, sleep_time: float) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a function so that it is tried again when it raises.

    Args:
        max_retries: How many tries there are. The last one's exception is not caught.
        sleep_time: How many seconds to wait between two tries.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for _ in range(max_retries - 1):
                try:
                    return function(*args, **kwargs)
                except Exception as error:
                    logger.debug("%s failed, trying again: %s", function.__name__, error)
                    time.sleep(sleep_time)
            return function(*args, **kwargs)

        return call

    return decorate


class FileTimerRequest(TimerRequest):
    """Asks for a timer, or releases one, over a FIFO.

    Args:
        worker_pid: The worker's process id; negative means the process group of that number.
        scope_id: What the timer is for.
        expiration_time: When it expires, in epoch seconds. Negative means release.
        signal: What to send the worker when it expires. Zero or less means to report the timer
            and to leave the worker alone.

    .. versionadded:: 0.1.0
    """

    __slots__ = ["signal", "version"]

    signal: int
    version: int

    def __init__(
        self, worker_pid: int, scope_id: str, expiration_time: float, signal: int = 0
    ) -> None:
        # Set here, not by the base class: clients make two of these for every block.
        self.worker_id = worker_pid
        self.scope_id = scope_id
        self.expiration_time = expiration_time
        self.version = 1
        self.signal = signal

    @property
    def worker_pid(self) -> int:
        """The worker's process id, or its negative process group."""
        return self.worker_id  # type: ignore[no-any-return]  # Any is the base class's contract.

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, FileTimerRequest)
            and super().__eq__(other)
            and self.version == other.version
            and self.signal == other.signal
        )

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, signal={self.signal!r})"

    def to_json(self) -> str:
        """The request as it goes over the FIFO, without the newline.

        Raises:
            TypeError: The scope is not a string.
            ValueError: The expiration time is NaN or infinite.
        """
        return encode(
            self.version, self.worker_id, self.scope_id, self.expiration_time, self.signal
        )


class FileTimerClient(TimerClient):
    """A worker's side of a `FileTimerServer` on the same host.

    It holds nothing open: it can be made before the server, shared by threads and inherited by
    forked children, each of which is a worker of its own.

    Args:
        file_path: The server's FIFO.
        signal: What to send this process when a timer expires. Zero or less means to report the
            timer and to leave the process alone.
        required: Whether a request needs the server. Where it is False, requests do nothing while
            the server can't be reached: that costs one warning in the log of each process, no error
            and no wait. The server is looked for again every 5 s at most, and by blocks of which
            it may still hold a timer.

    Raises:
        TypeError: The signal is no number.
        ValueError: There is no signal of that number.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        file_path: str,
        signal: int = _DEFAULT_SIGNAL,
        *,
        required: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(signal, int):
            raise TypeError(f"signal must be a number such as signal.SIGTERM, and not {signal!r}")
        if not signal < signals.NSIG:
            raise ValueError(f"there is no signal {signal}")
        # Absolute, or after a chdir() the release would go elsewhere than the acquire went.
        self._file_path = os.path.abspath(file_path)
        # Opens the FIFO anew at every step of a loop. An interrupt would come between a call of
        # os.open and the assignment of what it returns, and leak the descriptor; none comes between
        # a step and the body of the loop. Not by itertools, which can't be pickled (Python 3.14).
        self._opened = iter(
            functools.partial(os.open, os.fsencode(self._file_path), _OPEN_FLAGS), None
        )
        self._is_owner_known = False
        self.signal = signal
        self._lookout: Lookout | None = None
        if not required:
            # Here, as others need it not.
            from elastic_timer._worker.optional import Lookout

            # As methods of this class: those of a subclass have been called by then.
            self._lookout = Lookout(
                functools.partial(FileTimerClient.acquire, self),
                functools.partial(FileTimerClient.release, self),
            )

    def __eq__(self, other: object) -> bool:
        """Whether both send to the same server: what one of them owes, the other may send."""
        return isinstance(other, FileTimerClient) and self._file_path == other._file_path

    def __hash__(self) -> int:
        return hash(self._file_path)

    @_retry(max_retries=_TRIES, sleep_time=UNREACHABLE_AFTER / _TRIES)
    def _open_non_blocking(self) -> int:
        # Where no server reads, it fails at once with ENXIO instead of waiting for one.
        (fd,) = map(next, (self._opened,))  # Not by a call: an interrupt would leak it.
        try:
            self._check_owner(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _send_request(self, request: FileTimerRequest) -> None:
        self._send(
            encode_line(
                request.version,
                request.worker_id,
                request.scope_id,
                request.expiration_time,
                request.signal,
            )
        )

    def _send(self, line: bytes) -> None:
        if len(line) > PIPE_BUF:
            raise too_large(line)
        try:
            # One try without ado: this is the path of every block of every worker.
            for fd in self._opened:  # pragma: no branch  # It has no end.
                try:
                    # Another file may be there by now, and would be written over.
                    check_pipe(fd, CHECK)
                    if not self._is_owner_known:
                        self._check_owner(fd)
                    (os.write if sigpipe_handler(SIGPIPE) else write)(fd, line)
                finally:
                    # At once: upstream's server stops watching while a client has the FIFO open.
                    os.close(fd)
                return
        except OSError as error:
            if not may_wait():
                raise self._unreachable(error) from error
            self._send_patiently(line)

    def _send_patiently(self, line: bytes) -> None:
        """Send to a server that is not there, or that is behind with reading."""
        give_up_at = monotonic() + UNREACHABLE_AFTER
        while True:
            try:
                fd = self._open_non_blocking()
            except OSError as error:
                raise self._unreachable(error) from error
            try:
                check_pipe(fd, CHECK)
                has_room(fd, give_up_at - monotonic())
                write(fd, line)
                return
            except OSError as error:
                if monotonic() >= give_up_at:
                    raise self._unreachable(error) from error
            finally:
                os.close(fd)

    def _at_once(self, method: Callable[..., object], *args: object) -> None:
        """Call a method of this client that does not wait for the server, but fails at once."""
        if self._lookout is None:
            at_once(method, *args)
        else:
            method(*args)  # It waits for no server, and fails for none.

    def _check_owner(self, fd: int) -> None:
        status = os.fstat(fd)
        if not stat.S_ISFIFO(status.st_mode):
            raise OSError(errno.ENXIO, "not a FIFO")
        if status.st_uid not in (os.geteuid(), 0):
            raise PermissionError(errno.EPERM, f"the FIFO belongs to user {status.st_uid}")
        self._is_owner_known = True

    def _unreachable(self, error: OSError) -> BrokenPipeError:
        problem = (
            "the timer server does not read, and the pipe is full"
            if isinstance(error, BlockingIOError)
            else f"no timer server can be reached ({error.strerror})"
        )
        return BrokenPipeError(
            errno.EPIPE,
            f"{problem}; is a FileTimerServer or `elastic-timer run` alive on this host?",
            self._file_path,
        )

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Ask for a timer of this process; see `TimerClient.acquire`.

        When it returns, the request has left the process.

        Raises:
            BrokenPipeError: The server is required and could not be reached for about a second.
            RuntimeError: The request does not fit in one atomic write; shorten the scope.
            ValueError: The expiration time is NaN or infinite.
        """
        if self._lookout is not None and may_wait():
            self._lookout.acquire(scope_id, expiration_time)
        # Without a request object, which takes long, unless somebody looks at those.
        elif type(self)._send_request is _send_request:
            self._send(acquire_line(scope_id, expiration_time, self.signal))
        else:
            self._send_request(
                FileTimerRequest(os.getpid(), scope_id, expiration_time, self.signal)
            )

    def release(self, scope_id: str) -> None:
        """Release a timer of this process; see `TimerClient.release`.

        Raises:
            BrokenPipeError: The server is required and could not be reached for about a second.
            RuntimeError: The request does not fit in one atomic write.
        """
        if self._lookout is not None and may_wait():
            self._lookout.release(scope_id)
        elif type(self)._send_request is _send_request:
            self._send(release_line(scope_id))
        else:
            self._send_request(FileTimerRequest(os.getpid(), scope_id, -1))


_send_request = FileTimerClient._send_request


# Type checkers must not see it, or they would take any misspelt name for one that is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # The server comes when it is asked for, and so does what its debug hook is until somebody
        # replaces it here: they make the import half as long again, and a worker needs neither.
        if name not in _OF_THE_SERVER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module("elastic_timer._file_server"), name)
        # Kept, as every round of a server asks for its hook. What somebody has put here meanwhile
        # stays.
        return globals().setdefault(name, value)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_OF_THE_SERVER})
