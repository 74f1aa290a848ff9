"""What expired workers and their peers were doing: looked at together, told case by case."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import json
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from elastic_timer import _clock
from elastic_timer._evidence.expiry import Descendant, Evidence
from elastic_timer._evidence.facts import (
    Facts,
    descendants_of,
    one_line,
    parent_of,
    processes_beside,
    read_facts,
)
from elastic_timer._evidence.picture import Member, Picture, describe, who_hangs
from elastic_timer._evidence.stacks import Dumps, Stacks, can_pause, missing
from elastic_timer._server.job import Job, Standing, job_of, ranks
from elastic_timer._server.process import environment_of, refusal

_MOST_DESCENDANTS = 32  # of one worker

# So long one picture of a job serves all who expire in it: they wait for each other, and overrun
# one after the other. In seconds.
_PICTURE_SERVES = 5.0

# How long it may take to find the ranks of a job that never asked for a timer, in seconds.
_SEARCH = 0.05

# How soon it is noticed, while dumps are taken, that there are others to look at, in seconds.
_ATTENTION = 0.005

_OF_EXPIRED, _OF_PEERS, _NATIVE, _OF_DESCENDANTS = range(4)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found out about workers that expired.

    Attributes:
        expired: Pid to the JSON of its expired timers.
        evidence: What each of them was doing, in the same order.
        pictures: Of the jobs that are not told of yet.
        answers: Who hangs each of these jobs, as text.
        told: The pids of those of whom such an answer has all that is to be read, now or before.
    """

    expired: dict[int, list[str]]
    evidence: dict[int, Evidence]
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    answers: list[str] = dataclasses.field(default_factory=list)
    told: set[int] = dataclasses.field(default_factory=set)


class _Request(NamedTuple):
    expired: Mapping[int, list[str]]
    standings: Sequence[Standing]
    timeout: float
    native: bool
    collectives: Collection[str]


_handed_over: contextvars.ContextVar[Findings | None] = contextvars.ContextVar(
    "elastic-timer findings", default=None
)


@contextlib.contextmanager
def handing_over(findings: Findings) -> Iterator[None]:
    """Have `collect`, called meanwhile in this context, return these."""
    token = _handed_over.set(findings)
    try:
        yield
    finally:
        _handed_over.reset(token)


def collect(
    run_id: str,
    expired: Mapping[int, list[str]],
    timeout: float,
    native: bool = False,
    collectives: Collection[str] = (),
) -> Findings:
    """The evidence on expired workers: what a server has handed over, or what is gathered now.

    Args:
        run_id: The run of the server that found the timers expired.
        expired: Pid to the JSON of its expired timers.
        timeout: Seconds for the stacks of all workers together; 0 for none.
        native: Whether to have C frames too.
        collectives: Functions in which ranks wait for each other, besides those known.
    """
    handed = _handed_over.get()
    if handed is not None and expired.keys() <= handed.evidence.keys():
        return dataclasses.replace(handed, evidence={pid: handed.evidence[pid] for pid in expired})
    found: dict[int, Evidence] = {}
    collector = Collector(run_id, lambda findings: found.update(findings.evidence))
    collector.ask(expired, [], timeout, native, collectives)
    collector.work()
    return Findings(dict(expired), {pid: found[pid] for pid in expired})


class _Look:
    """One process that was looked at."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        # The facts come first: py-spy pauses the process, and that would show in its state.
        self.facts: Facts = read_facts(pid)
        self.stacks: Stacks = missing("")
        self.native: Stacks | None = None
        self.descendants: list[_Look] = []

    def best(self) -> Stacks:
        """The stacks with C frames, or those without where there are no others."""
        return self.native or self.stacks

    def told_as_descendants(self) -> list[Descendant]:
        return [
            {
                "pid": look.pid,
                "command": look.facts["command"],
                "state": look.facts["state"],
                "system_call": look.facts["system_call"],
                **look.best(),
            }
            for look in self.descendants
        ]


class _Case:
    """Workers that are looked at together: one alone, or those of a job.

    Args:
        members: Who is looked at, those first that expired.
        job: What they have in common. None without one.
        collectives: Functions in which ranks wait for each other, besides those known.
    """

    def __init__(
        self,
        members: Sequence[Standing],
        job: Job | None = None,
        collectives: Collection[str] = (),
    ) -> None:
        self.members = {member.pid: member for member in members}
        self.job = job
        self.collectives = collectives
        self.begun = _clock.monotonic()
        self.looks: dict[int, _Look] = {}
        # How many dumps are not there yet.
        self.outstanding = 0
        # Those who wait for it: the JSON of their timers, and when they were found expired (epoch).
        self.waiting: dict[int, tuple[list[str], float]] = {}
        # Of whom its answer has told all that is to be read; None before that.
        self.told: set[int] | None = None

    def is_complete(self) -> bool:
        return self.outstanding == 0

    def serves(self, standing: Standing) -> bool:
        """Whether the worker is where it was when this began."""
        then = self.members.get(standing.pid)
        return (
            then is not None
            and (then.block, then.deadline) == (standing.block, standing.deadline)
            and _clock.monotonic() - self.begun < _PICTURE_SERVES
        )


class Collector:
    """Looks at expired workers and their peers, for one server.

    All but `ask` is called on one thread at a time.

    Args:
        run_id: The run of the server.
        report: Called with what was found as soon as it is there, for each worker once.
    """

    def __init__(self, run_id: str, report: Callable[[Findings], object]) -> None:
        self._run_id = run_id
        self._report = report
        self._asked: deque[_Request] = deque()
        self._open: list[_Case] = []
        self._pictures: dict[Job, _Case] = {}

    def ask(
        self,
        expired: Mapping[int, list[str]],
        standings: Sequence[Standing],
        timeout: float,
        native: bool = False,
        collectives: Collection[str] = (),
    ) -> None:
        """Have workers looked at by `work`; from any thread, also while that is under way.

        Args:
            expired: Pid to the JSON of its expired timers, of those found expired at one moment.
            standings: Where they and the others of their jobs are.
            timeout: Seconds for the stacks of all of them together; 0 for none.
            native: Whether to have C frames too.
            collectives: Functions in which ranks wait for each other, besides those known.
        """
        self._asked.append(_Request(expired, standings, timeout, native, collectives))

    def work(self) -> None:
        """Look at all that was asked for, and report each case when it is complete."""
        try:
            with contextlib.closing(Dumps()) as dumps:
                while self._asked or self._open:
                    while self._asked:
                        self._begin(self._asked.popleft(), dumps)
                    self._report_complete()
                    if self._open:
                        for take, stacks in dumps.wait(_ATTENTION):
                            take(stacks)
                    self._report_complete()
        except BaseException:
            # What is not complete never will be.
            self._open, self._pictures = [], {}
            raise

    def _begin(self, request: _Request, dumps: Dumps) -> None:
        now = _clock.epoch()
        standings = {standing.pid: standing for standing in request.standings}
        begun: list[_Case] = []
        for pid, timers in request.expired.items():
            standing = standings.get(pid) or _unknown(pid)
            case = self._case_of(standing, request)
            if not case.looks:
                case.looks = {member: _Look(member) for member in case.members}
                begun.append(case)
                self._open.append(case)
            elif case not in self._open:
                self._open.append(case)
            case.waiting[pid] = timers, now
        deadline = _clock.monotonic() + request.timeout if request.timeout > 0 else None
        everybody = {pid for case in self._open for pid in case.members}
        for case in begun:
            self._order(case, request, everybody, deadline, dumps)

    def _case_of(self, standing: Standing, request: _Request) -> _Case:
        if standing.job is None or not standing.is_in_a_job():
            return _Case([standing])
        recent = self._pictures.get(standing.job)
        if recent is not None:
            if recent.serves(standing):
                return recent
            if _clock.monotonic() - recent.begun < _PICTURE_SERVES:
                # It has moved on since; its peers' stacks are not taken once more for that.
                return _Case([standing])
        members = _members(standing, request)
        if standing.pid not in members:
            return _Case([standing])
        first = [pid for pid in members if pid in request.expired]
        others = [pid for pid in members if pid not in request.expired]
        ordered = [members[pid] for pid in first + others]
        case = _Case(ordered, standing.job, request.collectives)
        self._pictures = {
            job: picture
            for job, picture in self._pictures.items()
            if _clock.monotonic() - picture.begun < _PICTURE_SERVES
        }
        self._pictures[standing.job] = case
        return case

    def _order(
        self,
        case: _Case,
        request: _Request,
        but: Collection[int],
        deadline: float | None,
        dumps: Dumps,
    ) -> None:
        def order(look: _Look, urgency: int) -> None:
            def take(stacks: Stacks) -> None:
                case.outstanding -= 1
                look.stacks = stacks
                # Not before: of two that want to pause a process at once one fails.
                if request.native and stacks["stacks"] and can_pause(look.facts["state"]):
                    case.outstanding += 1
                    native = max(urgency, _NATIVE)
                    dumps.order(take_native, look.pid, None, deadline, native, native=True)

            def take_native(stacks: Stacks) -> None:
                case.outstanding -= 1
                if stacks["stacks"]:
                    look.native = stacks

            case.outstanding += 1
            dumps.order(take, look.pid, look.facts["state"], deadline, urgency)

        for pid, look in case.looks.items():
            order(look, _OF_EXPIRED if pid in request.expired else _OF_PEERS)
            # None where no stacks are wanted: that asks for the shortest way to the kill. The
            # children of init are everybody's, those of the server are all of its workers.
            if deadline is not None and refusal(pid) is None:
                found = descendants_of(pid, but, _MOST_DESCENDANTS)
                look.descendants = [_Look(child) for child in found]
            for descendant in look.descendants:
                order(descendant, _OF_DESCENDANTS)

    def _report_complete(self) -> None:
        complete = [case for case in self._open if case.is_complete()]
        if not complete:
            return
        self._open = [case for case in self._open if not case.is_complete()]
        findings = Findings({}, {})
        for case in complete:
            for pid, (timers, now) in case.waiting.items():
                findings.evidence[pid] = self._evidence(case, pid, timers, now)
                findings.expired[pid] = timers
            if case.job is not None:
                if case.told is None:
                    picture = _picture(case, case.job)
                    answer, case.told = _answer(case, picture)
                    findings.pictures.append(picture)
                    findings.answers.append(answer)
                findings.told.update(case.told.intersection(case.waiting))
            case.waiting = {}
        self._report(findings)

    def _evidence(self, case: _Case, pid: int, timers: list[str], now: float) -> Evidence:
        given = sorted(map(_expiration_and_scope, timers))
        look, standing = case.looks[pid], case.members[pid]
        return {
            "run_id": self._run_id,
            "pid": pid,
            "rank": standing.rank,
            "local_rank": standing.local_rank,
            "scopes": [scope for _, scope in given],
            "seconds_late": max(0.0, now - given[0][0]) if given else 0.0,
            **look.facts,
            **look.best(),
            "descendants": look.told_as_descendants(),
        }


def _unknown(pid: int) -> Standing:
    """A worker that only its environment tells of."""
    return Standing(pid, *ranks(environment_of(pid)), job=None)


def _members(standing: Standing, request: _Request) -> dict[int, Standing]:
    """One process for each rank of a worker's job, by pid; those that sent nothing as well."""
    here = [each for each in request.standings if each.job == standing.job and each.is_in_a_job()]
    parents = {each.pid: parent_of(each.pid) for each in here}
    ranks_of = {each.pid: each.rank for each in here}
    home = parents[standing.pid]
    by_rank: dict[int | None, Standing] = {}
    # Two jobs may look alike; then those of one have one parent.
    for each in sorted(here, key=lambda each: parents[each.pid] != home):
        # What a worker has started bears its rank, and is its descendant.
        if ranks_of.get(parents[each.pid]) != each.rank:
            by_rank.setdefault(each.rank, each)
    job = standing.job
    if job is not None and len(by_rank) != job.world_size and not _is_a_ranks(job):
        # Of a rank the first one found is the one that has started the others.
        for stranger in _strangers(standing, job, set(by_rank)):
            by_rank.setdefault(stranger.rank, stranger)
    return {each.pid: each for _, each in sorted(by_rank.items(), key=lambda item: item[0] or 0)}


def _is_a_ranks(job: Job) -> bool:
    """Whether this server was started as a part of one rank of a job, as below `srun`.

    Then each has its own, and what bears another's number is its server in the first place.
    """
    environment = environment_of(os.getpid())
    return ranks(environment)[0] is not None and job_of(environment) == job


def _strangers(standing: Standing, job: Job, known: Collection[int | None]) -> list[Standing]:
    """Processes of a job's other ranks on this host, which the server has never heard of."""
    found: list[Standing] = []
    for pid in processes_beside(standing.pid, _clock.monotonic() + _SEARCH):
        environment = environment_of(pid)
        rank, local_rank = ranks(environment)
        if rank is not None and rank not in known and job_of(environment) == job:
            found.append(Standing(pid, rank, local_rank, job))
    return found


def _picture(case: _Case, job: Job) -> Picture:
    blocks = {member.block for member in case.members.values()} - {None}
    host = os.uname().nodename
    members: list[Member] = [
        {
            "host": host,
            "pid": pid,
            "rank": standing.rank or 0,
            "local_rank": standing.local_rank,
            "scope": standing.block,
            "passes": {block: standing.passes.get(block, 0) for block in sorted(map(str, blocks))},
            "seconds": standing.seconds,
            "expired": standing.expired or pid in case.waiting,
            "state": case.looks[pid].facts["state"],
            **case.looks[pid].best(),
            "descendants": case.looks[pid].told_as_descendants(),
        }
        for pid, standing in case.members.items()
    ]
    return {
        "job": {
            "run_id": job.run_id,
            "world_size": job.world_size,
            "restart_count": job.restart_count,
        },
        "members": sorted(members, key=lambda member: member["rank"]),
    }


def _answer(case: _Case, picture: Picture) -> tuple[str, set[int]]:
    """Who hangs a job, as text, and of whom nothing more has to be read."""
    answer = who_hangs([picture], case.collectives)
    # Of the suspects it has the details.
    told = set(case.members)
    if not answer["suspects"]:
        # Nobody stands out: one of them shows where they are.
        told.discard(next(iter(case.members)))
    return describe(answer), told


def _expiration_and_scope(request: str) -> tuple[float, str]:
    """Of a request as JSON; of any other text, that text as a scope whose time is not known."""
    try:
        fields = json.loads(request)
        return float(fields["expiration_time"]), str(fields["scope_id"])
    except (ValueError, KeyError, TypeError):
        return math.inf, one_line(str(request))
