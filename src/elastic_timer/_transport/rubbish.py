"""What arrives and is no request: the log tells of it, but never so much that it costs time."""

from __future__ import annotations

import logging

from elastic_timer._clock import monotonic

# So many pieces are named each second, with the reason. A warning takes longer than it took to
# write the piece, so whoever writes rubbish without end would keep the server busy with warnings.
_NAMED = 10


class RubbishLog:
    """Logs the first pieces of rubbish of each second as warnings, and counts the rest.

    Args:
        logger: Where the warnings go.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._left = self._unnamed = 0
        self._again_at = 0.0

    def add(self, what: object, reason: object, count: int = 1) -> None:
        """Note some more rubbish.

        Args:
            what: One piece of it.
            reason: Why that piece is no request.
            count: How many such pieces there are, `what` included; the others are only counted.
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
