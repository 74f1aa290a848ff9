"""A12: the clocks by which deadlines are kept go on where a test library stops those of Python."""

from __future__ import annotations

import errno
import importlib.util
import sys
import time
from typing import Any

import pytest

from elastic_timer import _clock
from tests.support import Child


def test_a12_epoch_is_the_wall_clock() -> None:
    """It tells what `time.time` tells, to the microsecond and without jumps."""
    for _ in range(1000):
        before, between, after = time.time(), _clock.epoch(), time.time()
        assert before - 1e-5 <= between <= after + 1e-5
    before, between, after = time.monotonic(), _clock.monotonic(), time.monotonic()
    assert before <= between <= after


CLOCKS = """
import time
from elastic_timer import _clock
real = time.time(), time.monotonic()
{freeze}
    assert abs(time.time() - real[0]) > 1e6
    told = _clock.epoch(), _clock.monotonic()
    began = _clock.monotonic()
    while _clock.monotonic() < began + 0.01:
        pass
    assert _clock.epoch() >= told[0] + 0.009
for was, now in zip(real, told):
    assert was <= now < was + 10, (was, now)
print("right")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the clock that is not moved is Linux's")
@pytest.mark.parametrize(
    "freeze",
    [
        "from freezegun import freeze_time\nwith freeze_time('2000-01-01'):",
        "import time_machine\nwith time_machine.travel(0, tick=False):",
    ],
    ids=["freezegun", "time-machine"],
)
def test_a12_clocks_go_on_when_frozen(freeze: str) -> None:
    """With Python's clock stopped at another date both clocks tell the real time, and go on."""
    pytest.importorskip("freezegun" if "freezegun" in freeze else "time_machine")
    child = Child(CLOCKS.format(freeze=freeze))
    try:
        assert child.wait() == 0, child.stderr_text()
        assert child.readline() == "right"
    finally:
        child.close()


@pytest.mark.parametrize("lacking", ["name", "clock"])
def test_a12_system_without_the_clock(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """Where the name or the clock itself is missing, the wall clock is Python's own."""

    def refuse(clock: int) -> float:
        raise OSError(errno.EINVAL, "Invalid argument")

    if lacking == "name":
        monkeypatch.delattr(time, "CLOCK_TAI", raising=False)
    else:
        monkeypatch.setattr(time, "clock_gettime", refuse)
    before = time.time()
    assert before <= load_anew().epoch() <= time.time()


def test_a12_leap_seconds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system knows of them, its clock without jumps is ahead of the wall clock."""
    ahead = {getattr(time, "CLOCK_TAI", None): 37}
    monkeypatch.setattr(time, "clock_gettime", lambda clock: time.time() + ahead.get(clock, 0))
    before = time.time()
    assert before - 1e-5 <= load_anew().epoch() <= time.time() + 1e-5


def load_anew() -> Any:
    """The module of the clocks, as it finds the system now."""
    spec = importlib.util.find_spec(_clock.__name__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
