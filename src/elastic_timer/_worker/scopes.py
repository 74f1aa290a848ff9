"""The default name of a block: where it stands, and what tells it from others there."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

# CO_GENERATOR and CO_ASYNC_GENERATOR, see the module inspect, which takes long to import.
_ANY_GENERATOR = 0x20 | 0x200

# Where in the code of its line an unnamed block stands, by `file#line`: the first one that is met
# there has this alone for its scope.
_first_calls: dict[str, int] = {}


def place(caller: FrameType, block: object) -> str:
    """The default scope: `file#line`, and what tells it from others of the same line."""
    found = f"{caller.f_code.co_filename}#{caller.f_lineno}"
    if _first_calls.setdefault(found, caller.f_lasti) != caller.f_lasti:
        found += f"@{caller.f_lasti}"
    if caller.f_code.co_flags & _ANY_GENERATOR:
        # Several generators may be within their blocks at a time; as long as one is, it keeps this
        # object, so that no other has its address.
        found += f"@generator-{id(block):x}"
    return found


def thread_or_task() -> str:
    """What tells the default scope of this thread or asyncio task from those of others."""
    # Not imported here: a process that has no asyncio has no tasks, and importing takes long.
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None:
        loop = getattr(asyncio, "_get_running_loop", lambda: None)()
        task = None if loop is None else asyncio.current_task(loop)
        if task is not None:
            return f"@task-{id(task):x}"
    thread = threading.get_ident()
    return "" if thread == threading.main_thread().ident else f"@thread-{thread}"
