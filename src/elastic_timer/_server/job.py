"""A worker's place in its job: which workers are peers, and where each of them is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Job(NamedTuple):
    """What workers have in common that wait for each other."""

    run_id: str | None
    world_size: int | None
    restart_count: int | None


class Standing(NamedTuple):
    """Where a worker is, as its server knows it at one moment.

    Attributes:
        pid: The worker.
        rank: Its rank in its job.
        local_rank: Its rank among those of this host.
        job: Its job; None without one.
        block: That of its most urgent timer; None where it holds none.
        deadline: Of that timer, in monotonic seconds.
        seconds: For how long it has been in the block.
        passes: How often it has entered each block.
        expired: Whether that timer is past its deadline.
    """

    pid: int
    rank: int | None
    local_rank: int | None
    job: Job | None
    block: str | None = None
    deadline: float | None = None
    seconds: float | None = None
    passes: Mapping[str, int] = {}
    expired: bool = False

    def is_in_a_job(self) -> bool:
        """Whether it has peers, or could have."""
        return self.job is not None and self.rank is not None


# No job has as many ranks. What has thousands of digits Python refuses to make a number of.
_MOST_DIGITS = 9


def number_in(environment: Mapping[str, str], *names: str) -> int | None:
    """The number that the first of these variables has which holds one."""
    values = (environment.get(name, "") for name in names)
    numbers = (value for value in values if value.isdecimal() and len(value) <= _MOST_DIGITS)
    return next(map(int, numbers), None)


def ranks(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    """The rank in its job and the rank on its host of a process; `None` where it has none.

    Args:
        environment: What `environment_of` found.
    """
    rank = number_in(environment, "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return rank, number_in(environment, "LOCAL_RANK")


def job_of(environment: Mapping[str, str]) -> Job | None:
    """The job of a process; None where nothing tells of one, and where it has but one rank.

    Args:
        environment: What `environment_of` found.
    """
    job = Job(
        environment.get("TORCHELASTIC_RUN_ID") or None,
        number_in(environment, "WORLD_SIZE"),
        number_in(environment, "TORCHELASTIC_RESTART_COUNT"),
    )
    is_one = job.run_id is not None or job.world_size is not None
    return job if is_one and job.world_size != 1 else None
