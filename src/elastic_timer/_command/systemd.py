"""What `run` tells systemd, or whoever else has given it a socket for that, see sd_notify(3)."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, MutableMapping

from elastic_timer._server.callbacks import contained_logger
from elastic_timer._server.events import Event, WatchdogRound

logger = contained_logger(__name__)

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

# So many rounds come within the time after which systemd takes the watchdog for dead.
_ROUNDS_IN_TIME = 3

# How long to wait for room in systemd's queue, in seconds.
_PATIENCE = 1.0


class Notifier:
    """Tells it how things stand; does nothing where nobody has asked for that.

    Args:
        environment: The variables in which systemd says what it wants.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # One in the abstract namespace is written with an @.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        period = environment.get("WATCHDOG_USEC", "")
        is_ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._is_watched = is_ours and period.isdecimal() and int(period) > 0
        self._period = int(period) / 1e6 if self._is_watched else float("inf")
        self._told = ""
        self._sending = threading.Lock()

    @property
    def is_wanted(self) -> bool:
        """Whether anybody wants to be told."""
        return bool(self._address)

    def interval(self, longest: float) -> float:
        """The longest pause between two rounds, in seconds, by which no alarm is raised.

        Args:
            longest: What it would be without.
        """
        return min(longest, self._period / _ROUNDS_IN_TIME) if self._address else longest

    def ready(self) -> None:
        """COMMAND runs, and its workers are watched."""
        self._send("READY=1")

    def made_round(self, event: Event) -> None:
        """The watchdog has made a round: a listener to that."""
        assert isinstance(event, WatchdogRound)
        status = f"workers: {event.workers}, timers: {event.timers}, reaped: {event.reaped}"
        lines = ["WATCHDOG=1"] if self._is_watched else []
        if status != self._told:
            lines.append(f"STATUS={status}")
            self._told = status
        if lines:
            self._send("\n".join(lines))

    def stopping(self) -> None:
        """COMMAND has ended."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        with self._sending:  # Two threads do this, and what is wrong is to be said once.
            if not self._address:
                return
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                    sender.settimeout(_PATIENCE)
                    sender.sendto(text.encode(), self._address)
            except OSError as error:
                logger.warning("Can't tell systemd how things stand: %s", error)
                self._address = ""


def remove_variables(environment: MutableMapping[str, str]) -> None:
    """Take out what is meant for this process alone: COMMAND's own word would count as ours."""
    for name in _VARIABLES:
        environment.pop(name, None)
