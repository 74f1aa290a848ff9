"""What happens in a server, as records that flow one way: to whoever listens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar, Generic, TypeVar

from elastic_timer import _clock
from elastic_timer._server.callbacks import Callbacks

_Request = TypeVar("_Request")


def named(pid: int, rank: int | None) -> str:
    """A worker as the log has it: its pid and, where it was started with one, its rank."""
    return str(pid) if rank is None else f"{pid} (rank {rank})"


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened, at `time` (epoch seconds)."""

    name: ClassVar[str]
    time: float


@dataclasses.dataclass(frozen=True)
class ServerStarted(Event):
    """The watchdog runs; requests count from now on."""

    name: ClassVar[str] = "watchdog started"


@dataclasses.dataclass(frozen=True)
class ServerStopped(Event):
    """The watchdog has ended."""

    name: ClassVar[str] = "watchdog stopped"


@dataclasses.dataclass(frozen=True)
class WatchdogRound(Event):
    """The watchdog has made a round, which tells that it lives; not all rounds are told of.

    Attributes:
        workers: How many workers it watches.
        timers: How many timers they hold.
        reaped: How many times it has signalled a worker since it was started.
    """

    name: ClassVar[str] = "watchdog round"
    workers: int
    timers: int
    reaped: int


@dataclasses.dataclass(frozen=True)
class WorkerEvent(Event):
    """Something that happened to a worker.

    Attributes:
        pid: The worker; negative for a process group.
        rank: Its rank in its job, read off the environment it was started with; None without one.
        local_rank: Its rank among those of this host.
    """

    pid: int
    rank: int | None
    local_rank: int | None


@dataclasses.dataclass(frozen=True)
class TimerEvent(WorkerEvent, Generic[_Request]):
    """Something that happened to a timer, which is given as the request that acquired it."""

    timer: _Request


@dataclasses.dataclass(frozen=True)
class TimerAcquired(TimerEvent[_Request]):
    """A worker has entered a block, or asked for another deadline within it."""

    name: ClassVar[str] = "timer acquired"


@dataclasses.dataclass(frozen=True)
class TimerReleased(TimerEvent[_Request]):
    """A worker has left a block; `timer` is the request that releases."""

    name: ClassVar[str] = "timer released"


@dataclasses.dataclass(frozen=True)
class TimerExpired(TimerEvent[_Request]):
    """A worker is still in its block after the deadline.

    Attributes:
        seconds_late: How long after the deadline it was noticed.
        evidence: What the worker was doing, as `_evidence` tells it; None where that is not known.
    """

    name: ClassVar[str] = "timer expired"
    seconds_late: float
    evidence: Mapping[str, object] | None


@dataclasses.dataclass(frozen=True)
class WorkerDue(TimerEvent[_Request]):
    """A worker was due to be signalled for one of its timers.

    Attributes:
        signal: The signal's number.
        seconds_late: How long after the timer's deadline.
        scopes: All scopes of the worker that had expired, oldest first.
    """

    signal: int
    seconds_late: float
    scopes: list[str]


@dataclasses.dataclass(frozen=True)
class WorkerSignalled(WorkerDue[_Request]):
    """The worker was sent the signal."""

    name: ClassVar[str] = "kill worker process"


@dataclasses.dataclass(frozen=True)
class WorkerSpared(WorkerDue[_Request]):
    """The worker would have been sent it, had the server not been told to signal nobody."""

    name: ClassVar[str] = "would kill worker process"


@dataclasses.dataclass(frozen=True)
class WorkerExited(WorkerEvent):
    """A worker that had acquired timers has ended.

    Attributes:
        scopes: Those whose timers it had not released.
    """

    name: ClassVar[str] = "worker exited"
    scopes: list[str]


@dataclasses.dataclass(frozen=True)
class JobHangs(Event):
    """The workers of a job wait for each other, and one of them or more are past a deadline.

    Attributes:
        picture: What all of them on this host were doing before the first of them was signalled,
            as `_evidence` tells it.
    """

    name: ClassVar[str] = "job hangs"
    picture: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class BlocksMeasured(Event):
    """What the workers' blocks took since the server was made.

    Attributes:
        since: When that was, in epoch seconds: what tells servers of one run and host apart.
        blocks: Of each block what `_server.blocks` makes of it.
        unmeasured: How often others were entered, that were too many.
    """

    name: ClassVar[str] = "blocks"
    since: float
    blocks: list[Mapping[str, object]]
    unmeasured: int


Listener = Callable[[Event], object]


class Events:
    """Hands records to listeners, to each in their order and on a thread of its own.

    Nobody waits for a listener: one that blocks or raises holds up neither the server nor another.
    """

    def __init__(self) -> None:
        self._listeners: list[tuple[Listener, tuple[type[Event], ...], Callbacks]] = []

    def subscribe(
        self, listener: Listener, *kinds: type[Event], queue: Callbacks | None = None
    ) -> None:
        """Have a listener called with each record of these kinds.

        Args:
            listener: What to call.
            kinds: Of which records.
            queue: Where its calls wait for their turn. None means one of its own.
        """
        self._listeners.append((listener, kinds, Callbacks() if queue is None else queue))

    def wants(self, kind: type[Event]) -> bool:
        """Whether anybody listens to records of a kind."""
        return any(issubclass(kind, kinds) for _, kinds, _ in self._listeners)

    def publish(self, event: Event) -> None:
        """Hand a record to those who listen to its kind."""
        for listener, kinds, callbacks in self._listeners:
            if isinstance(event, kinds):
                callbacks.submit(functools.partial(listener, event))

    def flush(self, patience: float) -> bool:
        """Wait until the listeners have all that was published, for so many seconds at most.

        Returns:
            Whether they have.
        """
        end = _clock.monotonic() + patience
        return all(each.flush(end - _clock.monotonic()) for _, _, each in self._listeners)

    def forget_parent(self) -> None:
        """Begin anew in a forked child, where no thread of a listener is."""
        self._listeners = [(listener, kinds, Callbacks()) for listener, kinds, _ in self._listeners]
