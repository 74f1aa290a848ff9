"""The command `elastic-timer`."""

from __future__ import annotations

# The exit status of what ended by a signal, to which its number is added, as shells have it.
ENDED_BY_SIGNAL = 128
