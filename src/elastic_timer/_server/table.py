"""The timers a server holds, and which of them is due first.

Pure: no clock, no I/O, no lock. Times are monotonic seconds and always come in as arguments.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, TypeVar

_Worker = TypeVar("_Worker", bound=Hashable)
_Request = TypeVar("_Request")

# Heap entries of released timers are left in place; the heap is rebuilt when it holds more than
# twice the live ones plus this many, so that its size and the cost of an acquire stay bounded.
_HEAP_SLACK = 64


class TimerTable(Mapping["tuple[_Worker, str]", _Request], Generic[_Worker, _Request]):
    """A mapping from (worker, scope) to request that knows the earliest deadline.

    A timer whose deadline has passed is held on until it is dropped. Once it was `settled` it no
    longer counts for `next_deadline`: somebody has looked at it and knows what it waits for.
    """

    def __init__(self) -> None:
        # Of each timer its serial, its deadline, its request, and when it was acquired.
        self._timers: dict[_Worker, dict[str, tuple[int, float, _Request, float]]] = {}
        self._size = 0
        self._serial = 0
        # Deadline, serial, worker, scope. The serial breaks ties, so that workers are never
        # compared, and tells a live entry from one whose timer was released or acquired anew.
        self._heap: list[tuple[float, int, _Worker, str]] = []
        self._settled: list[tuple[float, int, _Worker, str]] = []

    def __getitem__(self, key: tuple[_Worker, str]) -> _Request:
        worker, scope = key
        try:
            return self._timers[worker][scope][2]
        except KeyError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[tuple[_Worker, str]]:
        # Over copies, each made in one step: another thread may change the table meanwhile.
        timers = list(self._timers.items())
        return iter([(worker, scope) for worker, scopes in timers for scope in list(scopes)])

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)!r})"

    def acquire(
        self, worker: _Worker, scope: str, request: _Request, deadline: float, since: float = 0.0
    ) -> bool:
        """Hold a timer; it replaces the one that the worker holds for the scope, if any.

        Args:
            worker: The worker.
            scope: What the timer is for.
            request: What it was asked for with.
            deadline: When it is due.
            since: The present, for those who want to know how much of the time is used.

        Returns:
            Whether it held none.
        """
        scopes = self._timers.setdefault(worker, {})
        is_new = scope not in scopes
        self._size += is_new
        self._serial += 1
        scopes[scope] = self._serial, deadline, request, since
        heapq.heappush(self._heap, (deadline, self._serial, worker, scope))
        self._prune()
        return is_new

    def release(self, worker: _Worker, scope: str) -> None:
        """Drop one timer; a release of what is not held does nothing."""
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
        """When the worker's timer for a scope is due; None where it holds none."""
        timer = self._timers.get(worker, {}).get(scope)
        return None if timer is None else timer[1]

    def spans(self, worker: _Worker) -> Iterator[tuple[str, float, float]]:
        """Of each timer that a worker holds its scope, when it was acquired, and when it is due.

        Timers that are acquired in the course of it are left out, as are those that are released.
        """
        scopes = self._timers.get(worker, {})
        # Over a copy of the names alone: so many tuples at once would have all garbage collected.
        for scope in list(scopes):
            timer = scopes.get(scope)
            if timer is not None:
                yield scope, timer[3], timer[1]

    def expired(self, now: float) -> dict[_Worker, list[_Request]]:
        """The requests due at `now` or before, by worker, each worker's oldest first.

        Asks only the due part of the heap: the cost does not grow with the timers still running.
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
        """Take note that what is due at `now` or before was looked at."""
        self._settled = [entry for entry in self._settled if self._is_live(entry)]
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if self._is_live(entry):
                self._settled.append(entry)

    def next_deadline(self) -> float | None:
        """The earliest deadline that was not settled; None where there is none."""
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
