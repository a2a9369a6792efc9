"""Requests, streams, deadlines, cancels, credits, priority and fences, against a real server and client."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from protocol.errors import (
    CancelledRequestError,
    DeadlineError,
    InternalError,
    InvalidError,
    OverloadedError,
    ProtocolError,
    RefusedError,
    StaleError,
    UnavailableError,
)
from protocol.messages import Ack, Body, Health, HealthRequest, InfoRequest, PushReceived
from protocol.server import Call, Handler, ServerLimits
from tests.protocol.conftest import Connect, Serve

T = 5.0  # a deadline that is not meant to pass


class Gate:
    """A handler that says who entered and who was stopped, and lets go when told."""

    def __init__(self) -> None:
        self.entered: asyncio.Queue[str] = asyncio.Queue()
        self.stopped: asyncio.Queue[str] = asyncio.Queue()
        self.open = asyncio.Event()

    async def __call__(self, call: Call, body: Body) -> Body:
        self.entered.put_nowait(call.id)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.stopped.put_nowait(call.id)
            raise
        return Ack()


async def ack(call: Call, body: Body) -> Body:
    return Ack()


async def count(call: Call, body: InfoRequest) -> Body:
    for step in range(body.known or 0):
        await call.reply(PushReceived(step))
    return Ack()


async def test_request_stream_and_health(serve: Serve, connect: Connect) -> None:
    server = await serve(("x", InfoRequest, ack), ("count", InfoRequest, count))
    client = connect(server)
    assert await client.request("x", InfoRequest(), Ack, timeout_s=T) == Ack()
    assert await client.request("count", InfoRequest(3), Ack, timeout_s=T) == Ack()
    items = [item async for item in client.stream("count", InfoRequest(3), PushReceived, Ack, timeout_s=T)]
    assert items == [PushReceived(0), PushReceived(1), PushReceived(2), Ack()]
    assert await client.request("health", HealthRequest(), Health, timeout_s=T) == Health(alive=True, ready=True)


async def test_arrays_arrive_large_and_small(serve: Serve, connect: Connect) -> None:
    from protocol.messages import UNVERSIONED, WeightsChunk

    async def echo(call: Call, body: WeightsChunk) -> Body:
        return body

    client = connect(await serve(("weights.chunk", WeightsChunk, echo)))
    for size in (0, 1, 1000, 1 << 22):
        data = np.arange(size, dtype=np.uint8)
        chunk = WeightsChunk(UNVERSIONED, 7, data)
        back = await client.request("weights.chunk", chunk, WeightsChunk, timeout_s=T)
        assert np.array_equal(back.data, data) and not back.data.flags.writeable and back.offset == 7


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RefusedError("no"), RefusedError),
        (StaleError("old"), StaleError),
        (InvalidError("bad"), InvalidError),
        (UnavailableError("later"), UnavailableError),
        (RuntimeError("defect"), InternalError),
    ],
)
async def test_errors_are_typed(serve: Serve, connect: Connect, raised: Exception, seen: type[ProtocolError]) -> None:
    async def fail(call: Call, body: Body) -> Body:
        raise raised

    client = connect(await serve(("x", InfoRequest, fail), ("y", InfoRequest, ack)))
    with pytest.raises(seen, match=str(raised.args[0]).split(": ")[-1]):
        await client.request("x", InfoRequest(), Ack, timeout_s=T)
    assert await client.request("y", InfoRequest(), Ack, timeout_s=T) == Ack()


async def test_what_a_server_does_not_serve_is_invalid(serve: Serve, connect: Connect) -> None:
    server = await serve(("x", PushReceived, ack))
    client = connect(server)
    with pytest.raises(InvalidError, match="does not serve 'y'"):
        await client.request("y", InfoRequest(), Ack, timeout_s=T)
    with pytest.raises(InvalidError, match="step"):
        await client.request("x", InfoRequest(), Ack, timeout_s=T)
    assert server.counters.malformed == 2


async def test_deadline_stops_the_work(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    client = connect(await serve(("x", InfoRequest, gate)))
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        await client.request("x", InfoRequest(), Ack, timeout_s=0.2)
    assert time.monotonic() - started < 1.0
    assert await asyncio.wait_for(gate.stopped.get(), T) == await gate.entered.get()


async def test_server_counts_the_deadline_itself(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    server = await serve(("x", InfoRequest, gate))
    client = connect(server)
    task = asyncio.create_task(client.request("x", InfoRequest(), Ack, timeout_s=0.3))
    await asyncio.wait_for(gate.entered.get(), T)
    client._expire = lambda pending: None  # type: ignore[method-assign]  # the client waits on and sends no cancel
    client._pending[next(iter(client._pending))].timer.cancel()  # type: ignore[union-attr]
    with pytest.raises(DeadlineError, match="at the server"):
        await asyncio.wait_for(task, T)
    assert server.counters.deadlines == 1 and server.counters.cancelled == 0
    await asyncio.wait_for(gate.stopped.get(), T)


async def test_an_unreachable_server_is_a_deadline(connect: Connect, tmp_path: Path) -> None:
    client = connect(f"ipc://{tmp_path}/nobody")
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        await client.request("x", InfoRequest(), Ack, timeout_s=0.2)
    assert time.monotonic() - started < 1.0


async def test_closing_a_stream_cancels(serve: Serve, connect: Connect) -> None:
    stopped = asyncio.Event()

    async def endless(call: Call, body: Body) -> Body:
        try:
            await call.reply(PushReceived(0))
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return Ack()

    client = connect(await serve(("x", InfoRequest, endless)))
    stream = client.stream("x", InfoRequest(), PushReceived, Ack, timeout_s=T)
    assert await anext(stream) == PushReceived(0)
    await stream.aclose()
    await asyncio.wait_for(stopped.wait(), T)


async def test_cancelling_the_task_cancels_the_request(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    client = connect(await serve(("x", InfoRequest, gate)))
    task = asyncio.create_task(client.request("x", InfoRequest(), Ack, timeout_s=T))
    await asyncio.wait_for(gate.entered.get(), T)
    task.cancel()
    await asyncio.wait_for(gate.stopped.get(), T)


async def test_a_cancel_that_overtakes_its_request(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    server = await serve(("x", InfoRequest, gate))
    client = connect(server)
    await client.request("health", HealthRequest(), Health, timeout_s=T)
    client._send_control("cancel", "late", None)
    with pytest.raises(CancelledRequestError):
        await client.request("x", InfoRequest(), Ack, timeout_s=T, request_id="late")
    assert gate.entered.empty() and server.counters.early_cancels == 1


async def test_a_closed_client_fails_its_requests_and_cancels_them(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    client = connect(await serve(("x", InfoRequest, gate)))
    task = asyncio.create_task(client.request("x", InfoRequest(), Ack, timeout_s=T))
    await asyncio.wait_for(gate.entered.get(), T)
    await client.close()
    with pytest.raises(UnavailableError):
        await task
    await asyncio.wait_for(gate.stopped.get(), T)
    with pytest.raises(UnavailableError):
        await client.request("x", InfoRequest(), Ack, timeout_s=T)


async def test_credits_bound_what_is_in_flight(serve: Serve, connect: Connect) -> None:
    running = most = 0

    async def work(call: Call, body: Body) -> Body:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return Ack()

    limits = ServerLimits(window=4, max_concurrent=100, retry_after_ms=5)
    server = await serve(("x", InfoRequest, work), limits=limits)
    client = connect(server, resend_s=0.1)
    await client.request("x", InfoRequest(), Ack, timeout_s=T)  # by now it knows its window
    replies = await asyncio.gather(*(client.request("x", InfoRequest(), Ack, timeout_s=T) for _ in range(200)))
    assert len(replies) == 200 and most <= 4 and server.counters.overloaded == 0
    assert client._window.sent == 201 and client._window.credit == 205


async def test_beyond_its_credit_a_client_is_told_to_wait_and_does(serve: Serve, connect: Connect) -> None:
    limits = ServerLimits(window=2, retry_after_ms=5)
    server = await serve(("x", InfoRequest, ack), limits=limits)
    client = connect(server, resend_s=0.1)
    await asyncio.gather(*(client.request("x", InfoRequest(), Ack, timeout_s=T) for _ in range(40)))
    assert server.counters.overloaded > 0 and server.counters.accepted == 40


async def test_waiting_for_credit_counts_against_the_deadline(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    client = connect(await serve(("x", InfoRequest, gate), ("y", InfoRequest, ack), limits=ServerLimits(window=1)))
    await client.request("y", InfoRequest(), Ack, timeout_s=T)
    first = asyncio.create_task(client.request("x", InfoRequest(), Ack, timeout_s=T))
    await asyncio.wait_for(gate.entered.get(), T)
    with pytest.raises(DeadlineError):
        await client.request("x", InfoRequest(), Ack, timeout_s=0.1)
    gate.open.set()
    await first


async def test_credit_lost_with_requests_is_found_again(serve: Serve, connect: Connect) -> None:
    server = await serve(("x", InfoRequest, ack), limits=ServerLimits(window=2))
    client = connect(server, resend_s=0.05)
    await client.request("x", InfoRequest(), Ack, timeout_s=T)
    client._window.sent += 5  # as if five requests had been lost on the way and given up
    await client.request("x", InfoRequest(), Ack, timeout_s=T)
    assert client._window.sent == 2


async def test_overloaded_reaches_the_caller_when_no_time_is_left(serve: Serve, connect: Connect) -> None:
    async def busy(call: Call, body: Body) -> Body:
        raise OverloadedError("busy", retry_after_ms=10_000)

    client = connect(await serve(("x", InfoRequest, busy)))
    with pytest.raises(OverloadedError):
        await client.request("x", InfoRequest(), Ack, timeout_s=1.0)


async def test_priority_and_queue_bound(serve: Serve, connect: Connect) -> None:
    order: list[str] = []
    gate = Gate()

    def log(name: str) -> Handler[Body]:
        async def handler(call: Call, body: Body) -> Body:
            order.append(name)
            return Ack()

        return handler

    server = await serve(
        ("block", InfoRequest, gate),
        ("draft", InfoRequest, log("draft"), {"priority": 1}),
        ("refine", InfoRequest, log("refine"), {"priority": 2}),
        ("info", InfoRequest, ack, {"control": True}),
        limits=ServerLimits(max_concurrent=1, max_queued=4, retry_after_ms=10_000),
    )
    client = connect(server)
    tasks = [asyncio.create_task(client.request("block", InfoRequest(), Ack, timeout_s=T))]
    await asyncio.wait_for(gate.entered.get(), T)
    kinds = ["draft", "draft", "refine", "refine"]
    tasks += [asyncio.create_task(client.request(kind, InfoRequest(), Ack, timeout_s=T)) for kind in kinds]
    await asyncio.sleep(0)  # they are sent, in this order, before:
    with pytest.raises(OverloadedError, match="queue is full"):
        await client.request("draft", InfoRequest(), Ack, timeout_s=T)
    assert await client.request("info", InfoRequest(), Ack, timeout_s=T) == Ack()  # control goes past the queue
    gate.open.set()
    await asyncio.gather(*tasks)
    assert order == ["refine", "refine", "draft", "draft"]


async def test_a_cancelled_request_leaves_the_queue(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    server = await serve(("x", InfoRequest, gate), limits=ServerLimits(max_concurrent=1))
    client = connect(server)
    first = asyncio.create_task(client.request("x", InfoRequest(), Ack, timeout_s=T))
    await asyncio.wait_for(gate.entered.get(), T)
    second = asyncio.create_task(client.request("x", InfoRequest(), Ack, timeout_s=T))
    await asyncio.sleep(0)
    second.cancel()
    await client.request("health", HealthRequest(), Health, timeout_s=T)
    gate.open.set()
    await first
    assert gate.entered.empty() and server.counters.cancelled == 1


async def test_an_older_term_or_incarnation_is_stale(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    server = await serve(("x", InfoRequest, gate), ("y", InfoRequest, ack))
    old, new = connect(server, run="r", term=1, incarnation=5), connect(server, run="r", term=2, incarnation=5)
    working = asyncio.create_task(old.request("x", InfoRequest(), Ack, timeout_s=T))
    await asyncio.wait_for(gate.entered.get(), T)
    await new.request("y", InfoRequest(), Ack, timeout_s=T)
    with pytest.raises(StaleError, match="took over"):
        await working
    await asyncio.wait_for(gate.stopped.get(), T)
    with pytest.raises(StaleError, match="term 1"):
        await old.request("y", InfoRequest(), Ack, timeout_s=T)
    with pytest.raises(StaleError, match="incarnation 4"):
        await connect(server, run="r", incarnation=4).request("y", InfoRequest(), Ack, timeout_s=T)
    for fine in (connect(server, run="other", term=1), connect(server, run="r", incarnation=6), connect(server)):
        assert await fine.request("y", InfoRequest(), Ack, timeout_s=T) == Ack()
    assert server.counters.stale == 2


async def test_the_handler_sees_where_a_request_comes_from(serve: Serve, connect: Connect) -> None:
    calls: list[tuple[object, ...]] = []

    async def look(call: Call, body: Body) -> Body:
        calls.append((call.id, call.kind, call.run, call.term, call.incarnation, call.trace, 0 < call.remaining_s <= T))
        return Ack()

    client = connect(await serve(("x", InfoRequest, look)), run="r", term=3, incarnation=4)
    await client.request("x", InfoRequest(), Ack, timeout_s=T, request_id="me", trace="t")
    assert calls == [("me", "x", "r", 3, 4, "t", True)]
    with pytest.raises(InvalidError, match="256"):
        await client.request("x", InfoRequest(), Ack, timeout_s=T, request_id="x" * 257)


async def test_draining_lets_work_end_and_takes_no_more(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    server = await serve(("x", InfoRequest, gate))
    client = connect(server)
    working = asyncio.create_task(client.request("x", InfoRequest(), Ack, timeout_s=T))
    await asyncio.wait_for(gate.entered.get(), T)
    closing = asyncio.create_task(server.close(drain_s=T))
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError, match="draining"):
        await client.request("x", InfoRequest(), Ack, timeout_s=T)
    assert not (await client.request("health", HealthRequest(), Health, timeout_s=T)).ready
    gate.open.set()
    assert await working == Ack()
    await asyncio.wait_for(closing, T)


async def test_closing_ends_what_does_not_end(serve: Serve, connect: Connect) -> None:
    gate = Gate()
    server = await serve(("x", InfoRequest, gate))
    working = asyncio.create_task(connect(server).request("x", InfoRequest(), Ack, timeout_s=T))
    await asyncio.wait_for(gate.entered.get(), T)
    await server.close(drain_s=0.05)
    with pytest.raises(UnavailableError, match="closing"):
        await working


async def test_a_slow_reader_gets_everything_in_order(serve: Serve, connect: Connect) -> None:
    total = 5000  # more than a client queues, more than ZeroMQ queues per peer
    server = await serve(("count", InfoRequest, count), limits=ServerLimits(peer_queue=100))
    client = connect(server, resend_s=0.1)
    seen: list[int] = []
    async for item in client.stream("count", InfoRequest(total), PushReceived, Ack, timeout_s=30.0):
        if isinstance(item, PushReceived):
            seen.append(item.step)
        if len(seen) % 500 == 1:
            await asyncio.sleep(0.01)
    assert seen == list(range(total))
