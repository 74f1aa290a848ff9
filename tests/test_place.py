"""Where a process is: from its stacks, made up and recorded, to what ranks are compared by."""

from __future__ import annotations

import pytest

from elastic_timer._evidence.picture import describe, who_hangs
from elastic_timer._evidence.place import Place, describe_frames, is_at_work, place_of
from tests.picture_support import (
    BARRIER,
    LOADS,
    MAIN,
    RECORDED,
    TORCH,
    WAITS,
    WRAPPER,
    member,
    picture,
    recorded,
    thread,
)

STANDARD = "/usr/lib/python3.11"
PACKAGES = "/opt/venv/lib/python3.11/site-packages"
STARTED = (
    f"Thread.run ({STANDARD}/threading.py:982)",
    f"_bootstrap ({STANDARD}/threading.py:1002)",
)
JOINS = (f"Thread.join ({STANDARD}/threading.py:1119)", "main (train.py:71)")
ENGINE = (
    f"_engine_run_backward ({TORCH}/autograd/graph.py:979)",
    f"backward ({TORCH}/_tensor.py:9)",
)
FORKED = (
    f"BaseProcess.run ({STANDARD}/multiprocessing/process.py:108)",
    f"BaseProcess._bootstrap ({STANDARD}/multiprocessing/process.py:314)",
    f"Popen._launch ({STANDARD}/multiprocessing/popen_fork.py:71)",
    *MAIN,
)


def at(*places: str, **changes: bool) -> Place:
    """Where a process of one thread is."""
    place = place_of([thread(*places, **changes)])
    assert place is not None
    return place


# Recorded jobs ------------------------------------------------------------------------------------

ALONE = "the only one that does not wait in a collective"
OTHERS = "elsewhere than 2 of the 3 ranks"


@pytest.mark.parametrize(
    ("name", "reason", "doing", "victims"),
    [
        ("sleep", ALONE, "stuck (train.py:21)", "all_reduce (distributed_c10d.py:3252)"),
        ("c_code_with_the_gil", ALONE, "step (train.py:30)", "all_reduce"),
        ("lock_of_two_threads", ALONE, "locks (train.py:89)", "all_reduce"),
        ("data_loader", ALONE, "_BaseDataLoaderIter.__next__ (dataloader.py:725)", "all_reduce"),
        ("computing", ALONE, "step (train.py:39)", "all_reduce"),
        (
            "another_collective",
            "in another collective than 2 of the 3 ranks",
            "barrier",
            "all_reduce",
        ),
        (
            "all_gather_object",
            ALONE,
            "stuck",
            "all_gather_object (distributed_c10d.py:3513) < step",
        ),
        ("functional_collective", ALONE, "stuck", "AsyncCollectiveTensor.trigger_wait"),
        ("init_process_group", ALONE, "stuck", "init_process_group (distributed_c10d.py:18"),
        ("work_wait", OTHERS, "stuck", "step (train.py:53) < loop"),
        ("work_wait_native", ALONE, "stuck", "step (train.py:53) < loop"),
        ("ddp_backward", ALONE, "stuck (train.py:21)", "Tensor.backward (_tensor.py:623) < ddp"),
        ("ddp_backward_native", ALONE, "stuck (train.py:21)", "Tensor.backward"),
        ("ddp_hook", ALONE, "stuck (train.py:21) < Hook.backward", "Tensor.backward"),
        ("ddp_c_code", ALONE, "Hook.backward (train.py:101)", "Tensor.backward"),
        ("fsdp_forward", ALONE, "stuck (train.py:21) < Net.forward", "all_gather_single"),
        ("training_thread", ALONE, "stuck (train.py:21) < step", "all_reduce"),
    ],
)
def test_recorded(name: str, reason: str, doing: str, victims: str) -> None:
    """The last of three real ranks hangs, and its last frames are told; the others wait."""
    answer = who_hangs([picture(recorded(name))])
    assert answer["suspected"] == [2]
    assert answer["reasons"] == [reason]
    _, _, suspect, others, *_ = describe(answer).splitlines()
    assert suspect.startswith(f"  rank 2     {doing}")
    assert others.startswith(f"  ranks 0-1  {victims}")


def test_recorded_and_stopped() -> None:
    """Stopped by SIGSTOP outside of the collective that the others wait in."""
    answer = who_hangs([picture(recorded("stopped"))])
    assert answer["suspected"] == [2]
    assert answer["reasons"] == ["stopped (state T)", ALONE]


@pytest.mark.parametrize("name", sorted(file.stem for file in RECORDED.iterdir()))
def test_recorded_two_ranks(name: str) -> None:
    """Of one that waits and one that hangs the right one is named, where Python's frames tell."""
    answer = who_hangs([picture(recorded(name)[1:], world_size=None)])
    assert answer["suspected"] == ([] if name in ("another_collective", "work_wait") else [2])


@pytest.mark.parametrize("name", sorted(file.stem for file in RECORDED.iterdir()))
def test_recorded_without_an_odd_one_out(name: str) -> None:
    """Of ranks that all hang in one place nobody is named; the two victims are such ranks."""
    answer = who_hangs([picture(recorded(name)[:2])])
    assert answer["suspected"] == []
    assert answer["reasons"] == ["no suspect: all ranks are at the same place"]
    assert len(answer["groups"]) == 1


def test_records_name_no_machine() -> None:
    """The recorded data is of nobody's machine."""
    for file in RECORDED.iterdir():
        text = file.read_text()
        assert "/root/" not in text
        assert "/work/" not in text
        assert "/tmp/" not in text


# Whose frames -------------------------------------------------------------------------------------


def test_innermost_of_the_program() -> None:
    """Of a library only what the program has called counts, by its name."""
    inside = f"Queue.get ({STANDARD}/multiprocessing/queues.py:113)"
    called = f"_BaseDataLoaderIter.__next__ ({TORCH}/utils/data/dataloader.py:725)"
    place = at(inside, called, "loader (train.py:137)", *MAIN)
    other = at(called.replace("725", "730"), "loader (train.py:137)", *MAIN)
    assert place.key == other.key == ("loader (train.py:137)", "_BaseDataLoaderIter.__next__")
    assert describe_frames(place.shown) == (
        "_BaseDataLoaderIter.__next__ (dataloader.py:725) < loader (train.py:137)"
        " < main (train.py:71)"
    )
    assert place.key != at(called, "loader (train.py:138)", *MAIN).key
    assert place.path != at(called, "loader (train.py:137)", "main (train.py:72)").path


def test_program_that_is_installed() -> None:
    """Without any frame of a program's own, packages count; without these, whatever there is."""
    installed = f"train ({PACKAGES}/megatron/training.py:5)"
    assert at(*WAITS[:2], installed).key == ("train (training.py:5)", "all_reduce")
    assert at("accept (<frozen io>:1)").key == ("accept (<frozen io>:1)", "")
    assert describe_frames(at("<module> (job/train.py:9)").shown) == "<module> (train.py:9)"
    assert describe_frames(at("wait (/a/cuda/__init__.py:9)").shown) == "wait (cuda/__init__.py:9)"


def test_few_frames_tell_it() -> None:
    """The three innermost of the program, and what everything is in tells nothing."""
    assert describe_frames(at("c (a.py:3)", "b (a.py:2)", "<module> (a.py:1)").shown) == (
        "c (a.py:3) < b (a.py:2)"
    )
    shown = at("e (a.py:5)", "d (a.py:4)", "c (a.py:3)", "b (a.py:2)", *MAIN).shown
    assert [frame["function"] for frame in shown] == ["e", "d", "c"]


def test_function_within_a_function() -> None:
    """It is called by its own name."""
    assert at("train.<locals>.closure (train.py:5)", *MAIN).key == ("closure (train.py:5)", "")


def test_frames_of_this_package() -> None:
    """They are not the program's, but for those of the demo, which is one."""
    package = "/home/me/src/elastic_timer"
    assert at(f"call ({package}/api.py:5)", *MAIN).key == ("main (train.py:71)", "call")
    assert at(f"send ({package}/_worker/holds.py:5)", *MAIN).key == ("main (train.py:71)", "send")
    assert at(f"step ({package}/_command/demo.py:5)", *MAIN).key == ("step (demo.py:5)", "")


def test_folder_named_torch() -> None:
    """A program of somebody's own may be in one."""
    assert at("step (/home/me/torch/train.py:9)", *MAIN).key[0] == "step (train.py:9)"
    assert at("step (/home/me/elastic_timer/tools/train.py:9)", *MAIN).key[0] == "step (train.py:9)"


@pytest.mark.parametrize("places", [WAITS, BARRIER, [f"wait ({TORCH}/_ops.py:9)", *WAITS]])
def test_waits_in_a_collective(places: tuple[str, ...]) -> None:
    """Whatever torch calls inside of it."""
    assert at(*places, *MAIN).in_collective


@pytest.mark.parametrize(
    "places",
    [
        LOADS,
        # Of torch.distributed, and no collective: a disk, a wrapper around everything, a launcher.
        (f"write ({TORCH}/distributed/checkpoint/filesystem.py:5)", "save (train.py:3)"),
        (
            "step (train.py:88)",
            f"wrapper ({TORCH}/distributed/elastic/multiprocessing/errors/__init__.py:9)",
        ),
        # The program's own function, called by one of torch.distributed.
        ("__setstate__ (data.py:5)", *WAITS),
        (f"loads ({PACKAGES}/msgpack/fallback.py:5)", *WAITS),
    ],
)
def test_does_not_wait_in_a_collective(places: tuple[str, ...]) -> None:
    """Though there may be frames of torch.distributed."""
    assert not at(*places, *MAIN).in_collective


@pytest.mark.parametrize(
    "name", ["synchronize", "cuda/__init__.py:synchronize", "__init__.py:synchronize"]
)
def test_named_collective(name: str) -> None:
    """A function that somebody has named waits, and whatever it calls."""
    stack = [thread("poll (tools.py:5)", f"synchronize ({TORCH}/cuda/__init__.py:9)", *MAIN)]
    place = place_of(stack, [name])
    assert place is not None
    assert place.in_collective
    for other in (
        "sync",
        "ynchronize",
        "da/__init__.py:synchronize",
        "cpu/__init__.py:synchronize",
    ):
        place = place_of(stack, [other])
        assert place is not None
        assert not place.in_collective


def test_wrapper_of_collectives() -> None:
    """Torch's, which logs each of them, is none itself; Python 3.10 tells less of its name."""
    for wrapper in (WRAPPER, WRAPPER.replace("_exception_logger.<locals>.", "")):
        place = at(WAITS[0], wrapper, "step (train.py:88)", *MAIN)
        assert place.shown[0]["function"] == "all_reduce"
        assert not at(wrapper, "step (train.py:88)", *MAIN).in_collective


def test_named_method() -> None:
    """With its class or without; a name of C++ is none of a file."""
    stack = [thread("ring::Ring::wait (/usr/lib/libring.so:0)", "Loss.reduce (train.py:5)", *MAIN)]
    names = ("reduce", "Loss.reduce", "train.py:Loss.reduce", "ring::Ring::wait")
    for file in ("/home/me/train.py", "train.py"):
        stack[0]["frames"][-2]["file"] = file
        for name in (*names, "another"):
            place = place_of(stack, [name])
            assert place is not None
            assert place.in_collective == (name in names), (file, name)


# Threads and backward passes ----------------------------------------------------------------------


def test_thread_that_the_main_thread_waits_for() -> None:
    """What the process does is done there, most of all where that waits for other ranks."""
    loads, waits = thread(*LOADS, *STARTED), thread(*WAITS, *STARTED)
    helper = thread(f"Condition.wait ({STANDARD}/threading.py:327)", *STARTED)
    empty = thread()
    for main in (
        thread(*JOINS),
        thread(f"Future.result ({STANDARD}/concurrent/futures/_base.py:451)", "main (train.py:71)"),
        thread(f"_shutdown ({STANDARD}/threading.py:1553)"),
        thread(f"main_loop ({PACKAGES}/ray/worker.py:9)"),
    ):
        place = place_of([main, empty, helper, loads, waits])
        assert place is not None
        assert place.in_collective
        place = place_of([main, empty, helper, loads])
        assert place is not None
        assert place.shown[0]["function"] == "load"
        place = place_of([main, helper])
        assert place is not None
        assert place.frames == main["frames"]
    # One that does something itself does not become a waiting one by what goes on beside it.
    place = place_of([thread(*LOADS, *MAIN), waits])
    assert place is not None
    assert not place.in_collective


def test_backward_pass() -> None:
    """In it ranks wait, unless they compute or keep the GIL; a device's thread tells more."""
    assert at(*ENGINE, *MAIN).in_collective
    assert not at(*ENGINE, *MAIN, active=True).in_collective
    assert not at(*ENGINE, *MAIN, gil=True).in_collective
    assert not at("hook (train.py:5)", *ENGINE, *MAIN).in_collective
    main = thread(*ENGINE, *MAIN)
    place = place_of([main, thread("hook (train.py:5)")])
    assert place is not None
    assert not place.in_collective
    # A thread of Python's is none of the engine's, nor is one of which there are no frames.
    place = place_of([main, thread(), thread("prefetch (data.py:5)", *STARTED)])
    assert place is not None
    assert place.in_collective


NATIVE = ("std::condition_variable::wait (/usr/lib/libstdc++.so.6.0.30:0)",)
COLLECTIVE = (*NATIVE, f"c10d::Work::wait ({TORCH}/lib/libtorch_cpu.so:0)")


def test_frames_in_c() -> None:
    """They tell who waits, and change no place."""
    waits = at(*COLLECTIVE, "step (train.py:53)", *MAIN)
    assert waits.in_collective
    assert not at(*NATIVE, "step (train.py:53)", *MAIN).in_collective
    gloo = (*NATIVE, f"gloo::transport::tcp::Pair::recv ({TORCH}/lib/libtorch_cpu.so:0)")
    assert at(*gloo, "step (train.py:53)", *MAIN).in_collective
    assert waits.key == at("step (train.py:53)", *MAIN).key
    assert waits.shown == at("step (train.py:53)", *MAIN).shown
    for file in ("/usr/bin/python3.11", "/opt/python/bin/python3.13t", "/build/src/mutex.rs"):
        assert at(f"wait ({file}:0)", "step (train.py:53)", *MAIN).key == waits.key
    # They are of the innermost function: outside of it the collective is over.
    assert not at(*LOADS, *COLLECTIVE, *MAIN).in_collective
    # Where there are some, nothing has to be guessed of a backward pass.
    assert not at(*NATIVE, *ENGINE, *MAIN).in_collective


def test_frames_in_c_of_some_ranks() -> None:
    """Those at the same place wait, too, though none were taken of them."""
    members = recorded("work_wait_native")[:2] + recorded("work_wait")[1:]
    for rank, each in enumerate(members):
        each["rank"] = each["pid"] = rank
    answer = who_hangs([picture(members)])
    assert answer["suspected"] == [3]
    assert answer["reasons"] == [ALONE]
    stacks = members[2]["stacks"]
    assert stacks is not None
    stacks[0]["active"] = True
    assert who_hangs([picture(members)])["suspected"] == [2, 3]


def test_frames_in_c_that_tell_of_no_waiting() -> None:
    """Whose are known is not taken for one that waits, though it is at the same place."""
    ranks = [
        member(rank, *native, "step (train.py:53)")
        for rank, native in enumerate((COLLECTIVE, COLLECTIVE, COLLECTIVE, NATIVE))
    ]
    assert who_hangs([picture(ranks)])["suspected"] == [3]


# Processes of multiprocessing ---------------------------------------------------------------------


def test_forked_process() -> None:
    """It has the frames of the one that forked it, and is not where that is."""
    place = at(*LOADS, *FORKED)
    assert place.key == at(*LOADS, *FORKED[:2]).key
    assert [frame["function"] for frame in place.frames] == [
        "BaseProcess._bootstrap",
        "BaseProcess.run",
        "__next__",
        "load",
    ]


def test_child_at_work() -> None:
    """One that waits for work is not, though its parent's frames are the program's."""
    waits = f"Queue.get ({STANDARD}/multiprocessing/queues.py:113)"
    assert is_at_work([thread(*LOADS, *FORKED)])
    assert not is_at_work([thread(waits, *FORKED)])
    assert not is_at_work([thread(waits, *FORKED[:2], MAIN[0])])
    assert not is_at_work([thread(*FORKED[1:])])
    assert not is_at_work([])
    assert not is_at_work(None)
    assert not is_at_work([thread()])


def test_nowhere() -> None:
    """Without threads, or without frames of the main thread, there is no place."""
    assert place_of([]) is None
    assert place_of([thread()]) is None
    assert place_of([thread(*NATIVE)]) is None
