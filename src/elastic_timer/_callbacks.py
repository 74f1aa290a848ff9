"""Calls of other people's code, which may raise and may block."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

# How long the callbacks of one round may keep the watchdog from its work, all together.
ROUND_ALLOWANCE = 1.0


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
        if is_next and not done.wait(limit) and limit > 0:
            logger.warning("No return within %.1f s, so the watchdog goes on: %r", limit, callback)
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
