"""A1: the interrupts of tests/test_interrupted_blocks.py, for 50,000 blocks of each kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support import Child
from tests.test_interrupted_blocks import KINDS, interrupted_blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["single", "storm"])
def test_a1_50_000_blocks(
    spawn: Callable[..., Child], fifo_path: str, kind: str, when: str
) -> None:
    """Thousands of interrupts leave no timer and no descriptor behind."""
    interrupts, stray, descriptors = interrupted_blocks(spawn, fifo_path, kind, 50_000, when)
    assert interrupts > 1000
    assert (stray, descriptors) == (0, 0)
