"""Who hangs a job: from what each of its ranks was doing to groups, suspects and their text. Pure.

The ranks of a job wait for each other. Where one hangs all of them overrun, and the first to be
noticed is mostly a victim. What sets some ranks apart from the others tells more.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from elastic_timer._evidence.expiry import describe_stacks
from elastic_timer._evidence.facts import one_line
from elastic_timer._evidence.place import (
    Place,
    describe_frames,
    is_at_work,
    place_of,
    without_parents,
)

if TYPE_CHECKING:
    from elastic_timer._evidence.expiry import Descendant
    from elastic_timer._evidence.stacks import Frame, ThreadStack

_STOPPED = {
    "T": "stopped",
    "t": "stopped by a debugger",
    "D": "stuck in the kernel",
    "Z": "ended",
    "X": "ended",
}

# What is told of a job with thousands of ranks is to be on one screen.
_MOST_GROUPS = 12
_MOST_SUSPECTED = 8  # of these groups
_WIDEST_RANKS = 40
_WIDEST_MISSING = 400
_MOST_NAMED = 3
_WIDEST = 80
_MOST_LINES = 60  # on each suspect

# There is no larger job; whoever says so is not to have so much memory used up.
_MOST_RANKS = 1 << 20


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
    """Ranks that are at the same place.

    `frames` are the few that tell the place, innermost first, `None` where `stacks_missing` says
    why. `descendant` has those of a child process of a suspect that is at work, which may be what
    the suspect waits for. `seconds` is the longest that one of them has been in its block.
    """

    ranks: list[int]
    hosts: list[str]
    suspected: bool
    in_collective: bool
    frames: list[Frame] | None
    descendant: list[Frame] | None
    stacks_missing: str | None
    scopes: list[str]
    passes: list[int]
    seconds: float | None


class Answer(TypedDict):
    """Who hangs a job, as far as can be told; can be written as JSON as it is.

    `suspected` are the ranks under suspicion, `suspects` what is known of them: of a rank that no
    picture has, nothing. `reasons` say why they are suspects; without any, why there are none.
    `missing` are the ranks that no picture has though the world size says that they exist. Of the
    `groups` those of the suspects come first.
    """

    job: Job
    hosts: list[str]
    ranks: list[int]
    missing: list[int]
    suspected: list[int]
    suspects: list[Member]
    reasons: list[str]
    groups: list[Group]


class Seen(NamedTuple):
    """A member and its place.

    `waits` is whether it waits for other ranks, which is false where that is not known. `passes`
    are those of the blocks that its server tells of, which are named without their folders.
    """

    member: Member
    place: Place | None
    waits: bool
    passes: dict[str, int]

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is known not to wait for other ranks."""
        return self.place is not None and not self.waits


def who_hangs(
    pictures: Sequence[Picture], collectives: Collection[str] = (), *, offline: bool = False
) -> Answer:
    """Find groups and suspects in the pictures of one hang.

    Args:
        pictures: Those of all hosts that are known, of one job; several of one host in their order.
        collectives: Functions that wait for other ranks, besides those of `torch.distributed`: by
            their names, or as `FILE:FUNCTION` with the end of the file's path.
        offline: Whether these are all pictures that there are. Otherwise there may be other hosts.

    Raises:
        ValueError: There is no member in any of them.
    """
    seen = look(pictures, collectives)
    if not seen:
        raise ValueError("there are no members in these pictures")
    job = pictures[0]["job"]
    ranks = sorted({one.member["rank"] for one in seen})
    missing = sorted(set(range(min(job["world_size"] or 0, _MOST_RANKS))).difference(ranks))
    suspects, reasons = _suspects(seen)
    suspected = [seen[index].member["rank"] for index in sorted(suspects)]
    if not suspects and missing and all(one.waits for one in seen):
        suspected, reasons = _suspects_missing(seen, missing, offline)
    elif not suspects:
        reasons = [_why_none(seen)]
    return {
        "job": job,
        "hosts": sorted({one.member["host"] for one in seen}),
        "ranks": ranks,
        "missing": missing,
        "suspected": suspected,
        "suspects": [seen[index].member for index in sorted(suspects)],
        "reasons": reasons,
        "groups": _groups(seen, suspects),
    }


def look(pictures: Iterable[Picture], collectives: Collection[str] = ()) -> list[Seen]:
    """Each process of some pictures once, by rank: as the first picture has it with its stacks."""
    # By the rank as well: containers of one host's name may have the same pids.
    members: dict[tuple[int, str, int], Member] = {}
    # Of a block in which nobody was whom its server knows, it is not known how often a rank has
    # entered it. There may be several servers on a host.
    blocks: dict[tuple[int, str, int], set[str]] = {}
    for picture in pictures:
        known: dict[str, set[str]] = {}
        for member in picture["members"]:
            process = member["rank"], member["host"], member["pid"]
            first = members.setdefault(process, member)
            told = known.setdefault(member["host"], set())
            told.update(map(short_scope, [*member["passes"], *filter(None, [member["scope"]])]))
            blocks.setdefault(process, told)
            if first["stacks"] is None and member["stacks"] is not None:
                stacks = member["stacks"], member["descendants"]
                members[process] = _with_stacks(first, *stacks)
    found = sorted(members.items(), key=lambda item: item[0])
    places = [
        place_of(member["stacks"], collectives) if member["stacks"] else None for _, member in found
    ]
    # What frames in C tell of one holds for those at the same place that have none.
    waiting = {place.key for place in places if place and place.in_collective and place.is_sure}
    return [
        Seen(
            member,
            place,
            place is not None and _waits(place, waiting),
            _passes(member, blocks[process]),
        )
        for (process, member), place in zip(found, places, strict=True)
    ]


def _with_stacks(
    member: Member, stacks: list[ThreadStack], descendants: list[Descendant]
) -> Member:
    return {**member, "stacks": stacks, "stacks_missing": None, "descendants": descendants}


def _passes(member: Member, blocks: Iterable[str]) -> dict[str, int]:
    passes = dict.fromkeys(blocks, 0)
    for scope, count in member["passes"].items():
        passes[short_scope(scope)] += count
    return passes


def _waits(place: Place, waiting: Collection[tuple[str, ...]]) -> bool:
    by_others = not place.is_sure and place.is_idle and place.key in waiting
    return place.in_collective or by_others


def describe(answer: Answer, *, missing: str | None = None, details: int = _MOST_LINES) -> str:
    """The answer as text: who, then one line a group, then what the suspects were doing.

    Args:
        answer: What `who_hangs` has found.
        missing: What to say before the ranks that no picture has; `None` for nothing.
        details: How many lines there may be on what each of the suspects was doing.
    """
    groups = answer["groups"]
    lines = [
        f"{_count(len(answer['ranks']), 'rank')} on {_count(len(answer['hosts']), 'host')}, "
        f"{_count(len(groups), 'group')} of stacks",
        _conclusion(answer),
    ]
    suspected = [group for group in groups if group["suspected"]][:_MOST_SUSPECTED]
    shown = [*suspected, *(group for group in groups if not group["suspected"])][:_MOST_GROUPS]
    rows = [(_ranks(group["ranks"]), *_doing(group)) for group in shown]
    wide, wider = (max(len(row[column]) for row in rows) for column in (0, 1))
    wider = min(wider, _WIDEST)
    lines += [f"  {ranks:{wide}}  {what:{wider}}   {where}".rstrip() for ranks, what, where in rows]
    if more := len(groups) - len(shown):
        lines.append(f"  and {_count(more, 'group')} more")
    if missing and answer["missing"]:
        lines.append(f"  {missing} {_ranks(answer['missing'], _WIDEST_MISSING)}")
    # One of each group: the others do the same.
    first = {group["ranks"][0] for group in suspected}
    detailed = [member for member in answer["suspects"] if member["rank"] in first]
    for member in detailed[:_MOST_NAMED]:
        lines += _details(member, details)
    return "\n".join(lines)


def fold_ranks(ranks: Iterable[int]) -> str:
    """Ranks as people write them: `0-2,4-7`."""
    return ",".join(_spans(ranks))


def short_scope(scope: str) -> str:
    """A scope without the folder of its file."""
    return one_line(os.path.basename(scope) or scope)


# Suspects: by their indices, and why. -------------------------------------------------------------

_Verdict = tuple[frozenset[int], str]
_NOBODY: _Verdict = frozenset(), ""


def _suspects(seen: Sequence[Seen]) -> tuple[frozenset[int], list[str]]:
    """The suspects by the first rule that has any, and why: by it and others that name the same."""
    rules = [_behind(seen), _stopped(seen), _not_waiting(seen)]
    if len(seen) == 2:
        # Neither is fewer than the other; what one waits for is what the other does not do.
        rules.insert(0, rules.pop())
    for index, (found, why) in enumerate(rules):
        if found:
            # One that waits for others is no more than another victim.
            suspects = frozenset(one for one in found if not _is_victim(seen[one])) or found
            return suspects, [why, *(also for same, also in rules[index + 1 :] if same == suspects)]
    found, why = _elsewhere(seen)
    if not found:
        found, why = _by_path(seen)
    return found, [why]


def _is_victim(one: Seen) -> bool:
    return one.waits and one.member["state"] not in _STOPPED


def _fewer(seen: Sequence[Seen], found: Collection[int]) -> bool:
    """Whether these are so few that they, and not the others, are the odd ones."""
    return 0 < 2 * len(found) < len(seen)


def _behind(seen: Sequence[Seen]) -> _Verdict:
    """Those who have not reached the pass of the others, or are in no block at all."""
    scopes = [short_scope(one.member["scope"] or "") for one in seen]
    blocks = Counter(scope for scope in scopes if scope)
    if not blocks:
        return _NOBODY
    [(block, _)] = blocks.most_common(1)
    inside = Counter(
        one.passes[block] for one, scope in zip(seen, scopes, strict=True) if scope == block
    )
    usual = max(inside, key=lambda count: (inside[count], count))
    behind = frozenset(
        index for index, one in enumerate(seen) if one.passes.get(block, usual) < usual
    )
    if _fewer(seen, behind):
        reached = sorted({seen[index].passes[block] for index in behind})
        if reached == [0]:
            return behind, f"not in {block} at all, where the others are in pass {usual}"
        told = fold_ranks(reached)
        return behind, f"behind: pass {told} of {block}, where the others are in pass {usual}"
    # Somebody outside who has been in it may as well be further on than those inside, unless they
    # wait for him, and he for nobody; a server knows no block of a rank that another one watches.
    has_stacks = any(one.place for one in seen)
    if has_stacks and not any(one.waits for one in seen):
        return _NOBODY
    outside = frozenset(
        index
        for index, one in enumerate(seen)
        if not scopes[index] and (one.is_elsewhere or not has_stacks)
    )
    if _fewer(seen, outside):
        return outside, f"not in {block}, where the others are"
    return _NOBODY


def _stopped(seen: Sequence[Seen]) -> _Verdict:
    """Those that do nothing at all."""
    found = frozenset(index for index, one in enumerate(seen) if one.member["state"] in _STOPPED)
    if not found or len(found) == len(seen):
        return _NOBODY
    states = sorted({str(seen[index].member["state"]) for index in found})
    return found, " or ".join(f"{_STOPPED[state]} (state {state})" for state in states)


def _not_waiting(seen: Sequence[Seen]) -> _Verdict:
    """Those for whom the others wait."""
    found = frozenset(index for index, one in enumerate(seen) if one.is_elsewhere)
    if not found or not any(one.waits for one in seen):
        return _NOBODY
    one = "one that does" if len(found) == 1 else "ones that do"
    return found, f"the only {one} not wait in a collective"


def _elsewhere(seen: Sequence[Seen]) -> _Verdict:
    """Those that are at other places than most are."""
    keys = {index: one.place.key for index, one in enumerate(seen) if one.place}
    found = _odd(keys)
    usual = len(keys) - len(found)
    if found and all(seen[index].waits for index in keys):
        return found, f"in another collective than {usual} of the {len(keys)} ranks"
    return found, f"elsewhere than {usual} of the {len(keys)} ranks"


def _by_path(seen: Sequence[Seen]) -> _Verdict:
    """Those that came by another way to where all are; the first rank often does, and may."""
    paths = {index: one.place.path for index, one in enumerate(seen) if one.place}
    found = _odd(paths)
    if all(0 in (seen[index].member["rank"], seen[index].member["local_rank"]) for index in found):
        return _NOBODY
    return found, f"called from elsewhere than {len(paths) - len(found)} of the {len(paths)} ranks"


def _odd(places: dict[int, tuple[str, ...]]) -> frozenset[int]:
    """Those that are not where more than half are."""
    counted = Counter(places.values())
    usual = max(counted, key=lambda place: counted[place], default=None)
    if usual is None or 2 * counted[usual] <= len(places):
        return frozenset()
    return frozenset(index for index, place in places.items() if place != usual)


def _suspects_missing(
    seen: Sequence[Seen], missing: Sequence[int], offline: bool
) -> tuple[list[int], list[str]]:
    """What follows where all that are known wait: somebody else lets them."""
    here = "that are known" if offline else "here"
    all_wait = f"all {_count(len(seen), 'rank')} {here} wait in a collective"
    where = "on another host"
    if len(seen) == 1:
        where = "another rank"  # It may be on this host, with a server of its own.
        all_wait = f"the only rank {here} waits in a collective".replace("that are", "that is")
    absent = list(missing) if offline else _absent_here(seen, missing)
    if offline:
        return absent, [f"of which no file tells; {all_wait}"]
    if absent:
        return absent, [f"which should be here: ended, or in no block so far; {all_wait}"]
    return [], [f"{all_wait}; the suspect is {where}: elastic-timer report EVENTS..."]


def _absent_here(seen: Sequence[Seen], missing: Sequence[int]) -> list[int]:
    """Of the missing ranks those that must be on a host from which there is a picture."""
    hosts: dict[str, list[Member]] = {}
    for one in seen:
        hosts.setdefault(one.member["host"], []).append(one.member)
    if len(missing) < min(map(len, hosts.values())):
        return list(missing)  # Too few for a host as these are.
    absent: set[int] = set()
    for members in hosts.values():
        first = {
            member["rank"] - member["local_rank"]
            for member in members
            if member["local_rank"] is not None
        }
        if len(first) == 1:  # The ranks of a host follow each other, as torchrun has it.
            absent.update(range(first.pop(), max(member["rank"] for member in members)))
    return sorted(absent.intersection(missing))


def _why_none(seen: Sequence[Seen]) -> str:
    known = [one for one in seen if one.place]
    if not known:
        return "no suspect: there are no stacks"
    if len({one.place.key for one in known if one.place}) > 1:
        return "no suspect: as many ranks are at one place as at another"
    if len(known) < len(seen):
        return "no suspect: all ranks of which there are stacks are at the same place"
    return "no suspect: all ranks are at the same place"


# Groups and text ----------------------------------------------------------------------------------


def _groups(seen: Sequence[Seen], suspects: Collection[int]) -> list[Group]:
    """The ranks by their places, suspects first, then the larger groups."""
    found: dict[tuple[bool, object], list[Seen]] = {}
    for index, one in enumerate(seen):
        place = one.place.key if one.place else one.member["stacks_missing"]
        found.setdefault((index not in suspects, place), []).append(one)
    ordered = sorted(found, key=lambda group: (group[0], -len(found[group])))
    return [_group(found[group], not group[0]) for group in ordered]


def _group(seen: Sequence[Seen], suspected: bool) -> Group:
    members = [one.member for one in seen]
    place = seen[0].place
    scopes = {short_scope(member["scope"]) for member in members if member["scope"]}
    passes = {one.passes[short_scope(one.member["scope"])] for one in seen if one.member["scope"]}
    at_work = next((_at_work(member) for member in members if suspected and _at_work(member)), [])
    descendant = place_of(at_work[0][0]["stacks"] or []) if at_work else None
    return {
        "ranks": [member["rank"] for member in members],
        "hosts": sorted({member["host"] for member in members}),
        "suspected": suspected,
        "in_collective": seen[0].waits,
        "frames": place.shown if place else None,
        "descendant": descendant.shown if descendant else None,
        "stacks_missing": members[0]["stacks_missing"],
        "scopes": sorted(scopes),
        "passes": sorted(passes),
        "seconds": max((m["seconds"] for m in members if m["seconds"] is not None), default=None),
    }


def _conclusion(answer: Answer) -> str:
    """The suspects and why, on one line."""
    suspected, suspects = answer["suspected"], answer["suspects"]
    reasons = "; ".join(answer["reasons"])
    if not suspected:
        return reasons
    if not suspects:
        names = _ranks(suspected)
    elif len(suspects) <= _MOST_NAMED:
        names = ", ".join(
            f"rank {one['rank']} ({one['host']}, pid {one['pid']})" for one in suspects
        )
    else:
        hosts = sorted({member["host"] for member in suspects})
        more = f" and {len(hosts) - _MOST_NAMED} more" if len(hosts) > _MOST_NAMED else ""
        names = f"{_ranks(suspected)} ({', '.join(hosts[:_MOST_NAMED])}{more})"
    return f"{'suspect' if len(suspected) == 1 else 'suspects'}: {names}, {reasons}"


def _doing(group: Group) -> tuple[str, str]:
    """What the ranks of a group do, and in which block."""
    told = f"no stacks: {group['stacks_missing'] or 'no thread of it runs Python code'}"
    if group["frames"]:
        told = describe_frames(group["frames"])
    if group["descendant"]:
        told += f"; its child: {describe_frames(group['descendant'])}"
    where = "in no block"
    if group["scopes"]:
        scope, *others = group["scopes"]
        where = f"in {scope}" + (f" and {len(others)} more" if others else "")
        where += f", pass {_listed(group['passes'])}"
    if group["seconds"] is not None:
        where += f", {group['seconds']:.1f} s"
    return told, where


def _details(member: Member, most: int) -> list[str]:
    """All that is known of a suspect; children that wait for work left out."""
    lines = describe_stacks(member)
    for alike in _at_work(member):
        pids = ", ".join(str(descendant["pid"]) for descendant in alike)
        noun = "descendant" if len(alike) == 1 else "descendants"
        lines.append(f"{noun} {pids}: {alike[0]['command'] or ''}")
        stacks = without_parents(alike[0]["stacks"] or [])
        lines += [
            f"  {line}" for line in describe_stacks({"stacks": stacks, "stacks_missing": None})
        ]
    if len(lines) > most:
        lines[most:] = [f"and {_count(len(lines) - most, 'line')} more"]
    state = f", state {member['state']}" if member["state"] else ""
    title = f"rank {member['rank']} ({member['host']}, pid {member['pid']}{state}):"
    return [title, *(f"  {line}" for line in lines)]


def _at_work(member: Member) -> list[list[Descendant]]:
    """The child processes that do something, those at the same place together."""
    found: dict[object, list[Descendant]] = {}
    for descendant in member["descendants"]:
        if is_at_work(descendant["stacks"]):
            place = place_of(descendant["stacks"] or [])
            found.setdefault(place and place.key, []).append(descendant)
    return list(found.values())


def _ranks(ranks: Collection[int], widest: int = _WIDEST_RANKS) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {_listed(ranks, widest)}"


def _listed(numbers: Iterable[int], widest: int = _WIDEST_RANKS) -> str:
    """Numbers folded; those that the line has no room for are counted."""
    spans = _spans(numbers)
    text = ",".join(spans)
    if len(text) > widest:
        text = text[:widest].rpartition(",")[0]
        text += f" and {len(spans) - text.count(',') - 1} more"
    return text


def _spans(numbers: Iterable[int]) -> list[str]:
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ["-".join(map(str, span)) for span in spans]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
