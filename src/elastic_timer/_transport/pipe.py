"""What holds for every pipe that requests go through, with a name or inside a queue."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal as signals
import stat
from _signal import getsignal

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

# The most bytes that one write puts into a pipe whole, whoever else writes to it (pipe(7)). POSIX
# lets every writer rely on 512; Windows has no such pipes and no constant.
PIPE_BUF: int = getattr(select, "PIPE_BUF", 512)

# What Linux lets everybody give a pipe unless the administrator says otherwise (pipe(7)). A burst
# of some 8,000 requests fits in it.
CAPACITY = 1 << 20

_SIGPIPE = getattr(signals, "SIGPIPE", signals.SIGINT)  # Windows has none, and no pipes for this.

# How long a client goes on trying to reach a server that is not there, or does not read, in
# seconds.
UNREACHABLE_AFTER = 1.0


def enlarge(fd: int) -> None:
    """Give a pipe room for a burst, where the system allows it (F_SETPIPE_SZ, Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, CAPACITY)


def _get_size(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


def _get_status(fd: int) -> None:
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        raise OSError(errno.EBADF, "not a FIFO")


# Raises OSError where a descriptor leads to no pipe. Asking for its size, which only Linux knows,
# takes a third of what asking for its status takes.
check_pipe = _get_size if hasattr(fcntl, "F_GETPIPE_SZ") else _get_status


def write(fd: int, message: bytes) -> None:
    """Write a message; where nobody reads, that raises BrokenPipeError and ends no process.

    A program that restored the default of SIGPIPE, as many commands do, would die of the signal.
    """
    # The module's own function: that of `signal` makes an enum of what it finds, in 1 us.
    if getsignal(_SIGPIPE) != signals.SIG_DFL:
        os.write(fd, message)
        return
    # Held back in this thread, where it would arrive, and taken out of the way if it came.
    was_blocked = _SIGPIPE in signals.pthread_sigmask(signals.SIG_BLOCK, {_SIGPIPE})
    try:
        os.write(fd, message)
    except BrokenPipeError:
        if not was_blocked:
            signals.sigtimedwait({_SIGPIPE}, 0)
        raise
    finally:
        if not was_blocked:
            signals.pthread_sigmask(signals.SIG_UNBLOCK, {_SIGPIPE})


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
