"""What is to be known of expired workers before they are signalled, found out beside the rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from elastic_timer import _clock
from elastic_timer._server import callbacks

if TYPE_CHECKING:
    from elastic_timer._evidence.collector import Findings
    from elastic_timer._evidence.picture import Picture
    from elastic_timer._server.job import Standing

logger = callbacks.contained_logger(__name__)


@dataclasses.dataclass
class _Inquest:
    """What is to be known of one worker, or what it was and who else is to know of it.

    Attributes:
        timers: The JSON of its expired timers.
        scopes: Theirs.
        until: How long it is waited for, in monotonic seconds.
        evidence: What was found.
        is_done: Whether it need not be waited for any more.
        is_concluded: Whether what is found from now on comes too late.
    """

    timers: list[str]
    scopes: frozenset[str]
    until: float
    evidence: Mapping[str, object] | None = None
    is_done: bool = False
    is_concluded: bool = False

    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.is_done or self.until <= _clock.monotonic()


class Inquests:
    """The inquests of one server: from the expiry of a worker's timers to its signal.

    What is found out is found out on one thread, and told there by the debug hook. Where that
    thread is in somebody's handler and has not come back in time, or where there is none, nobody
    waits for it. The methods are called by the server's own thread.

    Args:
        run_id: The server's.
        call_debug_hook: Tells what is handed over to it; what was found of each worker.
        tell_picture: Called with the picture of each job that hangs.
        wake: Has the server look for inquests that are over.
    """

    def __init__(
        self,
        run_id: str,
        call_debug_hook: Callable[[dict[int, list[str]]], object],
        tell_picture: Callable[[Picture], object],
        wake: Callable[[], object],
    ) -> None:
        self._run_id = run_id
        self._call_debug_hook = call_debug_hook
        self._tell_picture = tell_picture
        self._wake = wake
        self._begin_anew()

    def _begin_anew(self) -> None:
        from elastic_timer._evidence.collector import Collector

        # Apart from the events, so that a listener that blocks costs nobody the evidence.
        self._reports = callbacks.Callbacks()
        self._collector = Collector(self._run_id, self._tell)
        self._inquests: dict[int, _Inquest] = {}
        self._is_blocked = False

    def __contains__(self, pid: int) -> bool:
        return pid in self._inquests

    def __len__(self) -> int:
        return len(self._inquests)

    def keep(self, expired: Mapping[int, Collection[str]]) -> None:
        """Forget those that are not about blocks in which workers are.

        Args:
            expired: The scopes of the expired timers, by worker.
        """
        self._inquests = {
            pid: each
            for pid, each in self._inquests.items()
            if not each.scopes.isdisjoint(expired.get(pid, ()))
        }

    def ask(
        self,
        expired: dict[int, list[str]],
        scopes: Mapping[int, Collection[str]],
        standings: Sequence[Standing],
        wanted: tuple[float, bool, tuple[str, ...]],
    ) -> None:
        """Have it found out, and told by the debug hook, what expired workers were doing.

        Args:
            expired: The JSON of their timers.
            scopes: Those of their timers.
            standings: Where they and the others of their jobs are.
            wanted: How many seconds stacks may take, whether with C frames, and where ranks wait.
        """
        if self._is_blocked:
            self._is_blocked = not self._reports.flush(0)
        until = _clock.monotonic() + wanted[0] + callbacks.PATIENCE
        begun = {
            pid: _Inquest(timers, frozenset(scopes[pid]), until) for pid, timers in expired.items()
        }
        self._inquests.update(begun)
        self._collector.ask(expired, standings, *wanted)
        if not self._reports.submit(self._collect) or self._is_blocked:
            self._end(begun.values())

    def has_to_come(self) -> bool:
        """Whether there is something to be found out that nobody has given up."""
        return not all(each.is_over() for each in self._inquests.values() if not each.is_concluded)

    def is_over(self, pid: int) -> bool:
        """Whether a worker's need not be waited for any more; so where there is none."""
        return pid not in self._inquests or self._inquests[pid].is_over()

    def is_concluded(self, pid: int) -> bool:
        """Whether `conclude` was called for a worker's; so where there is none."""
        return pid not in self._inquests or self._inquests[pid].is_concluded

    def conclude(self, pid: int, name: str) -> Mapping[str, object] | None:
        """Wait no longer for what there is to be found out of a worker; what was found.

        Args:
            pid: The worker.
            name: What the log calls it.
        """
        inquest = self._inquests[pid]
        if not (inquest.is_done or self._is_blocked):
            logger.warning("No evidence on worker %s in time; the watchdog goes on without", name)
            self._is_blocked = True
        # Another one: what comes too late must not end what the signal waits for from now on.
        self._inquests[pid] = dataclasses.replace(inquest, is_done=True, is_concluded=True)
        return inquest.evidence

    def wait_for(self, pid: int, callback: Callable[[], object], timeout: float) -> None:
        """Have a concluded one last until a callback has come back, on a thread of its own.

        Args:
            pid: The worker.
            callback: What it raises is logged.
            timeout: How many seconds it lasts at most.
        """
        inquest = self._inquests[pid]
        inquest.is_done, inquest.until = False, _clock.monotonic() + timeout

        def call() -> None:
            callbacks.run_contained(callback)
            self._end([inquest])

        if not callbacks.Callbacks().submit(call):
            inquest.is_done = True

    def forget(self, pid: int) -> Mapping[str, object] | None:
        """Be done with a worker's; what was found."""
        inquest = self._inquests.pop(pid, None)
        return None if inquest is None else inquest.evidence

    def wait_for_all(self) -> bool:
        """Wait until all that was asked for was found out; whether there was any."""
        if not self._inquests:
            return False
        until = max(inquest.until for inquest in self._inquests.values())
        self._reports.flush(until - _clock.monotonic())
        return True

    def next_due(self) -> float:
        """When the next one is over, in monotonic seconds; infinite where there is none."""
        due = [0.0 if each.is_done else each.until for each in self._inquests.values()]
        return min(due, default=float("inf"))

    def flush(self, patience: float) -> bool:
        """Wait until there is nothing more to tell, for so many seconds; whether that is so."""
        return self._reports.flush(patience)

    def close(self) -> None:
        """Forget all."""
        self._inquests = {}

    def forget_parent(self) -> None:
        """Begin anew in a forked child: the thread is missing there."""
        self._begin_anew()

    # On the thread that finds it out -------------------------------------------------------------

    def _collect(self) -> None:
        try:
            self._collector.work()
        except BaseException:
            self._end([each for each in list(self._inquests.values()) if not each.is_concluded])
            raise

    def _tell(self, findings: Findings) -> None:
        from elastic_timer._evidence.collector import handing_over

        for picture in findings.pictures:
            self._tell_picture(picture)
        told: object = None
        with handing_over(findings):
            try:
                told = self._call_debug_hook(findings.expired)
            # It may be anybody's, and the evidence is not worth a worker that is not reaped.
            except BaseException:
                logger.exception("Error telling of expired timers; the watchdog goes on")
        over = []
        for pid, timers in findings.expired.items():
            inquest = self._inquests.get(pid)
            # It may be one of a later expiry, or concluded without this.
            if inquest is not None and inquest.timers is timers and not inquest.is_concluded:
                # The hook may be somebody's own, or upstream's, which returns nothing.
                inquest.evidence = told.get(pid) if isinstance(told, dict) else None
                over.append(inquest)
        self._end(over)

    def _end(self, inquests: Collection[_Inquest]) -> None:
        for inquest in inquests:
            inquest.is_done = True
        self._wake()
