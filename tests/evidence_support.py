"""What the tests of the evidence on expired workers share."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_timer._evidence import stacks

REAL_PY_SPY = shutil.which("py-spy", path=os.path.dirname(sys.executable)) or "py-spy"


def install_py_spy(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a shell script run as py-spy; returns the file that logs its arguments."""
    log = folder / "dumps"
    log.touch()
    program = folder / "scripts" / "py-spy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(log))}\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(stacks, "find_py_spy", lambda: str(program))
    return log


def expired(pid: int, *scopes: str, late: float = 0.5) -> list[str]:
    """Timers of a worker as a server hands them over, each `late` seconds past its deadline."""
    return [
        json.dumps(
            {
                "version": 1,
                "pid": pid,
                "scope_id": scope,
                "expiration_time": time.time() - late,
                "signal": 9,
            }
        )
        for scope in scopes or ("train.py#42",)
    ]


def logged(caplog: pytest.LogCaptureFixture) -> list[Any]:
    """The records on workers, as objects with any attribute."""
    return [record for record in caplog.records if hasattr(record, "timer_command")]
