"""Calls of other people's code, which may raise and may block: callbacks and the log's handlers."""

from __future__ import annotations

import functools
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

# How long the callbacks of one round may keep the watchdog from its work, all together. The same
# again goes to what the log's handlers take.
ROUND_ALLOWANCE = 1.0

# What more is logged while a handler of the log blocks is lost: it must not fill the memory.
_MOST_RECORDS_KEPT = 1000


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
        if _records.unfinished() < _MOST_RECORDS_KEPT:
            _records.run(functools.partial(_handle, self._named, record))


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
    """Runs callbacks one after the other on a thread of their own, and waits for each with a bound.

    While one does not come back, those behind it are kept, to be run in their order, and are not
    waited for. The thread lives only while there is something to run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[tuple[Callable[[], object], threading.Event]] = deque()
        self._unfinished = 0
        self._has_thread = False
        self._allowance = ROUND_ALLOWANCE

    def unfinished(self) -> int:
        """How many callbacks have not returned yet."""
        return self._unfinished

    def begin_round(self) -> None:
        """Grant a new round its patience."""
        self._allowance = ROUND_ALLOWANCE

    def run(self, callback: Callable[[], object], patience: float | None = None) -> None:
        """Run a callback and wait for it.

        Args:
            callback: What to call.
            patience: How many seconds to wait at most. None means what is left to the round.
        """
        started = time.monotonic()
        done, is_next = self._submit(callback)
        limit = self._allowance if patience is None else patience
        if is_next and limit > 0 and not done.wait(limit):
            logger.warning("No return in time, so the watchdog goes on without: %r", callback)
        if patience is None:
            self._allowance = max(0.0, limit - (time.monotonic() - started))

    def _submit(self, callback: Callable[[], object]) -> tuple[threading.Event, bool]:
        """Queue a callback; the event tells that it is done, the bool that none is before it."""
        done = threading.Event()
        with self._lock:
            is_next = self._unfinished == 0
            self._pending.append((callback, done))
            self._unfinished += 1
            if self._has_thread:
                return done, is_next
            self._has_thread = True
        thread = threading.Thread(target=self._run_pending, name="elastic-timer callbacks")
        thread.daemon = True
        try:
            thread.start()
        except RuntimeError:  # No more threads to be had: late is better than never.
            self._run_pending()
        return done, is_next

    def _run_pending(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._has_thread = False
                    return
                callback, done = self._pending.popleft()
            run_contained(callback)
            with self._lock:
                self._unfinished -= 1
            done.set()


# Of the process, as logging itself is.
_records = Callbacks()


def begin_round() -> None:
    """Grant the log's handlers the patience of a new round."""
    _records.begin_round()


def forget_parent() -> None:
    """Begin anew in a forked child, where the thread is not, and the lock may have been held."""
    global _records
    _records = Callbacks()
