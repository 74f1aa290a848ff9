"""Sessions for every supported Python: `nox`, or `nox -s tests-3.12`, `nox -s coverage-3.12`."""

from __future__ import annotations

from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]

nox.needs_version = ">=2025.2"
nox.options.sessions = ["tests"]
# One that is not installed is left out: nobody has to have all of them.
nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The suite; warnings are errors, the order is random, as pyproject.toml says."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=PYTHONS)
def coverage(session: nox.Session) -> None:
    """The suite, which has to run every line and branch of the source; processes it starts count.

    The faults are left out: where they leave a process no descriptor, or kill it, coverage can
    write nothing, and where they fork in the middle of everything, they meet its locks.
    """
    session.install("-e", ".[test]", "coverage>=7.16")
    python = ("python", "-m", "coverage")
    session.run(*python, "erase")
    session.run(*python, "run", "-m", "pytest", *session.posargs)
    # A file's name ends in the hash of its data once all of them are in it. The others are those of
    # processes that were killed while they wrote, or that still do: combining stumbles over them.
    complete = sorted(map(str, Path().glob(".coverage.*.H*h")))
    total = f"--data-file={session.create_tmp()}/coverage"
    session.run(*python, "combine", "-q", total, *complete, log=False)
    session.run(*python, "report", total)
