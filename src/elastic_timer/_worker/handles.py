"""What the handle of a block asks for while the block lasts: more time, or none for a while."""

from __future__ import annotations

import os
import threading
import weakref
from math import inf
from typing import TYPE_CHECKING, cast

from elastic_timer._clock import epoch, monotonic
from elastic_timer._worker import holds
from elastic_timer._worker.holds import Exit, Hold

if TYPE_CHECKING:
    from types import TracebackType

# The expiration time of a timer that is paused, in epoch seconds: the year 33658. It is not
# released: the server would count the block as left, and then as entered once more.
NEVER = 1e12

# Of the full time, the part in which one tick is sent at most.
QUIET_PART = 0.1

# How often the end of a pause is tried that further interrupts cut short.
_TRIES = 10

# Blocks that were entered before are those of the process that this one was forked from.
_forked_at = -inf


class Handle:
    """Of a block whose handle was used: its pauses, and a lock that the block's exit waits for.

    No request of the handle may come behind the release, from another thread for instance.
    """

    def __init__(self, hold: Hold) -> None:
        # Reentrant: a signal handler may use the handle, too.
        self.lock = threading.RLock()
        self._hold = hold
        self._pauses: list[Pause] = []
        self._left: float  # The seconds left when the first of them began.

    def extend(self, full: float) -> None:
        """Have the time be so many seconds from now on."""
        with self.lock:
            self._check()
            if self._pauses:
                self._left = full
                self._keep(full)
            else:
                self._acquire(full, full)

    def pause(self, pause: Pause) -> None:
        """Have no deadline until every pause is over."""
        with self.lock:
            full = self._check()
            # Where the end of one failed, what is left has been told before.
            if not self._pauses and self._hold.expiration_time < inf:
                self._left = self._hold.quiet_until + (1 - QUIET_PART) * full - monotonic()
            # Before the request: one that is interrupted may have been sent.
            self._pauses.append(pause)
            if self._pauses == [pause]:
                try:
                    self._send(NEVER)
                except Exception:
                    self._pauses.clear()
                    raise
                self._hold.quiet_until, self._hold.expiration_time = -inf, inf

    def resume(self, pause: Pause) -> None:
        """End a pause; with the last one, what was left of the time begins to run again."""
        with self.lock:
            if pause not in self._pauses or self._hold.full is None:  # The block may be left first.
                return
            full = self._check()
            if self._pauses == [pause]:
                try:
                    self._acquire(self._left, full)
                except Exception:
                    # Not paused any more: the next tick tries again.
                    self._pauses.clear()
                    raise
            self._pauses.remove(pause)

    def _check(self) -> float:
        # Who leaves the block says so before looking whether there is a handle to wait for.
        if self._hold.full is None:
            holds.handles.pop(self._hold, None)
        return cast("float", checked(self._hold).full)

    def _acquire(self, left: float, full: float) -> None:
        hold = self._hold
        deadline = monotonic() + left
        expiration_time = epoch() + left
        self._send(expiration_time)
        self._keep(full)
        hold.expiration_time = expiration_time
        hold.quiet_until = deadline - (1 - QUIET_PART) * full

    def _keep(self, full: float) -> None:
        # Who leaves the block meanwhile has said so here, and waits: nothing may be sent behind.
        if self._hold.full is not None:
            self._hold.full = full

    def _send(self, expiration_time: float) -> None:
        if holds.owed:
            holds.send_owed(self._hold.client)
        self._hold.client.acquire(cast("str", self._hold.scope), expiration_time)


def handle_of(hold: Hold | None) -> Handle:
    """The handle of a block that this process is in; RuntimeError where it is not."""
    hold = checked(hold)
    return holds.handles.setdefault(hold, Handle(hold))


def checked(hold: Hold | None) -> Hold:
    """The hold of a block that this process is in; RuntimeError where it is not."""
    if hold is None or hold.full is None:
        raise RuntimeError(
            "this block is not entered, or was left: use what `with expires(...) as timer:` gives "
            "within the block"
        )
    if hold.entered < _forked_at:
        raise RuntimeError(
            "this block was entered by the process that this one was forked from, whose timer it "
            "is: enter a block here, and use its handle"
        )
    return hold


def current_hold() -> Hold:
    """The hold of the innermost block that this thread or task is in.

    Raises:
        RuntimeError: It is in none.
    """
    hold = holds.outer_hold()
    if hold is None or hold.entered < _forked_at:
        raise RuntimeError(
            "this thread or task is in no block of this process: call current() within "
            "`with expires(...):` or in a function that expires(...) decorates; another thread "
            "needs the handle that `with expires(...) as timer:` gives"
        )
    return hold


class Pause:
    """A part of a block without a deadline, for the `with` statement.

    It ends when what the statement keeps on the stack dies, as a block does, at the latest: an
    interrupt may come at the entry of `__exit__`.
    """

    def __init__(self, hold: Hold | None) -> None:
        self._hold = checked(hold)
        self._guards: list[object] = []

    def __enter__(self) -> None:
        handle_of(self._hold).pause(self)

    def _leave(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            self._resume()
            # What dies behind this would else call back, and swallow an interrupt there.
            del self._guards[-1:]
        except Exception as error:
            if exc_type is None:
                raise
            holds.logger.warning(
                "Timer %s could not be resumed after an exception in its pause, which the next "
                "tick tries again: %s",
                self._hold.scope,
                error,
            )

    def _resume(self) -> None:
        handle = holds.handles.get(self._hold)
        if handle is not None:
            handle.resume(self)

    def _watch(self, token: object) -> None:
        self._guards.append(weakref.ref(token, self._settle))

    def _settle(self, guard: object) -> None:
        for _ in range(_TRIES):
            try:
                self._resume()
                self._guards.remove(guard)
            except Exception as error:
                holds.logger.debug("Timer %s could not be resumed: %s", self._hold.scope, error)
            except BaseException:
                continue  # A second interrupt; the first is on its way to the caller.
            break

    if TYPE_CHECKING:

        def __exit__(
            self,
            exc_type: type[BaseException] | None,
            exception: BaseException | None,
            traceback: TracebackType | None,
        ) -> None: ...

    else:
        __exit__ = Exit(_leave, _watch)


def _forget_parent() -> None:
    global _forked_at
    _forked_at = monotonic()
    holds.handles.clear()


# Windows has neither forks nor hooks for them.
getattr(os, "register_at_fork", dict)(after_in_child=_forget_parent)
