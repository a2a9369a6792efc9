"""Gives every rollout server the newest version, in the background of training.

INVARIANTS: one task per server, so that a lost one delays nobody. Only the newest snapshot is delivered: versions that
came and went meanwhile are never sent. A server that serves anything else (it joined late, it restarted) gets it again.
Every wait has a deadline. A snapshot is discarded once it is not the newest and nobody is being given it; the newest
by `discard`. At most SNAPSHOTS_HELD older ones are kept for servers that are still being given them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from protocol.clients import OrchestratorClient, RolloutClient
from protocol.errors import ProtocolError
from protocol.messages import ReplicaEntry, Version, WeightsDone
from trainer.transports.base import Snapshot, Transport

log = logging.getLogger("trainer.publisher")

MEMBERSHIP_WAIT_MS = 5000
"""How long one `info` request to the orchestrator stays open while the set of servers does not change."""

SNAPSHOTS_HELD = 2
"""Older versions on their way at a time; beyond it, deliveries of the oldest end and their servers get the newest.

It bounds rank 0's memory (or the disk) to this many snapshots and the newest, however slow the servers are.
"""


class Publisher:
    """Runs in one event loop; `run` ends only by cancellation."""

    def __init__(
        self,
        orchestrator: OrchestratorClient,
        transport: Transport,
        *,
        run: str,
        incarnation: int,
        request_s: float,
        transfer_s: float,
        poll_s: float,
    ) -> None:
        self._orchestrator = orchestrator
        self._transport = transport
        self._origin = {"run": run, "incarnation": incarnation}
        self._request_s = request_s
        self._transfer_s = transfer_s
        self._poll_s = poll_s
        self._newest: Snapshot | None = None
        self._changed = asyncio.Event()
        self._deliveries: dict[asyncio.Task[WeightsDone], Snapshot] = {}  # in the order in which they began
        self._servers: dict[ReplicaEntry, asyncio.Task[None]] = {}
        self.served: dict[str, Version] = {}  # what each server of the set was last seen to serve
        self.failures = 0

    def offer(self, snapshot: Snapshot) -> None:
        """From now on this is the newest version."""
        previous, self._newest = self._newest, snapshot
        if previous is not None:
            self._discard_unused(previous)
        self._bound_held()
        self._changed.set()
        self._changed = asyncio.Event()

    def discard(self) -> None:
        """Nobody will be given the newest version any more; call it once `run` has ended."""
        newest, self._newest = self._newest, None
        if newest is not None:
            self._discard_unused(newest)

    def metrics(self) -> dict[str, float]:
        """Servers of the set, how many of them serve the newest version, and failed deliveries so far."""
        newest = self._newest.version if self._newest else None
        return {
            "replicas": float(len(self._servers)),
            "replicas_current": float(sum(version == newest for version in self.served.values())),
            "publish_failures": float(self.failures),
        }

    async def run(self) -> None:
        """Follow the orchestrator's set of servers until cancelled."""
        try:
            known: int | None = None
            while True:
                try:
                    timeout_s = self._request_s + MEMBERSHIP_WAIT_MS / 1000
                    info = await self._orchestrator.info(known, MEMBERSHIP_WAIT_MS, timeout_s=timeout_s)
                except ProtocolError as error:
                    log.info("the orchestrator does not answer, the known servers are kept: %s", error)
                    await asyncio.sleep(self._poll_s)
                    continue
                known = info.revision
                await self._follow(set(info.replicas))
        finally:
            await self._follow(set())

    async def _follow(self, replicas: set[ReplicaEntry]) -> None:
        gone = [entry for entry in self._servers if entry not in replicas]
        tasks = [self._servers.pop(entry) for entry in gone]
        for entry, task in zip(gone, tasks, strict=True):
            task.cancel()
            self.served.pop(entry.name, None)
        for entry in replicas - self._servers.keys():
            self._servers[entry] = asyncio.create_task(self._serve(entry), name=f"publish to {entry.name}")
        if tasks:
            await asyncio.wait(tasks, timeout=self._request_s)

    async def _serve(self, entry: ReplicaEntry) -> None:
        """Keep one server at the newest version."""
        client = RolloutClient(entry.address, name="trainer", **self._origin)
        try:
            while True:
                changed = self._changed
                try:
                    await self._bring_up_to_date(entry, client)
                except (ProtocolError, TimeoutError) as error:
                    self.failures += 1
                    log.warning("weights to %s at %s: %s", entry.name, entry.address, error)
                    await asyncio.sleep(self._poll_s)
                    continue
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), self._poll_s)
        finally:
            await client.close()

    async def _bring_up_to_date(self, entry: ReplicaEntry, client: RolloutClient) -> None:
        info = await client.info(timeout_s=self._request_s)
        self.served[entry.name] = info.version
        if self._newest is None or info.version == self._newest.version:
            return
        done = await self._deliver(client, self._newest)
        if done is not None:
            self.served[entry.name] = done.version

    async def _deliver(self, client: RolloutClient, snapshot: Snapshot) -> WeightsDone | None:
        """None: it was given up, since a newer version is there. Raises ProtocolError, TimeoutError."""
        task = asyncio.create_task(self._transport.deliver(client, snapshot, timeout_s=self._transfer_s))
        self._deliveries[task] = snapshot
        task.add_done_callback(self._on_delivered)
        try:
            ended, _ = await asyncio.wait((task,), timeout=self._transfer_s + self._request_s)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,), timeout=self._request_s)
        if not ended:
            raise TimeoutError(f"the delivery of version {snapshot.version.step} did not end in time")
        return None if task.cancelled() else task.result()

    def _on_delivered(self, task: asyncio.Task[WeightsDone]) -> None:
        snapshot = self._deliveries.pop(task)
        if not task.cancelled():
            task.exception()  # who waited for it, if anybody still does, hears of it
        if snapshot is not self._newest:
            self._discard_unused(snapshot)

    def _discard_unused(self, snapshot: Snapshot) -> None:
        if not any(held is snapshot for held in self._deliveries.values()):
            snapshot.discard()

    def _bound_held(self) -> None:
        """End the oldest snapshot's deliveries while more older ones than SNAPSHOTS_HELD are on their way."""
        older = {id(held): held for held in self._deliveries.values() if held is not self._newest}
        excess = sorted(older.values(), key=lambda held: held.version.step)[: max(0, len(older) - SNAPSHOTS_HELD)]
        for task, held in self._deliveries.items():
            if any(held is one for one in excess) and not task.cancelling():
                task.cancel()
