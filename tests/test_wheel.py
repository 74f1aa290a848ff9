"""The wheel: what is in it, and that it works installed alone into a fresh environment."""

from __future__ import annotations

import email
import importlib.util
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import elastic_timer
from tests.support import REPOSITORY

PACKAGE = Path(elastic_timer.__file__).parent

PATIENCE = 110
"""How long a pip may take, in seconds; over a fast line it takes some five."""

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("pip") is None, reason="this system's Python has no pip"
    ),
    pytest.mark.timeout(300),
    pytest.mark.long,
]


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    """What a command prints; it has to exit with 0."""
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if "No matching distribution found" in done.stdout:
        pytest.skip("this system reaches no package index")
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def distributions(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A folder with the wheel and the source distribution of this checkout."""
    return made_once("distributions", build_in) / "made"


@pytest.fixture
def wheel(request: pytest.FixtureRequest) -> Path:
    """The wheel named by ELASTIC_TIMER_WHEEL or, without that, one built from this checkout."""
    built = os.environ.get("ELASTIC_TIMER_WHEEL")
    if built:
        return Path(built)
    [path] = request.getfixturevalue("distributions").glob("*.whl")
    return Path(path)


def build_in(folder: Path) -> None:
    # By the interface of all builders (PEP 517): pip would fetch it anew for each of the two.
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--target", str(folder / "tools"), "hatchling")
    (folder / "made").mkdir()
    build = "import os, sys; os.chdir(sys.argv[1]); from hatchling import build; "
    build += "build.build_sdist(sys.argv[2]); build.build_wheel(sys.argv[2])"
    tools = {"PYTHONPATH": str(folder / "tools")}
    run(sys.executable, "-c", build, str(REPOSITORY), str(folder / "made"), environment=tools)


@pytest.fixture
def commands(wheel: Path, tmp_path: Path) -> Path:
    """Where the commands are of a fresh environment that has the wheel, and nothing else."""
    builder = venv.EnvBuilder(symlinks=True)
    builder.create(tmp_path)
    found = builder.ensure_directories(tmp_path)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", found.env_exe)
    run(*pip, "install", "--quiet", str(wheel))
    return Path(found.bin_path)


def test_contents(wheel: Path) -> None:
    """The package with `py.typed`, the licence, the command: all of it, and no tests."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    information = f"elastic_timer-{elastic_timer.__version__}.dist-info"
    assert names == {
        *(f"elastic_timer/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")),
        "elastic_timer/events.schema.json",
        "elastic_timer/status.schema.json",
        "elastic_timer/py.typed",
        "elastic_timer/report.schema.json",
        *(
            f"{information}/{name}"
            for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
        ),
    }


def test_source_distribution(distributions: Path) -> None:
    """Its tests can be run from it: it has what they read."""
    name = f"elastic_timer-{elastic_timer.__version__}"
    with tarfile.open(distributions / f"{name}.tar.gz") as archive:
        names = {path.removeprefix(f"{name}/") for path in archive.getnames()}
    assert names >= {".ci/run", ".pre-commit-config.yaml", "README.md", "docs/index.md"}


def test_metadata(wheel: Path) -> None:
    """It is for any system and Python from 3.10 on, and needs `typing_extensions` alone."""
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    required = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert [text.partition(">")[0] for text in required] == ["typing-extensions"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert "with expires(" in str(metadata.get_payload())


def test_demo_from_the_wheel(commands: Path) -> None:
    """Installed alone, its demo shows the rank that hangs named and reaped, and the job go on."""
    listed = "from importlib.metadata import distributions as all; "
    listed += "print(*sorted(found.name.replace('-', '_') for found in all()))"
    shown = run(str(commands / "python"), "-I", "-c", listed)
    assert shown == "elastic_timer typing_extensions\n"
    shown = run(str(commands / "elastic-timer"), "demo", environment={"PYTHONPATH": ""})
    assert shown.count("yes  ") == 4
