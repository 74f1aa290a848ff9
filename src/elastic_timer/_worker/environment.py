"""What the environment says of all timers of a process."""

from __future__ import annotations

import os
from math import inf
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from elastic_timer.api import TimerClient

DISABLE = "ELASTIC_TIMER_DISABLE"
SCALE = "ELASTIC_TIMER_SCALE"


def read() -> tuple[float, TimerClient | None]:
    """By how much every `after` is multiplied, and whom to ask instead of any client, if anybody.

    Raises:
        ValueError: A variable has a value of no use.
    """
    text = os.environ.get(SCALE)
    try:
        scale = float(text or 1)
    except ValueError:
        scale = 0.0
    if not 0 < scale < inf:
        raise ValueError(f"{SCALE} must be a positive number such as 3, and not {text!r}")
    disabled = os.environ.get(DISABLE, "")
    if disabled not in ("", "0", "1"):
        raise ValueError(f"{DISABLE} must be 1 or 0, and not {disabled!r}")
    if disabled != "1":
        return scale, None
    # Here, as others need it not.
    from elastic_timer._worker.optional import NoTimers

    return scale, cast("TimerClient", NoTimers())


def read_or_refuse() -> tuple[float, TimerClient | None]:
    """As `read`; where that raises, every block is to raise it: an import must not."""
    try:
        return read()
    except ValueError as error:
        return 1.0, cast("TimerClient", _Refusal(str(error)))


class _Refusal:
    """Stands for a client where the environment can't be made sense of."""

    def __init__(self, why: str) -> None:
        self._why = why

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        raise ValueError(self._why)

    def release(self, scope_id: str) -> None:
        """Nothing was acquired."""
