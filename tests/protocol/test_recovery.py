"""Resends, replays, duplicates, broken connections and restarted servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from protocol.clients import RolloutClient
from protocol.codec import encode, request_header
from protocol.errors import UnavailableError
from protocol.messages import (
    Ack,
    Body,
    DraftRequest,
    FinishReason,
    GenerationDone,
    InfoRequest,
    PushReceived,
    Sample,
    Sampling,
    VersionSpan,
)
from protocol.server import Call, Server, ServerLimits
from tests.protocol.conftest import Connect, Serve

T = 10.0


class Proxy:
    """A TCP proxy whose connections can be cut."""

    def __init__(self, target: str) -> None:
        self._target = int(target.rpartition(":")[2])
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, back}
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self._server.close()
        self.cut()


class Steps:
    """Streams `known` items, the next one whenever `go` is released; counts how often it was started."""

    def __init__(self) -> None:
        self.started = 0
        self.entered = asyncio.Event()
        self.go = asyncio.Semaphore(0)

    async def __call__(self, call: Call, body: InfoRequest) -> Body:
        self.started += 1
        self.entered.set()
        for step in range(body.known or 0):
            await self.go.acquire()
            await call.reply(PushReceived(step))
        await self.go.acquire()
        return Ack()

    def release(self, count: int) -> None:
        for _ in range(count):
            self.go.release()


@contextlib.asynccontextmanager
async def losing_replies(server: Server) -> AsyncIterator[None]:
    """Replies are lost until one has been."""
    lost = asyncio.Event()

    def lose(parts: object) -> bool:
        lost.set()
        return False

    send, server._out._send = server._out._send, lose
    try:
        yield
        await asyncio.wait_for(lost.wait(), T)
    finally:
        server._out._send = send


async def test_a_resent_id_attaches_and_is_told_what_it_lacks(serve: Serve, connect: Connect) -> None:
    steps = Steps()
    server = await serve(("x", InfoRequest, steps))
    first, second = connect(server), connect(server)
    stream = first.stream("x", InfoRequest(3), PushReceived, Ack, timeout_s=T, request_id="one")
    steps.release(2)
    assert [await anext(stream), await anext(stream)] == [PushReceived(0), PushReceived(1)]
    # The same id from another connection: the newest one is answered, from the start, as nothing was acknowledged.
    again = second.stream("x", InfoRequest(3), PushReceived, Ack, timeout_s=T, request_id="one")
    assert [await anext(again), await anext(again)] == [PushReceived(0), PushReceived(1)]
    steps.release(2)
    assert [item async for item in again] == [PushReceived(2), Ack()]
    assert steps.started == 1 and server.counters.duplicates == 1 and server.counters.replayed == 2


async def test_a_finished_request_is_replayed_until_it_is_acknowledged(serve: Serve, connect: Connect) -> None:
    steps = Steps()
    server = await serve(("x", InfoRequest, steps))
    steps.release(10)
    client = connect(server)
    head = request_header("x", "one", encode(InfoRequest(1)).packed, timeout_ms=5000)
    await client.request("x", InfoRequest(0), Ack, timeout_s=T)
    assert client._dealer is not None
    client._dealer.send([head])  # answered, and not acknowledged: nobody waits for it here
    while "one" not in server._calls.finished:
        await client.request("x", InfoRequest(0), Ack, timeout_s=T)
        steps.release(1)
    again = [
        item async for item in client.stream("x", InfoRequest(1), PushReceived, Ack, timeout_s=T, request_id="one")
    ]
    assert again == [PushReceived(0), Ack()] and server.counters.replayed == 2
    client._flush_acks()
    await client.request("health", InfoRequest(), Body, timeout_s=T)
    assert not server._calls.known and server._calls.bytes == 0


async def test_duplicate_replies_are_dropped(serve: Serve, connect: Connect) -> None:
    steps = Steps()
    server = await serve(("x", InfoRequest, steps))
    client = connect(server)
    stream = client.stream("x", InfoRequest(2), PushReceived, Ack, timeout_s=T, request_id="one")
    steps.release(1)
    seen = [await anext(stream)]
    for _ in range(3):  # resends that claim to have nothing
        assert client._dealer is not None
        client._dealer.send([request_header("x", "one", encode(InfoRequest(2)).packed, timeout_ms=5000)])
    await client.request("health", InfoRequest(), Body, timeout_s=T)
    steps.release(2)
    seen += [item async for item in stream]
    assert seen == [PushReceived(0), PushReceived(1), Ack()]
    assert client.duplicates == 3 and steps.started == 1


async def test_a_lost_reply_is_noticed_and_replayed(serve: Serve, connect: Connect) -> None:
    steps = Steps()
    server = await serve(("x", InfoRequest, steps))
    client = connect(server, resend_s=30.0)
    stream = client.stream("x", InfoRequest(4), PushReceived, Ack, timeout_s=T)
    steps.release(1)
    seen = [await anext(stream)]
    async with losing_replies(server):
        steps.release(1)
    steps.release(3)
    seen += [item async for item in stream]
    assert seen == [PushReceived(0), PushReceived(1), PushReceived(2), PushReceived(3), Ack()]


async def test_a_lost_last_reply_is_asked_for(serve: Serve, connect: Connect) -> None:
    steps = Steps()
    server = await serve(("x", InfoRequest, steps))
    client = connect(server, resend_s=0.05)
    task = asyncio.create_task(client.request("x", InfoRequest(0), Ack, timeout_s=T))
    await steps.entered.wait()
    async with losing_replies(server):
        steps.release(1)
    assert await task == Ack() and steps.started == 1


async def test_a_broken_connection_loses_nothing(serve: Serve, connect: Connect) -> None:
    steps = Steps()
    server = await serve(("x", InfoRequest, steps))
    proxy = Proxy(server.address)
    client = connect(await proxy.start(), resend_s=30.0)
    stream = client.stream("x", InfoRequest(200), PushReceived, Ack, timeout_s=T)
    seen = []
    for _ in range(5):
        steps.release(20)
        seen += [await anext(stream) for _ in range(10)]
        proxy.cut()
    steps.release(150)
    seen += [item async for item in stream]
    assert seen == [*map(PushReceived, range(200)), Ack()] and steps.started == 1
    await client.close()
    await proxy.close()


async def test_requests_sent_into_a_broken_connection_arrive(serve: Serve, connect: Connect) -> None:
    async def ack(call: Call, body: Body) -> Body:
        return Ack()

    proxy = Proxy((await serve(("x", InfoRequest, ack))).address)
    client = connect(await proxy.start(), resend_s=0.2)
    for _ in range(5):
        await client.request("x", InfoRequest(), Ack, timeout_s=T)
        proxy.cut()
        await asyncio.gather(*(client.request("x", InfoRequest(), Ack, timeout_s=T) for _ in range(20)))
    await client.close()
    await proxy.close()


async def test_a_restarted_server_gets_open_requests_again(connect: Connect, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"

    def sample(index: int) -> Sample:
        ids = np.arange(index + 1, dtype=np.int32)
        return Sample(index, ids, ids.astype(np.float32), [VersionSpan(0, 0, 0, index + 1)], FinishReason.STOP, "")

    async def start(order: list[int], stop_after: int | None) -> Server:
        async def draft(call: Call, body: DraftRequest) -> Body:
            for index in order[:stop_after]:
                await call.reply(sample(index))
            if stop_after is not None:
                await asyncio.Event().wait()
            return GenerationDone(np.zeros(1, np.int32), body.n)

        server = Server("s", address)
        server.route("draft", DraftRequest, draft)
        await server.start()
        return server

    first = await start([0, 1, 2, 3], stop_after=2)
    client = connect(address, RolloutClient, resend_s=0.2)
    assert isinstance(client, RolloutClient)
    body = DraftRequest(n=4, sampling=Sampling(8), prompt_ids=np.zeros(1, np.int32))
    stream = client.draft(body, timeout_s=T)
    seen = [await anext(stream), await anext(stream)]
    await first._out.close(0)  # as if it had been killed: no last words
    await first.close()
    second = await start([3, 1, 2, 0], stop_after=None)
    seen += [item async for item in stream]
    assert [s.index if isinstance(s, Sample) else "done" for s in seen] == [0, 1, 3, 2, "done"]
    await client.request("draft", body, GenerationDone, timeout_s=T)  # the new session's credits work
    assert client._window.sent == 2
    await second.close()


async def test_a_client_may_come_before_its_server(connect: Connect, tmp_path: Path) -> None:
    async def ack(call: Call, body: Body) -> Body:
        return Ack()

    client = connect(f"ipc://{tmp_path}/s")
    tasks = [asyncio.create_task(client.request("x", InfoRequest(), Ack, timeout_s=T)) for _ in range(10)]
    await asyncio.sleep(0)
    server = Server("s", f"ipc://{tmp_path}/s")
    server.route("x", InfoRequest, ack)
    await server.start()
    assert await asyncio.gather(*tasks) == [Ack()] * 10
    await client.close()
    await server.close()


async def test_replies_are_bounded_in_memory(serve: Serve, connect: Connect) -> None:
    steps = Steps()
    limits = ServerLimits(replay_bytes=4096, max_finished=4, ack_grace_s=0)
    server = await serve(("x", InfoRequest, steps), limits=limits)
    client = connect(server)
    client._flush_acks = lambda: None  # type: ignore[method-assign]  # a client that never acknowledges
    steps.release(10_000)
    for index in range(20):
        await client.request("x", InfoRequest(20), Ack, timeout_s=T, request_id=f"r{index}")
    assert server._calls.bytes <= 4096 and len(server._calls.known) <= 4


async def test_replies_that_were_given_up_are_said_to_be(serve: Serve, connect: Connect) -> None:
    steps = Steps()
    server = await serve(("x", InfoRequest, steps), limits=ServerLimits(replay_bytes=1000))
    first = connect(server)
    stream = first.stream("x", InfoRequest(50), PushReceived, Ack, timeout_s=T, request_id="one")
    first._flush_acks = lambda: None  # type: ignore[method-assign]
    steps.release(40)
    for _ in range(40):
        await anext(stream)
    with pytest.raises(UnavailableError, match="given up"):
        await connect(server).request("x", InfoRequest(50), Ack, timeout_s=T, request_id="one")


async def test_unacknowledged_replies_expire(serve: Serve, connect: Connect) -> None:
    steps = Steps()
    server = await serve(("x", InfoRequest, steps), limits=ServerLimits(replay_s=0.05, ack_grace_s=0))
    client = connect(server)
    client._flush_acks = lambda: None  # type: ignore[method-assign]
    steps.release(1)
    await client.request("x", InfoRequest(0), Ack, timeout_s=T)
    assert server._calls.known
    server._keep_house()
    await asyncio.sleep(0.06)
    server._keep_house()
    assert not server._calls.known and server._calls.bytes == 0
