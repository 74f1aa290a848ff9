"""Mutation testing of the pure modules: are there tests that fail when the code is wrong?

    python -m tests.mutation

makes each of the changes of `mutants.py` in turn, runs the module's tests, and names the mutants
that survive. Those in `equivalent.py` are known to change nothing that could be told; the exit
status is 1 if another one survives, or if less than 97 % of all are killed. It takes some minutes,
though each mutant is loaded from memory in a fork that has pytest loaded already.

mutmut 3 can't be used: it wraps each function, and the frame that `expires` takes its scope from
is then the wrapper's.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

import pytest
from hypothesis import Phase, settings

from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.mutants import Mutant, mutants_of

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "elastic_timer"

SECONDS = 20
"""How long the tests of one mutant may compute, and each of them take: some loop for ever."""

BYTES = 1 << 30
"""How much memory they may take: those that loop may collect things."""

LOWEST_SCORE = 0.97

OPTIONS = ["-x", "-q", "-n0", "-p", "no:randomly", "-p", "no:cacheprovider", f"--timeout={SECONDS}"]
# hypothesis is loaded already.
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]


class Target(NamedTuple):
    """A module, or some classes and functions of it, and what tests it.

    Fit are modules that need no other process: a mutant is known to the tests' own process alone.
    """

    module: str
    names: Sequence[str]
    tests: Sequence[str]


SURVIVORS = "tests/mutation/test_survivors.py"
_BLOCKS = [
    "tests/test_api.py",
    "tests/test_client_mends.py",
    SURVIVORS,
    "tests/test_differences.py",
    "-k",
    "test_api or test_survivors or test_client_mends or test_handle or d01 or d13 or d18",
]

TARGETS = [
    Target("_clock", [], ["tests/test_clock.py"]),
    Target("_server.blocks", [], ["tests/test_blocks.py", SURVIVORS]),
    Target("_command.block_table", [], ["tests/test_block_table.py"]),
    Target("_evidence.picture", [], ["tests/test_picture.py"]),
    Target("_server.table", [], ["tests/test_timer_table.py", SURVIVORS]),
    Target("_server.process", ["ranks"], ["tests/test_ranks.py"]),
    Target("_server.workers", ["EpochClock"], ["tests/test_epoch_clock.py"]),
    Target(
        "_transport.wire", [], ["tests/test_wire.py", SURVIVORS, "tests/test_cached_requests.py"]
    ),
    # Without its tables: tests/interop holds them against the torchrun that is installed.
    Target(
        "_command.torchrun",
        ["warnings", "_find_torchrun", "parser", "_complaints"],
        ["tests/test_torchrun_warnings.py"],
    ),
    Target("api", ["expires", "_seconds"], ["tests/test_handle.py", *_BLOCKS]),
    Target("_worker.holds", ["send_owed"], _BLOCKS),
    Target("_worker.scopes", [], _BLOCKS),
]


def file_of(target: Target) -> Path:
    """Where the module lies."""
    return PACKAGE.joinpath(*target.module.split(".")).with_suffix(".py")


class _InMemory(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module in memory, whatever is on disk."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self._name = name
        self._path = path
        self._code = code

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=str(self._path))

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = str(self._path)
        exec(self._code, module.__dict__)


def start(target: Target, tree: ast.Module) -> int:
    """Run the tests of a mutant in a fork; its pid. Its exit code is pytest's."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    path = file_of(target)
    code = compile(tree, str(path), "exec")
    sys.meta_path.insert(0, _InMemory(f"elastic_timer.{target.module}", path, code))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    # The first failure is enough: no time goes into finding a simpler one.
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutation", phases=phases, derandomize=True, database=None)
    settings.load_profile("mutation")
    os._exit(pytest.main([*OPTIONS, *target.tests]))


def survivors(
    target: Target, mutants: Sequence[Mutant], jobs: int
) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant, and whether it survived; so many are tested at a time."""
    waiting = list(mutants)[::-1]
    running: dict[int, Mutant] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[start(target, mutant.tree)] = mutant
        pid, status = os.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # What its tests may have left behind.
        yield running.pop(pid), status == 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="only these, by name (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.chdir(REPOSITORY)
    killed = total = unknown = 0
    for target in TARGETS:
        if options.modules and target.module not in options.modules:
            continue
        source = file_of(target).read_text()
        untouched = start(target, ast.parse(source))
        if os.waitpid(untouched, 0)[1] != 0:
            print(f"{target.module}: the tests fail without any change")
            return 1
        mutants = list(mutants_of(source, target.names))
        started = time.monotonic()
        equivalent = EQUIVALENT.get(target.module, {})
        alive = []
        for mutant, survived in survivors(target, mutants, options.jobs):
            if survived:
                alive.append(mutant)
                if mutant.change not in equivalent:
                    unknown += 1
                    print(f"{target.module}:{mutant.line}: {mutant.change}", flush=True)
        killed += len(mutants) - len(alive)
        total += len(mutants)
        print(
            f"{target.module}: {len(mutants) - len(alive)} of {len(mutants)} mutants killed, "
            f"{sum(mutant.change in equivalent for mutant in alive)} known to be equivalent, "
            f"in {time.monotonic() - started:.0f} s",
            flush=True,
        )
        for change in set(equivalent) - {mutant.change for mutant in alive}:
            print(f"{target.module}: not a survivor any more: {change}")
    print(f"{killed} of {total} killed: {killed / total:.1%}; {unknown} survivors without a reason")
    # Of a small module alone the few that are equivalent may be more than the rest of the score.
    return 0 if not unknown and (options.modules or killed / total >= LOWEST_SCORE) else 1


if __name__ == "__main__":
    sys.exit(main())
