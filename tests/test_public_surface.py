"""What the package offers: the names, their documentation, and that importing it works anywhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest

import elastic_timer
from elastic_timer import FileTimerServer, debug_info_logging, file_based_local_timer
from tests.support import Spawn

PACKAGE = Path(elastic_timer.__file__).parent
MODULES = [
    importlib.import_module(f"elastic_timer.{path.stem}")
    for path in sorted(PACKAGE.glob("*.py"))
    if not path.stem.startswith("_")
]


class Documented(NamedTuple):
    """A public class, function or method, with what it is documented by."""

    name: str
    function: Callable[..., object] | None
    docstring: str
    inherited: str
    """The docstrings of the methods that it overrides, which need not be repeated."""


def documented() -> Iterator[Documented]:
    """All that a user may call."""
    for module in MODULES:
        for name in module.__all__:
            item = getattr(module, name)
            docstring = inspect.cleandoc(item.__doc__ or "")
            if not inspect.isclass(item):
                yield Documented(f"{module.__name__}.{name}", item, docstring, "")
                continue
            yield Documented(f"{module.__name__}.{name}", vars(item).get("__init__"), docstring, "")
            for method, attribute in vars(item).items():
                is_public = not method.startswith("_") or method == "__call__"
                if is_public and isinstance(attribute, (FunctionType, property, staticmethod)):
                    yield of_method(item, method, attribute)


def of_method(owner: type, name: str, attribute: Any) -> Documented:
    """A method or a property."""
    overridden = [vars(base)[name] for base in owner.__mro__[1:] if name in vars(base)]
    return Documented(
        f"{owner.__module__}.{owner.__name__}.{name}",
        attribute.fget if isinstance(attribute, property) else inspect.unwrap(attribute),
        inspect.cleandoc(attribute.__doc__ or ""),
        "\n".join(inspect.cleandoc(base.__doc__ or "") for base in overridden),
    )


DOCUMENTED = {item.name: item for item in documented()}


def section(docstring: str, title: str) -> dict[str, str]:
    """One section of a docstring: each entry's name and its description."""
    match = re.search(rf"^{title}:\n((?:(?: .*)?\n?)*)", docstring, re.M)
    entries = re.split(r"^    (?=\w)", match[1], flags=re.M)[1:] if match else []
    return {name: text for name, _, text in (entry.partition(":") for entry in entries)}


def parameters(item: Documented) -> dict[str, inspect.Parameter]:
    """What a caller passes."""
    if item.function is None:
        return {}
    found = dict(inspect.signature(item.function).parameters)
    found.pop("self", None)
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_is_what_the_module_defines(module: ModuleType) -> None:
    """A public module's `__all__` is sorted and names what it defines for others, and no more.

    What it loads from a private module when it is asked for counts as its own.
    """
    tree = ast.parse(Path(str(module.__file__)).read_text())
    defined = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and not node.name.startswith("_")
    ]
    defined += [
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("elastic_timer._")
        for name in node.names
        if name.asname == name.name
    ]
    assert module.__all__ == sorted(defined)


def test_package_offers_what_its_modules_do() -> None:
    """The package re-exports what its modules have on timers, and nothing else.

    What concerns the log alone stays in its module.
    """
    offered = {
        name: getattr(module, name)
        for module in MODULES
        for name in module.__all__
        if module.__name__ != "elastic_timer.debug_info_logging"
    }
    assert elastic_timer.__all__ == sorted(offered)
    assert {name: getattr(elastic_timer, name) for name in elastic_timer.__all__} == offered
    name = "nothing"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(elastic_timer, name)


@pytest.mark.parametrize("item", DOCUMENTED.values(), ids=DOCUMENTED)
def test_docstring(item: Documented) -> None:
    """One line of summary; every argument explained, seconds as such, and what None means."""
    summary, _, rest = item.docstring.partition("\n")
    assert summary.endswith(".")
    assert not rest or rest.startswith("\n")
    told = section(item.inherited, "Args") | section(item.docstring, "Args")
    expected = parameters(item)
    assert set(section(item.docstring, "Args")) <= set(expected)
    for name, parameter in expected.items():
        assert name in told, f"{name} is not explained"
        if "float" in str(parameter.annotation):
            assert "second" in told[name], f"{name} has no unit"
        if "None" in str(parameter.annotation):
            assert re.search(r"\bNone\b|[Ww]ithout", told[name]), f"what {name}=None means"


@pytest.mark.parametrize("item", DOCUMENTED.values(), ids=DOCUMENTED)
def test_docstring_names_what_is_raised(item: Documented) -> None:
    """The exceptions that a function itself raises are in its docstring."""
    if item.function is None:
        return
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(item.function)))
    raised = {
        ast.unparse(node.exc.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    assert raised <= set(section(item.docstring, "Raises"))


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name.count(".") == 2])
def test_docstring_says_since_when(name: str) -> None:
    """A class or function says which version brought it; a method does where it came later."""
    assert re.search(r"^\.\. versionadded:: \d+\.\d+\.\d+$", DOCUMENTED[name].docstring, re.M)


TAKEN_AWAY = {
    "pidfd": "os.pidfd_open signal.pidfd_send_signal",
    "FIFOs": "os.mkfifo",
    "poll and epoll": "select.poll select.epoll",
    "PIPE_BUF": "select.PIPE_BUF",
    "POSIX": (
        "os.fork os.getpgrp os.kill os.mkfifo os.O_NONBLOCK os.pidfd_open os.posix_spawnp "
        "os.register_at_fork os.uname select.epoll select.poll select.PIPE_BUF signal.SIGCHLD "
        "signal.SIGHUP signal.SIGKILL signal.SIGQUIT signal.SIGUSR1 signal.SIGUSR2 "
        "signal.pidfd_send_signal signal.pthread_sigmask"
    ),
}
"""What a system may lack. The last one makes this system look like Windows."""


@pytest.mark.parametrize("capability", TAKEN_AWAY)
def test_imports_without(spawn: Spawn, tmp_path: Path, capability: str) -> None:
    """Where the system lacks something every module can be imported, and `expires` works.

    Without FIFOs `FileTimerServer` says what to take in its place.
    """
    child = spawn(
        """
        import ctypes, os, select, signal, sys
        import multiprocessing.queues, selectors, subprocess, tempfile, threading  # These need it.

        path, *names = sys.argv[1:]
        for module, name in (name.split(".") for name in names):
            if hasattr(globals()[module], name):
                delattr(globals()[module], name)
        if not hasattr(os, "mkfifo"):  # Every system that has the one has the other.
            sys.modules["fcntl"] = None
            sys.modules["_json"] = None  # Not every Python has it.
        if not hasattr(os, "fork"):
            sys.platform, os.name, signal.CTRL_C_EVENT = "win32", "nt", 0

        import elastic_timer, elastic_timer.__main__

        class Client(elastic_timer.TimerClient):
            def acquire(self, scope_id, expiration_time):
                print("acquired", scope_id)

            def release(self, scope_id):
                print("released", scope_id)

        for name in elastic_timer.__all__:
            getattr(elastic_timer, name)
        elastic_timer.configure(Client())
        with elastic_timer.expires(after=60, scope="block"):
            elastic_timer.FileTimerClient(path)
        try:
            elastic_timer.FileTimerServer(path, "run")
        except NotImplementedError as error:
            print(error)
        else:
            print("made a server")
        """,
        str(tmp_path / "timers"),
        *TAKEN_AWAY[capability].split(),
    )
    assert child.wait() == 0, child.stderr_text()
    assert [child.readline() for _ in range(3)] == [
        "acquired block",
        "released block",
        "this platform has no FIFOs; run the workers and their server on a POSIX system"
        if "os.mkfifo" in TAKEN_AWAY[capability]
        else "made a server",
    ]


@pytest.mark.parametrize("module", [elastic_timer, file_based_local_timer])
def test_names_that_are_loaded_when_asked_for_are_listed(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dir()` has all public names, so that a prompt completes them; a misspelt one is an error."""
    monkeypatch.delitem(vars(module), "FileTimerServer", raising=False)  # As if not asked for yet.
    assert set(module.__all__) <= set(dir(module))
    assert dir(module) == sorted(set(dir(module)))
    with pytest.raises(AttributeError, match="no attribute 'TimerSever'"):
        _ = module.TimerSever


def test_names_that_are_loaded_when_asked_for_are_replaced_and_restored() -> None:
    """Whether they were loaded before or not, as any name of a module is that a test replaces."""
    hook, server = debug_info_logging.log_debug_info_for_expired_timers, FileTimerServer
    for module, name, original in (
        (elastic_timer, "FileTimerServer", server),
        (file_based_local_timer, "FileTimerServer", server),
        (file_based_local_timer, "log_debug_info_for_expired_timers", hook),
    ):
        assert getattr(module, name) is original
        with mock.patch.object(module, name, "another"):
            assert getattr(module, name) == "another"
        assert getattr(module, name) is original


def test_import_is_light() -> None:
    """A worker pays for at most 60 modules, and for nothing that only a server needs."""

    def loaded(module: str) -> set[str]:
        # -S: what else is installed may import anything at every start, by a .pth file.
        source = f"import site, sys, {module}; print(*sys.modules)"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-S", "-c", source]
        return set(subprocess.check_output(command, env=environment, text=True).split())

    new = loaded("elastic_timer") - loaded("sys")
    assert len(new) <= 60, sorted(new)
    ours = {name for name in new if name.startswith("elastic_timer._server.")}
    assert ours == {"elastic_timer._server.callbacks"}


def test_library_configures_no_logging(spawn: Spawn) -> None:
    """Importing sets no level and no handler anywhere."""
    child = spawn(
        """
        import logging
        import elastic_timer
        from elastic_timer import api, file_based_local_timer, local_timer
        loggers = [logging.getLogger()] + [
            logger for logger in logging.Logger.manager.loggerDict.values()
            if isinstance(logger, logging.Logger) and logger.name.startswith("elastic_timer")
        ]
        assert len(loggers) > 3
        assert all(not logger.handlers for logger in loggers)
        assert all(logger.level == 0 for logger in loggers[1:])
        print("fine", flush=True)
        """
    )
    assert child.readline() == "fine"
