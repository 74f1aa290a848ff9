"""Blocks: what the scopes of many workers, threads and tasks have in common. Pure."""

from __future__ import annotations

import functools
import re

# What `expires` appends to a default scope to keep threads, tasks and generators apart.
_WHOSE = re.compile(r"@(?:thread|task|generator)-[0-9a-f]+")


@functools.lru_cache(maxsize=4096)
def block_of(scope: str) -> str:
    """The block that a scope stands for, whichever thread, task or generator is in it."""
    return _WHOSE.sub("", scope) if "@" in scope else scope
