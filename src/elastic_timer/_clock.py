"""The present moment, by clocks that test libraries do not freeze or move.

`freezegun` replaces `time.time` and `time.monotonic` in every module that refers to them, and
`time-machine` changes what the original `time.time` and CLOCK_REALTIME tell. With such a clock a
server would kill workers that have time left.
"""

from __future__ import annotations

import functools
import time

# The number that Linux has for this clock; the time module has no name for it. It is up to 10 ms
# behind.
_CLOCK_REALTIME_COARSE = 5

try:
    # Partials, since freezegun replaces only the functions themselves.
    _now = functools.partial(time.clock_gettime, time.CLOCK_TAI)
    _now_about = functools.partial(time.clock_gettime, _CLOCK_REALTIME_COARSE)
    _now() - _now_about()  # Raises OSError if the system lacks one of these clocks.

    def epoch() -> float:
        """The wall clock, in epoch seconds. CLOCK_TAI is ahead of it by whole (leap) seconds."""
        now = _now()
        return now - (now - _now_about() + 0.5) // 1  # Rounded, without a call: each block asks.

except (AttributeError, OSError):
    # Not Linux. There, time-machine does change what this tells.
    epoch = functools.partial(time.time)

monotonic = functools.partial(time.monotonic)
