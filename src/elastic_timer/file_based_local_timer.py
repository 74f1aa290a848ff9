"""Timers over a FIFO: any process of the host that may write to it can be a worker."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal as signals
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from elastic_timer._clock import monotonic
from elastic_timer._server.callbacks import (
    ROUND_ALLOWANCE,
    Callbacks,
    contained_logger,
    run_contained,
)
from elastic_timer._server.process import is_running
from elastic_timer._server.rounds import REQUESTS, Rounds
from elastic_timer._server.workers import WorkerTimers
from elastic_timer._transport.fifo import Fifo, read_available
from elastic_timer._transport.pipe import (
    CHECK,
    PIPE_BUF,
    SIGPIPE,
    UNREACHABLE_AFTER,
    check_pipe,
    has_room,
    sigpipe_handler,
    too_large,
    write,
)
from elastic_timer._transport.wire import LineBuffer, decode, encode, encode_line, encode_line_again
from elastic_timer.api import TimerClient, TimerRequest
from elastic_timer.debug_info_logging import log_debug_info_for_expired_timers, stacks_timeout

if TYPE_CHECKING:
    from typing_extensions import ParamSpec, Self

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
_OPEN_FLAGS = (os.O_WRONLY | getattr(os, "O_NONBLOCK", 0),)

# Per thread: whether a client may wait for its server.
_mode = threading.local()

# How often a server looks whether its FIFO is still where it was made, in seconds: often enough
# that clients, which try for about a second, find it again.
_FIFO_CHECK = 0.5

# How many unreadable lines of one read are named one by one. Each warning takes longer than the
# line took to write: without a limit rubbish would keep the server from its deadlines.
_NAMED_LINES = 10


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

    Raises:
        TypeError: The signal is no number.
        ValueError: There is no signal of that number.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        file_path: str,
        signal: int = _DEFAULT_SIGNAL,
    ) -> None:
        super().__init__()
        if not isinstance(signal, int):
            raise TypeError(f"signal must be a number such as signal.SIGTERM, and not {signal!r}")
        if not signal < signals.NSIG:
            raise ValueError(f"there is no signal {signal}")
        # Absolute, or after a chdir() the release would go elsewhere than the acquire went.
        self._file_path = os.path.abspath(file_path)
        self._path = (os.fsencode(self._file_path),)  # Once, not for every block.
        self._is_owner_known = False
        self.signal = signal

    def __eq__(self, other: object) -> bool:
        """Whether both send to the same server: what one of them owes, the other may send."""
        return isinstance(other, FileTimerClient) and self._path == other._path

    def __hash__(self) -> int:
        return hash(self._path)

    @_retry(max_retries=_TRIES, sleep_time=UNREACHABLE_AFTER / _TRIES)
    def _open_non_blocking(self) -> int:
        # Where no server reads, it fails at once with ENXIO instead of waiting for one.
        (fd,) = map(os.open, self._path, _OPEN_FLAGS)
        try:
            self._check_owner(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _send_request(self, request: FileTimerRequest) -> None:
        line = (encode_line_again if request.expiration_time == -1 else encode_line)(
            request.version,
            request.worker_id,
            request.scope_id,
            request.expiration_time,
            request.signal,
        )
        if len(line) > PIPE_BUF:
            raise too_large(line)
        try:
            # One try without ado: this is the path of every block of every worker. Opened by the
            # unpacking, behind which no interrupt comes before `try`: it would leak the descriptor.
            (fd,) = map(os.open, self._path, _OPEN_FLAGS)
            try:
                # Another file may be there by now, and would be written over.
                check_pipe(fd, CHECK)
                if not self._is_owner_known:
                    self._check_owner(fd)
                (os.write if sigpipe_handler(SIGPIPE) else write)(fd, line)
            finally:
                # At once: upstream's server stops watching while a client has the FIFO open.
                os.close(fd)
        except OSError as error:
            if not getattr(_mode, "waits", True):
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
        _mode.waits = False
        try:
            method(*args)
        finally:
            _mode.waits = True

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
            BrokenPipeError: The server could not be reached for about a second.
            RuntimeError: The request does not fit in one atomic write; shorten the scope.
            ValueError: The expiration time is NaN or infinite.
        """
        self._send_request(FileTimerRequest(os.getpid(), scope_id, expiration_time, self.signal))

    def release(self, scope_id: str) -> None:
        """Release a timer of this process; see `TimerClient.release`.

        Raises:
            BrokenPipeError: The server could not be reached for about a second.
            RuntimeError: The request does not fit in one atomic write.
        """
        self._send_request(FileTimerRequest(os.getpid(), scope_id, -1))


class FileTimerServer:
    """Reads requests from a FIFO, and signals the processes that overrun their timers.

    Start one on each host; its workers can be any processes of that host, children or not. `with
    server:` starts it and stops it. A forked child inherits nothing of it.

    Not guaranteed: the end of a process that hangs in the kernel, where even SIGKILL waits. Where
    the system has no pidfds (they are Linux's), that no other process is signalled which was given
    the pid of a worker that ended.

    Args:
        file_path: Where to make the FIFO, readable and writable for this user alone. A FIFO that
            lies there is replaced.
        run_id: A name for this run, for the logs.
        max_interval: The longest time between two rounds of the watchdog, in seconds. Deadlines
            and requests are seen to when they come, whatever it is.
        daemon: Whether the interpreter may exit while the watchdog runs.
        log_event: Called with an event's name and its request: "watchdog started", "watchdog
            stopped" (without a request), "timer expired", "kill worker process". What it raises
            is logged. The watchdog waits for it for at most a second in a round.
        reap_self: Send this very process the same signal once a worker was reaped, as upstream
            does.
        kill_after: How many seconds a worker may outlive a signal other than SIGKILL before it
            gets SIGKILL. None means for ever. Process groups are not followed.

    Raises:
        FileExistsError: Something lies at `file_path` that is no FIFO.
        FileNotFoundError: The folder of `file_path` does not exist.
        NotImplementedError: The platform has no FIFOs.
        ValueError: `max_interval` or `kill_after` is not a positive number.

    .. versionadded:: 0.1.0
    """

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
    ) -> None:
        if not max_interval > 0:
            raise ValueError(f"max_interval must be a positive number of seconds: {max_interval}")
        if kill_after is not None and not kill_after > 0:
            raise ValueError(f"kill_after must be a positive number of seconds: {kill_after}")
        self._file_path = file_path
        self._run_id = run_id
        self._max_interval = max_interval
        self._daemon = daemon
        self._log_event = log_event
        self._reap_self = reap_self
        self._stop_signaled = False
        # Set, a round does not wait, and is the last.
        self._run_once = False
        self._request_count = 0
        self._is_client_started = False
        self._last_progress_time = int(time.time())
        self._is_started = False
        self._is_cut_off = False
        self._next_fifo_check = 0.0
        self._fatal_signal = 0
        self._lines = LineBuffer()
        # Apart, so that a log_event that blocks costs nobody the evidence.
        self._events = Callbacks()
        self._reports = Callbacks()
        self._fifo = Fifo(file_path)
        # Not before: its fork and exit hooks are no business of a process that has no server.
        from elastic_timer._server.loop import Watchdog

        self._watchdog = Watchdog(self, daemon)
        self._workers: WorkerTimers[FileTimerRequest] = WorkerTimers(
            self._watchdog,
            # Looked up at each call: users replace it, on the class too.
            lambda pid: self.is_process_running(pid),
        )
        self._timers = self._workers.table
        self._rounds: Rounds[FileTimerRequest] = Rounds(
            self, self._watchdog, self._workers, max_interval, kill_after
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the watchdog; does nothing where it runs already.

        When it returns, clients can send. After a `stop` the FIFO is made anew, and the timers
        from before are gone.

        Raises:
            FileExistsError: Since the server was made, something else was put in its FIFO's place.
            RuntimeError: It was stopped while it was busy, and still is.
        """
        if not self._watchdog.may_start():
            return
        self._stop_signaled = self._run_once = False
        try:
            self._workers.open()
            self._fifo.make()
            self._watchdog.watch(self._fifo.open(), REQUESTS)
            self._watchdog.start()
        except BaseException:
            # Open, but read by nobody, it would swallow what clients send.
            self._release_resources()
            raise
        self._is_started = True
        logger.info(
            "Started %s: max_interval=%s, daemon=%s, file_path=%s",
            type(self).__name__,
            self._max_interval,
            self._daemon,
            self._file_path,
        )
        self._emit_here("watchdog started")

    def stop(self) -> None:
        """Stop the watchdog, wait for its thread, and remove the FIFO; harmless when repeated."""
        self._stop_signaled = True
        self._end_watchdog()
        if self._is_started:
            self._is_started = False
            logger.info("Stopped %s: file_path=%s", type(self).__name__, self._file_path)
            self._emit_here("watchdog stopped")

    def run_once(self) -> None:
        """Serve all that was sent, then end the watchdog and remove the FIFO."""
        self._run_once = True
        self._end_watchdog()

    @staticmethod
    def is_process_running(pid: int) -> bool:
        """Whether a process runs; one that has ended but was not waited for does not.

        A process group is taken to run, as only a signal tells whether it has members.

        Args:
            pid: The process; negative means the process group of that number.
        """
        return is_running(pid)

    def get_last_progress_time(self) -> int:
        """When the watchdog's last round ended, in epoch seconds; now, until a client shows up."""
        return self._last_progress_time if self._is_client_started else int(time.time())

    def register_timers(self, timer_requests: list[FileTimerRequest]) -> None:
        """Acquire and release timers; requests of workers that are gone are dropped.

        Args:
            timer_requests: In the order of their arrival. A negative expiration time releases.
        """
        if not timer_requests:
            return
        self._request_count += len(timer_requests)
        self._workers.register(timer_requests)
        self._watchdog.wake_from_outside()

    def clear_timers(self, worker_pids: set[int]) -> None:
        """Drop all timers of some workers, and of those that are gone.

        Args:
            worker_pids: The workers.
        """
        gone = [pid for pid in self._timers.workers() if not self.is_process_running(pid)]
        self._workers.clear([*worker_pids, *gone])

    def get_expired_timers(self, deadline: float) -> dict[int, list[FileTimerRequest]]:
        """The timers whose expiration time is `deadline` or before, by worker.

        Args:
            deadline: Epoch seconds, by the wall clock as it is now: where it was set since a timer
                was registered, the timer's expiration time has moved along.
        """
        return self._workers.expired(deadline)

    def _watchdog_loop(self) -> None:
        """Run rounds until the server is stopped; an error in one of them ends nothing."""
        while not self._stop_signaled:
            is_last = self._run_once
            self._watchdog.run_round(self._run_next_round)
            if is_last:
                break

    def _run_next_round(self) -> None:
        self._run_watchdog(self._fifo.fileno())
        self._last_progress_time = int(time.time())

    def _run_watchdog(self, fd: int) -> None:
        """Run one round: wait for requests, register them, reap the workers that overran.

        Args:
            fd: The FIFO, open for reading and non-blocking.
        """
        self._events.begin_round()
        self.register_timers(self._get_requests(fd, self._max_interval))
        self._rounds.look_at_deadlines()
        if self._reap_self and self._fatal_signal:
            self._reap_worker(os.getpid(), self._fatal_signal)

    def _get_requests(self, fd: int, max_interval: float) -> list[FileTimerRequest]:
        """Wait until there is something to do, `max_interval` seconds at most."""
        end = time.monotonic() + max_interval
        is_due = is_fifo_lost = False
        while not (is_due or is_fifo_lost or self._stop_signaled or self._run_once):
            remaining = end - time.monotonic()
            if remaining <= 0:
                return []  # Nothing was ready all the time: there is nothing to read or to mend.
            is_due = self._rounds.wait(min(remaining, _FIFO_CHECK))
            is_fifo_lost = self._is_fifo_lost()
        requests = self._read_requests(fd)
        if is_fifo_lost:
            self._mend_fifo()
        return requests

    def _is_fifo_lost(self) -> bool:
        # Not in every round: with a short max_interval that would be a third of an idle server.
        now = time.monotonic()
        if now < self._next_fifo_check:
            return False
        self._next_fifo_check = now + _FIFO_CHECK
        return not self._fifo.is_in_place()

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

    def _read_requests(self, fd: int) -> list[FileTimerRequest]:
        data = read_available(fd)
        self._is_client_started = self._is_client_started or bool(data)
        requests = []
        refused = 0
        for line in self._lines.feed(data):
            try:
                requests.append(FileTimerRequest(*decode(line)))
            except ValueError as error:
                refused += 1
                if refused <= _NAMED_LINES:
                    _watchdog_logger.warning(
                        "Dropped a line that is no request: %s: %.100r", error, line
                    )
        if refused > _NAMED_LINES:
            _watchdog_logger.warning(
                "Dropped %d more lines that are no requests", refused - _NAMED_LINES
            )
        return requests

    def _mend_fifo(self) -> None:
        """Make the FIFO anew where it was removed; say so where that can't be done."""
        try:
            if not self._fifo.is_missing():
                raise FileExistsError(errno.EEXIST, "something else was put in its place")
            old = self._fifo.fileno()
            self._fifo.make()
            new = self._fifo.open()
            self._watchdog.unwatch(old)
            self._watchdog.watch(new, REQUESTS)
        except OSError as error:
            self._fifo.remove()  # If it was made and not opened, the next round has to try again.
            if not self._is_cut_off:
                _watchdog_logger.error(
                    "No requests can arrive at %s any more: %s. The timers held are kept; a new "
                    "server is needed",
                    self._file_path,
                    error.strerror,
                )
            self._is_cut_off = True
        else:
            _watchdog_logger.warning("The FIFO %s was removed; made it anew", self._file_path)
            self._is_cut_off = False

    def _drain_requests(self) -> list[FileTimerRequest]:
        return self._read_requests(self._fifo.fileno())

    def _report_expired(self, expired_timers: dict[int, list[FileTimerRequest]]) -> None:
        report = functools.partial(
            log_debug_info_for_expired_timers,
            self._run_id,
            {pid: [timer.to_json() for timer in timers] for pid, timers in expired_timers.items()},
        )
        if expired_timers:
            self._reports.run(report, stacks_timeout() + ROUND_ALLOWANCE)
        else:
            report()

    def _fatal_timer(
        self, timers: list[FileTimerRequest], is_retry: bool
    ) -> tuple[FileTimerRequest, int] | None:
        for timer in timers:
            if not is_retry:
                self._emit("timer expired", timer)
            if timer.signal > 0:
                return timer, timer.signal
        return None

    def _signal_worker(self, pid: int, signal: int) -> bool:
        return self._reap_worker(pid, signal)

    def _confirm_reaped(self, timer: FileTimerRequest) -> None:
        self._fatal_signal = timer.signal
        self._emit("kill worker process", timer)

    def _emit(self, name: str, request: FileTimerRequest) -> None:
        if self._log_event is not None:
            self._events.run(functools.partial(self._log_event, name, request))

    def _emit_here(self, name: str) -> None:
        if self._log_event is not None:
            run_contained(functools.partial(self._log_event, name, None))

    def _end_watchdog(self) -> None:
        self._watchdog.request_stop()
        if self._watchdog.end():
            self._release_resources()

    def _release_resources(self) -> None:
        self._fifo.remove()
        self._workers.close()
        self._watchdog.close()
        self._fifo.close()

    def _forget_parent(self) -> None:
        self._is_started = False
        self._events = Callbacks()
        self._reports = Callbacks()
        self._workers.forget_parent()
        self._fifo.forget_parent()
