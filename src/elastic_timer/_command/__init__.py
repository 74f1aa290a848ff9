"""The command `elastic-timer`."""

# The exit status of what ended by a signal, to which its number is added, as shells have it.
from __future__ import annotations

ENDED_BY_SIGNAL = 128
