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

# The places that were met, by all that a line's number follows from. To tell it, Python reads
# through the lines of the function up to there: 20 us and more in a function of some 500 lines.
_places: dict[tuple[str, int, bytes, int], str] = {}
_MOST_PLACES = 1000


def place(caller: FrameType, block: object) -> str:
    """The default scope: `file#line`, and what tells it from others of the same line."""
    code, offset = caller.f_code, caller.f_lasti
    key = (code.co_filename, code.co_firstlineno, code.co_linetable, offset)
    found = _places.get(key)
    if found is None:
        found = f"{code.co_filename}#{caller.f_lineno}"
        if _first_calls.setdefault(found, offset) != offset:
            found += f"@{offset}"
        if len(_places) >= _MOST_PLACES:  # A notebook's cell is new code each time it is run.
            _places.clear()
        _places[key] = found
    if code.co_flags & _ANY_GENERATOR:
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
