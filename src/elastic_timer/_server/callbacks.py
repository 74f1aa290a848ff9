"""Calls of other people's code, which may raise and may block: callbacks and the log's handlers."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

# How long a server that stops, and an interpreter that ends, wait for callbacks that block; and how
# long the handlers of evidence may take beyond the stacks' own time. In seconds.
PATIENCE = 1.0

# What comes while so many callbacks wait for one that blocks is lost: it must not fill the memory.
_MOST_KEPT = 1000


class _ContainedLogger(logging.Logger):
    """Logs as the logger of its name does, but is neither held up nor ended by what logging calls.

    A handler blocks for good where it writes to a pipe that nobody reads. What filters and record
    factories raise goes to the caller of other loggers.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._named = logging.getLogger(name)

    def isEnabledFor(self, level: int) -> bool:
        return self._named.isEnabledFor(level)

    def makeRecord(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        try:
            return super().makeRecord(*args, **kwargs)
        except Exception:
            name, level, path, line, message, values, exc_info, function, _extra, stack = args
            return logging.LogRecord(
                name, level, path, line, message, values, exc_info, function, stack
            )

    def handle(self, record: logging.LogRecord) -> None:
        _records.submit(functools.partial(_handle, self._named, record))


def contained_logger(name: str) -> logging.Logger:
    """The logger for what runs on a server's threads.

    Args:
        name: The name of the logger whose level and handlers count.
    """
    return _ContainedLogger(name)


def _handle(logger: logging.Logger, record: logging.LogRecord) -> None:
    try:
        logger.handle(record)
    # To log it would come here again.
    except BaseException:
        if logging.raiseExceptions:
            traceback.print_exc()


logger = contained_logger(__name__)


def run_contained(callback: Callable[[], object]) -> None:
    """Run a callback; whatever it raises is logged, and ends nothing but the callback."""
    try:
        callback()
    # Also SystemExit: it would end the thread, and with it the watch, without a word.
    except BaseException:
        logger.exception("A callback raised; the watchdog goes on without its result")


class Callbacks:
    """Runs callbacks in their order on a thread of their own, for which nobody has to wait.

    While one does not come back, those behind it are kept. The thread lives only while there is
    something to run. Where none can be had, they are kept until one can.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[Callable[[], object]] = deque()
        self._has_thread = False
        self._idle = threading.Event()
        self._idle.set()

    def submit(self, callback: Callable[[], object]) -> bool:
        """Have a callback run, without waiting for it.

        Returns:
            Whether there is a thread for it. Where none can be had, it is kept until one can.
        """
        with self._lock:
            if len(self._pending) < _MOST_KEPT:
                self._pending.append(callback)
            self._idle.clear()
            if self._has_thread:
                return True
            self._has_thread = True
        thread = threading.Thread(target=self._run_pending, name="elastic-timer callbacks")
        thread.daemon = True
        try:
            thread.start()
        except RuntimeError:  # No more threads to be had. To run it here could block for good.
            self._has_thread = False
            return False
        return True

    def flush(self, patience: float) -> bool:
        """Wait until all have run, for so many seconds at most; whether they have."""
        return self._idle.wait(max(0.0, patience))

    def _run_pending(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._has_thread = False
                    self._idle.set()
                    return
                callback = self._pending.popleft()
            run_contained(callback)


# Of the process, as logging itself is.
_records = Callbacks()


def the_log() -> Callbacks:
    """What runs the log's handlers: a listener that logs goes through it, in the log's order."""
    return _records


def flush_log(patience: float) -> bool:
    """Wait until the log's handlers have what was logged; whether they have."""
    return _records.flush(patience)


def give_up_on_the_log() -> None:
    """Let the interpreter end although a handler of the log blocks.

    It would wait for good for the handler's lock, in `logging.shutdown`, and for that of the stream
    to which the handler writes.
    """
    for reference in list(logging._handlerList):  # type: ignore[attr-defined] # No public list.
        handler = reference()
        if handler is None or handler.lock is None:
            continue
        if handler.lock.acquire(blocking=False):
            handler.lock.release()
            continue
        logging._handlerList.remove(reference)  # type: ignore[attr-defined] # As above.
        if getattr(handler, "stream", None) is sys.stderr:
            sys.stderr = None


def forget_parent() -> None:
    """Begin anew in a forked child, where the thread is not, and the lock may have been held."""
    global _records
    _records = Callbacks()
