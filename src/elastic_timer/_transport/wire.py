"""The lines on the FIFO: one JSON object each, shared with upstream's clients and servers.

Pure: bytes and plain values in and out. Upstream's reader and writer of the same lines are in
torch's `file_based_local_timer`.
"""

from __future__ import annotations

import functools
import os
import signal as signals
import sys
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

from elastic_timer._transport.pipe import PIPE_BUF

try:
    # Without the rest of json, which makes the import longer; a worker needs none of it.
    from _json import encode_basestring_ascii
except ImportError:  # It is CPython's.
    from json.encoder import encode_basestring_ascii

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeGuard

_LARGEST_PID = 2**31 - 1  # pid_t is a signed 32-bit integer wherever Python runs.
_LARGEST_SIGNAL = int(signals.NSIG) - 1

# Within a JSON string the quotes would be escaped: this matches no part of somebody's scope.
_REQUEST_START = b'{"version"'

# What is shorter is no request: JSON has no shorter way to write all the keys.
SHORTEST_REQUEST = len('{"pid":1,"scope_id":"","expiration_time":1,"signal":1}')


class Fields(NamedTuple):
    """What one line says, under the names it has there."""

    pid: int
    scope_id: str
    expiration_time: float
    signal: int


def encode(version: int, pid: int, scope_id: str, expiration_time: float, signal: int) -> str:
    """The JSON of a request; raises as `encode_line` does."""
    return encode_line(version, pid, scope_id, expiration_time, signal)[:-1].decode()


def encode_line(
    version: int, pid: int, scope_id: str, expiration_time: float, signal: int
) -> bytes:
    """The line of a request: what `json.dumps` makes of it, several times as fast.

    Raises:
        TypeError: The scope is not a string.
        ValueError: The expiration time is NaN or infinite, for which JSON has no number.
    """
    if not isfinite(expiration_time):
        raise ValueError(f"a timer needs a finite expiration time, not {expiration_time}")
    # A subclass such as numpy.float64 or an enum has a repr of its own, which is no JSON.
    if isinstance(expiration_time, float):
        number = float.__repr__(expiration_time)
    else:
        number = int.__repr__(expiration_time)
    return (
        f'{{"version": {version}, "pid": {pid}, "scope_id": {encode_basestring_ascii(scope_id)}, '
        f'"expiration_time": {number}, "signal": {int(signal)}}}\n'
    ).encode()


def acquire_line(scope_id: str, expiration_time: float, signal: int) -> bytes:
    """The line by which this process asks for a timer; raises as `encode_line` does."""
    if type(expiration_time) is float and isfinite(expiration_time):
        return _acquire_format(scope_id, signal) % expiration_time
    return encode_line(1, os.getpid(), scope_id, expiration_time, signal)


# A worker enters the same few blocks over and over. What is cached has its pid, for which the
# system would have to be asked: see below.
@functools.lru_cache(maxsize=64)
def _acquire_format(scope_id: str, signal: int) -> bytes:
    line = encode_line(1, os.getpid(), scope_id, 0, signal).replace(b"%", b"%%")
    return b'"expiration_time": %a'.join(line.rsplit(b'"expiration_time": 0', 1))


@functools.lru_cache(maxsize=64)
def release_line(scope_id: str) -> bytes:
    """The line by which this process releases a timer; raises as `encode_line` does."""
    return encode_line(1, os.getpid(), scope_id, -1, 0)


def _forget_pid() -> None:
    _acquire_format.cache_clear()
    release_line.cache_clear()


# Before a fork too: hooks of others may send something in the child before this one is called.
# Windows has neither forks nor hooks for them.
getattr(os, "register_at_fork", dict)(before=_forget_pid, after_in_child=_forget_pid)


def decode(line: bytes) -> Fields:
    """Read one line; unknown keys are tolerated, and any version, as upstream tolerates them.

    A writer that is no client may leave rubbish without a newline in the pipe. A request that
    follows it on the same line still counts.

    Raises:
        ValueError: The line is no request; the message says why.
    """
    try:
        return _decode_object(line)
    except ValueError:
        start = line.rfind(_REQUEST_START)
        if start <= 0:
            raise
        return _decode_object(line[start:])


@functools.cache
def _json_reader() -> Callable[[str], tuple[object, int]]:
    # Only a server needs it, and has loaded it with the evidence before the first request comes.
    import json

    # What json.loads does, without the searches for white space around it: a third of the time.
    return json.JSONDecoder().raw_decode


def _decode_object(text: bytes) -> Fields:
    stripped = text.decode().strip()
    try:
        request, end = _json_reader()(stripped)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(request, dict) or end != len(stripped):
        raise ValueError("not one JSON object")
    try:
        fields = Fields(
            request["pid"], request["scope_id"], request["expiration_time"], request["signal"]
        )
    except KeyError as missing:
        raise ValueError(f"{missing} is missing") from None
    check_timer(fields.pid, fields.scope_id, fields.expiration_time)
    if not _is_integer(fields.signal) or fields.signal > _LARGEST_SIGNAL:
        raise ValueError(f"{fields.signal!r} is no signal's number")
    return fields


def check_timer(worker: object, scope: object, expiration_time: object) -> None:
    """Refuse what can't be a timer of a process.

    Raises:
        ValueError: The message says what is wrong.
    """
    if not _is_integer(worker) or abs(worker) > _LARGEST_PID:
        raise ValueError(f"{worker!r} is no process id")
    if not isinstance(scope, str):
        raise ValueError(f"scope {scope!r} is not a string")
    if not _is_integer(expiration_time) and not isinstance(expiration_time, float):
        raise ValueError(f"expiration time {expiration_time!r} is not a number")
    # Compared, not converted: an integer too large for a float would raise OverflowError.
    if not -sys.float_info.max <= expiration_time <= sys.float_info.max:
        raise ValueError(f"expiration time {expiration_time!r} is not finite")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


class LineBuffer:
    """Puts the lines of the FIFO together, wherever the reads were split."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The lines that `data` ends, with newlines between them."""
        lines, _, rest = (self._rest + data).rpartition(b"\n")
        # No request is longer than PIPE_BUF. Of rubbish without an end that much is kept, so that
        # memory stays bounded and a request behind it can still be read.
        self._rest = rest[-PIPE_BUF:]
        return lines
