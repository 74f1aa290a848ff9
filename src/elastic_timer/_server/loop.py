"""The watchdog's thread, and the one place where it waits."""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

# Loaded with the first server: the first worker's end shall not wait for it.
import elastic_timer._evidence.expiry  # noqa: F401
from elastic_timer._server import callbacks as _callbacks

logger = _callbacks.contained_logger(__name__)

# The pause after a round that raised: an error that comes back at once must not burn a core.
_ERROR_PAUSE = 0.1

# How long stop() waits for a watchdog that is busy, most likely in somebody's callback.
_STOP_PATIENCE = 10.0

# Linux lets a wait come to its end up to a thousandth of its length too late (the timer slack of
# poll(2) and the like): one of a minute would end up to 60 ms behind a deadline.
_LONGEST_WAIT = 0.5

_all_watchdogs: weakref.WeakSet[Watchdog] = weakref.WeakSet()


class Owner(Protocol):
    """What a watchdog works for: a timer server."""

    def _watchdog_loop(self) -> None:
        """Run rounds until told to stop."""

    def _release_resources(self) -> None:
        """Give back what was opened for the loop. Called by the thread that saw the loop's end."""

    def _forget_parent(self) -> None:
        """Close, in a forked child, what belongs to its parent."""

    def stop(self) -> None:
        """Stop the server."""


class Watchdog:
    """Runs a server's loop on a thread, lets it wait there, and wakes it from other threads."""

    def __init__(self, owner: Owner, daemon: bool) -> None:
        self._owner = owner
        self._daemon = daemon
        # Of what several threads use: the end of the loop, and what it waits with.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._loop_has_ended = True
        self._thread_releases = False
        self._stop_requested = threading.Event()
        self._selector: selectors.BaseSelector | None = None
        self._wake_fds: tuple[int, int] | None = None
        _all_watchdogs.add(self)

    def __del__(self) -> None:
        self.close()

    def may_start(self) -> bool:
        """Whether the thread does not run.

        Raises:
            RuntimeError: It was told to stop and is still busy with its last round.
        """
        if self._thread is not None and self._thread.is_alive():
            return False
        if not self._loop_has_ended:
            raise RuntimeError("the watchdog was told to stop and is still in its last round")
        return True

    def start(self) -> None:
        """Start the thread, which `may_start` has allowed."""
        self._stop_requested.clear()
        self._loop_has_ended = False
        self._thread_releases = False
        name = f"elastic-timer {type(self._owner).__name__}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=self._daemon)
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None
            self._loop_has_ended = True
            raise

    def end(self) -> bool:
        """Wake the thread and wait for its end, which its loop must have been told to reach.

        Returns:
            True if it has ended. Otherwise it is busy, or it is the caller itself, and it will
            release the server's resources when it ends.
        """
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self.wake()
            thread.join(_STOP_PATIENCE)
        with self._lock:
            self._thread_releases = not self._loop_has_ended
        return self._loop_has_ended

    def run_round(self, one_round: Callable[[], object]) -> None:
        """Run a round of the loop; an error in it is logged, and ends nothing but the round."""
        _callbacks.begin_round()
        try:
            one_round()
        # Also SystemExit: it would end the watch without a word.
        except BaseException:
            logger.exception("Error in a round of the watchdog; it goes on")
            self.pause(_ERROR_PAUSE)

    def request_stop(self) -> None:
        """End a pause and a wait that is under way, and all later ones at once."""
        self._stop_requested.set()
        self.wake()

    def wake_from_outside(self) -> None:
        """Let the thread look again, unless it is the caller."""
        if threading.current_thread() is not self._thread:
            self.wake()

    def wake(self) -> None:
        """End a wait that is under way, or the next one."""
        # The lock keeps `close` from giving the descriptor's number to somebody else's file.
        # Where the pipe is full, the thread will wake anyway.
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._wake_fds is not None:
                os.write(self._wake_fds[1], b"\0")

    def pause(self, seconds: float) -> None:
        """Let time pass, less where the server is told to stop."""
        self._stop_requested.wait(seconds)

    def watch(self, fd: int, what: object) -> None:
        """Let `wait` return `what` when there is something to read from `fd`."""
        self._open().register(fd, selectors.EVENT_READ, what)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`. To be called before the descriptor is closed."""
        if self._selector is not None:
            self._selector.unregister(fd)

    def wait(self, timeout: float) -> list[object]:
        """Wait for one of the descriptors watched, for `wake`, or for `timeout` seconds.

        It may return early with nothing.
        """
        selector = self._open()
        if self._stop_requested.is_set():
            timeout = 0
        ready = [key.data for key, _ in selector.select(min(max(timeout, 0), _LONGEST_WAIT))]
        if None in ready and self._wake_fds is not None:
            os.read(self._wake_fds[0], 4096)
            ready.remove(None)
        return ready

    def close(self) -> None:
        """Close the descriptors it waits with."""
        with self._lock:
            if self._selector is not None:
                self._selector.close()
                self._selector = None
            for fd in self._wake_fds or ():
                os.close(fd)
            self._wake_fds = None

    def _run(self) -> None:
        has_died = False
        try:
            self._owner._watchdog_loop()
        # A loop of somebody's own, or no memory even to log an error of a round.
        except BaseException:
            has_died = True
            logger.exception(
                "The watchdog has died; nobody is watched until the server starts anew"
            )
        finally:
            with self._lock:
                self._loop_has_ended = True
                # Left open by a watchdog that died, the way in would swallow what clients send.
                if self._thread_releases or has_died:
                    self._owner._release_resources()

    def _open(self) -> selectors.BaseSelector:
        # A worker registered from another thread may have it watched before the thread waits.
        with self._lock:
            if self._selector is None:
                reader, writer = os.pipe()
                try:
                    selector = selectors.DefaultSelector()
                except OSError:
                    os.close(reader)
                    os.close(writer)
                    raise
                os.set_blocking(reader, False)
                os.set_blocking(writer, False)
                selector.register(reader, selectors.EVENT_READ, None)
                self._selector, self._wake_fds = selector, (reader, writer)
            return self._selector

    def _forget_parent(self) -> None:
        # The lock may have been held, and the thread is not there, in a forked child.
        self._lock = threading.RLock()
        self._stop_requested = threading.Event()
        self._thread = None
        self._loop_has_ended = True
        self.close()
        self._owner._forget_parent()


def _forget_parents() -> None:
    _callbacks.forget_parent()
    for watchdog in list(_all_watchdogs):
        watchdog._forget_parent()


def _stop_all() -> None:
    for watchdog in list(_all_watchdogs):
        if watchdog._thread is not None:
            watchdog._owner.stop()


if hasattr(os, "register_at_fork"):
    # A child that kept a FIFO open would let clients write into the void after the server's death.
    os.register_at_fork(after_in_child=_forget_parents)
# A server that is still running at the interpreter's end would leave its FIFO behind.
atexit.register(_stop_all)
