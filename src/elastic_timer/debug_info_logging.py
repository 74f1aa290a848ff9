"""What is logged about workers whose timers expired, before any of them is signalled.

One WARNING per worker, with facts and Python stacks in its text and in its `extra` fields, and
above them one for each job that hangs, which says who hangs it; docs/evidence.md says how to read
them.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from elastic_timer._evidence.expiry import Evidence

    _Handler = Callable[[str, dict[int, list[str]]], object]

__all__ = [
    "add_collective",
    "add_debug_info_handler",
    "collectives",
    "log_debug_info_for_expired_timers",
    "native_stacks",
    "remove_debug_info_handler",
    "set_native_stacks",
    "set_stacks_timeout",
    "stacks_timeout",
]

logger: logging.Logger = logging.getLogger(__name__)

# Changed without a lock: one held by another thread during a fork would stay held in the child.
_handlers: list[_Handler] = []
_collectives: list[str] = []
_stacks_timeout = 2.0
_native_stacks = False


def log_debug_info_for_expired_timers(
    run_id: str, expired_timers: dict[int, list[str]]
) -> dict[int, Evidence]:
    """Log what workers were doing when their timers expired, then call the added handlers.

    Of workers that have peers, who wait for each other, the answer to who hangs the job comes
    first; then each has one line, and its details are in the record's fields.

    Both servers call this once per expiry, before they signal a worker and also where they will
    not signal it (a signal of zero or below). Nothing is logged for an empty mapping. Never
    raises an `Exception`: what goes wrong is logged instead.

    Args:
        run_id: The run id of the server.
        expired_timers: Pid of each worker to its expired timers, each as JSON.

    Returns:
        Pid of each worker to what was learned of it: the fields of its log record, without their
        prefix. Empty where nothing could be learned.

    .. versionadded:: 0.1.0
    """
    collected: dict[int, Evidence] = {}
    if not expired_timers:
        return collected
    # Not before: in a worker, and until something expires, nobody needs it.
    from elastic_timer._evidence import collector, expiry

    try:
        found = collector.collect(
            run_id, expired_timers, _stacks_timeout, _native_stacks, collectives()
        )
        for answer in found.answers:
            logger.warning("%s", answer, extra={"timer_run_id": run_id})
        for pid, evidence in found.evidence.items():
            describe = expiry.describe_expiry if pid in found.told else expiry.describe
            logger.warning("%s", describe(evidence), extra=expiry.log_fields(evidence))
        collected = found.evidence
    except Exception:
        logger.exception("no evidence on the expired timers of run %r: %s", run_id, expired_timers)
    for handler in tuple(_handlers):
        try:
            handler(run_id, expired_timers)
        except Exception:
            logger.exception("the debug info handler %r failed", handler)
    return collected


def add_debug_info_handler(handler: _Handler) -> None:
    """Have a function of your own called when timers expire, before their workers are signalled.

    It runs on a thread of the server, after the evidence was logged. The server waits for the
    evidence and all handlers together for `stacks_timeout` and one second more, then goes ahead.

    Args:
        handler: Called with the run id and the mapping of pid to the JSON of each expired timer.
            What it returns is ignored; an error it raises is logged. Added twice, it is called
            once.

    .. versionadded:: 0.1.0
    """
    if handler not in _handlers:
        _handlers.append(handler)


def remove_debug_info_handler(handler: _Handler) -> None:
    """Undo `add_debug_info_handler`; without effect for a handler that is not there.

    Args:
        handler: What was added.

    .. versionadded:: 0.1.0
    """
    if handler in _handlers:
        _handlers.remove(handler)


def set_stacks_timeout(seconds: float) -> None:
    """Bound the time that taking Python stacks may add to a reap, for this process's servers.

    Args:
        seconds: How many seconds the stacks of all workers that expire together may take; 2.0 at
            first. 0 takes none.

    Raises:
        ValueError: It is negative, infinite or not a number.

    .. versionadded:: 0.1.0
    """
    global _stacks_timeout
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"the time for stacks must be 0 or more seconds, not {seconds!r}")
    _stacks_timeout = float(seconds)


def stacks_timeout() -> float:
    """The bound set with `set_stacks_timeout`, in seconds.

    .. versionadded:: 0.1.0
    """
    return _stacks_timeout


def set_native_stacks(wanted: bool) -> None:
    """Say whether stacks are to have C frames too, for this process's servers.

    The Python stack is taken first, and is what there is where the other one does not come within
    the time for stacks. It takes about ten times as long, and the worker is paused meanwhile.

    Args:
        wanted: Whether. At first they have none.

    .. versionadded:: 0.2.0
    """
    global _native_stacks
    _native_stacks = wanted


def native_stacks() -> bool:
    """What was set with `set_native_stacks`.

    .. versionadded:: 0.2.0
    """
    return _native_stacks


def add_collective(name: str) -> None:
    """Name a function in which ranks wait for each other, besides those of `torch.distributed`.

    A rank that is in it, or in what it calls, waits; where others do not, these are the suspects.
    Name where your program waits for what was begun elsewhere: with NCCL that is mostly
    `torch.cuda.synchronize`, or the function of yours that calls `.item()`.

    Args:
        name: The function's name, with or without its class, or `FILE:FUNCTION` with the end of
            the file's path: `cuda/__init__.py:synchronize`. Added twice, it counts once.

    .. versionadded:: 0.2.0
    """
    if name not in _collectives:
        _collectives.append(name)


def collectives() -> tuple[str, ...]:
    """The names added with `add_collective`.

    .. versionadded:: 0.2.0
    """
    return tuple(_collectives)
