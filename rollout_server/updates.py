"""weights.begin / chunk / commit / abort / load: a new version as a transaction (DESIGN.md section 6).

INVARIANTS: one transfer is open at a time, and a newer one replaces it; live parameters are touched only by
Supervisor.switch; a commit that has begun ends by itself, whether or not its caller still waits (`info` tells).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from protocol.errors import InvalidError, RefusedError, StaleError
from protocol.messages import (
    Ack,
    Version,
    WeightsAbort,
    WeightsBegin,
    WeightsChunk,
    WeightsCommit,
    WeightsDone,
    WeightsLoad,
)
from protocol.server import Call
from rollout_server.supervisor import Supervisor
from rollout_server.weights import ModelShape, Staging, Transfer, check_folder

log = logging.getLogger("rollout_server")


class Updates:
    """The weights endpoints of one server."""

    def __init__(self, supervisor: Supervisor, staging: Staging, shape: ModelShape) -> None:
        self._supervisor = supervisor
        self._staging = staging
        self._shape = shape
        self._open: Transfer | None = None
        self._writing = asyncio.Lock()
        self._opening: set[asyncio.Task[Ack]] = set()
        self._running: dict[Version, asyncio.Task[WeightsDone]] = {}

    async def begin(self, call: Call, request: WeightsBegin) -> Ack:
        self._supervisor.engine()
        if request.version == self._supervisor.version or request.version in self._running:
            return Ack()
        self._supervisor.refuse_older(request.version)
        self._shape.check_manifest(request.manifest)
        task = asyncio.create_task(self._begin(request))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return await asyncio.shield(task)  # a cancelled caller must not lose sight of a half-opened transfer

    async def _begin(self, request: WeightsBegin) -> Ack:
        async with self._writing:
            if self._open is not None:
                if request.version < self._open.version:
                    raise StaleError(f"version {_name(self._open.version)} is being transferred already")
                if request.version == self._open.version and request.manifest == self._open.manifest:
                    return Ack()
                await self._drop()
            self._open = await asyncio.to_thread(
                self._staging.begin, request.version, request.manifest, request.total_bytes
            )
        return Ack()

    async def chunk(self, call: Call, request: WeightsChunk) -> Ack:
        if request.version == self._supervisor.version or request.version in self._running:
            return Ack()
        async with self._writing:
            await asyncio.to_thread(self._transfer(request.version).write, request.offset, request.data)
        return Ack()

    async def commit(self, call: Call, request: WeightsCommit) -> WeightsDone:
        if request.version == self._supervisor.version:
            return WeightsDone(version=request.version)
        return await self._detached(request.version, self._commit(request))

    async def abort(self, call: Call, request: WeightsAbort) -> Ack:
        async with self._writing:
            if self._open is not None and self._open.version == request.version:
                await self._drop()
        return Ack()

    async def load(self, call: Call, request: WeightsLoad) -> WeightsDone:
        if request.version == self._supervisor.version:
            return WeightsDone(version=request.version)
        return await self._detached(request.version, self._load(request))

    async def _commit(self, request: WeightsCommit) -> WeightsDone:
        self._supervisor.engine()
        async with self._writing:
            transfer = self._transfer(request.version)
            await asyncio.to_thread(transfer.check)
            self._open = None
        try:
            paused_s = await self._supervisor.switch(request.version, transfer.folder, request.policy)
        finally:
            await asyncio.to_thread(transfer.discard)
        return WeightsDone(version=request.version, paused_s=paused_s)

    async def _load(self, request: WeightsLoad) -> WeightsDone:
        self._supervisor.engine()
        self._supervisor.refuse_older(request.version)
        path = Path(request.path)
        if not path.is_absolute():
            raise InvalidError(f"{request.path} is not an absolute path")
        await asyncio.to_thread(check_folder, path, request.manifest, self._shape)
        paused_s = await self._supervisor.switch(request.version, path, request.policy)
        return WeightsDone(version=request.version, paused_s=paused_s)

    async def _detached(self, version: Version, work: Coroutine[Any, Any, WeightsDone]) -> WeightsDone:
        """Run to the end even if the caller goes away; a second caller for the same version joins the first."""
        task = self._running.get(version)
        if task is None:
            task = asyncio.create_task(work)
            self._running[version] = task
            task.add_done_callback(lambda done: self._ended(version, done))
        else:
            work.close()
        return await asyncio.shield(task)

    def _ended(self, version: Version, task: asyncio.Task[WeightsDone]) -> None:
        del self._running[version]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("weights %s not taken: %s", _name(version), error)
        elif not task.cancelled():
            log.info("serving weights %s, paused for %.3f s", _name(version), task.result().paused_s)

    def _transfer(self, version: Version) -> Transfer:
        if self._open is None or self._open.version != version:
            raise RefusedError(f"no transfer of version {_name(version)} is open: begin it first")
        return self._open

    async def _drop(self) -> None:
        transfer, self._open = self._open, None
        if transfer is not None:
            await asyncio.to_thread(transfer.discard)

    async def close(self) -> None:
        """Forget what was staged; a switch that runs is left to die with the engine."""
        tasks = [*self._running.values(), *self._opening]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._drop()
        await asyncio.to_thread(self._staging.close)


def _name(version: Version) -> str:
    return f"{version.incarnation}:{version.step}"
