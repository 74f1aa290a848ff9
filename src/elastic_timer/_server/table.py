"""The timers a server holds, and which of them is due first.

Pure: no clock, no I/O, no lock. Times are monotonic seconds and always come in as arguments.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, TypeVar

_Worker = TypeVar("_Worker", bound=Hashable)
_Request = TypeVar("_Request")

# The heap's entries of released timers are left in place. It is rebuilt when it has more entries
# than this and twice the number of timers, so that its size and the cost of an acquire stay
# bounded.
_HEAP_SLACK = 64


class TimerTable(Mapping["tuple[_Worker, str]", _Request], Generic[_Worker, _Request]):
    """A mapping from (worker, scope) to request that knows the earliest deadline.

    A timer whose deadline has passed stays in the table until it is released or cleared. After
    `settle` it no longer counts for `next_deadline`: somebody has looked at it, and knows what it
    is waiting for.
    """

    def __init__(self) -> None:
        # For each worker and scope: the timer's serial number, its deadline, its request, since
        # when it is held, and when it was asked for last.
        self._timers: dict[_Worker, dict[str, tuple[int, float, _Request, float, float]]] = {}
        self._size = 0
        self._serial = 0
        # Deadline, serial, worker, scope. The serial decides between equal deadlines, so that
        # workers, which may have no order, are never compared. An entry is live while the timer
        # still has that serial; one that was released or acquired anew has not.
        self._heap: list[tuple[float, int, _Worker, str]] = []
        self._settled: list[tuple[float, int, _Worker, str]] = []

    def __getitem__(self, key: tuple[_Worker, str]) -> _Request:
        worker, scope = key
        try:
            return self._timers[worker][scope][2]
        except KeyError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[tuple[_Worker, str]]:
        # Over copies: another thread may change the table meanwhile.
        timers = list(self._timers.items())
        return iter([(worker, scope) for worker, scopes in timers for scope in list(scopes)])

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)!r})"

    def acquire(
        self, worker: _Worker, scope: str, request: _Request, deadline: float, now: float = 0.0
    ) -> bool:
        """Hold a timer, in the place of the one that the worker may hold for the scope already.

        Returns:
            Whether there was none.
        """
        scopes = self._timers.setdefault(worker, {})
        held = scopes.get(scope)
        is_new = held is None
        self._size += is_new
        self._serial += 1
        since = now if held is None else held[3]
        scopes[scope] = self._serial, deadline, request, since, now
        heapq.heappush(self._heap, (deadline, self._serial, worker, scope))
        self._prune()
        return is_new

    def release(self, worker: _Worker, scope: str) -> None:
        """Drop one timer; does nothing if the worker does not hold it."""
        scopes = self._timers.get(worker)
        if scopes is None or scopes.pop(scope, None) is None:
            return
        self._size -= 1
        if not scopes:
            del self._timers[worker]
        self._prune()

    def clear(self, worker: _Worker) -> None:
        """Drop all timers of a worker."""
        self._size -= len(self._timers.pop(worker, ()))
        self._prune()

    def scopes(self, worker: _Worker) -> list[str]:
        """The scopes for which a worker holds a timer."""
        return list(self._timers.get(worker, ()))

    def holds(self, worker: _Worker) -> bool:
        """Whether a worker has a timer."""
        return worker in self._timers

    def workers(self) -> list[_Worker]:
        """The workers that hold a timer."""
        return list(self._timers)

    def deadline(self, worker: _Worker, scope: str) -> float | None:
        """When the worker's timer for a scope is due; None if it holds none."""
        timer = self._timers.get(worker, {}).get(scope)
        return None if timer is None else timer[1]

    def spans(self, worker: _Worker) -> Iterator[tuple[str, float, float]]:
        """Of each timer that a worker holds its scope, when it was asked for, and when it is due.

        Timers that are acquired in the course of it are left out, as are those that are released.
        """
        scopes = self._timers.get(worker, {})
        # Over a copy of the names alone: so many tuples at once would have all garbage collected.
        for scope in list(scopes):
            timer = scopes.get(scope)
            if timer is not None:
                yield scope, timer[4], timer[1]

    def most_urgent(self, worker: _Worker) -> tuple[str, float, float] | None:
        """Of a worker's timer that is due first its scope, its deadline, and since when it is held.

        None where it has none.
        """
        timers = list(self._timers.get(worker, {}).items())
        due = [(deadline, scope, since) for scope, (_, deadline, _, since, _) in timers]
        if not due:
            return None
        deadline, scope, since = min(due)
        return scope, deadline, since

    def expired(self, now: float) -> dict[_Worker, list[_Request]]:
        """The requests due at `now` or before, by worker, each worker's earliest first.

        Only the part of the heap that is due is looked at, so the cost does not grow with the
        number of timers that are not.
        """
        due = [entry for entry in self._settled if entry[0] <= now and self._is_live(entry)]
        pending = [0]
        while pending:
            index = pending.pop()
            if index < len(self._heap) and self._heap[index][0] <= now:
                pending += (2 * index + 1, 2 * index + 2)
                if self._is_live(self._heap[index]):
                    due.append(self._heap[index])
        found: dict[_Worker, list[_Request]] = {}
        for _, _, worker, scope in sorted(due, key=lambda entry: entry[:2]):
            found.setdefault(worker, []).append(self[worker, scope])
        return found

    def settle(self, now: float) -> None:
        """Note that all timers due at `now` or before have been looked at."""
        self._settled = [entry for entry in self._settled if self._is_live(entry)]
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if self._is_live(entry):
                self._settled.append(entry)

    def next_deadline(self) -> float | None:
        """The earliest deadline that was not settled; None if there is none."""
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _is_live(self, entry: tuple[float, int, _Worker, str]) -> bool:
        _, serial, worker, scope = entry
        timer = self._timers.get(worker, {}).get(scope)
        return timer is not None and timer[0] == serial

    def _prune(self) -> None:
        if len(self._heap) > 2 * self._size + _HEAP_SLACK:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)
