"""Tables and plots of a run: on the terminal, in docs/benchmarks.md, as SVG."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tests.benchmarks import cost, lateness
from tests.benchmarks.goals import judge
from tests.benchmarks.harness import OURS, Results, Series, Work
from tests.benchmarks.peers import FAULTHANDLER, FLOOR, NVRX, TORCH

_BEGIN = "<!-- figures: written by `python -m tests.benchmarks --doc` -->"
_END = "<!-- end of figures -->"

_COLOURS = {
    OURS: "tab:blue",
    TORCH: "tab:red",
    NVRX: "tab:green",
    FAULTHANDLER: "tab:purple",
    FLOOR: "tab:gray",
}

Table = list[tuple[str, ...]]


def as_text(results: Results) -> str:
    """What was measured, then goal, figure, met or not: for a terminal."""
    parts = [f"{title}\n{_aligned(table)}" for title, table in _figures(results)]
    parts += [f"skipped: {peer}: {reason}" for peer, reason in results.skipped.items()]
    return "\n\n".join([*parts, _aligned(_goals(results))])


def write_doc(results: Results, path: Path) -> None:
    """Replace the figures in a Markdown file; what is written around them stays."""
    about = [f"- {name}: {value}" for name, value in results.about.items()]
    about += [f"- not compared with {peer}: {why}" for peer, why in results.skipped.items()]
    parts = [_BEGIN, "\n".join(about), "## Goals", _markdown(_goals(results)), "## All figures"]
    for title, table in _figures(results):
        parts += [f"### {title[0].upper()}{title[1:]}", _markdown(table)]
    text = path.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, found, after = rest.partition(_END)
    if not found:
        raise SystemExit(f"{path} has no place for figures: {_BEGIN} ... {_END}")
    path.write_text(before + "\n\n".join([*parts, _END]) + after)


def _goals(results: Results) -> Table:
    met = {True: "met", False: "not met", None: "-"}
    rows = [(goal.work, goal.goal, goal.figure, met[goal.met]) for goal in judge(results)]
    return [("work", "goal", "figure", "met?"), *rows]


def _figures(results: Results) -> list[tuple[str, Table]]:
    """A table for every work: a row a contestant, a column for what the work is varied over."""
    tables = []
    for work in dict.fromkeys(series.work for series in results.series):
        of_work = [series for series in results.series if series.work == work]
        columns = sorted({series.at for series in of_work}, key=lambda at: at or 0)
        table: Table = [(work.varied, *("" if at is None else f"{at:,g}" for at in columns))]
        for contestant in dict.fromkeys(series.contestant for series in of_work):
            found = (results.find(work, contestant, at) for at in columns)
            table.append((contestant, *(_cell(series) if series else "" for series in found)))
        unit = f", {work.unit}" if work.unit else ""
        tables.append((f"{work.title}{unit}: median (middle half; worst)", table))
    return tables


def _cell(series: Series) -> str:
    if series.worst == min(series.samples):
        return _number(series.median)
    low, high = (_number(quartile) for quartile in series.spread)
    return f"{_number(series.median)} ({low} to {high}; {_number(series.worst)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def _aligned(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def _markdown(table: Table) -> str:
    rows = [table[0], ("---",) * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(results: Results, folder: Path) -> None:
    """Write the plots: lateness against max_interval, cost against stack depth."""
    matplotlib = importlib.import_module("matplotlib")
    # Without these, two plots of the same figures would differ in every identifier.
    matplotlib.rcParams.update({"svg.hashsalt": "elastic-timer", "svg.fonttype": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    _draw(
        folder / "lateness.svg",
        "Lateness of a reap (median; shaded: the middle half)",
        "max_interval, s (NVRx: workload_check_interval)",
        "ms",
        {
            name: _along(results, lateness.LATENESS, name)
            for name in (
                *(f"{name}, {kind}" for name in (OURS, TORCH) for kind in ("file", "queue")),
                NVRX,
                FAULTHANDLER,
            )
        },
    )
    _draw(
        folder / "cost.svg",
        "Cost of one block (median; shaded: the middle half)",
        "stack depth, frames",
        "us",
        {
            f"{OURS}, default scope": _along(results, cost.FIFO_DEFAULT, OURS),
            f"{OURS}, explicit scope": _along(results, cost.FIFO_EXPLICIT, OURS),
            f"{TORCH}, default scope": _along(results, cost.FIFO_DEFAULT, TORCH),
            f"{TORCH}, explicit scope": _along(results, cost.FIFO_EXPLICIT, TORCH),
            f"{NVRX}, section": _along(results, cost.OTHER, NVRX),
            FAULTHANDLER: _along(results, cost.OTHER, FAULTHANDLER),
            "floor: bare system calls": _along(results, cost.FIFO_EXPLICIT, FLOOR),
        },
    )


def _along(results: Results, work: Work, contestant: str) -> list[Series]:
    found = (each for each in results.series if (each.work, each.contestant) == (work, contestant))
    return sorted(found, key=lambda series: series.at or 0)


def _draw(path: Path, title: str, x_label: str, y_label: str, lines: dict[str, Any]) -> None:
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    ticks = sorted({series.at for line in lines.values() for series in line if series.at})
    drawn = set()
    for name, line in lines.items():
        if not line:
            continue
        # A contestant's second line has its colour, dashed.
        contestant = line[0].contestant.partition(",")[0]
        colour, style = _COLOURS[contestant], "o--" if contestant in drawn else "o-"
        drawn.add(contestant)
        # Without an `at` it does not depend on it: a level line.
        at = [series.at for series in line] if line[0].at else [ticks[0], ticks[-1]]
        line = line if line[0].at else line * 2
        medians = [series.median for series in line]
        axes.plot(at, medians, style, color=colour, label=name, markersize=4)
        low, high = zip(*(series.spread for series in line), strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
