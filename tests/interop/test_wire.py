"""Equal requests are equal on the wire, whichever library sends them."""

from __future__ import annotations

import json
import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import elastic_timer

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")
from torch.distributed.elastic import timer as upstream

pids = st.integers(min_value=-(2**31), max_value=2**31 - 1)
scopes = st.text(max_size=50)
times = st.floats(min_value=0, max_value=1e12) | st.just(-1.0) | st.integers(0, 2**40)
signals = st.integers(min_value=-1, max_value=64)


@given(pids, scopes, times, signals)
def test_json(pid: int, scope: str, expiration_time: float, signal: int) -> None:
    """`to_json` says the same as upstream's, key by key and in the same order."""
    ours = elastic_timer.FileTimerRequest(pid, scope, expiration_time, signal)
    theirs = upstream.FileTimerRequest(pid, scope, expiration_time, signal)
    assert in_order(ours.to_json()) == in_order(theirs.to_json())


def in_order(text: str | bytes) -> object:
    """JSON with the order of its keys kept."""
    return json.loads(text, object_pairs_hook=list)


@pytest.mark.parametrize("scope", ["train.py#42", 'päck\n\t"☃\\ 😀'])
def test_bytes(reader: int, fifo_path: str, scope: str) -> None:
    """Both clients write the same lines for the same acquire and release, and only these."""
    written = []
    for client in (elastic_timer.FileTimerClient(fifo_path), upstream.FileTimerClient(fifo_path)):
        client.acquire(scope, 1795150503.21)
        client.release(scope)
        written.append(os.read(reader, 65536))
    ours, theirs = written
    assert [in_order(line) for line in ours.splitlines()] == [
        in_order(line) for line in theirs.splitlines()
    ]
    assert ours.endswith(b"\n")
    assert len(ours.splitlines()) == 2


def test_pickled_attributes() -> None:
    """A pickled request keeps what upstream reads from it: the three attributes."""
    ours = elastic_timer.TimerRequest(4711, "train.py#42", 1795150503.21)
    theirs = upstream.TimerRequest(4711, "train.py#42", 1795150503.21)
    assert attributes(pickle.loads(pickle.dumps(ours))) == attributes(
        pickle.loads(pickle.dumps(theirs))
    )


def attributes(request: object) -> list[object]:
    """The values of all attributes that upstream's class has."""
    return [getattr(request, name) for name in upstream.TimerRequest.__slots__]
