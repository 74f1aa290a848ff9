"""Between the wall clock, which the wire speaks, and the monotonic one, which nobody can set."""

from __future__ import annotations

import pytest

from elastic_timer import _clock
from elastic_timer._server.workers import EpochClock


class Clocks:
    """Both clocks, to be set."""

    epoch = 1000.0
    monotonic = 10.0


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(_clock, "epoch", lambda: clocks.epoch)
    monkeypatch.setattr(_clock, "monotonic", lambda: clocks.monotonic)
    return clocks


def test_deadlines_are_as_far_away_on_both_clocks(clocks: Clocks) -> None:
    """There and back, now and after both have gone on."""
    clock = EpochClock()
    for _ in range(2):
        assert clock.to_monotonic(1005.0) == 15.0
        assert clock.to_epoch(15.0) == 1005.0
        clocks.epoch += 3
        clocks.monotonic += 3


@pytest.mark.parametrize("step", [3600.0, 0.0011, -0.0011, -3600.0])
def test_step_of_the_wall_clock_is_followed(clocks: Clocks, step: float) -> None:
    """What is so far ahead by the new wall clock is so far ahead by the monotonic one."""
    clock = EpochClock()
    clocks.epoch += step
    assert clock.to_monotonic(clocks.epoch + 5) == pytest.approx(15.0, abs=1e-9)
    assert clock.to_epoch(15.0) == pytest.approx(clocks.epoch + 5, abs=1e-9)


@pytest.mark.parametrize("shift", [0.0009, -0.0009])
def test_time_between_two_readings_is_no_step(clocks: Clocks, shift: float) -> None:
    """A time that was turned into the other once is turned into the same one again."""
    clock = EpochClock()
    clocks.epoch += shift
    assert clock.to_monotonic(1005.0) == 15.0
    # It does not creep on for ever: more than a millisecond in all is a step.
    clocks.epoch += shift
    assert clock.to_monotonic(1005.0) == pytest.approx(15.0 - 2 * shift, abs=1e-9)


@pytest.mark.parametrize("step", [3600.0, 0.0005, -0.0005, -3600.0])
def test_a6_present_of_a_round_is_one_moment(clocks: Clocks, step: float) -> None:
    """However the clocks go on, the present stays what it was on both, until the round ends."""
    clock = EpochClock()
    with clock.present() as now:
        clocks.epoch += step
        clocks.monotonic += 0.25
        assert now == 1000.0
        assert clock.to_monotonic(now) == 10.0
        assert clock.to_monotonic(now + 5000) > 10.0  # Others are not the present.
    clocks.epoch = 2000.0
    assert clock.to_monotonic(now) == pytest.approx(clocks.monotonic - 1000)


def test_a6_present_ends_with_its_round_also_where_that_raises(clocks: Clocks) -> None:
    """The next look at the same moment asks the clocks again."""
    clock = EpochClock()
    with pytest.raises(ZeroDivisionError), clock.present() as now:
        _ = 1 / 0
    clocks.epoch += 100
    assert clock.to_monotonic(now) == -90.0


def test_pause_between_the_readings_makes_deadlines_later(
    clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never earlier: the wall clock is read first."""

    def slow_monotonic() -> float:
        clocks.epoch += 30
        clocks.monotonic += 30
        return clocks.monotonic

    monkeypatch.setattr(_clock, "monotonic", slow_monotonic)
    assert EpochClock().to_monotonic(1005.0) >= 15.0


@pytest.mark.parametrize(("pause", "wrong_by"), [(0.0015, 0.0), (0.6, 0.0), (0.6, 0.4)])
@pytest.mark.parametrize("reading", range(15))
def test_pause_between_the_readings_is_no_step(
    clocks: Clocks, monkeypatch: pytest.MonkeyPatch, reading: int, pause: float, wrong_by: float
) -> None:
    """Wherever a busy machine holds the server up, and though the wall clock is wrong by that."""
    clock = EpochClock()
    readings = iter(range(1000))

    def read(name: str) -> float:
        told = float(getattr(clocks, name))
        if next(readings) == reading:
            clocks.epoch += pause
            clocks.monotonic += pause
            # It is put together of two readings of its own.
            told += wrong_by if name == "epoch" else 0.0
        return told

    monkeypatch.setattr(_clock, "epoch", lambda: read("epoch"))
    monkeypatch.setattr(_clock, "monotonic", lambda: read("monotonic"))
    assert clock.to_monotonic(1005.0) == pytest.approx(15.0, abs=1e-3)
