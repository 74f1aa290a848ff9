"""Blocks: what the scopes of many workers, threads and tasks have in common, counted and timed.

Pure: no clock, no I/O, no lock. Times are monotonic seconds and always come in as arguments.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping

# What `expires` appends to a default scope to keep threads, tasks and generators apart.
_WHOSE = re.compile(r"@(?:thread|task|generator)-[0-9a-f]+(?=@|$)")

# Each bucket of a histogram ends at so many times its beginning: told by its middle, a duration is
# wrong by 5 % at most.
_GROWTH = 1.1
_PER_BUCKET = 1 / math.log(_GROWTH)
# What takes less time, in seconds, is not told apart.
_SHORTEST = 0.001
_FIRST_BUCKET = math.floor(math.log(_SHORTEST) * _PER_BUCKET)

# Scopes may be made up without end.
_MOST_BLOCKS = 1000
# So may those that are overrun and never left.
_MOST_OVERDUE = 1000

# What asks for so many seconds, a year, asks for no deadline.
_NEVER = 366 * 86400.0

# A request that is read at once was sent so many seconds ago at most: bursts are left to gather.
_READ_AFTER = 0.015
# On a busy machine it may be so many. That is still less than by what two deadlines differ that a
# program has for one block.
_READ_LATE_AFTER = 0.1
# So long after something has arrived a server may notice.
_NOTICED_AFTER = 0.005
# By so much two clocks may differ that are read one after the other.
_CLOCKS_DIFFER = 0.0005


@functools.lru_cache(maxsize=4096)
def block_of(scope: str) -> str:
    """The block that a scope stands for, whichever thread, task or generator is in it."""
    return _WHOSE.sub("", scope) if "@" in scope else scope


def asked_for(left: float, late: float, before: float) -> float:
    """How many seconds a worker asked for, of whose time something was gone when that was read.

    Args:
        left: What was left of it.
        late: How long ago, at most, the request may have been sent.
        before: What was asked for at this place before; zero for nothing.
    """
    late += _NOTICED_AFTER
    # What is read when it was due already may have been for any time; at least it was sent by then.
    least = max(left - _CLOCKS_DIFFER, 0.0)
    # People write whole seconds. Of what is short they do not, and a tenth would be much of it.
    whole = float(math.ceil(least))
    fits = whole <= left + max(late, min(_READ_LATE_AFTER, left / 100))
    if least <= before <= left + max(late, _READ_LATE_AFTER) and not (fits and before < whole):
        return before
    if fits:
        return whole
    # The last of these is wrong by 10 ms at most.
    for parts in (2, 10, 20):
        rounded = math.ceil(least * parts) / parts
        if rounded <= left + max(_READ_AFTER, late):
            return rounded
    return math.ceil(least * 100) / 100


def percentile(histogram: Iterable[tuple[int, int]], share: float) -> float | None:
    """The duration in seconds that this share of all does not exceed, within 5 %; None of none.

    Args:
        histogram: Of each bucket its number and how many durations are in it.
        share: More than 0, at most 1.
    """
    buckets = sorted(histogram)
    left = math.ceil(share * sum(count for _, count in buckets))
    for number, count in buckets:
        left -= count
        if left <= 0:
            return _SHORTEST if number <= _FIRST_BUCKET else float(_GROWTH ** (number + 0.5))
    return None


class _Durations:
    """How often a block was left, after how long, and who took longest."""

    __slots__ = ("histogram", "left", "longest", "pid", "rank")

    def __init__(self) -> None:
        self.left = 0
        self.longest = -1.0
        self.pid: int | None = None
        self.rank: int | None = None
        self.histogram: dict[int, int] = {}

    def add(self, seconds: float, pid: int, rank: int | None) -> None:
        self.left += 1
        if seconds > self.longest:
            self.longest, self.pid, self.rank = seconds, pid, rank
        bucket = math.floor(math.log(max(seconds, _SHORTEST)) * _PER_BUCKET)
        self.histogram[bucket] = self.histogram.get(bucket, 0) + 1

    def record(self) -> dict[str, object]:
        return {
            "left": self.left,
            "longest": round(self.longest, 4) if self.left else None,
            "pid": self.pid,
            "rank": self.rank,
            "histogram": sorted(self.histogram.items()),
        }


class _Block:
    __slots__ = ("after", "entered", "expired", "first", "later", "scope", "unfinished", "whole")

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.entered = self.expired = self.unfinished = 0
        # The largest that was asked for; zero before.
        self.after = 0.0
        # The same where it is a whole number, which is sooner recognized.
        self.whole = -math.inf
        # Of each worker its first pass, which has to load and to compile what later ones find.
        self.first, self.later = _Durations(), _Durations()

    def record(self) -> dict[str, object]:
        return {
            "scope": self.scope,
            "entered": self.entered,
            "expired": self.expired,
            "unfinished": self.unfinished,
            "after": self.after or None,
            **self.later.record(),
            "first": self.first.record(),
        }


class _Pass:
    """A worker within a block; what it was longest without asking for a deadline anew."""

    __slots__ = ("block", "durations", "longest", "pid", "rank", "since")

    def __init__(self, block: _Block, pid: int, rank: int | None, is_first: bool) -> None:
        self.block = block
        self.durations = block.first if is_first else block.later
        self.pid = pid
        self.rank = rank
        self.longest = 0.0
        # None while it has no deadline.
        self.since: float | None = None

    def until(self, now: float) -> None:
        """The deadline is asked for anew, or the block is left."""
        since = self.since
        if since is not None and now - since > self.longest:
            self.longest = now - since

    def end(self, now: float) -> None:
        """The block was left."""
        self.until(now)
        self.durations.add(self.longest, self.pid, self.rank)


class _Worker:
    __slots__ = ("inside", "leaving")

    def __init__(self) -> None:
        self.inside: dict[str, _Pass] = {}
        # Left within requests that were read together; when exactly, the next acquire may tell.
        self.leaving: list[_Pass] = []


class Blocks:
    """Counts and times all passes of all blocks, up to 1,000 blocks, in bounded memory.

    A pass is from the first acquire of a scope to its release. One in which the worker asks for
    its deadline anew, or has none for a while, counts by the longest time for which one held:
    that is what a deadline has to be longer than.

    A worker's requests are called with in the order in which it sent them.

    Args:
        now: The present; nothing that was sent before counts.
    """

    def __init__(self, now: float) -> None:
        self._blocks: dict[str, _Block] = {}
        self._workers: dict[int, _Worker] = {}
        # Those that are leaving blocks.
        self._unsettled: list[_Worker] = []
        # They have expired and may go on, though their timers are dropped.
        self._overdue: dict[tuple[int, str], _Pass] = {}
        # Gone, though releases that they sent before may still be read.
        self._gone: set[int] = set()
        self._all_read_at = now
        self._unmeasured = 0

    def note_all_read(self, now: float) -> None:
        """Take note that all that was sent before `now` has been read."""
        self._all_read_at = max(self._all_read_at, now)

    def acquired(
        self, pid: int, rank: int | None, scope: str, is_first: bool, deadline: float, now: float
    ) -> None:
        """A worker has asked for a deadline.

        Args:
            pid: The worker.
            rank: Its rank, if it has one.
            scope: What for.
            is_first: Whether it is, or may be, the first time that it enters the block.
            deadline: When its timer is due.
            now: When the request is read.
        """
        if pid in self._gone:  # It is another one, of the same number.
            self._forget(pid)
        worker = self._workers.get(pid)
        if worker is None:
            worker = self._workers[pid] = _Worker()
        current = worker.inside.get(scope)
        if current is None:
            current = self._entered(pid, rank, scope, is_first)
            if current is None:
                return
            worker.inside[scope] = current
        block = current.block
        left = deadline - now
        if 0 <= block.whole - left <= _READ_LATE_AFTER:
            sent = since = deadline - block.whole  # What `asked_for` finds, too.
        elif left > _NEVER:
            sent, since = now, None
        else:
            after = asked_for(left, now - self._all_read_at, block.after)
            # A deadline may be in the far past; what was sent by then was read by then.
            sent = since = max(deadline - after, self._all_read_at - _READ_LATE_AFTER)
            if after > block.after:
                block.after = after
                block.whole = after if after.is_integer() else -math.inf
        if current.since is not None:
            current.until(sent)
        current.since = since
        if worker.leaving:
            for each in worker.leaving:
                each.end(sent)
            worker.leaving.clear()

    def released(self, pid: int, scope: str) -> None:
        """A worker has left a block; `settle` says when."""
        worker = self._workers.get(pid)
        if worker is None:
            return
        current = worker.inside.pop(scope, None)
        if current is None:
            current = self._overdue.pop((pid, scope), None)
            if current is None:
                return
        if not worker.leaving:
            self._unsettled.append(worker)
        worker.leaving.append(current)

    def settle(self, now: float) -> None:
        """Take note that all requests that were there at `now` were called with."""
        for worker in self._unsettled:
            for each in worker.leaving:
                each.end(now)
            worker.leaving.clear()
        self._unsettled.clear()
        self._forget_gone()

    def expired(self, pid: int, scope: str) -> None:
        """A worker is in its block after the deadline, and loses its timer for that."""
        worker = self._workers.get(pid)
        current = None if worker is None else worker.inside.pop(scope, None)
        if current is not None:
            current.block.expired += 1
            if len(self._overdue) == _MOST_OVERDUE:
                del self._overdue[next(iter(self._overdue))]
            self._overdue[pid, scope] = current

    def ended(self, pid: int) -> None:
        """A worker is gone. What is still called with until `settle` was sent before that."""
        self._gone.add(pid)

    def records(self) -> list[Mapping[str, object]]:
        """What was measured, of each block, as plain values; docs/reference/events.md has them."""
        self._forget_gone()
        return [block.record() for block in self._blocks.values()]

    @property
    def unmeasured(self) -> int:
        """How often a block was entered that was one too many to be measured."""
        return self._unmeasured

    def _forget_gone(self) -> None:
        for pid in list(self._gone):
            self._forget(pid)

    def _forget(self, pid: int) -> None:
        self._gone.discard(pid)
        worker = self._workers.pop(pid, None)
        for each in () if worker is None else worker.inside.values():
            each.block.unfinished += 1
        for key in [key for key in self._overdue if key[0] == pid]:
            del self._overdue[key]

    def _entered(self, pid: int, rank: int | None, scope: str, is_first: bool) -> _Pass | None:
        overdue = self._overdue.pop((pid, scope), None) if self._overdue else None
        if overdue is not None:
            return overdue
        name = block_of(scope)
        block = self._blocks.get(name)
        if block is None:
            if len(self._blocks) == _MOST_BLOCKS:
                self._unmeasured += 1
                return None
            block = self._blocks[name] = _Block(name)
        block.entered += 1
        return _Pass(block, pid, rank, is_first)
