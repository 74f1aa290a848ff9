"""The goals: what was asked for, what a run shows, met or not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from tests.benchmarks import (
    burst,
    cost,
    held_up,
    idle,
    imports,
    lateness,
    many_hosts,
    mass,
    status,
)
from tests.benchmarks.harness import OURS, Results, Series
from tests.benchmarks.peers import FLOOR, NVRX, TORCH


@dataclass
class Goal:
    """One row of the closing table; `met` is None where there is nothing to reach."""

    work: str
    goal: str
    figure: str
    met: bool | None


def judge(results: Results) -> list[Goal]:
    """Compare a run with the goals."""
    return [
        *_costs(results),
        *_reaps(results),
        *_status(results),
        *_load(results),
        *_report(results),
        *_weights(results),
    ]


def _costs(results: Results) -> Iterator[Goal]:
    fifo_default = results.find(cost.FIFO_DEFAULT, OURS, cost.DEPTH)
    fifo_explicit = results.find(cost.FIFO_EXPLICIT, OURS, cost.DEPTH)
    queue_default = results.find(cost.QUEUE_DEFAULT, OURS, cost.DEPTH)
    for work, ours, peer, times in (
        (cost.FIFO_DEFAULT, fifo_default, TORCH, 1 / 50),
        (cost.FIFO_EXPLICIT, fifo_explicit, TORCH, 1 / 3),
        (cost.FIFO_EXPLICIT, fifo_explicit, FLOOR, 1.5),
        (cost.QUEUE_DEFAULT, queue_default, TORCH, 1 / 40),
        (cost.OTHER, fifo_explicit, NVRX, 1 / 12),
    ):
        theirs = results.find(work, peer, cost.DEPTH)
        title = work.title if work != cost.OTHER else cost.FIFO_EXPLICIT.title
        yield _ratio(results, ours, theirs, title, peer, times)
    if sent := results.find(cost.QUEUE_EXPLICIT, OURS, cost.DEPTH):
        figure = f"{sent.median:.1f} us"
        yield Goal(sent.work.title, "at most 12 us", figure, sent.median <= 12)
    if sent := results.find(cost.SENT_AT_RETURN, OURS):
        figure = f"{sum(sent.samples):.0f} of {len(sent.samples)}"
        yield Goal(sent.work.title, "always", figure, min(sent.samples) == 1)


def _ratio(
    results: Results, ours: Series | None, theirs: Series | None, work: str, peer: str, times: float
) -> Goal:
    limit = f"{times:g} times" if times > 1 else f"1/{1 / times:.0f} of"
    goal = f"at most {limit} {peer}"
    if ours is None or theirs is None:
        return Goal(work, goal, results.skipped.get(peer, "not measured"), None)
    # Round by round: what slows the machine down for a while slows down both.
    pairs = zip(ours.samples, theirs.samples, strict=True)
    ratio = statistics.median(mine / other for mine, other in pairs)
    shown = f"{ratio:.2f} times" if times > 1 else f"1/{1 / ratio:.1f}"
    figure = f"{shown} ({ours.median:.1f} us, {theirs.median:.1f} us)"
    return Goal(work, goal, figure, ratio <= times)


def _reaps(results: Results) -> Iterator[Goal]:
    for kind in ("file", "queue"):
        for interval in lateness.INTERVALS:
            late = results.find(lateness.LATENESS, f"{OURS}, {kind}", interval)
            unreaped = results.find(lateness.UNREAPED, f"{OURS}, {kind}", interval)
            if unreaped is None:
                continue
            work = f"{lateness.LATENESS.title}, {kind}, max_interval {interval:g} s"
            goal = "median at most 1 ms above the floor and the evidence, worst of 20 at most 10 ms"
            floor = results.find(lateness.LATENESS, FLOOR)
            evidence = results.find(lateness.EVIDENCE, OURS)
            if late is None or floor is None or evidence is None or any(unreaped.samples):
                yield Goal(work, goal, f"{sum(unreaped.samples):.0f} not reaped", False)
                continue
            more = late.median - floor.median - evidence.median
            figure = (
                f"{more:+.1f} ms ({late.median:.1f} ms, {floor.median:.1f} ms, "
                f"{evidence.median:.1f} ms), worst {late.worst:.1f} ms"
            )
            yield Goal(work, goal, figure, more <= 1 and late.worst <= 10)
    # Of those with stacks, the stacks' own time is most.
    for name, workers, limit in (
        (mass.WITHOUT, 64, 25),
        (mass.WITHOUT, 500, 150),
        (mass.WITH, 1, 12),
        (mass.WITH, 64, None),
    ):
        if late := results.find(mass.MASS, name, workers):
            work = f"{name}, workers due at one moment: {workers}"
            goal = "stated" if limit is None else f"the last one dead after {limit} ms at most"
            figure = f"median {late.median:.1f} ms, worst {late.worst:.1f} ms"
            if floor := results.find(mass.MASS, FLOOR, workers):
                figure += f"; floor {floor.median:.1f} ms"
            yield Goal(work, goal, figure, None if limit is None else late.median <= limit)
    for threads in held_up.THREADS:
        if held := results.find(held_up.HELD_UP, held_up.TAKEN, threads):
            figure = f"median {held.median:.1f} ms, worst {held.worst:.1f} ms"
            work = f"{held.work.title}, {threads} threads"
            yield Goal(work, "at most 50 ms", figure, held.worst <= 50)


def _status(results: Results) -> Iterator[Goal]:
    quiet = results.find(status.LATENESS, status.QUIET)
    for who in (status.ASKED, status.CROWD):
        asked = results.find(status.LATENESS, who)
        if quiet and asked:
            work = f"{status.LATENESS.title}, status {who}"
            more = asked.median - quiet.median
            figure = f"{more:+.2f} ms ({asked.median:.2f} ms, {quiet.median:.2f} ms)"
            yield Goal(work, "at most 1 ms later", figure, more <= 1)
    if answer := results.find(status.ANSWER, OURS):
        figure = f"{answer.median:.0f} ms"
        yield Goal(status.ANSWER.title, "under 200 ms", figure, answer.median < 200)
    shut, opened = (results.find(status.IDLE, name) for name in (status.WITHOUT, status.WITH))
    if shut and opened:
        ratio = opened.median / shut.median
        # "The same" up to what two equal servers differ by.
        figure = f"{ratio:.2f} times ({opened.median:.2f}, {shut.median:.2f} ms per s)"
        yield Goal("idle CPU with a socket", "as without", figure, ratio < 1.1)
    if descriptors := results.find(status.LEFT, status.DESCRIPTORS):
        left = descriptors.worst
        yield Goal("descriptors left by all who asked", "none", f"{left:.0f}", left == 0)


def _load(results: Results) -> Iterator[Goal]:
    for kind in ("file", "queue"):
        for clients in burst.CLIENTS:
            found = [
                results.find(work, f"{OURS}, {kind}", clients)
                for work in (burst.FAILED, burst.LOST, burst.RATE, burst.SHARE)
            ]
            failed, lost, rate, share = (each for each in found)
            if failed is None or lost is None or rate is None or share is None:
                continue
            figure = (
                f"{failed.worst:.0f} % failed, {lost.worst:.0f} lost; "
                f"{rate.median:,.0f} requests/s, {share.median:.0f} % of a core"
            )
            work = f"burst, {kind}, {clients} clients"
            yield Goal(work, "none fails, none lost", figure, not (failed.worst or lost.worst))
    for clients in burst.CLIENTS:
        plain, measuring = (
            results.find(burst.RATE, name, clients) for name in (burst.PLAIN, burst.MEASURING)
        )
        if plain and measuring:
            ratio = statistics.median(
                on / off for on, off in zip(measuring.samples, plain.samples, strict=True)
            )
            work = f"burst, file, {clients} clients, blocks measured"
            goal = "at least 0.75 of the requests/s without"
            figure = f"{ratio:.2f} ({measuring.median:,.0f}, {plain.median:,.0f})"
            yield Goal(work, goal, figure, ratio >= 0.75)


def _weights(results: Results) -> Iterator[Goal]:
    held = [results.find(idle.IDLE, OURS, timers) for timers in idle.TIMERS]
    for series in held:
        if series:
            work = f"{idle.IDLE.title} holding {series.at:,.0f} timers"
            figure = f"{series.median:.2f} ms per s"
            yield Goal(work, "under 2 ms per s", figure, series.median < 2)
    if all(held):
        medians = [series.median for series in held if series]
        factor = max(medians) / min(medians)
        # "The same" up to what two equal servers differ by.
        figure = f"largest / smallest {factor:.2f}"
        yield Goal(idle.IDLE.title, "the same for all three", figure, factor < 1.5)
    bare = results.find(idle.IDLE, FLOOR, idle.TIMERS[0])
    if bare and held[0]:
        ratio = held[0].median / bare.median
        figure = f"{ratio:.1f} times ({held[0].median:.2f}, {bare.median:.2f} ms per s)"
        work = f"{idle.IDLE.title} at 0.1 s"
        yield Goal(work, "at most 2 times ten bare wake-ups a second", figure, ratio <= 2)
    ours, bare = (results.find(imports.IMPORT, name) for name in (OURS, imports.BARE))
    if ours and bare:
        more = statistics.median(
            mine - none for mine, none in zip(ours.samples, bare.samples, strict=True)
        )
        yield Goal("import", "under 30 ms more than bare Python", f"{more:.1f} ms more", more < 30)
    ours, bare = (results.find(imports.MODULES, name) for name in (OURS, imports.BARE))
    if ours and bare:
        more = ours.median - bare.median
        yield Goal("import", "at most 60 modules more", f"{more:.0f} more", more <= 60)
    for memory in (idle.TIMER_MEMORY, idle.WORKER_MEMORY):
        if series := results.find(memory, OURS):
            yield Goal(memory.title, "stated", f"{series.median:,.0f} bytes", None)


def _report(results: Results) -> Iterator[Goal]:
    took, used, right = (
        results.find(work, OURS)
        for work in (many_hosts.REPORT, many_hosts.MEMORY, many_hosts.RIGHT)
    )
    if took and used and right:
        goal = "the right rank in under 10 s and 1 GiB"
        figure = f"{took.worst:.1f} s, {used.worst:.0f} MiB"
        is_met = took.worst < 10 and used.worst < 1024 and min(right.samples) == 1
        yield Goal(took.work.title, goal, figure, is_met)
