"""How things stand in a server, for whoever asks; the schema of it is in the package."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from elastic_timer import __version__, _clock
from elastic_timer._server.blocks import block_of

if TYPE_CHECKING:
    from elastic_timer._server.server import Progress
    from elastic_timer._server.workers import Workers

# A deadline that is so many seconds away is not meant to come.
_NEVER = 1e12


class Snapshot(NamedTuple):
    """A server at one moment: what is known of itself, and its timers one by one."""

    server: dict[str, object]
    timers: Iterator[dict[str, object]]


class Snapshots:
    """Takes snapshots of a server on the server's own thread.

    Args:
        workers: Its workers and their timers.
        progress: Gives how far it has come.
        about: What is always the same.
    """

    def __init__(
        self,
        workers: Workers[Any],
        progress: Callable[[], Progress],
        about: Mapping[str, object],
    ) -> None:
        self._workers = workers
        self._progress = progress
        self._about = about

    def take(self) -> Snapshot:
        """How things stand now.

        The timers may be looked at later, and in the course of time: each is told as it is when it
        is looked at, its times as they were when the snapshot was taken.
        """
        now, epoch = _clock.monotonic(), _clock.epoch()
        progress = self._progress()
        server = {
            "time": epoch,
            **self._about,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "version": __version__,
            "started": progress.started_epoch,
            "uptime": round(now - progress.started, 6),
            "rounds": progress.rounds,
            "last_round_age": round(now - progress.last_round, 6),
            "worker_count": self._workers.count(),
            "timer_count": len(self._workers.table),
            "reaped_count": progress.reaped,
        }
        return Snapshot(server, self._timers(self._workers.table.workers(), now, epoch))

    def _timers(self, pids: list[int], now: float, epoch: float) -> Iterator[dict[str, object]]:
        table = self._workers.table
        for pid in pids:
            rank, local_rank = self._workers.ranks(pid)
            passes = self._workers.passes(pid)
            for scope, since, deadline in table.spans(pid):
                yield {
                    "pid": pid,
                    "rank": rank,
                    "local_rank": local_rank,
                    "scope": scope,
                    "acquired": _to_the_millisecond(epoch - now + since),
                    "after": _to_the_millisecond(deadline - since),
                    "left": _to_the_millisecond(deadline - now),
                    "pass": passes.get(block_of(scope)),
                }


def _to_the_millisecond(seconds: float) -> float:
    """As `round(seconds, 3)`, which takes several times as much of the watchdog's time."""
    # The product of one that is never meant to come could be infinite, which can't be rounded.
    return round(seconds * 1000) / 1000 if seconds < _NEVER else seconds
