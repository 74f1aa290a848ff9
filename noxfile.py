"""Sessions for every supported Python: `nox`, or `nox -s tests-3.12`, `nox -s coverage`."""

from __future__ import annotations

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
    """What of the source the suite and the faults run, processes that they start included."""
    session.install("-e", ".[test]", "coverage>=7.10")
    run = ("python", "-m", "coverage", "run", "-m", "pytest")
    session.run("python", "-m", "coverage", "erase")
    # coverage needs descriptors itself, and a fork in the middle of everything meets its own lock,
    # and waits for it for ever.
    session.run(
        *run,
        "tests/faults",
        "--ignore=tests/faults/test_descriptors.py",
        "--ignore=tests/faults/test_fork.py",
        "-k",
        "not use_up_descriptors",
    )
    session.run(*run, *session.posargs)
    # 1: a process that was killed while it wrote has left a file that can't be read.
    session.run("python", "-m", "coverage", "combine", "-q", success_codes=[0, 1])
    session.run("python", "-m", "coverage", "report")
