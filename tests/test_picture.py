"""Who hangs a job: the rules, from records of what its ranks were doing to suspects and text."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_timer import debug_info_logging
from elastic_timer._evidence.picture import (
    Answer,
    Member,
    describe,
    fold_ranks,
    who_hangs,
)
from tests.picture_support import (
    BARRIER,
    LOADS,
    MAIN,
    WAITS,
    member,
    picture,
    recorded,
    thread,
)

HANGS = ("step (train.py:50)",)
BLOCK = "/home/me/train.py#86"


def ask(*members: Member, **job: Any) -> Answer:
    """The answer for one picture."""
    return who_hangs([picture(members, **job)])


def waiting(*ranks: int, **changes: Any) -> list[Member]:
    """Ranks that wait in the same collective."""
    return [member(rank, *WAITS, **changes) for rank in ranks]


# The rules ----------------------------------------------------------------------------------------


def test_example_of_the_documentation() -> None:
    """Eight ranks on two hosts, one of them in its loader: who, why, and where."""
    stuck = member(3, *LOADS, scope="/home/me/data.py#70", seconds=61.24, pid=25724)
    stuck["passes"] = {"/home/me/data.py#70": 1200, BLOCK: 1201}
    others = waiting(0, 1, 2, 4, 5, 6, 7, passes={"/home/me/data.py#70": 1201, BLOCK: 1201})
    text = describe(ask(stuck, *others))
    loads, waits = (
        "load (data.py:41) < __next__ (data.py:77) < main (train.py:71)",
        ("all_reduce (distributed_c10d.py:2950) < step (train.py:88) < main (train.py:71)"),
    )
    assert text.splitlines() == [
        "8 ranks on 2 hosts, 2 groups of stacks",
        "suspect: rank 3 (node-0, pid 25724), the only one that does not wait in a collective",
        f"  rank 3         {loads:{len(waits)}}   in data.py#70, pass 1200, 61.2 s",
        f"  ranks 0-2,4-7  {waits}   in train.py#86, pass 1201, 60.0 s",
        "rank 3 (node-0, pid 25724, state S):",
        "  thread MainThread (idle):",
        '    File "/home/me/train.py", line 99, in <module>',
        '    File "/home/me/train.py", line 71, in main',
        '    File "/home/me/data.py", line 77, in __next__',
        '    File "/home/me/data.py", line 41, in load',
    ]


def test_behind() -> None:
    """A rank that has not reached the pass of the others, though it waits as they do."""
    answer = ask(*waiting(0, 1, 2, 4), *waiting(3, passes={BLOCK: 6}))
    assert answer["suspected"] == [3]
    assert answer["reasons"] == ["behind: pass 6 of train.py#86, where the others are in pass 7"]


def test_block_that_most_are_in() -> None:
    """Passes of another one, which is a rank's own, tell nothing."""
    others = waiting(1, 2, 3, passes={BLOCK: 7, "b": 2})
    first = waiting(0, passes={BLOCK: 7, "b": 1})
    answer = ask(*first, *others, *waiting(4, scope="b", passes={BLOCK: 6, "b": 2}))
    assert answer["suspected"] == [4]


def test_block_of_other_hosts() -> None:
    """How often a rank has entered it is not known where nobody on its host is in it."""
    elsewhere = {"scope": "/home/me/data.py#70", "passes": {"/home/me/data.py#70": 7}}
    answer = ask(*waiting(*range(9)), *(member(rank, *LOADS, **elsewhere) for rank in (12, 13)))
    assert answer["suspected"] == [12, 13]
    assert answer["reasons"] == ["the only ones that do not wait in a collective"]
    # Where one is, it is known of the others that they are not.
    answer = ask(*waiting(*range(9), 14), *(member(rank, *LOADS, **elsewhere) for rank in (12, 13)))
    assert answer["reasons"][0].startswith("not in train.py#86 at all")


def test_as_many_behind_as_not() -> None:
    """Neither are the odd ones; of as many in one pass as in another the later one is the usual."""
    behind = waiting(0, 1, passes={BLOCK: 6})
    assert ask(*behind, *waiting(2, 3))["suspected"] == []
    outside = waiting(4, scope=None)
    assert ask(*behind, *waiting(2, 3), *outside)["suspected"] == [0, 1]


def test_not_in_the_block_at_all() -> None:
    """A rank that has never entered the block that the others are in."""
    answer = ask(*waiting(0, 1, 2), member(3, *HANGS, scope=None, passes={}, seconds=None))
    assert answer["suspected"] == [3]
    assert answer["reasons"] == [
        "not in train.py#86 at all, where the others are in pass 7",
        "the only one that does not wait in a collective",
    ]
    assert "   in no block\n" in describe(answer)


def test_a_copy_of_the_program_on_each_host() -> None:
    """Its blocks are the same, whatever the folder is."""
    copies = [
        member(
            rank, *WAITS, scope=f"/tmp/{rank}/train.py#86", passes={f"/tmp/{rank}/train.py#86": 7}
        )
        for rank in range(4)
    ]
    copies[2]["passes"] = {"/tmp/2/train.py#86": 5}
    assert ask(*copies)["suspected"] == [2]


def test_left_the_block() -> None:
    """A rank that came as far as the others and has left them behind, where they wait for it."""
    outside = {"scope": None, "seconds": None}
    answer = ask(*waiting(0, 1, 2), member(3, *HANGS, **outside))
    assert answer["suspected"] == [3]
    assert answer["reasons"][0] == "not in train.py#86, where the others are"


def test_waits_outside_of_the_block() -> None:
    """It waits for the one that hangs, as the others do."""
    outside = member(4, *BARRIER, scope=None)
    assert ask(*waiting(0, 1, 2), member(3, *HANGS), outside)["suspected"] == [3]


def test_outside_of_the_block_for_all_that_is_known() -> None:
    """Without its stacks nothing is known of a rank that another server watches."""
    unknown = member(4, scope=None, stacks_missing="py-spy: not permitted")
    assert ask(*waiting(0, 1, 2), member(3, *HANGS), unknown)["suspected"] == [3]
    assert ask(*waiting(0, 1, 2), unknown, world_size=None)["suspected"] == []


def test_ahead_of_those_that_hang() -> None:
    """Most are stuck, and those who wait for them in the next block are nobody's suspects."""
    stuck = [member(rank, *LOADS) for rank in range(5)]
    ahead = waiting(5, 6, 7, scope="/home/me/train.py#95", passes={BLOCK: 7})
    answer = ask(*stuck, *ahead)
    assert answer["suspected"] == [0, 1, 2, 3, 4]
    assert answer["reasons"] == ["the only ones that do not wait in a collective"]
    # Nor are those who compute outside, where nobody is known to wait for them.
    computing = [member(rank, "forward (net.py:9)", scope=None) for rank in (5, 6)]
    reasons = ask(*stuck, *computing)["reasons"]
    assert reasons == ["elsewhere than 5 of the 7 ranks"]


def test_without_stacks() -> None:
    """Passes and blocks tell as much as they can."""
    outside = member(3, scope=None, seconds=None)
    assert ask(*(member(rank) for rank in range(3)), outside)["suspected"] == [3]
    answer = ask(*(member(rank) for rank in range(4)))
    assert answer["reasons"] == ["no suspect: there are no stacks"]
    assert "ranks 0-3  no stacks: switched off   in train.py#86" in describe(answer)
    nowhere = [member(rank, scope=None) for rank in range(4)]
    assert ask(*nowhere)["suspected"] == []


def test_victims_of_one_that_is_behind() -> None:
    """In a pipeline those who wait for the one that hangs are behind with it."""
    behind = {"passes": {BLOCK: 6}}
    answer = ask(*waiting(0, 1, 2, 3, 4), *waiting(5, **behind), member(6, *HANGS, **behind))
    assert answer["suspected"] == [6]
    assert len(answer["reasons"]) == 2


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("T", "stopped (state T)"),
        ("t", "stopped by a debugger (state t)"),
        ("D", "stuck in the kernel (state D)"),
        ("Z", "ended (state Z)"),
        ("X", "ended (state X)"),
    ],
)
def test_stopped(state: str, reason: str) -> None:
    """Stopped in the very collective in which the others wait; also where there are but two."""
    for ranks in (2, 5):
        answer = ask(*waiting(*range(1, ranks)), *waiting(0, state=state))
        assert answer["suspected"] == [0]
        assert answer["reasons"] == [reason]
    assert ask(*waiting(0, 1, 2, state=state))["suspected"] == []


def test_stopped_and_behind() -> None:
    """Each rule that names the same is a reason."""
    answer = ask(*waiting(0, 1, 2), *waiting(3, passes={BLOCK: 6}, state="T"))
    assert answer["suspected"] == [3]
    assert answer["reasons"] == [
        "behind: pass 6 of train.py#86, where the others are in pass 7",
        "stopped (state T)",
    ]
    assert "in pass 7; stopped (state T)\n" in describe(answer)


def test_stopped_in_two_ways() -> None:
    """Both are told."""
    answer = ask(*waiting(0, 1, 2), *waiting(3, state="T"), *waiting(4, state="D"))
    assert answer["suspected"] == [3, 4]
    assert answer["reasons"] == ["stuck in the kernel (state D) or stopped (state T)"]


def test_stopped_where_others_wait() -> None:
    """One that is stopped is no victim, wherever that was."""
    answer = ask(*waiting(0, 1, 2), *waiting(3, state="T"), member(4, *HANGS, state="T"))
    assert answer["suspected"] == [3, 4]
    assert answer["reasons"] == ["stopped (state T)"]


def test_not_waiting() -> None:
    """Those who let the others wait, however many they are."""
    assert ask(*waiting(0, 1, 2), member(3, *HANGS))["suspected"] == [3]
    assert ask(*waiting(0), *(member(rank, *HANGS) for rank in (1, 2, 3)))["suspected"] == [1, 2, 3]


def test_two_ranks() -> None:
    """What one waits for is what the other does not do; neither is fewer, nor behind."""
    assert ask(*waiting(1), member(0, *HANGS, passes={BLOCK: 6}))["suspected"] == [0]
    assert ask(*waiting(1, passes={BLOCK: 6}), member(0, *HANGS))["suspected"] == [0]
    assert ask(*waiting(1, state="T"), member(0, *HANGS))["suspected"] == [0]
    answer = ask(*waiting(0), member(1, *BARRIER))
    assert answer["suspected"] == []
    assert answer["reasons"] == ["no suspect: as many ranks are at one place as at another"]


def test_another_collective() -> None:
    """The smaller group is told, and where both are of equal right, none."""
    answer = ask(*waiting(0, 1, 2), member(3, *BARRIER))
    assert answer["suspected"] == [3]
    assert answer["reasons"] == ["in another collective than 3 of the 4 ranks"]
    answer = ask(*waiting(0, 1), member(2, *BARRIER), member(3, *BARRIER))
    assert answer["suspected"] == []
    # Three groups, none of which has more than half.
    three = [member(4, *HANGS), member(5, *HANGS)]
    answer = ask(*(member(rank, *LOADS) for rank in (0, 1, 2)), *three, member(3, *MAIN))
    assert answer["suspected"] == []


def test_smaller_group() -> None:
    """Where nobody waits in a collective that is known as one, the others are elsewhere."""
    answer = ask(*(member(rank, "step (train.py:92)") for rank in range(4)), member(4, *LOADS))
    assert answer["suspected"] == [4]
    assert answer["reasons"] == ["elsewhere than 4 of the 5 ranks"]


def test_helper_called_from_elsewhere() -> None:
    """All are in one helper, and one has called it in another place."""
    helper = (*WAITS[:2], "reduce (helper.py:9)")
    others = [member(rank, *helper, "step (train.py:88)") for rank in (0, 1, 2)]
    answer = ask(*others, member(3, *helper, "step (train.py:95)"))
    assert answer["suspected"] == [3]
    assert answer["reasons"] == ["called from elsewhere than 3 of the 4 ranks"]
    assert [group["ranks"] for group in answer["groups"]] == [[3], [0, 1, 2]]


@pytest.mark.parametrize("rank", [0, 4])
def test_first_rank_may_have_a_way_of_its_own(rank: int) -> None:
    """The first rank, of all or of its host, prints and saves, and waits with the others."""
    others = waiting(*(other for other in range(6) if other != rank))
    first = member(rank, *WAITS, "with_progress_bar (train.py:60)")
    answer = ask(*others, first)
    assert answer["suspected"] == []
    assert answer["reasons"] == ["no suspect: all ranks are at the same place"]


def test_all_at_the_same_place() -> None:
    """Nobody is named, though of some there are no stacks."""
    answer = ask(*waiting(0, 1, 2, 3))
    assert answer["suspects"] == []
    assert answer["reasons"] == ["no suspect: all ranks are at the same place"]
    assert describe(answer).splitlines()[:2] == [
        "4 ranks on 1 host, 1 group of stacks",
        "no suspect: all ranks are at the same place",
    ]
    answer = ask(*waiting(0, 1, 2), member(3))
    assert answer["suspects"] == []
    assert answer["reasons"] == [
        "no suspect: all ranks of which there are stacks are at the same place"
    ]


def test_polling_in_a_library() -> None:
    """Ranks in one call of a library's are at one place, wherever in it they were met."""
    torch = "/opt/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
    inside = [(), (f"_poll ({torch}:9)",), (f"_poll ({torch}:11)", f"_loop ({torch}:7)")]
    outside = (f"barrier ({torch}:5356)", "step (train.py:90)")
    answer = ask(*(member(rank, *inner, *outside) for rank, inner in enumerate(inside)))
    assert [group["ranks"] for group in answer["groups"]] == [[0, 1, 2]]


def test_names_that_a_program_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts once; a rank that is in one of them waits."""
    monkeypatch.setattr(debug_info_logging, "_collectives", [])
    assert debug_info_logging.collectives() == ()
    for name in ("synchronize", "reduce", "reduce"):
        debug_info_logging.add_collective(name)
    assert debug_info_logging.collectives() == ("synchronize", "reduce")
    ranks = picture([member(0, "reduce (train.py:5)"), member(1, *HANGS)])
    assert who_hangs([ranks])["suspected"] == []
    assert who_hangs([ranks], debug_info_logging.collectives())["suspected"] == [1]


# What is not known --------------------------------------------------------------------------------


def test_others_on_other_hosts() -> None:
    """Where all ranks here wait and there are more, the suspect is elsewhere."""
    answer = ask(*waiting(*range(8)), world_size=16)
    assert answer["missing"] == list(range(8, 16))
    assert answer["suspected"] == []
    assert answer["reasons"] == [
        "all 8 ranks here wait in a collective; the suspect is on another host: "
        "elastic-timer report EVENTS..."
    ]
    [only] = ask(*waiting(0), world_size=2)["reasons"]
    # It may be on this host, where each rank has a server of its own.
    assert only.startswith("the only rank here waits in a collective; the suspect is another rank:")


def test_servers_of_one_host_know_their_own_blocks() -> None:
    """How often a rank has entered a block that only others' servers tell of is not known."""
    there = {"scope": "b", "passes": {"b": 3}}
    ranks = [*waiting(0, 1), member(2, *BARRIER, **there)]
    answer = who_hangs([picture([rank], world_size=3) for rank in ranks], offline=True)
    assert answer["reasons"] == ["in another collective than 2 of the 3 ranks"]
    assert answer["suspected"] == [2]


def test_process_without_a_thread_of_pythons() -> None:
    """py-spy finds one that has not begun, or has all but ended."""
    answer = ask(*waiting(0, 1), member(2, stacks=[], stacks_missing=None))
    assert "rank 2     no stacks: no thread of it runs Python code  " in describe(answer)


@pytest.mark.parametrize(
    ("known", "world_size", "absent"),
    [
        ([0, 1, 2], 4, [3]),  # Too few for another host.
        ([4, 5, 7], 16, [6]),  # One between those of this host.
        ([0, 1, 2, 3], 8, []),
    ],
)
def test_rank_that_no_server_knows(known: list[int], world_size: int, absent: list[int]) -> None:
    """One that must be here, and of which nothing is known, is the suspect."""
    answer = ask(*waiting(*known), world_size=world_size)
    assert answer["suspected"] == absent
    assert answer["suspects"] == []
    if absent:
        assert describe(answer).splitlines()[1] == (
            f"suspect: rank {absent[0]}, which should be here: ended, or in no block so far; "
            f"all {len(known)} ranks here wait in a collective"
        )


def test_ranks_of_a_host_that_do_not_follow_each_other() -> None:
    """Without local ranks, or with ranks dealt out in turn, nothing is concluded from a gap."""
    alone = waiting(0, 2, local_rank=None)
    assert ask(*alone, world_size=8)["suspected"] == []
    dealt = [*waiting(0, local_rank=0), *waiting(2, local_rank=1)]
    assert ask(*dealt, world_size=8)["suspected"] == []


def test_offline_all_is_known() -> None:
    """No file tells of them, so they are the suspects."""
    answer = who_hangs([picture(waiting(0, 1, 2, 3), world_size=8)], offline=True)
    assert answer["suspected"] == [4, 5, 6, 7]
    lines = describe(answer, missing="no file tells of").splitlines()
    assert lines[1] == (
        "suspects: ranks 4-7, of which no file tells; "
        "all 4 ranks that are known wait in a collective"
    )
    assert lines[3] == "  no file tells of ranks 4-7"
    # Without any that are missing, or without words for them, there is no such line.
    assert len(describe(ask(*waiting(0, 1)), missing="no file tells of").splitlines()) == 3
    assert len(describe(ask(*waiting(0, 1), world_size=8)).splitlines()) == 3
    [only] = who_hangs([picture(waiting(0), world_size=2)], offline=True)["reasons"]
    assert only.endswith("the only rank that is known waits in a collective")
    # Somebody who is known not to wait is a better suspect.
    seen = [picture([*waiting(0, 1, 2), member(3, *HANGS)], world_size=8)]
    assert who_hangs(seen, offline=True)["suspected"] == [3]


def test_nobody() -> None:
    """A picture of nobody is no answer; a world of any size uses little memory."""
    with pytest.raises(ValueError, match="no members"):
        who_hangs([picture([])])
    assert len(ask(*waiting(0), world_size=1 << 60)["missing"]) == (1 << 20) - 1


def test_two_pictures_of_one_host() -> None:
    """The first one counts, but for the stacks where it has none."""
    early = picture([*waiting(0, 1), member(2, state="D")])
    children = recorded("data_loader")[2]["descendants"]
    stuck = member(2, *HANGS, state="S", descendants=children)
    late = picture([member(0, *BARRIER), *waiting(1, passes={BLOCK: 9}), stuck])
    answer = who_hangs([early, late])
    assert [group["passes"] for group in answer["groups"]] == [[7], [7]]
    [suspect] = answer["suspects"]
    assert suspect["rank"] == 2
    assert suspect["state"] == "D"
    assert suspect["stacks"] is not None
    assert suspect["stacks_missing"] is None
    assert suspect["descendants"] == children


def test_two_processes_of_one_rank() -> None:
    """Both are told, in the order of their pids, whichever was seen first."""
    first, second = waiting(0), waiting(0, pid=4001)
    for members in ([*first, *second], [*second, *first]):
        answer = ask(*members, member(1, *HANGS, pid=9), member(1, *HANGS, pid=8))
        assert [each["pid"] for each in answer["suspects"]] == [8, 9]


# Text ---------------------------------------------------------------------------------------------


def test_several_suspects() -> None:
    """Each with its host and pid while there are few; one of each group is shown."""
    few = ask(*waiting(0, 1, 2, 3, 4), member(5, *HANGS), member(6, *HANGS))
    lines = describe(few).splitlines()
    assert lines[1] == (
        "suspects: rank 5 (node-1, pid 4005), rank 6 (node-1, pid 4006), "
        "the only ones that do not wait in a collective"
    )
    assert [line for line in lines if line.startswith("rank")] == [
        "rank 5 (node-1, pid 4005, state S):"
    ]
    many = ask(*waiting(*range(20)), *(member(rank, *HANGS) for rank in range(20, 40)))
    assert describe(many).splitlines()[1] == (
        "suspects: ranks 20-39 (node-5, node-6, node-7 and 2 more), "
        "the only ones that do not wait in a collective"
    )


def test_one_screen() -> None:
    """However scattered a thousand ranks are; lines have an end, too."""
    places = [member(rank, f"step{rank} (train.py:{rank})") for rank in range(0, 1000, 2)]
    text = describe(ask(*waiting(*range(1, 1000, 2)), *places, world_size=4000), details=20)
    many = ask(*waiting(*range(0, 4000, 4)), world_size=4000)
    [unknown] = [line for line in describe(many, missing="unknown:").splitlines() if "unk" in line]
    assert unknown.startswith("  unknown: ranks 1-3,5-7,9-11,13-15,")
    assert unknown.endswith(" more")
    assert len(unknown) < 500
    assert len(text.splitlines()) < 100
    assert max(map(len, text.splitlines())) < 250
    assert "  and 492 groups more" in text
    assert "  ranks 1,3,5,7,9,11,13,15,17,19,21,23,25,27,29 and 485 more  all_reduce" in text


def test_width_of_ranks() -> None:
    """Forty characters of them are shown whole."""
    whole, wider = [*range(0, 28, 2), 100], [*range(0, 26, 2), 100, 102]
    assert f"ranks {','.join(map(str, whole))}  all_reduce" in describe(ask(*waiting(*whole)))
    cut = ",".join(map(str, wider[:-1]))
    assert f"ranks {cut} and 1 more  all_reduce" in describe(ask(*waiting(*wider)))


def test_width_of_missing_ranks() -> None:
    """Four hundred characters of them are shown whole."""
    answer = ask(*waiting(0))
    short = [*range(1, 100, 2)]  # 144 characters with the comma at their end, as those below.
    for missing, more in (
        ([*short, *range(101, 229, 2)], ""),
        ([*short[:-1], *range(101, 231, 2)], " and 1 more"),
    ):
        answer["missing"] = missing
        shown = ",".join(map(str, missing[:-1] if more else missing))
        assert describe(answer, missing="unknown:").endswith(f"\n  unknown: ranks {shown}{more}")


def test_width_of_frames() -> None:
    """Those that are longer do not push all others to the right."""
    long, short = "f" * 90, "step (train.py:92) < main (train.py:71)"
    ranks = [member(rank, "step (train.py:92)") for rank in (0, 1, 2)]
    lines = describe(ask(*ranks, member(3, f"{long} (train.py:1)"))).splitlines()
    assert lines[2].startswith(f"  rank 3     {long} (train.py:1) < main (train.py:71)   in train")
    assert lines[3] == f"  ranks 0-2  {short:80}   in train.py#86, pass 7, 60.0 s"


def test_how_many_suspects_are_named() -> None:
    """Three, each with its pid; of more, three hosts; and of three the stacks."""
    others = [*waiting(0, 1, 2, 3, 6, 7)]
    stuck = [member(rank, f"step (train.py:{rank})") for rank in (4, 5, 8, 12, 16)]
    assert "suspects: rank 4 (node-1, pid 4004), rank 5 (node-1, pid 4005), rank 8 (" in (
        describe(ask(*others, *stuck[:3]))
    )
    text = describe(ask(*others, *stuck[:4]))
    assert "suspects: ranks 4-5,8,12 (node-1, node-2, node-3), the" in text
    titles = [line for line in text.splitlines() if line.startswith("rank ")]
    assert [title.split()[1] for title in titles] == ["4", "5", "8"]
    text = describe(ask(*others, *stuck))
    assert "suspects: ranks 4-5,8,12,16 (node-1, node-2, node-3 and 1 more), the" in text


def test_order_of_groups() -> None:
    """The suspects' first, then the larger ones."""
    members = [member(0, *BARRIER), *waiting(1, 5), member(3, *HANGS)]
    groups = ask(*members)["groups"]
    assert [group["ranks"] for group in groups] == [[3], [1, 5], [0]]
    assert [group["hosts"] for group in groups] == [["node-0"], ["node-0", "node-1"], ["node-0"]]
    assert [group["suspected"] for group in groups] == [True, False, False]
    assert [group["in_collective"] for group in groups] == [False, True, True]


def test_world_that_is_not_known() -> None:
    """Nobody is missing in it."""
    assert ask(*waiting(1, 2), world_size=None)["missing"] == []


def test_most_groups() -> None:
    """Of many groups that are no suspects twelve are shown."""
    text = describe(ask(*(member(rank, f"step{rank} (train.py:5)") for rank in range(20))))
    assert len(text.splitlines()) == 2 + 12 + 1
    assert text.endswith("\n  and 8 groups more")


def test_details_have_an_end() -> None:
    """Of a suspect with many threads some lines are shown, and how many are not."""
    stacks = [thread("work (train.py:1)", name=f"worker-{number}") for number in range(50)]
    answer = ask(*waiting(0, 1, 2), member(3, stacks=stacks, state=None, stacks_missing=None))
    lines = describe(answer, details=10).splitlines()
    assert lines[-1] == "  and 90 lines more"
    assert "rank 3 (node-0, pid 4003):" in lines
    assert describe(answer).splitlines()[-1] == "  and 40 lines more"
    assert describe(answer, details=99).splitlines()[-1] == "  and 1 line more"
    assert "lines more" not in describe(answer, details=100)


def test_blocks_of_a_group() -> None:
    """Ranks at the same place may be in several blocks and passes."""
    members = [
        member(0, *WAITS),
        member(1, *WAITS, scope="b", passes={"b": 9, BLOCK: 7}),
        *waiting(2),
    ]
    [group] = ask(*members, world_size=None)["groups"]
    assert group["scopes"] == ["b", "train.py#86"]
    assert group["passes"] == [7, 9]
    assert "in b and 1 more, pass 7,9, 60.0 s" in describe(ask(*members))


def test_children_at_work() -> None:
    """What a suspect's data loaders do is on its line, and once in the details."""
    members = recorded("data_loader")
    answer = ask(*members)
    lines = describe(answer).splitlines()
    assert "its child: Images.fetch (data.py:20) < Images.__getitem__ (data.py:15)" in lines[2]
    assert "child" not in lines[3]
    shown = [line for line in lines if "descendant" in line]
    assert shown == ["  descendants 4740, 4741: /opt/venv/bin/python train.py loader"]
    first, second = lines[lines.index(shown[0]) + 1 :][:2]
    assert first.startswith("    thread ")
    assert "BaseProcess._bootstrap" in second
    # Those at another place are told apart.
    loading, other = members[2]["descendants"][:2]
    members[2]["descendants"] = [loading, {**other, "stacks": [thread(*LOADS, *MAIN)]}]
    shown = [line for line in describe(ask(*members)).splitlines() if "descendant" in line]
    assert [line.split()[1] for line in shown] == [f"{each['pid']}:" for each in (loading, other)]
    # Those of victims are not.
    members[0]["descendants"] = members[2]["descendants"]
    assert "child" not in describe(ask(*members)).splitlines()[3]
    [one, _] = members[2]["descendants"][:2]
    members[2]["descendants"] = [{**one, "command": None}]
    lines = [line.strip() for line in describe(ask(*members)).splitlines()]
    assert f"descendant {one['pid']}:" in lines


def test_children_that_wait_for_work() -> None:
    """They are not shown, though the suspect has them."""
    members = recorded("data_loader")
    members[2]["descendants"] = members[0]["descendants"]
    assert members[2]["descendants"]
    text = describe(ask(*members))
    assert "rank 2" in text
    assert "child" not in text
    assert "descendant" not in text


def test_names_forge_no_lines() -> None:
    """What does not print is left out."""
    evil = "step\nsuspect: rank 0"
    stack = thread(*MAIN)
    stack["frames"][-1]["function"] = evil
    hostile = member(1, scope="a\nb/c\nd", host="node", stacks=[stack])
    text = describe(ask(*waiting(0, 2, 3), hostile))
    assert not [line for line in text.splitlines() if line.startswith("suspect: rank 0")]


# What always holds --------------------------------------------------------------------------------

PLACES = [WAITS, BARRIER, LOADS, HANGS, ("forward (net.py:9)",), ()]


@st.composite
def jobs(draw: st.DrawFn) -> list[Member]:
    """Any ranks, wherever they are."""
    count = draw(st.integers(1, 9))
    return [
        member(
            rank,
            *draw(st.sampled_from(PLACES)),
            passes=draw(st.dictionaries(st.sampled_from([BLOCK, "b"]), st.integers(1, 3))),
            scope=draw(st.sampled_from([BLOCK, "b", None])),
            state=draw(st.sampled_from(["S", "R", "D", "T", None])),
            seconds=draw(st.sampled_from([None, 1.0, 60.0])),
        )
        for rank in range(count)
    ]


@given(jobs(), st.randoms(use_true_random=False))
def test_order_does_not_matter(members: list[Member], rng: random.Random) -> None:
    """Neither of the members nor of the hosts' pictures."""
    answer = ask(*members)
    mixed = members.copy()
    rng.shuffle(mixed)
    hosts = dict.fromkeys(each["host"] for each in mixed)
    parts = [[each for each in mixed if each["host"] == host] for host in hosts]
    job = answer["job"]
    assert who_hangs([{"job": job, "members": part} for part in parts]) == answer


@given(jobs())
def test_answers_are_whole(members: list[Member]) -> None:
    """Each rank is in one group; suspects are known ones; all of it is JSON; there is a text."""
    answer = ask(*members)
    grouped = [rank for group in answer["groups"] for rank in group["ranks"]]
    assert sorted(grouped) == [each["rank"] for each in members]
    named = [rank for group in answer["groups"] if group["suspected"] for rank in group["ranks"]]
    assert sorted(named) == answer["suspected"] == [each["rank"] for each in answer["suspects"]]
    assert len(named) < max(2, len(members))
    assert answer["reasons"]
    assert json.loads(json.dumps(answer)) == answer
    assert describe(answer).splitlines()[1].startswith(("suspect", "no suspect"))


@given(
    st.integers(2, 6),
    st.lists(
        st.tuples(st.sampled_from(PLACES[2:5]), st.sampled_from([6, 7])), min_size=1, max_size=6
    ),
)
def test_another_waiting_rank_accuses_nobody(
    count: int, others: list[tuple[tuple[str, ...], int]]
) -> None:
    """Those that do not wait are the suspects; one more that waits is none, and makes none."""
    stuck = [
        member(count + 1 + index, *place, passes={BLOCK: reached})
        for index, (place, reached) in enumerate(others)
    ]
    guilty = {each["rank"] for each in stuck}
    before = ask(*waiting(*range(count)), *stuck)["suspected"]
    after = ask(*waiting(*range(count + 1)), *stuck)["suspected"]
    assert set(before) <= guilty
    assert set(after) <= guilty
    assert after


@given(st.integers(1, 20), st.sampled_from(PLACES), st.sampled_from(["S", "R", "T"]))
def test_nobody_is_named_where_all_do_the_same(
    count: int, place: tuple[str, ...], state: str
) -> None:
    """Whatever that is."""
    answer = ask(*(member(rank, *place, state=state) for rank in range(count)))
    assert answer["suspects"] == []
    assert answer["reasons"][0].startswith("no suspect: ")


@given(st.sets(st.integers(0, 200)))
def test_folded_ranks_can_be_read_back(ranks: set[int]) -> None:
    """They are what people write, and lose nothing."""
    text = fold_ranks(ranks)
    spans = [[int(end) for end in span.split("-")] for span in text.split(",") if span]
    assert [rank for span in spans for rank in range(span[0], span[-1] + 1)] == sorted(ranks)
    assert all(later[0] - earlier[-1] > 1 for earlier, later in itertools.pairwise(spans))
