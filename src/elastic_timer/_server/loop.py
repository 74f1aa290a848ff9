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

from elastic_timer._server import callbacks

logger = callbacks.contained_logger(__name__)

# The pause after a round that raised, in seconds. Without it an error that comes back in every
# round would keep a core busy.
_ERROR_PAUSE = 0.1

# How long stop() waits for a watchdog that is busy, in seconds. Most likely it runs somebody's
# callback.
_STOP_PATIENCE = 10.0

# How long start() waits for the end of a watchdog that was told to stop just before, in seconds.
_START_PATIENCE = 1.0

# The longest wait at a time, in seconds. Linux may end a wait too late by a thousandth of its
# length (the timer slack of poll(2)): after a wait of a minute a worker would be reaped up to 60 ms
# late.
_LONGEST_WAIT = 0.5

_all_loops: weakref.WeakSet[Loop] = weakref.WeakSet()


class Loop:
    """Runs a server on a thread, lets it wait there, and wakes it from other threads.

    Everything that the server opens is opened and closed on that thread, since Python raises
    KeyboardInterrupt in the main thread alone: a Ctrl-C can't leave it half open.

    Args:
        name: The thread's name.
        daemon: Whether the interpreter may exit while the thread runs.
        open_all: Opens what the rounds need. What it raises is raised by `start`.
        run: Runs rounds until `stop` was called.
        close_all: Closes what was opened; it may be called repeatedly. Its argument is True in a
            forked child, which must leave alone what its parent goes on using.
    """

    _run: _Run
    # The run that the thread is in now; None outside of it.
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
        """Start the thread and wait until everything is open.

        Returns:
            False if it was running already.

        Raises:
            RuntimeError: It was told to stop and is still busy with its last round; or no thread
                can be started, or threads are not the system's.
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
        # The thread of a start that was interrupted may still come to life. It ends at once.
        self._run.stop_requested.set()
        self._run = run = _Run()
        # Since Python 3.13 a child of multiprocessing, when it ends, first waits for all threads
        # that are no daemons, and only then runs what would stop this one.
        daemon = self._daemon or _is_child_of_multiprocessing()
        run.thread = threading.Thread(
            target=self._serve, args=(run,), name=self._name, daemon=daemon
        )
        try:
            run.thread.start()
            run.is_open.wait()
        except BaseException:
            # No thread could be started, or there was a Ctrl-C. After that the thread may run or
            # not; if it does, it closes everything itself.
            run.stop_requested.set()
            self.join()
            raise
        if run.failure is not None:
            self.join()
            raise run.failure
        return True

    def stop(self) -> None:
        """Tell the thread to end and wait for that, 10 s at most; harmless when repeated.

        A thread that is busy for longer closes everything once it ends. A caller that is the thread
        itself does not wait.
        """
        self._run.stop_requested.set()
        self.join()

    def join(self) -> None:
        """Wait for the end of a thread that was told to end, as `stop` does."""
        run = self._run
        self.wake()
        if run.thread is threading.current_thread():
            return
        # A thread that has begun closes everything itself, where no Ctrl-C can interrupt it.
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

    def is_serving(self) -> bool:
        """Whether rounds follow one another on the thread; else somebody runs a single one."""
        return self._served is not None

    def wake_from_outside(self) -> None:
        """Have the thread look at its timers again; does nothing if the caller is that thread."""
        if threading.current_thread() is not self._run.thread:
            self.wake()

    def wake(self) -> None:
        """End the wait that is under way, or else the next one."""
        # Under the lock, or the descriptor could be closed at this moment, and its number be that
        # of somebody else's file. If the pipe is full, the thread has not yet read an earlier wake.
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._wake_fds is not None:
                os.write(self._wake_fds[1], b"\0")

    def run_round(self, one_round: Callable[[], object]) -> None:
        """Run a round; an error in it is logged, and ends nothing but the round."""
        try:
            one_round()
        # SystemExit, too, which would end the thread without a word.
        except BaseException:
            logger.exception("Error in a round of the watchdog; it goes on")
            self.pause(_ERROR_PAUSE)

    def pause(self, seconds: float) -> None:
        """Let so much time pass, or less if the thread is told to stop meanwhile."""
        if seconds > 0:
            (self._served or self._run).stop_requested.wait(seconds)

    def watch(self, fd: int, what: object, for_room: bool = False) -> None:
        """Have `wait` return `what` when there is something to read from `fd`.

        Args:
            fd: The descriptor.
            what: Not None.
            for_room: When there is room to write to it, instead.
        """
        self.unwatch(fd)  # Its number may be that of a file which was closed behind our back.
        event = selectors.EVENT_WRITE if for_room else selectors.EVENT_READ
        self._selector_().register(fd, event, what)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`; to be called while the descriptor is still open."""
        if self._selector is not None:
            with contextlib.suppress(KeyError):  # It is not watched.
                self._selector.unregister(fd)

    def wait(self, timeout: float) -> list[object]:
        """Wait until a watched descriptor is readable, until `wake`, or for `timeout` seconds.

        Returns:
            What was given to `watch` for the descriptors that are readable. It may also be empty
            before the time is over.
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
            # Rounds do not raise. But a subclass may have a loop of its own, and there may be no
            # memory left even to log what was wrong.
            except BaseException as error:
                if not run.is_open.is_set:
                    run.failure = error
                else:
                    logger.exception(
                        "The watchdog has died; nobody is watched until the server starts anew"
                    )
            finally:
                # If a watchdog died and left its FIFO open, clients would write without an error,
                # and nobody would read it.
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
        # Before the rest: parent and child share the selector's epoll set, so what `close_all`
        # takes out of it here would be gone for the parent as well.
        self._close_selector()
        self._close_all(True)

    def _selector_(self) -> selectors.BaseSelector:
        # Made on first use, under the lock: another thread may register a worker, and so watch its
        # exit, before the server's own thread waits for the first time.
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
        # In a forked child the thread does not exist, and the locks may be held for ever.
        self._lock = threading.RLock()
        # Held by a thread from its begin to its end, so that there is never more than one, even if
        # an earlier start was interrupted and its thread comes late.
        self._serving = threading.Lock()
        self._run = _Run()
        self._served = None


class _Flag:
    """An event that survives a Ctrl-C in the thread that waits for it.

    `threading.Event` may stay locked for good after that, and `Thread.join` may take a thread that
    runs for one that has ended.
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
        """Wait until it is set, for `timeout` seconds at most; a negative number means for ever."""
        if not self.is_set and self._lock.acquire(timeout=timeout):
            self._lock.release()


class _Run:
    """The thread's life from one `start` to its end."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.stop_requested = _Flag()
        self.has_begun = False
        self.is_open = _Flag()
        self.has_ended = _Flag()
        self.failure: BaseException | None = None


# Libraries whose threads take turns: where each keeps what it has replaced, how to ask for it, and
# what it calls the threads.
_GREEN_THREADS = (
    ("eventlet.patcher", "is_monkey_patched", "thread"),
    ("gevent.monkey", "is_module_patched", "threading"),
)


def refuse_green_threads() -> None:
    """Raise RuntimeError where threads are not the system's, but take turns in a single one."""
    for patcher, is_patched, threads in _GREEN_THREADS:
        if patcher in sys.modules and getattr(sys.modules[patcher], is_patched)(threads):
            raise RuntimeError(
                f"{patcher.partition('.')[0]} has replaced the threads of this process by its own, "
                "in which a watchdog stands still while the others work: start the server in a "
                "process of its own, or with `elastic-timer run -- ...`"
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
    """Have servers stopped in a child of multiprocessing, which ends without running `atexit`."""
    global _pid_with_finalizer
    if not _is_child_of_multiprocessing() or _pid_with_finalizer == os.getpid():
        return
    from multiprocessing.util import Finalize

    # Only with a priority is it run before the child waits for its own children and for threads
    # that are no daemons. It would wait for ever for those of servers.
    Finalize(None, _stop_all, exitpriority=0)
    _pid_with_finalizer = os.getpid()


if hasattr(os, "register_at_fork"):
    # If a child kept the FIFO open, clients would notice nothing of the server's death.
    os.register_at_fork(after_in_child=_forget_parents)
# Or a server that still runs when the interpreter ends would leave its FIFO behind.
atexit.register(_stop_all)
