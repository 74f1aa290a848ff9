"""The lines on the FIFO: what is written is upstream's, and nothing that is read does harm."""

from __future__ import annotations

import json
import math
import select
import signal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elastic_timer._transport.pipe import PIPE_BUF
from elastic_timer._transport.wire import Fields, LineBuffer, decode, encode

PIDS = st.integers(-(2**31) + 1, 2**31 - 1)
SIGNALS = st.integers(-70, int(signal.NSIG) - 1)
EXPIRATIONS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**12), 10**12)
)
SCOPES = st.text(st.characters(), max_size=60)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)
KEYS = ("pid", "scope_id", "expiration_time", "signal")


@st.composite
def requests(draw: st.DrawFn) -> Fields:
    return Fields(draw(PIDS), draw(SCOPES), draw(EXPIRATIONS), draw(SIGNALS))


def encoded(fields: Fields) -> bytes:
    return encode(1, *fields).encode()


@given(requests())
def test_encode_writes_what_json_dumps_writes(fields: Fields) -> None:
    """Faster than `json.dumps`, and equal to it byte by byte."""
    expected = {
        "version": 1,
        "pid": fields.pid,
        "scope_id": fields.scope_id,
        "expiration_time": fields.expiration_time,
        "signal": fields.signal,
    }
    assert encode(1, *fields) == json.dumps(expected)


@given(requests())
def test_decode_undoes_encode(fields: Fields) -> None:
    """Every request that can be written is read as it was."""
    assert decode(encoded(fields)) == fields


def test_encode_takes_subclasses_of_numbers() -> None:
    """Signals are enums, and times come from numpy: what counts is their value."""

    class Loud(float):
        def __repr__(self) -> str:
            return "LOUD"

        __str__ = __repr__

    line = encode(1, 2, "s", Loud(1.5), signal.SIGKILL)
    assert json.loads(line)["expiration_time"] == 1.5
    assert json.loads(line)["signal"] == 9


@pytest.mark.parametrize("expiration_time", [math.nan, math.inf, -math.inf])
def test_encode_refuses_what_json_cannot_say(expiration_time: float) -> None:
    """There is no such number in JSON."""
    with pytest.raises(ValueError, match="finite"):
        encode(1, 2, "s", expiration_time, 9)


def test_encode_refuses_a_scope_that_is_no_string() -> None:
    """A mistake in the training script is an error there, not a line that the server drops."""
    with pytest.raises(TypeError, match="string"):
        encode(1, 2, 3, 4.0, 9)  # type: ignore[arg-type]


def is_valid(fields: Fields) -> bool:
    return (
        type(fields.pid) is int
        and abs(fields.pid) < 2**31
        and type(fields.scope_id) is str
        and type(fields.expiration_time) in (int, float)
        and math.isfinite(fields.expiration_time)
        and type(fields.signal) is int
        and fields.signal < signal.NSIG
    )


def decode_or_reason(line: bytes) -> Fields | None:
    """Fields that are sound, or None for a ValueError with a reason; nothing else may happen."""
    reason = ""
    try:
        fields = decode(line)
    except ValueError as error:
        reason = str(error)
    else:
        assert is_valid(fields)
        return fields
    assert reason
    return None


@given(st.binary(max_size=300))
@example(b"")
@example(b'{"version"')
@example(b"[" * 4000)
@example(b'{"version": 1, "pid": ' + b"[" * 4000)
@example(b'{"a":' * 3000)
@example(b"9" * 4090)
@example(b"\xed\xa0\x80")
def test_any_bytes_are_a_request_or_a_reason(line: bytes) -> None:
    """Arbitrary bytes never raise anything but ValueError."""
    decode_or_reason(line)


@given(JSON)
def test_any_json_is_a_request_or_a_reason(value: Any) -> None:
    """Arbitrary JSON never raises anything but ValueError."""
    decode_or_reason(json.dumps(value).encode())


@given(st.fixed_dictionaries(dict.fromkeys(KEYS, JSON), optional={"version": JSON}))
def test_any_values_of_the_keys_are_a_request_or_a_reason(value: dict[str, Any]) -> None:
    """With all keys there: what comes out is sound and is what the line said."""
    fields = decode_or_reason(json.dumps(value).encode())
    if fields is not None:
        assert fields == Fields(*(value[key] for key in KEYS))


VALID = {"version": 1, "pid": 12, "scope_id": "s", "expiration_time": 1.5, "signal": 9}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pid": "12"}, "12"),
        ({"pid": 12.0}, "12.0"),
        ({"pid": True}, "True"),
        ({"pid": 2**31}, "2147483648"),
        ({"pid": -(2**31)}, "2147483648"),
        ({"pid": None}, "None"),
        ({"scope_id": 5}, "scope"),
        ({"scope_id": None}, "scope"),
        ({"expiration_time": "soon"}, "soon"),
        ({"expiration_time": True}, "True"),
        ({"expiration_time": math.nan}, "finite"),
        ({"expiration_time": math.inf}, "finite"),
        ({"expiration_time": 10**400}, "finite"),
        ({"signal": 9.0}, "signal"),
        ({"signal": False}, "signal"),
        ({"signal": int(signal.NSIG)}, "signal"),
        ({"signal": None}, "signal"),
    ],
    ids=repr,
)
def test_unsound_value_is_refused_with_a_reason(change: dict[str, Any], reason: str) -> None:
    """What cannot be a pid, a scope, a time or a signal is named in the error."""
    with pytest.raises(ValueError, match=reason):
        decode(json.dumps({**VALID, **change}).encode())


@pytest.mark.parametrize("key", KEYS)
def test_missing_key_is_named(key: str) -> None:
    """A line without one of the four keys is refused, and the error says which."""
    line = json.dumps({name: value for name, value in VALID.items() if name != key}).encode()
    with pytest.raises(ValueError, match=key):
        decode(line)


@pytest.mark.parametrize(
    "change",
    [{"extra": [1]}, {"version": 2}, {"version": None}, {"signal": -5}, {"pid": -(2**31) + 1}],
    ids=repr,
)
def test_what_upstream_tolerates_is_tolerated(change: dict[str, Any]) -> None:
    """Unknown keys, any version, negative signals and process groups are all fine."""
    value = {**VALID, **change}
    assert decode(json.dumps(value).encode()) == Fields(*(value[key] for key in KEYS))


def test_nesting_without_end_is_refused() -> None:
    """A line that is nested deeper than Python's parser follows is no request either."""
    with pytest.raises(ValueError, match="nested too deeply"):
        decode(b"[" * 500_000)


def test_version_may_be_missing() -> None:
    """Upstream's server never looks at it."""
    line = json.dumps({key: VALID[key] for key in KEYS}).encode()
    assert decode(line) == Fields(12, "s", 1.5, 9)


@given(st.binary(max_size=200).filter(lambda data: b'{"version"' not in data), requests())
def test_request_behind_rubbish_without_a_newline_counts(rubbish: bytes, fields: Fields) -> None:
    """Rubbish that was left in the pipe without its newline takes no request along."""
    assert decode(rubbish.replace(b"\n", b"") + encoded(fields)) == fields


@given(requests(), st.sampled_from(KEYS))
def test_request_within_a_scope_is_no_request(fields: Fields, key: str) -> None:
    """A scope that holds a whole request, quoted, smuggles none in when its line is broken."""
    outer = {**VALID, "scope_id": encode(1, *fields)}
    outer.pop(key)
    if key == "scope_id":
        outer["other"] = encode(1, *fields)
    assert decode_or_reason(json.dumps(outer).encode()) is None


@given(
    st.lists(st.one_of(requests().map(encoded), st.binary(max_size=80)), max_size=8),
    st.data(),
)
def test_lines_survive_any_split(parts: list[bytes], data: st.DataObject) -> None:
    """However the stream is cut into reads, the same lines come out, none lost, none joined."""
    lines = [part.replace(b"\n", b"") for part in parts]
    stream = b"".join(line + b"\n" for line in lines)
    buffer = LineBuffer()
    found: list[bytes] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        chunk, stream = stream[:size], stream[size:]
        found += filter(None, buffer.feed(chunk).split(b"\n"))
    assert found == [line for line in lines if line]


def test_rubbish_without_end_is_bounded() -> None:
    """Ten megabytes without a newline are not kept, and the request behind them still counts."""
    buffer = LineBuffer()
    for _ in range(160):
        assert buffer.feed(b"x" * 65536) == b""
        assert len(buffer._rest) <= PIPE_BUF
    line = buffer.feed(encoded(Fields(12, "s", 1.5, 9)) + b"\n")
    assert decode(line) == Fields(12, "s", 1.5, 9)


def test_pipe_buf_is_the_systems() -> None:
    """The limit of an atomic write is what the system says, at least what POSIX promises."""
    assert PIPE_BUF == select.PIPE_BUF >= 512
