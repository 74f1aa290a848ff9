"""Until `run --events` and the demo listen to events: the evidence of each run's last round."""

from __future__ import annotations

from elastic_timer._evidence.expiry import Evidence

_latest: dict[str, dict[int, Evidence]] = {}


def remember(run_id: str, evidence: dict[int, Evidence]) -> None:
    """Keep the evidence of a run's last round."""
    _latest[run_id] = evidence


def latest(run_id: str, pid: int) -> Evidence | None:
    """The evidence on a worker if it was in its run's last round, else `None`."""
    return _latest.get(run_id, {}).get(pid)
