"""Every message survives the wire; no bytes make decoding raise anything but the two errors it promises."""

from __future__ import annotations

import inspect

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from protocol import codec, messages
from protocol.codec import ReplyHeader, RequestHeader, check_header, decode, encode, request_header, unpack
from protocol.errors import InvalidError, OverloadedError, ProtocolError, VersionMismatchError

BODIES = [cls for _, cls in inspect.getmembers(messages, inspect.isclass) if messages.Body in cls.__mro__[1:]]

ARRAYS = nps.arrays(
    st.sampled_from(sorted(codec.DTYPES)).map(np.dtype),
    nps.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
TEXT = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def _in_range(kind: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> tuple[float, float]:
    low = kind.ge if kind.ge is not None else (kind.gt + 1e-3 if kind.gt is not None else -1000)
    high = kind.le if kind.le is not None else (kind.lt - 1e-3 if kind.lt is not None else low + 1000)
    return low, high


def values(kind: msgspec.inspect.Type) -> st.SearchStrategy[object]:
    """Plain values (as on the wire) of a type that msgspec has inspected."""
    match kind:
        case msgspec.inspect.IntType():
            return st.integers(*map(int, _in_range(kind)))
        case msgspec.inspect.FloatType():
            return st.floats(*_in_range(kind))
        case msgspec.inspect.StrType():
            return st.text(min_size=kind.min_length or 0, max_size=20)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.AnyType():
            return JSON
        case msgspec.inspect.CustomType(cls=np.ndarray):
            return ARRAYS
        case msgspec.inspect.EnumType():
            return st.sampled_from(list(kind.cls))
        case msgspec.inspect.ListType():
            return st.lists(values(kind.item_type), min_size=kind.min_length or 0, max_size=3)
        case msgspec.inspect.TupleType():
            return st.tuples(*map(values, kind.item_types))
        case msgspec.inspect.DictType():
            return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=3)  # type: ignore[arg-type]
        case msgspec.inspect.UnionType():
            return st.one_of(*map(values, kind.types))
        case msgspec.inspect.StructType():
            fields = {f.name: values(f.type) for f in kind.fields}
            return st.fixed_dictionaries(fields).map(lambda given, cls=kind.cls: cls(**given))
        case msgspec.inspect.Metadata():
            return values(kind.type)
    raise NotImplementedError(kind)


def bodies(cls: type[messages.Body]) -> st.SearchStrategy[messages.Body]:
    return values(msgspec.inspect.type_info(cls))  # pyright: ignore[reportReturnType]


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, msgspec.Struct):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__struct_fields__)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def travel(body: messages.Body) -> messages.Body:
    payload = encode(body)
    frames = [bytes(frame) for frame in payload.frames]
    header = check_header(unpack(request_header("k", "id", payload.packed, timeout_ms=5)), RequestHeader)
    return decode(header.body, type(body), frames)


@pytest.mark.parametrize("cls", BODIES, ids=lambda cls: cls.__name__)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_body_survives_the_wire(cls: type[messages.Body], data: st.DataObject) -> None:
    body = data.draw(bodies(cls))
    assert same(body, travel(body))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_invalid(data: bytes) -> None:
    try:
        check_header(unpack(data), RequestHeader)
    except (InvalidError, VersionMismatchError):
        pass


@settings(max_examples=100, deadline=None)
@given(bodies(messages.Sample), st.data())
def test_truncated_headers_are_invalid(body: messages.Body, data: st.DataObject) -> None:
    head = request_header("k", "id", encode(body).packed, timeout_ms=5)
    cut = data.draw(st.integers(0, len(head) - 1))
    with pytest.raises(InvalidError):
        unpack(head[:cut])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(BODIES), JSON, st.lists(st.binary(max_size=16), max_size=3))
def test_wrong_types_are_invalid(cls: type[messages.Body], value: object, frames: list[bytes]) -> None:
    try:
        decode(value, cls, frames)
    except InvalidError:
        pass


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["dtype", "shape", "frame", "x"]), JSON | st.sampled_from(sorted(codec.DTYPES))),
    st.lists(st.binary(max_size=16), max_size=3),
)
def test_wrong_array_descriptions_are_invalid(described: dict[str, object], frames: list[bytes]) -> None:
    body = {"version": [0, 0], "offset": 0, "data": described}
    try:
        chunk = decode(body, messages.WeightsChunk, frames)
    except InvalidError:
        return
    assert chunk.data.nbytes <= 16 and not chunk.data.flags.writeable


@pytest.mark.parametrize(
    "described",
    [
        {"dtype": "int32", "shape": [3], "frame": 0},  # does not fill its frame
        {"dtype": "int32", "shape": [2], "frame": 1},  # no such frame
        {"dtype": "int32", "shape": [2], "frame": -1},
        {"dtype": "object", "shape": [1], "frame": 0},
        {"dtype": "int32", "shape": [-2], "frame": 0},
        {"dtype": "int32", "shape": [2**62, 2**62], "frame": 0},
        {"dtype": "int32", "shape": [True, 2], "frame": 0},
        {"dtype": "int32", "shape": [1] * 9, "frame": 0},
        {"dtype": "int32", "shape": [2], "frame": 0, "more": 1},
        [1, 2],
        None,
    ],
)
def test_array_rules(described: object) -> None:
    with pytest.raises(InvalidError):
        decode({"version": [0, 0], "offset": 0, "data": described}, messages.WeightsChunk, [b"12345678"])


def test_a_frame_serves_one_array() -> None:
    one = {"dtype": "int32", "shape": [1], "frame": 0}
    body = {"index": 0, "output_ids": one, "logprobs": one, "versions": [], "finish_reason": "stop", "text": ""}
    with pytest.raises(InvalidError, match="share"):
        decode(body, messages.Sample, [b"1234"])


def test_arrays_are_not_copied() -> None:
    ids = np.arange(1 << 16, dtype=np.int32)
    payload = encode(messages.WeightsChunk(messages.Version(0, 1), 0, ids))
    assert np.shares_memory(np.asarray(payload.frames[0]), ids)
    raw = ids.tobytes()
    described = {"dtype": "int32", "shape": list(ids.shape), "frame": 0}
    chunk = decode({"version": [0, 1], "offset": 0, "data": described}, messages.WeightsChunk, [raw])
    assert np.shares_memory(chunk.data, np.frombuffer(raw, np.int32))


def test_other_objects_do_not_travel() -> None:
    with pytest.raises(TypeError):
        encode(messages.VerifyItem("i", "c", "r", metadata={"x": object()}))
    with pytest.raises(TypeError):
        encode(messages.WeightsChunk(messages.UNVERSIONED, 0, np.array([object()])))


def test_unknown_fields_are_ignored_and_unknown_major_versions_refused() -> None:
    header = {"v": [1, 99], "kind": "info", "id": "a", "later": {"x": 1}, "body": {"known": 1, "newer": [1]}}
    assert decode(check_header(header, RequestHeader).body, messages.InfoRequest).known == 1
    with pytest.raises(VersionMismatchError):
        check_header(header | {"v": [2, 0]}, RequestHeader)


@pytest.mark.parametrize(
    "data",
    [
        msgpack.packb({"x": msgpack.ExtType(5, b"1")}),
        msgpack.packb({"x": msgpack.Timestamp(1)}),
        b"\x91" * 5000,  # nested too deeply
        b"\xdd\xff\xff\xff\xff",  # a list of four thousand million items
        b"\x81\xa1\xff\x01",  # not UTF-8
        msgpack.packb({1: 2}),
        msgpack.packb([1]),
        b"",
    ],
)
def test_what_messagepack_allows_and_we_do_not(data: bytes) -> None:
    with pytest.raises(InvalidError):
        unpack(data)


def test_error_replies_keep_their_type_and_hint() -> None:
    sent = codec.error_header("id", 3, OverloadedError("busy", retry_after_ms=70), session="s", credit=4)
    header = check_header(unpack(sent), ReplyHeader)
    error = codec.error_in(header)
    assert isinstance(error, OverloadedError) and error.retry_after_ms == 70 and header.seq == 3 and header.credit == 4
    unknown = ReplyHeader(v=(1, 0), kind="error", id="i", error=codec.ErrorBody("from_the_future", "x"))
    assert isinstance(codec.error_in(unknown), ProtocolError)
