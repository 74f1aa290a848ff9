"""What is known of an expired worker as text: as documented, and where little is known."""

from __future__ import annotations

import re
from typing import Any, cast

import pytest

from elastic_timer._evidence.expiry import Evidence, describe, describe_expiry, log_fields
from tests.support import REPOSITORY

STANDARD = "/usr/lib/python3.11"
PACKAGES = "/opt/venv/lib/python3.11/site-packages"
STARTED = (f"Thread._bootstrap ({STANDARD}/threading.py:1002)",)


def thread(*places: str, **changes: Any) -> Any:
    """A thread in these places, `function (file:line)`, outermost first."""
    found = [re.fullmatch(r"(.*) \((.*):(\d+)\)", place) for place in places]
    frames = [
        {"function": match[1], "file": match[2], "line": int(match[3])} for match in found if match
    ]
    usual = {"id": 7, "name": "MainThread", "active": False, "gil": False}
    return {**usual, "frames": frames, **changes}


def evidence(**changes: Any) -> Evidence:
    """All that is known of a worker; nothing but what every one has, unless said."""
    usual: dict[str, Any] = {
        "run_id": "nightly",
        "pid": 15602,
        "rank": None,
        "local_rank": None,
        "scopes": ["train.py#42"],
        "seconds_late": 0.004,
        **unknown(),
        "descendants": [],
    }
    return cast("Evidence", {**usual, **changes})


def unknown(**known: Any) -> dict[str, Any]:
    """A process of which nothing else is known."""
    names = ("command", "state", "system_call", "wait_channel", "threads", "resident_bytes")
    return {**dict.fromkeys((*names, "age_seconds", "stacks", "stacks_missing")), **known}


def test_as_documented() -> None:
    """The page on evidence shows it."""
    page = (REPOSITORY / "docs" / "evidence.md").read_text()
    shown = re.search(r"```text\n(worker 15602 .*?)\n```", page, re.S)
    assert shown is not None
    library = f"{STANDARD}/multiprocessing"
    told = evidence(
        rank=3,
        command="python train.py --epochs 3",
        state="S",
        system_call="poll",
        wait_channel="do_sys_poll",
        threads=4,
        resident_bytes=13_946_060,
        age_seconds=93.21,
        stacks=[
            thread(
                "<module> (/home/me/train.py:61)",
                "train (/home/me/train.py:43)",
                f"Queue.get ({library}/queues.py:103)",
                f"_ConnectionBase.recv_bytes ({library}/connection.py:216)",
            ),
            thread(
                *STARTED, f"Condition.wait ({STANDARD}/threading.py:327)", name="QueueFeederThread"
            ),
            thread(
                *STARTED,
                f"TMonitor.run ({PACKAGES}/tqdm/_monitor.py:60)",
                f"Event.wait ({STANDARD}/threading.py:629)",
                name="tqdm_monitor",
            ),
        ],
        descendants=[
            {
                "pid": 15604,
                "command": "python train.py --epochs 3",
                "state": "S",
                "system_call": "recvfrom",
                "stacks": [
                    thread(
                        "train (/home/me/train.py:40)",
                        f"BaseProcess.run ({library}/process.py:108)",
                        "load (/home/me/loader.py:17)",
                    )
                ],
                "stacks_missing": None,
            },
            {
                "pid": 15611,
                "command": "git fetch",
                "state": "S",
                "system_call": "poll",
                "stacks": None,
                "stacks_missing": "py-spy: "
                "Error: Failed to find python version from target process",
            },
        ],
    )
    assert describe(told) == shown[1]


def test_little_is_known() -> None:
    """What is not known has no line, and no word."""
    first = "worker 15602 of run 'nightly' is past its deadline: 'a', 'b\\n', 0.500 s late"
    told = evidence(scopes=["a", "b\n"], seconds_late=0.5)
    assert describe_expiry(told) == describe(told) == first
    told["stacks_missing"] = "switched off"
    told["descendants"] = cast("Any", [unknown(pid=9, stacks_missing="py-spy took too long")])
    assert describe(told).splitlines() == [
        first,
        "  no stacks: switched off",
        "  descendant 9: no stacks: py-spy took too long",
    ]


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"state": "R"}, "state R (running)"),
        ({"state": "D"}, "state D (in the kernel, not interruptible)"),
        ({"state": "T"}, "state T (stopped)"),
        ({"state": "t"}, "state t (stopped by a debugger)"),
        ({"state": "Z"}, "state Z (ended, not waited for)"),
        ({"state": "I"}, "state I (idle)"),
        ({"state": "P"}, "state P (unknown)"),
        ({"threads": 1, "resident_bytes": 0}, "1 thread, 0.0 MiB resident"),
    ],
)
def test_facts_in_words(known: dict[str, Any], said: str) -> None:
    """A letter is said what it stands for."""
    assert describe(evidence(**known)).splitlines()[1:] == [f"  {said}"]


def test_threads() -> None:
    """Each says whether it runs, and holds the GIL; one without a name has its number."""
    active = thread("f (/home/me/a.py:5)", name=None, active=True, gil=True)
    idle = thread(*STARTED, "wait (/home/me/a.py:6)", name="two\nlines")
    assert describe(evidence(stacks=[active, idle])).splitlines()[1:] == [
        "  thread 7 (active, holds the GIL):",
        '    File "/home/me/a.py", line 5, in f',
        "  thread two lines (idle):",
        f'    File "{STANDARD}/threading.py", line 1002, in Thread._bootstrap',
        '    File "/home/me/a.py", line 6, in wait',
    ]


def test_frame_of_an_unknown_line() -> None:
    """It has none, rather than 0."""
    stack = [thread("clock_nanosleep (/usr/lib/libc.so.6:0)")]
    assert describe(evidence(stacks=stack)).splitlines()[2:] == [
        '    File "/usr/lib/libc.so.6", in clock_nanosleep'
    ]


def test_fields_of_the_record() -> None:
    """All of them begin alike."""
    assert log_fields({"pid": 5, "rank": None}) == {"timer_pid": 5, "timer_rank": None}
