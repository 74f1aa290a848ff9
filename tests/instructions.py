"""Interrupts at each instruction of a call in turn: none of them may be the wrong moment."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any


class Interrupts:
    """Interrupts a call before the n-th instruction that the code of these files executes."""

    def __init__(self, at: int, files: tuple[str, ...]) -> None:
        self._left = at
        self._files = files

    def __call__(self, frame: Any, event: str, argument: object) -> Any:
        if os.path.basename(frame.f_code.co_filename) not in self._files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
        return self


def interrupt(function: Callable[[], object], at: int, *files: str) -> bool:
    """Call a function, and interrupt it as Ctrl-C may.

    Args:
        function: What to call.
        at: Before which instruction, counted from one.
        files: The names of the source files whose instructions count.

    Returns:
        Whether it came so far.
    """
    traced_before = sys.gettrace()
    # What is collected meanwhile runs code of the same files, and is not what is to be interrupted.
    gc.disable()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks at it in settrace() alone.
    sys.settrace(Interrupts(at, files))
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(traced_before)
        gc.enable()
    return False
