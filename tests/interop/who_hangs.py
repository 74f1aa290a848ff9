"""How often is the right rank named? Jobs of torchrun, each stuck in a way of its own.

`python -m tests.interop.who_hangs --ranks 4 --kind sleep` runs that part of the table, each rank in
turn, and appends its results to a file; `--table` only prints what is in there. Without `--kind` it
is all of them, without `--ranks` 2, 4 and 8. A job takes some seconds; what is in the file is not
done again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from elastic_timer._evidence.picture import who_hangs
from tests.support import SOURCE

JOB = Path(__file__).parent / "jobs" / "stuck.py"
TOGETHER = "together"
KINDS = [
    "sleep",
    "in C with the GIL",
    "locks of two threads",
    "data loader",
    "SIGSTOP",
    "another collective",
    "never enters",
]


def command(events: Path, ranks: int, kind: str, stuck_rank: int | None, after: float) -> list[str]:
    """The job under `elastic-timer run`."""
    run = [sys.executable, "-m", "elastic_timer", "run", "--events", str(events), "--"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    stuck = -1 if stuck_rank is None else stuck_rank
    return [*run, *torchrun, str(JOB), kind, str(stuck), str(after)]


def verdict(lines: list[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """What the events of a job say: who is suspected, by whom of how many stacks are missing."""
    pictures = [line["picture"] for line in lines if line["event"] == "job hangs"]
    first = pictures[:1]
    answer = who_hangs(first) if first else None
    known = {member["rank"]: member for picture in first for member in picture["members"]}
    killed = [line for line in lines if line["event"] == "kill worker process"]
    return {
        "suspected": answer["suspected"] if answer else None,
        "reasons": answer["reasons"] if answer else [],
        "pictures": len(pictures),
        "without_stacks": [
            rank for rank in range(ranks) if rank not in known or not known[rank]["stacks"]
        ],
        "first_killed": killed[0]["rank"] if killed else None,
        "seconds_late": max((line["seconds_late"] for line in killed), default=None),
    }


def run_one(ranks: int, kind: str, stuck_rank: int | None, after: float) -> dict[str, Any]:
    """Run a job to its end; what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events"
        started = time.monotonic()
        log = Path(folder) / "log"
        # Not to a pipe: what outlives the job would keep it open.
        with log.open("wb") as stderr:
            subprocess.run(
                command(events, ranks, kind, stuck_rank, after),
                env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                timeout=120,
                check=False,
            )
        text = log.read_text(errors="replace")
        told = [line for line in text.splitlines() if line.startswith(("suspect", "no suspect"))]
        lines = [json.loads(line) for line in events.read_text().splitlines()]
    return {
        "ranks": ranks,
        "kind": kind,
        "stuck": stuck_rank,
        **verdict(lines, ranks),
        "log": told,
        "took": round(time.monotonic() - started, 1),
    }


def is_right(result: dict[str, Any]) -> bool:
    """Whether the stuck rank alone was named, and nobody where there is no odd one out.

    Of two ranks in two collectives neither is the odd one.
    """
    is_even = result["ranks"] == 2 and result["kind"] == "another collective"
    wanted = [] if result["stuck"] is None or is_even else [result["stuck"]]
    return bool(result["suspected"] == wanted)


def table(results: list[dict[str, Any]]) -> str:
    """A row for each kind, a column for each number of ranks."""
    sizes = sorted({result["ranks"] for result in results})
    lines = [f"{'stuck in':24}" + "".join(f"{f'{size} ranks':>12}" for size in sizes)]
    right, all_of = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for result in results:
        all_of[result["kind"], result["ranks"]] += 1
        right[result["kind"], result["ranks"]] += is_right(result)
    for kind in dict.fromkeys(result["kind"] for result in results):
        cells = [f"{right[kind, size]} of {all_of[kind, size]}" for size in sizes]
        lines.append(f"{kind:24}" + "".join(f"{cell:>12}" for cell in cells))
    lost = sum(len(result["without_stacks"]) for result in results)
    lines.append(f"{len(results)} jobs, {sum(map(is_right, results))} right; {lost} stacks missing")
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for, and print the table of all that is in the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, action="append")
    parser.add_argument("--kind", action="append", choices=[*KINDS, TOGETHER])
    parser.add_argument("--stuck-rank", type=int, action="append", help="not each in turn")
    parser.add_argument("--times", type=int, default=1, help="of each")
    parser.add_argument("--after", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=240, help="start no job after so long")
    parser.add_argument("--results", type=Path, default=Path("who_hangs.jsonl"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    asked = parser.parse_args()
    results = read(asked.results)
    done = Counter((each["ranks"], each["kind"], each["stuck"]) for each in results)
    plan = [
        (ranks, kind, rank)
        for kind in asked.kind or [*KINDS, TOGETHER]
        for ranks in asked.ranks or [2, 4, 8]
        for rank in (asked.stuck_rank or range(ranks) if kind != TOGETHER else [None])
        for _ in range(asked.times - done[ranks, kind, rank])
    ]
    # Cut off at any time, it has some of each.
    random.Random(13).shuffle(plan)
    give_up = time.monotonic() + asked.seconds
    for number, (ranks, kind, rank) in enumerate([] if asked.table else plan):
        if time.monotonic() > give_up:
            print(f"{len(plan) - number} jobs left for the next time")
            break
        result = run_one(ranks, kind, rank, asked.after)
        print("right" if is_right(result) else "WRONG", json.dumps(result), flush=True)
        with asked.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
    print(table(read(asked.results)))


def read(path: Path) -> list[dict[str, Any]]:
    """The results in a file, if there is one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
