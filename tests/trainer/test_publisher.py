"""The publisher: newest version only, one server delays nobody, whoever serves something else gets it again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from protocol.clients import OrchestratorClient, RolloutClient
from protocol.messages import UpdatePolicy, Version, WeightsDone
from tests.trainer.servers import CheckingReplica, Membership
from trainer.gather import Bucket
from trainer.publisher import Publisher
from trainer.transports.base import Snapshot, Transport
from trainer.transports.disk import DiskTransport
from trainer.transports.stream import StreamTransport


class Stage:
    """A publisher in this loop with an orchestrator and two replicas."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.membership = Membership("run")
        self.fast, self.slow = CheckingReplica("fast"), CheckingReplica("slow")

    async def open(self) -> None:
        address = await self.membership.server.start()
        self.entries = [await self.fast.start(), await self.slow.start()]
        self.membership.set(*self.entries)
        self.client = OrchestratorClient(address)
        self.publisher = Publisher(
            self.client, self.transport, run="run", incarnation=1, request_s=2.0, transfer_s=20.0, poll_s=0.05
        )
        self.task = asyncio.create_task(self.publisher.run())

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait((self.task,), timeout=5.0)
        await self.client.close()
        for server in (self.membership.server, self.fast.server, self.slow.server):
            await server.close()

    def offer(self, step: int) -> None:
        self.publisher.offer(self.transport.take(Version(1, step), iter(buckets(step))))


def buckets(step: int) -> list[list[tuple[str, torch.Tensor]]]:
    """Two buckets of odd sizes, whose content tells the step."""
    return [
        [("a", torch.full((7, 3), float(step))), ("b", torch.full((5,), step, dtype=torch.bfloat16))],
        [("c", torch.full((11,), -float(step)))],
    ]


@pytest.fixture(params=["stream", "disk"])
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    policy = UpdatePolicy.IN_FLIGHT
    disk = request.param == "disk"
    stage = Stage(DiskTransport(tmp_path / "weights", policy) if disk else StreamTransport(policy, chunk_bytes=16))
    await stage.open()
    yield stage
    await stage.close()


async def test_every_server_gets_the_version_bit_for_bit(stage: Stage) -> None:
    stage.offer(0)
    for replica in (stage.fast, stage.slow):
        await replica.serves(Version(1, 0))
        for name, tensor in (item for bucket in buckets(0) for item in bucket):
            assert torch.equal(replica.weights[name], tensor) and replica.weights[name].dtype == tensor.dtype


async def test_a_slow_server_delays_nobody_and_skips_what_it_missed(stage: Stage) -> None:
    stage.slow.gate.clear()
    for step in range(4):
        stage.offer(step)
        await stage.fast.serves(Version(1, step))
    assert stage.slow.history == []
    stage.slow.gate.set()
    await stage.slow.serves(Version(1, 3))
    assert len(stage.slow.history) <= 2, "the one that was on its way, then the newest"


async def test_a_server_that_restarts_or_joins_late_gets_the_newest_again(stage: Stage) -> None:
    stage.membership.set(stage.entries[0])
    stage.offer(5)
    await stage.fast.serves(Version(1, 5))
    await stage.fast.restart()
    await stage.fast.serves(Version(1, 5))
    stage.membership.set(*stage.entries)
    await stage.slow.serves(Version(1, 5))


async def test_a_failing_server_is_tried_again(stage: Stage) -> None:
    stage.slow.broken = True
    stage.offer(1)
    await stage.fast.serves(Version(1, 1))
    assert stage.slow.history == []
    stage.slow.broken = False
    await stage.slow.serves(Version(1, 1))


async def test_snapshots_held_for_slow_servers_are_bounded() -> None:
    """Each of three servers hangs with another version; the fourth version ends the first one's delivery."""
    transport = HangingTransport()
    stage = Stage(transport)
    third = CheckingReplica("third")
    await stage.open()
    try:
        entries = [*stage.entries, await third.start()]
        for step in range(3):
            stage.offer(step)
            stage.membership.set(*entries[: step + 1])
            await transport.begins(step)
        assert not any(snapshot.discarded for snapshot in transport.taken)
        stage.offer(3)
        await transport.begins(3)
        assert [snapshot.discarded for snapshot in transport.taken] == [True, False, False, False]
        stage.publisher.discard()
        stage.task.cancel()
        await asyncio.wait((stage.task,), timeout=5.0)
        assert all(snapshot.discarded for snapshot in transport.taken)
    finally:
        await stage.close()
        await third.server.close()


@dataclass(eq=False)
class PlainSnapshot:
    version: Version
    discarded: bool = False

    def discard(self) -> None:
        self.discarded = True


class HangingTransport:
    """Begins deliveries and ends none."""

    def __init__(self) -> None:
        self.taken: list[PlainSnapshot] = []
        self._begun: asyncio.Queue[int] = asyncio.Queue()

    async def begins(self, step: int) -> None:
        async with asyncio.timeout(10.0):
            assert await self._begun.get() == step

    def take(self, version: Version, buckets: Iterable[Bucket]) -> Snapshot:
        self.taken.append(PlainSnapshot(version))
        return self.taken[-1]

    async def deliver(self, client: RolloutClient, snapshot: Snapshot, *, timeout_s: float) -> WeightsDone:
        self._begun.put_nowait(snapshot.version.step)
        async with asyncio.timeout(timeout_s):
            await asyncio.Event().wait()
        raise AssertionError


async def test_old_snapshots_are_discarded(stage: Stage, tmp_path: Path) -> None:
    for step in range(3):
        stage.offer(step)
        await stage.fast.serves(Version(1, step))
        await stage.slow.serves(Version(1, step))
    if isinstance(stage.transport, DiskTransport):
        assert set(os.listdir(tmp_path / "weights")) <= {"v1-1", "v1-2"}
