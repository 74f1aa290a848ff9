"""Run the benchmarks: ``python -m tests.benchmarks [--json FILE] [--plot DIR] [--doc FILE]``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from pathlib import Path

from tests.benchmarks import (
    burst,
    cost,
    held_up,
    idle,
    imports,
    lateness,
    many_hosts,
    mass,
    peers,
    report,
    status,
)
from tests.benchmarks.harness import Results, elapsed, progress

_WORKS = {
    "import": imports.measure,
    "cost": cost.measure,
    "burst": burst.measure,
    "idle": idle.measure,
    "status": status.measure,
    "lateness": lateness.measure,
    "mass": mass.measure,
    "held_up": held_up.measure,
    "report": many_hosts.measure,
}


def main() -> None:
    """Measure, then show, write and plot what was measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to FILE")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write the plots as SVG to DIR")
    parser.add_argument(
        "--doc", type=Path, metavar="FILE", help="renew the figures in this Markdown file"
    )
    parser.add_argument(
        "--from", type=Path, metavar="FILE", dest="source", help="measure nothing, read --json's"
    )
    parser.add_argument("--only", nargs="+", choices=_WORKS, help="measure nothing else")
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")

    if arguments.source:
        results = Results.from_json(arguments.source.read_text())
    else:
        results = _measure(arguments.only or list(_WORKS))
    if arguments.json:
        arguments.json.write_text(results.to_json())
    if arguments.plot:
        report.plot(results, arguments.plot)
    if arguments.doc:
        report.write_doc(results, arguments.doc)
    print(report.as_text(results))


def _measure(works: list[str]) -> Results:
    # For every process started from here on: torch and NVRx warn on machines without a GPU.
    os.environ["PYTHONWARNINGS"] = "ignore"
    # What is installed is compiled, and not at each start of a command.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    results = Results()
    progress("peers: which are installed?")
    versions, results.skipped = peers.find()
    results.about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "Python": platform.python_version(),
        "elastic-timer": importlib.import_module("elastic_timer").__version__,
        **versions,
    }
    for work in works:
        _WORKS[work](results)
    results.about["duration"] = f"{elapsed():.0f} s"
    progress("done\n" if sys.stderr.isatty() else "done")
    return results


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
