"""A server's thread, and the one place where it waits."""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import sys
import threading
import weakref
from collections.abc import Callable

# Loaded with the first server: the first worker's end shall not wait for it.
import elastic_timer._evidence.expiry  # noqa: F401
from elastic_timer._server import callbacks

logger = callbacks.contained_logger(__name__)

# The pause after a round that raised: an error that comes back at once must not burn a core.
_ERROR_PAUSE = 0.1

# How long stop() waits for a watchdog that is busy, most likely in somebody's callback.
_STOP_PATIENCE = 10.0

# How long start() waits for a watchdog that was told to stop just before.
_START_PATIENCE = 1.0

# Linux lets a wait come to its end up to a thousandth of its length too late (the timer slack of
# poll(2) and the like): one of a minute would end up to 60 ms behind a deadline.
_LONGEST_WAIT = 0.5

_all_loops: weakref.WeakSet[Loop] = weakref.WeakSet()


class Loop:
    """Runs a server on a thread, lets it wait there, and wakes it from other threads.

    What the server opens is opened and closed on that thread: there no Ctrl-C comes in between.

    Args:
        name: The thread's name.
        daemon: Whether the interpreter may exit while it runs.
        open_all: Opens what the rounds need. What it raises is raised by `start`.
        run: Runs rounds until `stop` was called.
        close_all: Gives back what was opened, and does no harm when repeated. Called with True in
            a forked child, which must leave alone what its parent goes on using.
    """

    _run: _Run
    # The one that the thread is in; None outside of it.
    _served: _Run | None

    def __init__(
        self,
        name: str,
        daemon: bool,
        open_all: Callable[[], object],
        run: Callable[[], object],
        close_all: Callable[[bool], object],
    ) -> None:
        self._name = name
        self._daemon = daemon
        self._open_all = open_all
        self._run_rounds = run
        self._close_all = close_all
        self._forget()
        self._selector: selectors.BaseSelector | None = None
        self._wake_fds: tuple[int, int] | None = None
        _all_loops.add(self)
        _stop_at_the_end_of_a_child()

    def __del__(self) -> None:
        self._close()

    def start(self) -> bool:
        """Start the thread and wait until everything is open; False where it runs already.

        Raises:
            RuntimeError: It was told to stop and is still busy with its last round; or there are no
                threads, or none that run by themselves.
            BaseException: What `open_all` raised.
        """
        if self._run.has_begun and not self._run.has_ended.is_set:
            if not self.is_stopping():
                return False
            if self._run.thread is not threading.current_thread():
                self._run.has_ended.wait(_START_PATIENCE)
            if not self._run.has_ended.is_set:
                raise RuntimeError("the watchdog was told to stop and is still in its last round")
        refuse_green_threads()
        _stop_at_the_end_of_a_child()
        # A start that was interrupted may still bring its thread to life.
        self._run.stop_requested.set()
        self._run = run = _Run()
        # Since Python 3.13 a child of multiprocessing waits for threads that are no daemons before
        # it comes to what stops them.
        daemon = self._daemon or _is_child_of_multiprocessing()
        run.thread = threading.Thread(
            target=self._serve, args=(run,), name=self._name, daemon=daemon
        )
        try:
            run.thread.start()
            run.is_open.wait()
        except BaseException:
            # No more threads, or Ctrl-C. Then it is not known whether the thread runs yet; where it
            # does, it gives all back.
            run.stop_requested.set()
            self.join()
            raise
        if run.failure is not None:
            self.join()
            raise run.failure
        return True

    def stop(self) -> None:
        """End the thread, unless it is the caller, and wait for that; harmless when repeated.

        It is waited for 10 s at most. Then it is busy, and gives everything back when it ends.
        """
        self._run.stop_requested.set()
        self.join()

    def join(self) -> None:
        """Wait for the end of a thread that was told to end, as `stop` does."""
        run = self._run
        self.wake()
        if run.thread is threading.current_thread():
            return
        # A thread closes all by itself, where no Ctrl-C can cut it short.
        if run.has_begun:
            run.has_ended.wait(_STOP_PATIENCE)
        else:
            with self._serving:
                self._close()
        if run.thread is not None and run.has_ended.is_set:
            run.thread.join()

    def is_stopping(self) -> bool:
        """Whether the thread was told to end."""
        return (self._served or self._run).stop_requested.is_set

    def wake_from_outside(self) -> None:
        """Let the thread look again, unless it is the caller."""
        if threading.current_thread() is not self._run.thread:
            self.wake()

    def wake(self) -> None:
        """End a wait that is under way, or the next one."""
        # The lock keeps `close` from giving the descriptor's number to somebody else's file.
        # Where the pipe is full, the thread will wake anyway.
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._wake_fds is not None:
                os.write(self._wake_fds[1], b"\0")

    def run_round(self, one_round: Callable[[], object]) -> None:
        """Run a round; an error in it is logged, and ends nothing but the round."""
        try:
            one_round()
        # Also SystemExit: it would end the watch without a word.
        except BaseException:
            logger.exception("Error in a round of the watchdog; it goes on")
            self.pause(_ERROR_PAUSE)

    def pause(self, seconds: float) -> None:
        """Let time pass, less where the thread is told to stop."""
        if seconds > 0:
            (self._served or self._run).stop_requested.wait(seconds)

    def watch(self, fd: int, what: object, for_room: bool = False) -> None:
        """Let `wait` return `what` when there is something to read from `fd`.

        Args:
            fd: The descriptor.
            what: Not None.
            for_room: When there is room to write to it, instead.
        """
        self.unwatch(fd)  # A number whose file was closed behind our back is somebody else's now.
        event = selectors.EVENT_WRITE if for_room else selectors.EVENT_READ
        self._selector_().register(fd, event, what)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`. To be called before the descriptor's number is another file's."""
        if self._selector is not None:
            with contextlib.suppress(KeyError):  # It could not be watched in the first place.
                self._selector.unregister(fd)

    def wait(self, timeout: float) -> list[object]:
        """Wait for one of the descriptors watched, for `wake`, or for `timeout` seconds.

        It may return early with nothing.
        """
        selector = self._selector_()
        if self.is_stopping():
            timeout = 0
        ready = [key.data for key, _ in selector.select(min(max(timeout, 0), _LONGEST_WAIT))]
        if None in ready and self._wake_fds is not None:
            os.read(self._wake_fds[0], 4096)
            ready.remove(None)
        return ready

    def _serve(self, run: _Run) -> None:
        with self._serving:
            run.has_begun = True
            self._served = run
            try:
                if not run.stop_requested.is_set:
                    self._open_all()
                    run.is_open.set()
                    self._run_rounds()
            # A loop of somebody's own, or no memory even to log an error of a round.
            except BaseException as error:
                if not run.is_open.is_set:
                    run.failure = error
                else:
                    logger.exception(
                        "The watchdog has died; nobody is watched until the server starts anew"
                    )
            finally:
                # Left open by a watchdog that died, the way in would swallow what clients send.
                callbacks.run_contained(self._close)
                self._served = None
                run.has_ended.set()
                run.is_open.set()

    def _close(self) -> None:
        with self._lock:
            try:
                self._close_all(False)
            finally:
                self._close_selector()

    def _close_selector(self) -> None:
        with self._lock:
            if self._selector is not None:
                self._selector.close()
                self._selector = None
            for fd in self._wake_fds or ():
                os.close(fd)
            self._wake_fds = None

    def _forget_parent(self) -> None:
        self._forget()
        # First: the parent waits with the same one, and would no longer be told of what is
        # taken out of it here.
        self._close_selector()
        self._close_all(True)

    def _selector_(self) -> selectors.BaseSelector:
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

    def _forget(self) -> None:
        # In a forked child the lock may have been held, and the thread is not there.
        self._lock = threading.RLock()
        # Held by the thread as long as it runs: one that was told to stop, and did not even begin
        # by then, does not get in the way of the next.
        self._serving = threading.Lock()
        self._run = _Run()
        self._served = None


class _Flag:
    """An event that waiting for it leaves intact, also where that is interrupted.

    A Ctrl-C can leave `threading.Event` locked for good, and have `Thread.join` take a thread for
    ended that runs.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        if not self.is_set:
            self.is_set = True
            self._lock.release()

    def wait(self, timeout: float = -1) -> None:
        """Wait until it is set, for so many seconds at most; for ever without a number."""
        if not self.is_set and self._lock.acquire(timeout=timeout):
            self._lock.release()


class _Run:
    """One time that the thread runs, from a start to its end."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.stop_requested = _Flag()
        self.has_begun = False
        self.is_open = _Flag()
        self.has_ended = _Flag()
        self.failure: BaseException | None = None


def refuse_green_threads() -> None:
    """Raise RuntimeError where threads do not run by themselves."""
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("thread"):
        raise RuntimeError(
            "eventlet has replaced the threads of this process by its own, in which a watchdog "
            "stands still while the others work: start the server in a process of its own, or with "
            "`elastic-timer run -- ...`"
        )


def _forget_parents() -> None:
    callbacks.forget_parent()
    for loop in list(_all_loops):
        loop._forget_parent()


def _stop_all() -> None:
    loops = list(_all_loops)
    for loop in loops:
        loop.stop()
    if loops and not callbacks.flush_log(callbacks.PATIENCE):
        callbacks.give_up_on_the_log()


def _is_child_of_multiprocessing() -> bool:
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


_pid_with_finalizer = 0


def _stop_at_the_end_of_a_child() -> None:
    """Have servers stopped where multiprocessing ends a child, past `atexit`."""
    global _pid_with_finalizer
    if not _is_child_of_multiprocessing() or _pid_with_finalizer == os.getpid():
        return
    from multiprocessing.util import Finalize

    # With a priority it comes before children are waited for, and before threads that are no
    # daemons: those of servers would never end.
    Finalize(None, _stop_all, exitpriority=0)
    _pid_with_finalizer = os.getpid()


if hasattr(os, "register_at_fork"):
    # A child that kept a FIFO open would let clients write into the void after the server's death.
    os.register_at_fork(after_in_child=_forget_parents)
# A server that is still running at the interpreter's end would leave its FIFO behind.
atexit.register(_stop_all)
