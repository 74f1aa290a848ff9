"""Interrupts at each instruction of a call in turn: none of them may be the wrong moment."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any


class Interrupts:
    """Interrupts a call before the n-th instruction that the code of these files executes."""

    def __init__(self, at: int, files: tuple[str, ...], handle: Callable[[], object]) -> None:
        self.left = at
        self._files = files
        self._handle = handle

    def __call__(self, frame: Any, event: str, argument: object) -> Any:
        if os.path.basename(frame.f_code.co_filename) not in self._files:
            return None
        frame.f_trace_opcodes = True
        # What is in no line closes a generator, for one, where nobody is told of an interrupt.
        if event == "opcode" and frame.f_lineno is not None:
            self.left -= 1
            if self.left == 0:
                self._handle()
        return self


def _raise() -> None:
    raise KeyboardInterrupt


def interrupt(
    function: Callable[[], object],
    at: int,
    *files: str,
    handle: Callable[[], object] = _raise,
) -> bool:
    """Call a function, and interrupt it as Ctrl-C may.

    Args:
        function: What to call.
        at: Before which instruction, counted from one.
        files: The names of the source files whose instructions count.
        handle: What is called then, as the handler of a signal is.

    Returns:
        Whether it came so far.
    """
    interrupts = Interrupts(at, files, handle)
    traced_before = sys.gettrace()
    # What is collected meanwhile runs code of the same files, and is not what is to be interrupted.
    gc.disable()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks at it in settrace() alone.
    sys.settrace(interrupts)
    is_interrupted = False
    try:
        function()
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        sys.settrace(traced_before)
        gc.enable()
    came_so_far = interrupts.left <= 0
    assert is_interrupted == came_so_far or handle is not _raise, f"nobody was told: {at}"
    return came_so_far
