"""Bytes of the wire: MessagePack headers checked into structs, NumPy arrays as raw frames after them.

INVARIANTS
- Whatever bytes come in, decoding either returns typed values or raises InvalidError / VersionMismatchError.
- An array is copied at most once by us on its way out (into ZeroMQ, below COPY_BYTES) and at most once on its way in.
- A body is packed once; only the few header fields before it are packed again when a message is sent again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import msgpack
import msgspec
import numpy as np
import zmq
from msgspec import Meta, Struct, field

from protocol.errors import ErrorCode, InvalidError, ProtocolError, VersionMismatchError, error_of
from protocol.messages import Body, Count

VERSION = (1, 0)
MAX_TIMEOUT_MS = 7 * 24 * 3600 * 1000

COPY_BYTES = 65536
"""Frames smaller than this are copied into or out of ZeroMQ: cheaper than sharing, and aligned."""

DTYPES = frozenset(
    ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")
)
MAX_DIMS = 8
MAX_STRING_BYTES = 1 << 24
MAX_LIST_ITEMS = 1 << 20
MAX_MAP_ITEMS = 1 << 16

STATELESS_KINDS = frozenset(("session", "ack", "cancel", "health"))
"""Served by the wire itself: they keep no state, are not counted against credits and are not fenced."""

CREDIT_FREE_KINDS = STATELESS_KINDS | {
    "info", "hello", "finish", "pause", "resume",
    "weights.begin", "weights.chunk", "weights.commit", "weights.abort", "weights.load",
}  # fmt: skip
"""Control kinds: a client sends them without waiting for credit."""

B = TypeVar("B")
Buffer = bytes | memoryview


class RequestHeader(Struct, frozen=True):
    """First frame of a message to a service. `ack`: replies of this id that the client already has (0 at first)."""

    v: tuple[int, int]
    kind: Annotated[str, Meta(min_length=1, max_length=64)]
    id: Annotated[str, Meta(max_length=256)]
    timeout_ms: Annotated[int, Meta(ge=0, le=MAX_TIMEOUT_MS)] = 0
    run: Annotated[str, Meta(max_length=128)] = ""
    term: Count = 0
    incarnation: Count = 0
    trace: Annotated[str, Meta(max_length=256)] = ""
    ack: Count = 0
    body: Any = None


class ErrorBody(Struct, frozen=True):
    """`error` of a reply."""

    code: Annotated[str, Meta(max_length=64)]
    detail: str = ""
    retry_after_ms: Count | None = None


class ReplyHeader(Struct, frozen=True):
    """First frame of a message to a client. Simple services leave out `seq`, `session` and `credit`."""

    v: tuple[int, int]
    kind: Annotated[str, Meta(max_length=16)]
    id: Annotated[str, Meta(max_length=256)]
    seq: Count | None = None
    session: Annotated[str, Meta(max_length=64)] = ""
    credit: Count | None = None
    body: Any = None
    error: ErrorBody | None = None


class SessionRequest(Body, frozen=True):
    """`session`: what the client still waits for, as {request id: number of replies it has}."""

    open: Annotated[dict[str, Count], Meta(max_length=MAX_MAP_ITEMS)] = field(default_factory=dict)


class SessionReply(Body, frozen=True):
    """`accepted`: counted requests received in this session. `unknown`: open ids to be sent again from the start."""

    accepted: Count
    unknown: list[str] = field(default_factory=list)


class AckRequest(Body, frozen=True):
    """`ack`: {request id: number of replies received}. Not answered."""

    acks: Annotated[dict[str, Count], Meta(max_length=MAX_MAP_ITEMS)] = field(default_factory=dict)


class Payload(NamedTuple):
    """A packed body and the frames that its arrays travel in. The arrays must not change any more."""

    packed: bytes
    frames: Sequence[Buffer]
    nbytes: int


EMPTY = Payload(b"\x80", (), 1)


def _pack(value: object) -> bytes:
    packed = msgpack.packb(value)
    assert packed is not None  # only msgpack's stubs say that it may be
    return packed


def encode(body: Body) -> Payload:
    """Pack a body; arrays become `{"dtype", "shape", "frame"}`, frame 0 being the first one after the header."""
    frames: list[Buffer] = []

    def array(value: object) -> object:
        if isinstance(value, np.ndarray):
            dtype = value.dtype.name
            if dtype not in DTYPES or not value.dtype.isnative:
                raise TypeError(f"arrays of {value.dtype} do not travel")
            described = {"dtype": dtype, "shape": value.shape, "frame": len(frames)}
            frames.append(np.ascontiguousarray(value).data)
            return described
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"{type(value).__name__} does not travel")

    packed = _pack(msgspec.to_builtins(body, builtin_types=(bytes,), enc_hook=array))
    return Payload(packed, frames, len(packed) + sum(len(f) if isinstance(f, bytes) else f.nbytes for f in frames))


def with_body(header: Mapping[str, object], packed: bytes) -> bytes:
    """`header` plus an already packed `body` as its last field. At most 14 header fields (a MessagePack fixmap)."""
    head = _pack(header)
    return b"%c%b\xa4body%b" % (head[0] + 1, head[1:], packed)


def request_header(
    kind: str,
    request_id: str,
    packed: bytes,
    *,
    timeout_ms: int = 0,
    ack: int = 0,
    origin: Mapping[str, object] | None = None,
) -> bytes:
    """First frame of a request. `origin`: run, term, incarnation and trace, as far as they are known."""
    header: dict[str, object] = {"v": VERSION, "kind": kind, "id": request_id, "timeout_ms": timeout_ms}
    if ack:
        header["ack"] = ack
    if origin:
        header.update(origin)
    return with_body(header, packed)


def reply_header(kind: str, request_id: str, seq: int, packed: bytes, *, session: str, credit: int) -> bytes:
    """First frame of a `reply` or `done`."""
    header = {"v": VERSION, "kind": kind, "id": request_id, "seq": seq, "session": session, "credit": credit}
    return with_body(header, packed)


def error_header(request_id: str, seq: int, error: ProtocolError, *, session: str = "", credit: int = 0) -> bytes:
    """The only frame of an `error` reply; session and credit are left out where no session could be opened."""
    described: dict[str, object] = {"code": error.code.value, "detail": error.detail[:2000]}
    if error.retry_after_ms is not None:
        described["retry_after_ms"] = error.retry_after_ms
    header: dict[str, object] = {"v": VERSION, "kind": "error", "id": request_id, "seq": seq, "error": described}
    if session:
        header |= {"session": session, "credit": credit}
    return _pack(header)


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code} is not part of the protocol")


def unpack(data: Buffer) -> dict[str, Any]:
    """A header frame as a plain map, within limits. Raises InvalidError."""
    size = len(data) if isinstance(data, bytes) else data.nbytes
    try:
        value = msgpack.unpackb(
            data,
            max_str_len=MAX_STRING_BYTES,
            max_bin_len=MAX_STRING_BYTES,
            max_array_len=min(MAX_LIST_ITEMS, size),  # a list is allocated before its items are seen
            max_map_len=min(MAX_MAP_ITEMS, size),
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise InvalidError(f"header is not MessagePack: {error or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise InvalidError("header is not a map")
    return value


class Salvage(NamedTuple):
    """What an error reply needs, read from a header that may be wrong in every other respect."""

    id: str | None
    ack: int


def salvage(header: Mapping[str, Any]) -> Salvage:
    request_id, ack = header.get("id"), header.get("ack")
    usable = isinstance(request_id, str) and 0 < len(request_id) <= 256
    return Salvage(request_id if usable else None, ack if type(ack) is int and 0 <= ack < 2**63 else 0)


H = TypeVar("H", RequestHeader, ReplyHeader)


def check_header(header: Mapping[str, Any], header_type: type[H]) -> H:
    """A header map as a struct. An unknown major version raises VersionMismatchError, anything else InvalidError."""
    version = header.get("v")
    if isinstance(version, list) and version and type(version[0]) is int and version[0] != VERSION[0]:
        raise VersionMismatchError(f"this side speaks protocol version {VERSION[0]}, the message {version[0]}")
    try:
        return msgspec.convert(header, header_type)
    except msgspec.ValidationError as error:
        raise InvalidError(f"header: {error}") from None


class _ArrayReader:
    """Turns `{"dtype", "shape", "frame"}` maps into read-only arrays over the frames of one message."""

    __slots__ = ("_frames", "_used")

    def __init__(self, frames: Sequence[Buffer]) -> None:
        self._frames = frames
        self._used: set[int] = set()

    def __call__(self, wanted: type, value: object) -> object:
        if wanted is not np.ndarray:
            raise ValueError(f"{wanted.__name__} does not travel")
        if not isinstance(value, dict) or len(value) != 3:
            raise ValueError("expected an array: a map of dtype, shape and frame")
        dtype, shape, index = value.get("dtype"), value.get("shape"), value.get("frame")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError("unknown dtype of an array")
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMS
            or not all(type(n) is int and 0 <= n < 2**40 for n in shape)
        ):
            raise ValueError("bad shape of an array")
        if type(index) is not int or not 0 <= index < len(self._frames):
            raise ValueError("frame of an array is out of range")
        if index in self._used:
            raise ValueError("two arrays share a frame")
        self._used.add(index)
        frame = self._frames[index]
        size = len(frame) if isinstance(frame, bytes) else frame.nbytes
        if math.prod(shape) * np.dtype(dtype).itemsize != size:
            raise ValueError(f"an array of {dtype} {shape} does not fill its frame of {size} bytes")
        if not size:
            array = np.empty(shape, dtype)
        else:
            array = np.frombuffer(frame, dtype).reshape(shape)
            if not array.flags.aligned:
                array = array.copy()
        array.flags.writeable = False
        return array


def decode(body: object, body_type: type[B], frames: Sequence[Buffer] = ()) -> B:
    """A body map and its frames as `body_type`. Raises InvalidError. None counts as an empty map."""
    try:
        return msgspec.convert({} if body is None else body, body_type, dec_hook=_ArrayReader(frames))
    except (msgspec.ValidationError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidError(f"body: {error}") from None


def error_in(header: ReplyHeader) -> ProtocolError:
    """The exception that an `error` reply stands for."""
    if header.error is None:
        return error_of(ErrorCode.INTERNAL, "error reply without an error")
    return error_of(header.error.code, header.error.detail, header.error.retry_after_ms)


def buffers(frames: Sequence[zmq.Frame]) -> list[Buffer]:
    """Received frames as buffers: small ones copied out (aligned, and ZeroMQ's memory is free), large ones shared."""
    return [frame.bytes if len(frame) < COPY_BYTES else frame.buffer for frame in frames]
