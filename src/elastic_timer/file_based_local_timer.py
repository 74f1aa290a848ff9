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
from itertools import repeat
from typing import TYPE_CHECKING, TypeVar

from elastic_timer import _clock
from elastic_timer._clock import monotonic
from elastic_timer._server.callbacks import contained_logger
from elastic_timer._server.events import (
    Event,
    Listener,
    ServerStarted,
    ServerStopped,
    TimerEvent,
    TimerExpired,
    WorkerSignalled,
)
from elastic_timer._server.server import REQUESTS, ProcessServer
from elastic_timer._transport.fifo import FifoSource
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
from elastic_timer.debug_info_logging import (
    collectives,
    log_debug_info_for_expired_timers,
    native_stacks,
    stacks_timeout,
)

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    from elastic_timer._worker.optional import Lookout

    _P = ParamSpec("_P")

_R = TypeVar("_R")

__all__ = ["FileTimerClient", "FileTimerRequest", "FileTimerServer"]

logger: logging.Logger = logging.getLogger(__name__)
# For what runs on the watchdog's thread, and must not be held up by a handler of the log.
_watchdog_logger = contained_logger(__name__)

# A client whose server can't be reached tries so often.
_TRIES = 10

if sys.platform == "win32":
    _DEFAULT_SIGNAL = signals.CTRL_C_EVENT
else:
    _DEFAULT_SIGNAL = signals.SIGKILL

# Windows has no O_NONBLOCK, and no FIFO that could be opened.
_OPEN_FLAGS = os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)

# How often a server looks whether its FIFO is still where it was made, in seconds: often enough
# that clients, which try for about a second, find it again.
_FIFO_CHECK = 0.5


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
            and no wait. The server is looked for again every 5 s at most.

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
        # a step and the body of the loop.
        self._opened = map(os.open, repeat(os.fsencode(self._file_path)), repeat(_OPEN_FLAGS))
        self._is_owner_known = False
        self.signal = signal
        self._lookout: Lookout | None = None
        if not required:
            # Here, as others need it not.
            from elastic_timer._worker.optional import Lookout

            self._lookout = Lookout(self)

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


class FileTimerServer(ProcessServer[FileTimerRequest]):
    """Reads requests from a FIFO, and signals the processes that overrun their timers.

    Start one on each host; its workers can be any processes of that host, children or not. `with
    server:` starts it and stops it. A forked child inherits nothing of it.

    Not guaranteed: the end of a process that hangs in the kernel, where even SIGKILL waits. Where
    the system has no pidfds (they are Linux's), that no other process is signalled which was given
    the pid of a worker that ended.

    Args:
        file_path: Where to make the FIFO, readable and writable for this user alone. A FIFO that
            lies there and that nobody reads is replaced.
        run_id: A name for this run, for the logs.
        max_interval: The longest time between two rounds of the watchdog, in seconds. Deadlines
            and requests are seen to when they come, whatever it is.
        daemon: Whether the interpreter may exit while the watchdog runs.
        log_event: Called with an event's name and its request: "watchdog started", "watchdog
            stopped" (without a request), "timer expired", "kill worker process". It runs on a
            thread of its own; the watchdog waits for it for 10 ms at most, so that it hears of an
            expiry before the worker is signalled. What it raises is logged.
        reap_self: Send this very process the same signal once a worker was reaped, as upstream
            does.
        kill_after: How many seconds a worker may outlive a signal other than SIGKILL before it
            gets SIGKILL, unless it leaves the block. None means for ever. Process groups are not
            followed.
        kill_tree: Whether a worker that is reaped takes what it has started along. These processes
            are found while it lives, and get SIGKILL with it; after another signal, which it alone
            gets, once it is gone or `kill_after` is over, and not where it leaves the block. Never
            the server, its ancestors, or a process of another user than the worker's. What is
            still there 5 s later is named in the log. Of a process group nothing is looked for.

            Not guaranteed: that a process is found whose parent had ended before (a daemon), but
            for those in a session that the worker or a descendant leads.

            .. versionadded:: 0.2.0
        dry_run: Report who has overrun a deadline and would have been signalled, and signal
            nobody, whatever signal the clients name.

            .. versionadded:: 0.2.0
        status: Answer `elastic-timer status` on a socket beside the FIFO, `file_path` with
            ".sock" behind it, for this user and root alone. Where it can't be made, a warning says
            why, and the server runs without.

            .. versionadded:: 0.2.0

    Raises:
        FileExistsError: Something lies at `file_path` that is no FIFO, or that a server reads.
        FileNotFoundError: The folder of `file_path` does not exist.
        NotImplementedError: The platform has no FIFOs; or with `kill_tree`, no /proc.
        ValueError: `max_interval` or `kill_after` is not a positive number.

    .. versionadded:: 0.1.0
    """

    _source: FifoSource[FileTimerRequest]

    def __init__(
        self,
        file_path: str,
        run_id: str,
        max_interval: float = 10,
        daemon: bool = True,
        log_event: Callable[[str, FileTimerRequest | None], None] | None = None,
        *,
        reap_self: bool = False,
        kill_after: float | None = None,
        kill_tree: bool = False,
        dry_run: bool = False,
        status: bool = False,
    ) -> None:
        super().__init__(
            lambda: FifoSource(file_path, FileTimerRequest),
            run_id,
            max_interval,
            daemon,
            kill_after,
            kill_tree,
            dry_run,
        )
        self._file_path = file_path
        self._reap_self = reap_self
        # Set, a round does not wait, and is the last.
        self._run_once = False
        self._request_count = 0
        self._last_progress_time = int(_clock.epoch())
        self._is_cut_off = False
        self._next_fifo_check = 0.0
        if status:
            # Not before: a worker, which has no server, is not to pay for it.
            from elastic_timer._server.status import Snapshots
            from elastic_timer._transport.status_socket import StatusSocket

            about = {
                "run_id": run_id,
                "timer_file": os.path.abspath(file_path),
                "max_interval": max_interval,
            }
            snapshots = Snapshots(self._workers, lambda: self._progress, about)
            self._aside = StatusSocket(file_path, self._loop, snapshots.take)
        if log_event is not None:
            self.subscribe(
                _as_log_event(log_event),
                ServerStarted,
                ServerStopped,
                TimerExpired,
                WorkerSignalled,
            )

    def start(self) -> None:
        """Start the watchdog; does nothing where it runs already.

        When it returns, clients can send. After a `stop` the FIFO is made anew, and the timers
        from before are gone.

        Raises:
            FileExistsError: Since the server was made, something else was put in its FIFO's place,
                or another server has begun to read at its path.
            RuntimeError: It was stopped while it was busy, and still is; or the threads of this
                process are eventlet's or gevent's.
        """
        self._run_once = False
        super().start()

    def run_once(self) -> None:
        """Serve all that was sent, then end the watchdog and remove the FIFO."""
        self._run_once = True
        self._loop.join()

    def get_last_progress_time(self) -> int:
        """When the watchdog's last round ended, in epoch seconds; now, until a client shows up."""
        return self._last_progress_time if self._source.has_read else int(_clock.epoch())

    def register_timers(self, timer_requests: list[FileTimerRequest]) -> None:
        """Acquire and release timers; requests of workers that are gone are dropped.

        Args:
            timer_requests: In the order of their arrival. A negative expiration time releases.
        """
        self._request_count += len(timer_requests)
        super().register_timers(timer_requests)

    def _watchdog_loop(self) -> None:
        """Run rounds until the server is stopped; an error in one of them ends nothing."""
        while not self._loop.is_stopping():
            is_last = self._run_once
            self._loop.run_round(self._run_next_round)
            if is_last:
                break

    def _run_next_round(self) -> None:
        self._run_watchdog(self._source.fileno())
        self._last_progress_time = int(_clock.epoch())

    def _run_watchdog(self, fd: int) -> None:
        """Run one round: wait for requests, register them, reap the workers that overran.

        Args:
            fd: The FIFO, open for reading and non-blocking.
        """
        self._round(lambda: self._get_requests(fd, self._max_interval))
        if self._reap_self:
            for signal in self._sent:
                self._flush()
                self._reap_worker(os.getpid(), signal)

    def _get_requests(self, fd: int, max_interval: float) -> list[FileTimerRequest]:
        """Wait until there is something to do, `max_interval` seconds at most."""
        end = self._end_of_wait()
        is_due = False
        while not (is_due or self._loop.is_stopping() or self._run_once):
            remaining = end - _clock.monotonic()
            if remaining <= 0:
                return []  # Nothing has come: to look again would be a fifth of an idle server.
            is_due = self._wait(min(remaining, _FIFO_CHECK))
            # Not in every round: with a short max_interval that would be a third of an idle server.
            if _clock.monotonic() >= self._next_fifo_check:
                self._next_fifo_check = _clock.monotonic() + _FIFO_CHECK
                self._keep_fifo()
        return self._source.drain()

    def _is_ending(self) -> bool:
        return self._run_once or super()._is_ending()

    def _keep_fifo(self) -> None:
        """Make the FIFO anew where it was removed; say so where that can't be done."""
        if self._source.is_in_place():
            return
        # What was sent before, and can't be read any more from the new one.
        self._register(self._source.drain())
        old = self._source.fileno()
        try:
            new = self._source.mend()
        except OSError as error:
            if not self._is_cut_off:
                _watchdog_logger.error(
                    "No requests can arrive at %s any more: %s. The timers held are kept; a new "
                    "server is needed",
                    self._file_path,
                    error.strerror,
                )
            self._is_cut_off = True
        else:
            self._loop.unwatch(old)
            self._loop.watch(new, REQUESTS)
            _watchdog_logger.warning("The FIFO %s was removed; made it anew", self._file_path)
            self._is_cut_off = False

    def _get_scopes(self, timer_requests: list[FileTimerRequest]) -> list[str]:
        return [request.scope_id for request in timer_requests]

    def _reap_worker(self, worker_pid: int, signal: int) -> bool:
        """Signal a worker: every signal goes out through this hook.

        Returns:
            Whether there is no more to do. False has it called again, until the worker is gone.
        """
        if self._reap_self and worker_pid == os.getpid():
            os.kill(worker_pid, signal)
            return True
        return self._workers.signal(worker_pid, signal)

    def _signal_for(self, timer: FileTimerRequest) -> int:
        return timer.signal

    def _send_signal(self, pid: int, signal: int) -> bool:
        return self._reap_worker(pid, signal)

    def _to_json(self, timer: FileTimerRequest, expiration_time: float) -> str:
        return encode(
            timer.version, timer.worker_pid, timer.scope_id, expiration_time, timer.signal
        )

    def _call_debug_hook(self, expired: dict[int, list[str]]) -> object:
        return log_debug_info_for_expired_timers(self._run_id, expired)

    def _evidence_wanted(self) -> tuple[float, bool, tuple[str, ...]]:
        return stacks_timeout(), native_stacks(), collectives()


def _as_log_event(log_event: Callable[[str, FileTimerRequest | None], None]) -> Listener:
    def listener(event: Event) -> None:
        log_event(event.name, event.timer if isinstance(event, TimerEvent) else None)

    return listener
