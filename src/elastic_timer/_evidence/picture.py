"""Who hangs a job: from what each of its ranks was doing to groups, suspects and their text. Pure.

The ranks of a job wait for each other. Where one hangs all of them overrun, and the first to be
noticed is mostly a victim. What sets one rank apart from the others tells more.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from elastic_timer._evidence.expiry import describe_stacks
from elastic_timer._evidence.facts import one_line
from elastic_timer._evidence.place import Place, describe_frames, place_of

if TYPE_CHECKING:
    from elastic_timer._evidence.expiry import Descendant
    from elastic_timer._evidence.stacks import Frame, ThreadStack

_STOPPED = {"T": "stopped", "t": "stopped by a debugger", "D": "stuck in the kernel"}

_MOST_GROUPS = 12
_MOST_SPANS = 8
_MOST_DETAILED = 3


class Job(TypedDict):
    """What makes workers peers: the same run id or, where there is none, the same world size."""

    run_id: str | None
    world_size: int | None
    restart_count: int | None


class Member(TypedDict):
    """One rank of a job, as the server of its host saw it.

    `scope` is the block of its most urgent timer, `None` where it is in no block; `seconds` for how
    long it has been in there; `passes` how often it has entered each block that any peer's timer
    was for. `state` is the letter of `/proc/PID/stat`, read before the stacks were taken.
    """

    host: str
    pid: int
    rank: int
    local_rank: int | None
    scope: str | None
    passes: dict[str, int]
    seconds: float | None
    expired: bool
    state: str | None
    stacks: list[ThreadStack] | None
    stacks_missing: str | None
    descendants: list[Descendant]


class Picture(TypedDict):
    """The members of one job on one host, before any of them was signalled."""

    job: Job
    members: list[Member]


class Group(TypedDict):
    """Ranks that are at the same place; `frames` are the few that tell it, innermost first."""

    ranks: list[int]
    hosts: list[str]
    in_collective: bool
    frames: list[Frame]
    stacks_missing: str | None
    scopes: list[str]
    passes: list[int]
    seconds: float | None


class Answer(TypedDict):
    """Who hangs a job, as far as can be told; can be written as JSON as it is.

    `groups` begin with those of the suspects. `missing` are the ranks that no picture has though
    the world size says that they exist. `reasons` are why the suspects are suspects; without any,
    why there are none.
    """

    job: Job
    hosts: list[str]
    ranks: list[int]
    missing: list[int]
    suspects: list[Member]
    reasons: list[str]
    groups: list[Group]


def who_hangs(pictures: Sequence[Picture], collectives: Collection[str] = ()) -> Answer:
    """Find groups and suspects in the pictures of one hang.

    Args:
        pictures: Those of all hosts that are known, of one job; several of one host in their order.
        collectives: Functions that wait for other ranks, besides those of `torch.distributed`: by
            their names, or as `FILE:FUNCTION` with the end of the file's path.

    Raises:
        ValueError: There is no member in any of them.
    """
    seen = [_Seen(member, _place(member, collectives)) for member in _members(pictures)]
    if not seen:
        raise ValueError("a picture without members tells nothing")
    suspects, reasons = _suspects(seen)
    job = pictures[0]["job"]
    ranks = sorted({one.member["rank"] for one in seen})
    missing = sorted(set(range(job["world_size"] or 0)).difference(ranks))
    if not suspects:
        reasons = [_why_none(seen, missing)]
    return {
        "job": job,
        "hosts": sorted({one.member["host"] for one in seen}),
        "ranks": ranks,
        "missing": missing,
        "suspects": [one.member for one in suspects],
        "reasons": reasons,
        "groups": _groups(seen, suspects),
    }


def describe(answer: Answer) -> str:
    """The answer as text: who, then one line a group, then what the suspects were doing."""
    hosts = len(answer["hosts"])
    groups = len(answer["groups"])
    lines = [
        f"{_count(len(answer['ranks']), 'rank')} on {_count(hosts, 'host')}, "
        f"{_count(groups, 'group')} of stacks",
        _conclusion(answer),
    ]
    rows = [(_ranks(group["ranks"]), _doing(group)) for group in answer["groups"][:_MOST_GROUPS]]
    width = max(len(ranks) for ranks, _ in rows)
    lines += [f"  {ranks:{width}}  {doing}" for ranks, doing in rows]
    for member in answer["suspects"][:_MOST_DETAILED]:
        lines.append(f"rank {member['rank']} ({member['host']}, pid {member['pid']}):")
        lines += [f"  {line}" for line in describe_stacks(member)]
        for descendant in member["descendants"]:
            lines.append(f"  descendant {descendant['pid']}: {descendant['command'] or ''}")
            lines += [f"    {line}" for line in describe_stacks(descendant)]
    return "\n".join(lines)


def fold_ranks(ranks: Iterable[int]) -> str:
    """Ranks as people write them: `0-2,4-7`."""
    return ",".join(_spans(ranks))


class _Seen(NamedTuple):
    member: Member
    place: Place | None

    @property
    def waits(self) -> bool:
        return self.place is not None and self.place.in_collective


def _members(pictures: Iterable[Picture]) -> list[Member]:
    """Each process once, by rank: from the first picture that has its stacks."""
    found: dict[tuple[str, int], Member] = {}
    for picture in pictures:
        for member in picture["members"]:
            known = found.setdefault((member["host"], member["pid"]), member)
            if known["stacks"] is None and member["stacks"] is not None:
                found[member["host"], member["pid"]] = member
    return sorted(
        found.values(), key=lambda member: (member["rank"], member["host"], member["pid"])
    )


def _place(member: Member, collectives: Collection[str]) -> Place | None:
    return None if member["stacks"] is None else place_of(member["stacks"], collectives)


def _suspects(seen: Sequence[_Seen]) -> tuple[list[_Seen], list[str]]:
    """The suspects by the first rule that has any, and why: by all rules that have the same."""
    rules = [_behind(seen), _stopped(seen), _not_waiting(seen), _elsewhere(seen)]
    if len(seen) == 2:
        rules.insert(0, rules.pop(2))
    for index, (suspects, _) in enumerate(rules):
        if suspects:
            return suspects, [reason for other, reason in rules[index:] if other == suspects]
    return [], []


_Verdict = tuple[list[_Seen], str]


def _behind(seen: Sequence[_Seen]) -> _Verdict:
    blocks = Counter(one.member["scope"] for one in seen if one.member["scope"] is not None)
    if not blocks:
        return [], ""
    most = max(blocks.values())
    block = min(name for name, count in blocks.items() if count == most)
    inside = Counter(
        one.member["passes"].get(block, 0) for one in seen if one.member["scope"] == block
    )
    usual = max(inside, key=lambda count: (inside[count], count))
    behind = [one for one in seen if one.member["passes"].get(block, 0) < usual]
    if not behind or 2 * len(behind) >= len(seen):
        return [], ""
    passes = sorted({one.member["passes"].get(block, 0) for one in behind})
    name = _short_scope(block)
    if passes == [0]:
        return behind, f"not in {name} at all, where the others are in pass {usual}"
    return behind, f"behind: pass {_listed(passes)} of {name}, where the others are in {usual}"


def _stopped(seen: Sequence[_Seen]) -> _Verdict:
    suspects = [one for one in seen if one.member["state"] in _STOPPED]
    if not suspects or len(suspects) == len(seen):
        return [], ""
    words = sorted({_STOPPED[str(one.member["state"])] for one in suspects})
    return suspects, f"{' or '.join(words)} (state {_listed_states(suspects)})"


def _not_waiting(seen: Sequence[_Seen]) -> _Verdict:
    suspects = [one for one in seen if one.place and not one.waits]
    if not any(one.waits for one in seen):
        return [], ""
    only = "one that does" if len(suspects) == 1 else "ones that do"
    return suspects, f"the only {only} not wait in a collective"


def _elsewhere(seen: Sequence[_Seen]) -> _Verdict:
    places = Counter(one.place.key for one in seen if one.place)
    if not places:
        return [], ""
    usual, count = places.most_common(1)[0]
    suspects = [one for one in seen if one.place and one.place.key != usual]
    if len(suspects) >= count:
        return [], ""
    return suspects, f"not where {count} of the {len(seen)} ranks are"


def _why_none(seen: Sequence[_Seen], missing: Sequence[int]) -> str:
    if missing and all(one.waits for one in seen):
        return (
            f"all {len(seen)} ranks here wait in a collective; the suspect is on another host: "
            "elastic-timer report EVENTS..."
        )
    if len({one.place and one.place.key for one in seen}) == 1:
        return "no suspect: all ranks are at the same place"
    return "no suspect: the groups are of equal right"


def _groups(seen: Sequence[_Seen], suspects: Sequence[_Seen]) -> list[Group]:
    by_place: dict[object, list[_Seen]] = {}
    for one in seen:
        by_place.setdefault((one in suspects, one.place and one.place.key), []).append(one)
    ordered = sorted(by_place.values(), key=lambda group: (group[0] not in suspects, len(group)))
    return [_group(group) for group in ordered]


def _group(seen: Sequence[_Seen]) -> Group:
    members = [one.member for one in seen]
    place = seen[0].place
    scopes = sorted({member["scope"] for member in members if member["scope"] is not None})
    seconds = [member["seconds"] for member in members if member["seconds"] is not None]
    return {
        "ranks": [member["rank"] for member in members],
        "hosts": sorted({member["host"] for member in members}),
        "in_collective": seen[0].waits,
        "frames": list(place.shown) if place else [],
        "stacks_missing": members[0]["stacks_missing"],
        "scopes": scopes,
        "passes": sorted(
            {member["passes"].get(scope, 0) for member in members if (scope := member["scope"])}
        ),
        "seconds": max(seconds, default=None),
    }


def _conclusion(answer: Answer) -> str:
    suspects = answer["suspects"]
    if not suspects:
        return answer["reasons"][0]
    reasons = "; ".join(answer["reasons"])
    if len(suspects) == 1:
        [one] = suspects
        return f"suspect: rank {one['rank']} ({one['host']}, pid {one['pid']}), {reasons}"
    hosts = sorted({member["host"] for member in suspects})
    where = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
    return f"suspects: {_ranks([member['rank'] for member in suspects])} ({where}), {reasons}"


def _doing(group: Group) -> str:
    told = describe_frames(group["frames"]) or f"no stacks: {group['stacks_missing']}"
    where = [f"in {_short_scope(scope)}" for scope in group["scopes"][:1]] or ["in no block"]
    if group["passes"]:
        where.append(f"pass {_listed(group['passes'])}")
    if group["seconds"] is not None:
        where.append(f"{group['seconds']:.1f} s")
    return f"{told}   {', '.join(where)}"


def _short_scope(scope: str) -> str:
    return one_line(os.path.basename(scope) or scope)


def _listed(numbers: Iterable[int]) -> str:
    return fold_ranks(numbers)


def _listed_states(seen: Iterable[_Seen]) -> str:
    return ", ".join(sorted({str(one.member["state"]) for one in seen}))


def _ranks(ranks: Collection[int]) -> str:
    spans = _spans(ranks)
    more = f" and {len(spans) - _MOST_SPANS} more" if len(spans) > _MOST_SPANS else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {','.join(spans[:_MOST_SPANS])}{more}"


def _spans(ranks: Iterable[int]) -> list[str]:
    spans: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ["-".join(map(str, span)) for span in spans]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
