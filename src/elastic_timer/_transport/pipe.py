"""What holds for every pipe that requests go through, with a name or inside a queue."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable

# The most bytes that one write puts into a pipe whole, whoever else writes to it (pipe(7)). POSIX
# lets every writer rely on 512; Windows has no such pipes and no constant.
PIPE_BUF: int = getattr(select, "PIPE_BUF", 512)

# What Linux lets everybody give a pipe unless the administrator says otherwise (pipe(7)). A burst
# of some 8,000 requests fits in it.
CAPACITY = 1 << 20

# How long a client goes on trying to reach a server that is not there, or does not read, in
# seconds.
UNREACHABLE_AFTER = 1.0


def enlarge(fd: int) -> None:
    """Give a pipe room for a burst, where the system allows it (F_SETPIPE_SZ, Linux)."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl  # Not on Windows.

        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, CAPACITY)


def close_descriptors(fds: list[int], places: Iterable[int] | None = None) -> None:
    """Take descriptors out of a list and close them.

    Each is taken and closed within one call into C, as `fds.extend(map(os.open, ...))` opens and
    keeps it: an interrupt comes before or behind, and none is forgotten or closed twice.

    Args:
        fds: The descriptors.
        places: The index of each to be closed, as it is when those before it are gone. None means
            all.
    """
    any(map(os.close, map(fds.pop, [-1] * len(fds) if places is None else places)))


def too_large(message: bytes) -> RuntimeError:
    """The error for a message that does not fit in one atomic write."""
    return RuntimeError(
        f"a timer request may take {PIPE_BUF} bytes, this one takes {len(message)}: "
        "give it a shorter scope"
    )


def has_room(fd: int, timeout: float) -> bool:
    """Wait until a pipe has room for a message, for `timeout` seconds at most; whether it has."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(max(0.0, timeout) * 1000))
