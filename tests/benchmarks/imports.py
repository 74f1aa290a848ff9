"""What does the import cost? Whole processes, from their start to their end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from tests.benchmarks import peers
from tests.benchmarks.harness import Results, Work, alternate
from tests.benchmarks.peers import ELASTIC_TIMER, NVRX, UPSTREAM

IMPORT = Work("a fresh interpreter that imports it", "ms")
MODULES = Work("modules loaded after the import")
BARE = "bare Python"

_ROUNDS = 5


def measure(results: Results) -> None:
    """Time fresh interpreters, and count the modules that they hold."""
    modules = {
        BARE: "sys",
        ELASTIC_TIMER.name: ELASTIC_TIMER.module,
        UPSTREAM.name: UPSTREAM.module,
        NVRX: peers.NVRX_MODULE,
    }
    contestants = [
        (name, f"import site, sys, {module}; print(len(sys.modules))")
        for name, module in modules.items()
        if name not in results.skipped
    ]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _, source in contestants:
            _run(source, environment)  # As everywhere but at the first time: compiled already.
        for name, source in alternate(contestants, _ROUNDS, "import in a fresh interpreter"):
            start = time.perf_counter()
            count = _run(source, environment)
            results.add(IMPORT, name, (time.perf_counter() - start) * 1000)
            results.add(MODULES, name, count)


def _run(source: str, environment: dict[str, str]) -> int:
    # -S: what else is installed may import half the standard library at every start, by a .pth
    # file. The module site itself, which every ordinary start imports, `source` imports.
    command = [sys.executable, "-S", "-c", source]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
