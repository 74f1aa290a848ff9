"""Mutants that no test can tell from the original, and why."""

from __future__ import annotations

_PRUNING = "the heap is only rebuilt a little earlier or later; its bound holds"

EQUIVALENT: dict[str, dict[str, str]] = {
    "_timer_table": {
        "for _, _, worker, scope in sorted(due, key=lambda entry: entry[:2]):  ->  "
        "for _, _, worker, scope in sorted(due, key=lambda entry: entry[:3]):": (
            "serials differ, so the third is never compared"
        ),
        "while self._heap and (not self._is_live(0)):  ->  while False:": (
            "dead entries are passed over below; dropping them here saves time alone"
        ),
        "if earliest is not None and deadline >= earliest:  ->  "
        "if earliest is not None and deadline > earliest:": (
            "below an entry of the earliest deadline is none that is earlier"
        ),
        "if len(self._heap) > 2 * self._size + _HEAP_SLACK:  ->  "
        "if len(self._heap) >= 2 * self._size + _HEAP_SLACK:": _PRUNING,
        "if len(self._heap) > 2 * self._size + _HEAP_SLACK:  ->  "
        "if len(self._heap) > 2 * self._size - _HEAP_SLACK:": _PRUNING,
    },
    "_wire": {
        "@functools.lru_cache(maxsize=64)  ->  @functools.lru_cache(maxsize=65)": (
            "the size of a cache changes no result"
        ),
        "if start <= 0:  ->  if start < 0:": (
            "at 0 the same text is read again, and refused for the same reason"
        ),
    },
    "api": {
        "loop = getattr(asyncio, '_get_running_loop', lambda: None)()  ->  "
        "loop = getattr(asyncio, '_get_running_loop')()": (
            "it is missing only while another thread is importing asyncio"
        ),
        "task = None if loop is None else asyncio.current_task(loop)  ->  "
        "task = None if loop is None else asyncio.current_task()": (
            "without an argument it takes the running loop, which this one is"
        ),
    },
}
