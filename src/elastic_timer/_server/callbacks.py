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

# In seconds: how long a server that stops, or an interpreter that ends, waits for callbacks that
# block, and how long the handlers of evidence may take in addition to the time for the stacks.
PATIENCE = 1.0

# So many callbacks wait at most behind one that blocks. Further ones are dropped, or they would
# fill the memory.
_MOST_KEPT = 1000


class _ContainedLogger(logging.Logger):
    """Logs as the logger of its name does, but never blocks and never raises.

    With an ordinary logger, a handler that writes to a pipe which nobody reads blocks the caller
    for good, and an exception in a filter or a record factory reaches the caller.
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
    # Not logged: that would come here again.
    except BaseException:
        if logging.raiseExceptions:
            traceback.print_exc()


logger = contained_logger(__name__)


def run_contained(callback: Callable[[], object]) -> None:
    """Run a callback; whatever it raises is logged and goes no further."""
    try:
        callback()
    # SystemExit, too, which would end the thread without a word, and with it the watch.
    except BaseException:
        logger.exception("A callback raised; the watchdog goes on without its result")


class Callbacks:
    """Runs callbacks one after the other on a thread of their own, so that nobody has to wait.

    While one blocks, those behind it wait. The thread lives only while there is something to run;
    if none can be started, the callbacks wait until the next `submit` can start one.
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
        except RuntimeError:  # No thread can be started. To run it here could block for good.
            self._has_thread = False
            return False
        return True

    def flush(self, patience: float) -> bool:
        """Wait until all have run, for `patience` seconds at most; returns whether they have."""
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


# One for the whole process, as logging itself is.
_records = Callbacks()


def the_log() -> Callbacks:
    """What runs the log's handlers; and listeners that log, so that records keep their order."""
    return _records


def flush_log(patience: float) -> bool:
    """Wait until the log's handlers have got what was logged; returns whether they have."""
    return _records.flush(patience)


def give_up_on_the_log() -> None:
    """Let the interpreter end although a handler of the log blocks.

    Otherwise it would wait for ever: in `logging.shutdown` for the handler's lock, and when it
    flushes stderr for the lock of that stream.
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
    """Begin anew in a forked child: the thread is missing there, and the lock may be held."""
    global _records
    _records = Callbacks()
