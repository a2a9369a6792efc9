"""Keeps membership true: registers replicas that say hello and follows each one's version and state by long polls."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from orchestrator.dispatch import Dispatcher
from protocol.clients import RolloutClient
from protocol.errors import ProtocolError
from protocol.messages import ReplicaHello, ReplicaWelcome

log = logging.getLogger(__name__)

POLL_MS = 2_000
POLL_TIMEOUT_S = 6.0
RETRY_S = 0.5
FORGET_S = 600.0  # a replica that has been silent for so long is no member any more


class ReplicaWatch:
    """One task per replica. `changed` is called after everything that may let a waiting request go; `members_changed`

    when somebody joined or left.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        changed: Callable[[], None],
        members_changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._dispatcher, self._changed, self._members_changed = dispatcher, changed, members_changed
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def hello(self, body: ReplicaHello) -> ReplicaWelcome:
        """Register `body.name`, or note that it is still there."""
        membership, clients = self._dispatcher.membership, self._dispatcher.clients
        known = membership.replicas.get(body.name)
        membership.hello(body.name, body.address, body.capacity, body.context_tokens, time.monotonic())
        if known is None or known.address != body.address:
            log.info("replica %s at %s joined", body.name, body.address)
            old_task, old_client = self._tasks.pop(body.name, None), clients.get(body.name)
            client = clients[body.name] = RolloutClient(body.address, name="orchestrator")
            self._tasks[body.name] = asyncio.create_task(self._follow(body.name, client, old_task, old_client))
            self._members_changed()
        return ReplicaWelcome(accepted=True)

    async def _follow(
        self, name: str, client: RolloutClient, old_task: asyncio.Task[None] | None, old: RolloutClient | None
    ) -> None:
        if old_task is not None:
            old_task.cancel()
        if old is not None:
            await old.close()
        membership, known = self._dispatcher.membership, None
        while True:
            try:
                info = await client.info(known, POLL_MS if known is not None else 0, timeout_s=POLL_TIMEOUT_S)
            except ProtocolError as error:
                log.warning("replica %s does not answer: %s", name, error)
                known = None
                if time.monotonic() - membership.replicas[name].last_seen > FORGET_S:
                    await self._forget(name, client)
                    return
                await asyncio.sleep(RETRY_S)
                continue
            known = info.revision
            if membership.seen(name, info.version, ready=info.state == "ready", now=time.monotonic()):
                self._changed()

    async def _forget(self, name: str, client: RolloutClient) -> None:
        log.warning("replica %s has been silent for %.0f s and is forgotten", name, FORGET_S)
        self._dispatcher.membership.replicas.pop(name, None)
        self._dispatcher.clients.pop(name, None)
        self._tasks.pop(name, None)
        self._members_changed()
        await client.close()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for client in self._dispatcher.clients.values():
            await client.close()
