"""What arrives and is no request: told in the log, and never enough of it to hold anything up."""

from __future__ import annotations

import logging

from elastic_timer._clock import monotonic

# How much of it is named, each with the reason, in a second. To warn of a line takes longer than
# it took to write it.
_NAMED = 10


class RubbishLog:
    """Warns of the first rubbish of each second, and counts the rest.

    Args:
        logger: Where to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._left = self._unnamed = 0
        self._again_at = 0.0

    def add(self, what: object, reason: object, count: int = 1) -> None:
        """Note some more.

        Args:
            what: One piece of it.
            reason: Why that is no request.
            count: How many such pieces there are. All but the one are only counted.
        """
        now = monotonic()
        if now >= self._again_at:
            if self._unnamed:
                self._logger.warning("Dropped %d more that were no requests", self._unnamed)
            self._left, self._unnamed, self._again_at = _NAMED, 0, now + 1
        if self._left:
            self._left -= 1
            count -= 1
            self._logger.warning("Dropped what is no request: %s: %.100r", reason, what)
        self._unnamed += count
