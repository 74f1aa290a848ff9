"""What arrives and is no request: told in the log, and never enough of it to hold anything up."""

from __future__ import annotations

import logging

from elastic_timer._clock import monotonic


class RubbishLog:
    """Warns of rubbish at once, and then once a second at most: a warning takes time, too.

    Args:
        logger: Where to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._count = 0
        self._again_at = 0.0

    def add(self, what: object, reason: object, count: int = 1) -> None:
        """Note some more; where it is not told at once, it counts the next time.

        Args:
            what: One piece of it.
            reason: Why that is no request.
            count: How many pieces there are.
        """
        self._count += count
        if monotonic() >= self._again_at:
            self._logger.warning(
                "Dropped what is no request (%d times), such as %.100r: %s",
                self._count,
                what,
                reason,
            )
            self._count, self._again_at = 0, monotonic() + 1
