"""The present moment, by clocks that test libraries do not freeze or move.

`freezegun` puts other functions in the place of `time.time` and `time.monotonic`, wherever a module
refers to them; `time-machine` has even the original `time.time` and CLOCK_REALTIME tell another
time. A deadline by such a clock kills a worker that has time left.
"""

from __future__ import annotations

import functools
import time

# Its number in Linux, for which the time module has no name. It lags by up to 10 ms.
_CLOCK_REALTIME_COARSE = 5

try:
    # Partials: to freezegun they are not the functions that it looks for.
    _now = functools.partial(time.clock_gettime, time.CLOCK_TAI)
    _now_about = functools.partial(time.clock_gettime, _CLOCK_REALTIME_COARSE)
    _now() - _now_about()  # The system may lack what the time module has a name for.

    def epoch() -> float:
        """The wall clock, in epoch seconds: CLOCK_TAI is ahead of it by leap seconds alone."""
        now = _now()
        return now - (now - _now_about() + 0.5) // 1  # Rounded, without a call: each block asks.

except (AttributeError, OSError):
    # Not Linux: there time-machine is believed.
    epoch = functools.partial(time.time)

monotonic = functools.partial(time.monotonic)
