"""Nothing that arrives ends a service: it is counted, answered with `invalid` where it can be, and work goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.messages import Ack, Body, InfoRequest, WeightsChunk
from protocol.server import Call, Server, ServerLimits
from tests.protocol.conftest import Serve

LIMITS = ServerLimits(
    ack_grace_s=0, max_message_bytes=20_000, max_header_bytes=10_000, hard_frame_bytes=40_000, max_frames=4
)


async def ack(call: Call, body: Body) -> Body:
    return Ack()


@pytest.fixture
async def server(serve: Serve) -> Server:
    routes = (("x", InfoRequest, ack), ("weights.chunk", WeightsChunk, ack))
    return await serve(*routes, limits=LIMITS)


@pytest.fixture
async def raw(server: Server) -> AsyncIterator[zmq.asyncio.Socket]:
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(server.address)
        yield socket


async def answer(socket: zmq.asyncio.Socket) -> dict[str, Any]:
    frames = await asyncio.wait_for(socket.recv_multipart(), 5.0)
    return msgpack.unpackb(frames[0])


def header(**changed: object) -> bytes:
    fields = {"v": [1, 0], "kind": "x", "id": "a", "timeout_ms": 1000, "body": {}} | changed
    packed = msgpack.packb({name: value for name, value in fields.items() if value is not ...})
    assert packed is not None
    return packed


async def works(socket: zmq.asyncio.Socket) -> None:
    await socket.send_multipart([header(id="good")])
    while (reply := await answer(socket))["id"] != "good":
        pass
    assert reply["kind"] == "done" and reply["body"] == {}


@pytest.mark.parametrize(
    ("frames", "answered"),
    [
        ([b"\xc1"], None),
        ([b""], None),
        ([msgpack.packb(7)], None),
        ([header()[:-3]], None),
        ([header(id=...)], None),
        ([header(id="")], None),
        ([header(id=5)], None),
        ([header(id="x" * 300)], None),
        ([header(kind=...)], "invalid"),
        ([header(kind=["x"])], "invalid"),
        ([header(kind="unknown")], "invalid"),
        ([header(v=...)], "invalid"),
        ([header(v="1.0")], "invalid"),
        ([header(v=[True, 0])], "invalid"),
        ([header(v=[2, 0])], "version_mismatch"),
        ([header(timeout_ms=-1)], "invalid"),
        ([header(timeout_ms=1.5)], "invalid"),
        ([header(timeout_ms=2**63)], "invalid"),
        ([header(timeout_ms=...)], "deadline"),
        ([header(term=-1)], "invalid"),
        ([header(ack="no")], "invalid"),
        ([header(body=[1])], "invalid"),
        ([header(body={"known": "one"})], "invalid"),
        ([header(kind="session", body={"open": {"a": -1}})], "invalid"),
        ([header(kind="ack", body=3)], "invalid"),
        ([header(), *[b""] * 5], "invalid"),
        ([header(), b"x" * 20_001], "invalid"),
        ([header(kind="weights.chunk", body={"version": [0, 0], "offset": 0, "data": 1})], "invalid"),
    ],
)
async def test_bad_messages(server: Server, raw: zmq.asyncio.Socket, frames: list[bytes], answered: str | None) -> None:
    await raw.send_multipart(frames)
    if answered:
        reply = await answer(raw)
        assert reply["kind"] == "error" and reply["id"] == "a" and reply["error"]["code"] == answered
    await works(raw)
    counters = server.counters
    assert counters.malformed + counters.oversized + counters.version_mismatch + counters.deadlines == 1


async def test_too_long_a_header_is_dropped(server: Server, raw: zmq.asyncio.Socket) -> None:
    await raw.send_multipart([header(trace="x" * 10_001)])
    await works(raw)
    assert server.counters.oversized == 1


async def test_a_hard_oversized_frame_costs_its_sender_the_connection(server: Server, raw: zmq.asyncio.Socket) -> None:
    await raw.send_multipart([header(), b"x" * 100_000])
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as other:
        other.linger = 0
        other.connect(server.address)
        await works(other)
    await works(raw)  # it has reconnected


async def test_an_empty_message(server: Server) -> None:
    server._on_message([zmq.Frame(b"identity")])
    assert server.counters.malformed == 1


async def test_random_messages(server: Server, raw: zmq.asyncio.Socket) -> None:
    """Several hundred messages, half of them mutations of good ones, then a good request."""
    good = [header(), header(kind="cancel"), header(kind="session", body={"open": {"a": 0}}), header(kind="ack")]
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=4)
        | st.binary(max_size=4)
    )
    json = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    )
    names = st.sampled_from(["v", "kind", "id", "timeout_ms", "run", "term", "incarnation", "trace", "ack", "body"])
    kinds = st.sampled_from(["x", "weights.chunk", "session", "ack", "cancel", "health"])
    maps = st.dictionaries(names, json, max_size=10)
    near = st.builds(lambda kind, extra: {"v": [1, 0], "id": "a", "kind": kind, "timeout_ms": 9, **extra}, kinds, maps)
    mutated = st.builds(
        lambda data, at, byte: data[: at % len(data)] + bytes([byte]) + data[at % len(data) + 1 :],
        st.sampled_from(good), st.integers(0, 200), st.integers(0, 255),
    )  # fmt: skip
    first = st.binary(max_size=50) | mutated | maps.map(msgpack.packb) | near.map(msgpack.packb)
    batches: list[list[bytes]] = []

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(first, st.lists(st.binary(max_size=8), max_size=5))
    def collect(head: bytes, frames: list[bytes]) -> None:
        batches.append([head, *frames])

    collect()
    for frames in batches:
        await raw.send_multipart(frames)
    await works(raw)
    assert server.counters.received == len(batches) + 1 and server.counters.failed == 0
    assert server.counters.malformed > 0
