"""Timers that a program can do without: what is asked where their server may not be there."""

from __future__ import annotations

import errno
import logging
from math import inf
from typing import TYPE_CHECKING, cast

from elastic_timer._clock import monotonic
from elastic_timer._transport.pipe import at_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from elastic_timer.api import TimerClient

logger = logging.getLogger(__name__)

# How long a server that could not be reached is not looked for, in seconds; and how long where it
# may hold a timer that has to be released.
_LOOK_INTERVAL = 5.0
_OWED_INTERVAL = 0.1

# How the client's error tells that nobody reads: the server has gone, and its timers with it.
_NOBODY_READS = (errno.ENXIO, errno.EPIPE)

# Taken away by the first warning of the process. A forked child has what its parent had: of many
# loaders each would warn of the same.
_warnings_left = [True]


def warn_once(why: str) -> None:
    """Say that blocks run without deadlines, unless this process or its parent has said so."""
    try:
        _warnings_left.pop()
    except IndexError:
        return
    logger.warning(
        "Blocks run without deadlines, as this program allows: %s. It goes on, looks for a server "
        "every %.0f s at most, and says this once",
        why,
        _LOOK_INTERVAL,
    )


def made_optional(client: TimerClient | None) -> TimerClient:
    """A client that raises nothing where the other one's server can't be reached."""
    return cast(
        "TimerClient", NoTimers() if client is None else Lookout(client.acquire, client.release)
    )


class NoTimers:
    """A client without a server."""

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Do nothing."""

    def release(self, scope_id: str) -> None:
        """Do nothing."""


class Lookout:
    """A client that asks another one, as long as the server of that can be reached.

    While it can't, what concerns no timer that the server may hold is not even tried.

    Args:
        acquire: How to ask the other one for a timer.
        release: How to have it release one.
    """

    def __init__(
        self, acquire: Callable[[str, float], None], release: Callable[[str], None]
    ) -> None:
        self._acquire, self._release = acquire, release
        self._look_at = -inf  # Monotonic.
        # The scopes of which the server may hold a timer, and those of them to be released.
        self._armed: set[str] = set()
        self._owed: set[str] = set()

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Ask for a timer, if that can be done at once."""
        was_armed = scope_id in self._armed
        if not was_armed and monotonic() < self._look_at:
            return
        # Before it is sent: an interrupt may come behind that.
        self._armed.add(scope_id)
        self._owed.discard(scope_id)
        if not (self._pay() and self._send(self._acquire, scope_id, expiration_time)):
            if was_armed:
                # With the old deadline, which must not count any more.
                self._owe(scope_id)
            else:
                self._armed.discard(scope_id)

    def release(self, scope_id: str) -> None:
        """Release a timer, or have that done when the server can be reached."""
        if scope_id not in self._armed and monotonic() < self._look_at:
            return
        if self._send(self._release, scope_id):
            self._armed.discard(scope_id)
            self._owed.discard(scope_id)
            self._pay()
        else:
            self._owe(scope_id)

    def _owe(self, scope_id: str) -> None:
        if scope_id in self._armed:
            self._owed.add(scope_id)
            self._look_at = monotonic() + _OWED_INTERVAL

    def _pay(self) -> bool:
        """Release what is to be released; whether that is done."""
        for scope_id in tuple(self._owed):
            if not self._send(self._release, scope_id):
                self._owe(scope_id)
                return False
            self._owed.discard(scope_id)
            self._armed.discard(scope_id)
        return True

    def _send(self, request: Callable[..., None], scope_id: str, *when: float) -> bool:
        """Send a request now or not at all; whether it was sent."""
        try:
            at_once(request, scope_id, *when)
        # Also what the queue of a manager raises that has ended.
        except (OSError, EOFError) as error:
            self._look_at = monotonic() + _LOOK_INTERVAL
            if getattr(error.__cause__, "errno", None) in _NOBODY_READS:
                self._armed.clear()
                self._owed.clear()
            warn_once(str(error))
            return False
        if self._look_at > 0:
            logger.info("The timer server can be reached again: blocks have deadlines")
            self._look_at = -inf
        return True
