"""Gives every rollout server the newest version, in the background of training.

INVARIANTS: one task per server, so that a lost one delays nobody. Only the newest snapshot is delivered: versions that
came and went meanwhile are never sent. A server that serves anything else (it joined late, it restarted) gets it again.
Every wait has a deadline. A snapshot is discarded once it is not the newest and nobody is being given it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from protocol.clients import OrchestratorClient, RolloutClient
from protocol.errors import ProtocolError
from protocol.messages import ReplicaEntry, Version
from trainer.transports.base import Snapshot, Transport

log = logging.getLogger("trainer.publisher")

MEMBERSHIP_WAIT_MS = 5000
"""How long one `info` request to the orchestrator stays open while the set of servers does not change."""


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
        self._in_use: dict[int, int] = {}
        self._servers: dict[ReplicaEntry, asyncio.Task[None]] = {}
        self.served: dict[str, Version] = {}  # what each server of the set was last seen to serve
        self.failures = 0

    def offer(self, snapshot: Snapshot) -> None:
        """From now on this is the newest version."""
        previous, self._newest = self._newest, snapshot
        if previous is not None and not self._in_use.get(id(previous)):
            previous.discard()
        self._changed.set()
        self._changed = asyncio.Event()

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
        with self._held(self._newest) as snapshot:
            done = await self._transport.deliver(client, snapshot, timeout_s=self._transfer_s)
        self.served[entry.name] = done.version

    @contextlib.contextmanager
    def _held(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        self._in_use[id(snapshot)] = self._in_use.get(id(snapshot), 0) + 1
        try:
            yield snapshot
        finally:
            self._in_use[id(snapshot)] -= 1
            if not self._in_use[id(snapshot)]:
                del self._in_use[id(snapshot)]
                if snapshot is not self._newest:
                    snapshot.discard()
