"""The server over a FIFO, which `file_based_local_timer` loads when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable

from elastic_timer import _clock, file_based_local_timer
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
from elastic_timer._transport.wire import encode
from elastic_timer.debug_info_logging import collectives, native_stacks, stacks_timeout

# For `file_based_local_timer`, which has it by this name until somebody replaces it there.
from elastic_timer.debug_info_logging import (
    log_debug_info_for_expired_timers as log_debug_info_for_expired_timers,
)
from elastic_timer.file_based_local_timer import FileTimerRequest

# For what runs on the watchdog's thread, and must not be held up by a handler of the log. By the
# name of the module that users know.
_watchdog_logger = contained_logger(file_based_local_timer.__name__)

# How often a server looks whether its FIFO is still where it was made, in seconds: often enough
# that clients, which try for about a second, find it again.
_FIFO_CHECK = 0.5


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
        return self._drain()

    def _is_ending(self) -> bool:
        return self._run_once or super()._is_ending()

    def _keep_fifo(self) -> None:
        """Make the FIFO anew where it was removed; say so where that can't be done."""
        if self._source.is_in_place():
            return
        # What was sent before, and can't be read any more from the new one. All of it: a release
        # that was lost would have its worker reaped.
        self._register(self._drain(everything=True))
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
            self._register(self._drain())
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
        # By the name in that module, where it is replaced.
        return file_based_local_timer.log_debug_info_for_expired_timers(self._run_id, expired)

    def _evidence_wanted(self) -> tuple[float, bool, tuple[str, ...]]:
        return stacks_timeout(), native_stacks(), collectives()


def _as_log_event(log_event: Callable[[str, FileTimerRequest | None], None]) -> Listener:
    def listener(event: Event) -> None:
        log_event(event.name, event.timer if isinstance(event, TimerEvent) else None)

    return listener
