"""A storm of real workers: each overrunner is killed in time, and nobody else is signalled."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import REPOSITORY


@pytest.mark.parametrize("link", ["file", "queue"])
def test_soak(
    link: str, soak_seconds: float, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The storm finds no wrong kill and no missed one, and nothing left behind in the server."""
    # Half as long for the queue: it shares all but the transport with the FIFO.
    seconds = soak_seconds if link == "file" else soak_seconds / 2
    options = ["--link", link, "--soak-seconds", str(seconds), "--seed", str(seed)]
    storm = subprocess.run(
        [sys.executable, "-m", "tests.soak.storm", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    summary, _, problems = storm.stdout.partition("\n")
    with capsys.disabled():
        print(f"\n{summary}")
    assert not problems, problems + storm.stderr
    assert storm.returncode == 0, storm.stderr
