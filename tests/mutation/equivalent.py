"""Mutants that no test can tell from the original, and why."""

from __future__ import annotations

EQUIVALENT: dict[str, dict[str, str]] = {
    "_timer_table": {},
    "_wire": {},
    "api": {},
}
