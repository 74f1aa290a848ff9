"""Mutation testing of the pure modules: are there tests that fail when the code is wrong?

    python -m tests.mutation

makes each of the changes of `mutants.py` in turn, runs the module's tests, and names the mutants
that survive. Those in `equivalent.py` are known to change nothing that could be told; the exit
status is 1 if another one survives, or if less than 97 % of all are killed. Each mutant is put into
a fork of a process that has collected the tests, of which the quickest come first; all of them
together take a quarter of an hour. `--part 2/4` asks for a quarter of each module's mutants. The
original is tested in between, too: where that fails, the machine is to blame, and kills prove
nothing.

mutmut 3 can't be used: it wraps each function, and the frame that `expires` takes its scope from
is then the wrapper's.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.mutants import Mutant, mutants_of

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "elastic_timer"

SECONDS = 60
"""How long each test may take: some wait for ever."""

TIMES, MORE = 3, 2
"""The tests of a mutant may compute so many times as long as those of the original, and so many
seconds more: some loop for ever."""

BYTES = 1 << 30
"""How much memory they may take: those that loop may collect things."""

ORIGINAL, EVERY = -1, 20
"""The number of the unchanged module, which is tested first, after so many mutants, and last."""

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

_OPTIONAL = [
    "tests/test_optional.py",
    "-k",
    "not slow_machine and not in_the_middle and not children_inherit and not costs_no_more "
    "and not required_is_the_default",
]

TARGETS = [
    Target("_clock", [], ["tests/test_clock.py"]),
    Target("_server.blocks", [], ["tests/test_blocks.py", SURVIVORS]),
    Target(
        "_server.job",
        [],
        [
            "tests/test_ranks.py",
            "tests/test_peers.py::test_job",
            "tests/test_standings.py::test_standing_by_itself",
        ],
    ),
    Target(
        "_command.block_table",
        [],
        ["tests/test_block_table.py", "tests/test_report_blocks.py", "-k", "not test_what_run"],
    ),
    Target("_command.hangs", [], ["tests/test_hangs.py"]),
    Target(
        "_command.status_table",
        [],
        [
            "tests/test_status_table.py",
            "tests/test_status.py",
            "-k",
            "test_status_table or as_documented or durations or test_times or unknown_values "
            "or eighty_columns or escape_sequences or colours_say",
        ],
    ),
    Target(
        "_evidence.picture",
        [],
        ["tests/test_picture.py", "tests/test_place.py", "-k", "test_picture or frames_in_c"],
    ),
    Target("_evidence.place", [], ["tests/test_place.py", "tests/test_picture.py"]),
    Target(
        "_evidence.expiry",
        [],
        ["tests/test_expiry.py", "tests/test_idle_threads.py", "-k", "not are_one_line"],
    ),
    Target("_server.table", [], ["tests/test_timer_table.py", SURVIVORS]),
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
    Target(
        "_worker.handles",
        [],
        ["tests/test_handle.py", "tests/test_handle_model.py", "-k", "not test_worker_lives"],
    ),
    Target("_worker.holds", ["send_owed"], _BLOCKS),
    Target("_worker.scopes", [], _BLOCKS),
    Target("_worker.optional", [], _OPTIONAL),
    Target("_worker.environment", [], _OPTIONAL),
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


class _Asked(NamedTuple):
    """What became of a mutant, or of the `ORIGINAL`."""

    number: int
    survived: bool


class _ForkServer:
    """A plugin for pytest that runs the tests in a fork of this process for each mutant.

    Args:
        target: What is changed.
        mutants: To what, each with its number.
        jobs: How many are tested at a time.
        answers: Where an `_Asked` of each is written, as JSON; first and last the original's.
        complaints: Where it is told which tests fail for the original.
    """

    def __init__(
        self,
        target: Target,
        mutants: Iterator[tuple[int, Mutant]],
        jobs: int,
        answers: int,
        complaints: int,
    ) -> None:
        self._target = target
        self._mutants = mutants
        self._jobs = jobs
        self._answers = answers
        self._complaints = complaints
        self._running: dict[int, int] = {}
        self._seconds: dict[str, float] = {}
        self._tests_original = True

    def pytest_collection(self) -> None:
        """Have what is imported from now on, the tests, try few examples, the same each time."""
        settings.register_profile(
            "mutation",
            # The first failure is enough: no time goes into finding a simpler one.
            phases=(Phase.explicit, Phase.generate),
            max_examples=25,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        settings.load_profile("mutation")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how long each test takes, and say which can't be relied on."""
        seconds = self._seconds.get(report.nodeid, 0.0)
        self._seconds[report.nodeid] = seconds + report.duration
        if report.failed and self._tests_original:
            os.write(self._complaints, f"{report.nodeid}: {report.longreprtext}\n".encode())

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run them for the original, then for each mutant."""
        from multiprocessing import resource_tracker

        # Once, here, not in each fork.
        resource_tracker.ensure_running()
        session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # Private.
        source = ast.parse(file_of(self._target).read_text())
        reading, writing = os.pipe()
        began = os.times()
        pid = os.fork()
        if not pid:
            failed = self._run(session, source)
            with open(writing, "w") as pipe:
                json.dump(self._seconds, pipe)
            os._exit(failed)
        os.close(writing)
        with open(reading) as pipe:
            seconds = json.loads(pipe.read() or "{}")
        failed = os.waitpid(pid, 0)[1] != 0
        self._answer(ORIGINAL, not failed)
        if failed:
            return True
        session.items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))
        ended = os.times()
        took = ended.children_user + ended.children_system
        took -= began.children_user + began.children_system
        most = int(TIMES * took + MORE)
        trees = self._trees(source)
        while True:
            for number, tree in itertools.islice(trees, self._jobs - len(self._running)):
                self._tests_original = number == ORIGINAL
                self._running[self._start(session, tree, most)] = number
            if not self._running:
                break
            pid, status = os.wait()
            if pid in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # What its tests may have left behind.
                self._answer(self._running.pop(pid), status == 0)
        return True

    def _trees(self, source: ast.Module) -> Iterator[tuple[int, ast.Module]]:
        for count, (number, mutant) in enumerate(self._mutants, 1):
            yield number, mutant.tree
            if count % EVERY == 0:
                yield ORIGINAL, source
        yield ORIGINAL, source

    def _answer(self, number: int, survived: bool) -> None:
        os.write(self._answers, json.dumps([number, survived]).encode() + b"\n")

    def _start(self, session: pytest.Session, tree: ast.Module, most: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        os._exit(self._run(session, tree))

    def _run(self, session: pytest.Session, tree: ast.Module) -> int:
        try:
            replace(self._target, tree)
        except BaseException:
            return 1
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                return 1
        return 0


def replace(target: Target, tree: ast.Module) -> None:
    """Execute the target's code anew, and have all who have imported any of it refer to that."""
    ast.fix_missing_locations(tree)
    path, name = file_of(target), f"elastic_timer.{target.module}"
    module = importlib.import_module(name)
    # For tests that import it anew themselves.
    finder = _InMemory(name, path, compile(tree, str(path), "exec"))
    sys.meta_path.insert(0, finder)
    module.__spec__ = finder.find_spec(name)
    _replaced[name] += 1
    names = target.names
    body = [root for root in tree.body if not names or getattr(root, "name", None) in names]
    future = [root for root in tree.body if isinstance(root, ast.ImportFrom)][:1]
    code = compile(ast.Module([*future, *body], []), str(path), "exec")
    old = dict(vars(module))
    exec(code, vars(module))
    changed = {
        name: (value, vars(module)[name])
        for name, value in old.items()
        if not name.startswith("__") and vars(module).get(name) is not value
    }
    others: list[Any] = [
        other
        for name, other in list(sys.modules.items())
        if name.startswith(("elastic_timer", "tests"))
    ]
    for other in others:
        for name, value in list(vars(other).items()):
            if name in changed and value is changed[name][0]:
                setattr(other, name, changed[name][1])


_replaced: Counter[str] = Counter()
_really_register_at_fork = getattr(os, "register_at_fork", dict)


def _register_at_fork(**hooks: Callable[[], object]) -> None:
    """As the original, by which it would be for good: hooks end with the module they are of."""
    name = sys._getframe(1).f_globals["__name__"]
    before = _replaced[name]

    def until_replaced(hook: Callable[[], object]) -> Callable[[], object]:
        return lambda: _replaced[name] == before and hook()

    _really_register_at_fork(**{when: until_replaced(hook) for when, hook in hooks.items()})


def answers(target: Target, part: slice, jobs: int) -> Iterator[_Asked]:
    """What becomes of the original, and if its tests pass, of each mutant."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        complaints = os.dup(2)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        vars(os)["register_at_fork"] = _register_at_fork
        mutants = enumerate(mutants_of(file_of(target).read_text(), target.names))
        chosen = itertools.islice(mutants, part.start, None, part.step)
        plugin = _ForkServer(target, chosen, jobs, writing, complaints)
        os._exit(pytest.main([*OPTIONS, *target.tests], [plugin]))
    os.close(writing)
    with open(reading) as pipe:
        for line in pipe:
            yield _Asked(*json.loads(line))
    os.waitpid(pid, 0)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="only these, by name (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--part", default="1/1", metavar="N/M", help="only this part of each")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    os.chdir(REPOSITORY)
    killed = total = unknown = 0
    for target in TARGETS:
        if options.modules and target.module not in options.modules:
            continue
        found = mutants_of(file_of(target).read_text(), target.names)
        changes = [(mutant.line, mutant.change) for mutant in found]
        started = time.monotonic()
        chosen = slice(part - 1, None, parts)
        asked = answers(target, chosen, options.jobs)
        if next(asked, None) != (ORIGINAL, True):
            print(f"{target.module}: the tests fail without any change")
            return 1
        equivalent = EQUIVALENT.get(target.module, {})
        alive = []
        dead = originals = unsound = 0
        for number, survived in asked:
            if number == ORIGINAL:
                originals += 1
                unsound += not survived
            elif not survived:
                dead += 1
            else:
                line, change = changes[number]
                alive.append(change)
                if change not in equivalent:
                    unknown += 1
                    print(f"{target.module}:{line}: {change}", flush=True)
        count = len(changes[chosen])
        killed += dead
        total += count
        print(
            f"{target.module}: {dead} of {count} mutants killed, "
            f"{sum(change in equivalent for change in alive)} known to be equivalent, "
            f"in {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if unsound:
            print(f"{target.module}: without a change they fail {unsound} of {originals} times")
            return 1
        if dead + len(alive) < count:
            print(f"{target.module}: not all of them were tested")
            return 1
        for change in set(equivalent).difference(alive) if parts == 1 else ():
            print(f"{target.module}: not a survivor any more: {change}")
    print(f"{killed} of {total} killed: {killed / total:.1%}; {unknown} survivors without a reason")
    # Of a small module alone the few that are equivalent may be more than the rest of the score.
    whole = not options.modules and parts == 1
    return 0 if not unknown and (not whole or killed / total >= LOWEST_SCORE) else 1


if __name__ == "__main__":
    sys.exit(main())
