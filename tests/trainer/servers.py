"""A rollout server and an orchestrator as far as the trainer's publisher sees them, on the real wire."""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from protocol.errors import InvalidError, UnavailableError
from protocol.messages import (
    UNVERSIONED,
    Ack,
    InfoRequest,
    OrchestratorInfo,
    ReplicaEntry,
    RolloutInfo,
    TensorSpec,
    Version,
    WeightsAbort,
    WeightsBegin,
    WeightsChunk,
    WeightsCommit,
    WeightsDone,
    WeightsLoad,
)
from protocol.revision import Revision
from protocol.server import Call, Server

LOCAL = "tcp://127.0.0.1:0"


class CheckingReplica:
    """Accepts weights and checks them against their manifest before it serves them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = UNVERSIONED
        self.weights: dict[str, torch.Tensor] = {}
        self.history: list[Version] = []
        self.arrived = asyncio.Condition()
        self.gate = asyncio.Event()  # closed: commits and loads wait
        self.gate.set()
        self.broken = False
        self._staged: dict[Version, tuple[WeightsBegin, bytearray]] = {}
        self._revision = Revision()
        self.server = Server(name, LOCAL)
        self.server.route("info", InfoRequest, self._info, control=True)
        self.server.route("weights.begin", WeightsBegin, self._begin, control=True)
        self.server.route("weights.chunk", WeightsChunk, self._chunk, control=True)
        self.server.route("weights.commit", WeightsCommit, self._commit, control=True)
        self.server.route("weights.abort", WeightsAbort, self._abort, control=True)
        self.server.route("weights.load", WeightsLoad, self._load, control=True)

    async def start(self) -> ReplicaEntry:
        return ReplicaEntry(name=self.name, address=await self.server.start())

    async def restart(self) -> None:
        """As a server that came back with the model from disk."""
        self.version, self.weights = UNVERSIONED, {}
        self._revision.bump()

    async def serves(self, version: Version, timeout_s: float = 30.0) -> None:
        """Until this version is served."""
        async with asyncio.timeout(timeout_s), self.arrived:
            await self.arrived.wait_for(lambda: self.version == version)

    async def _info(self, call: Call, body: InfoRequest) -> RolloutInfo:
        await self._revision.wait(body)
        return RolloutInfo(
            revision=self._revision.value,
            name=self.name,
            version=self.version,
            state="ready",
            model="tiny",
            context_tokens=2048,
            capacity=8,
            running=0,
        )

    async def _begin(self, call: Call, body: WeightsBegin) -> Ack:
        self._staged = {body.version: (body, bytearray(body.total_bytes))}
        return Ack()

    async def _chunk(self, call: Call, body: WeightsChunk) -> Ack:
        _, staged = self._staged[body.version]
        staged[body.offset : body.offset + len(body.data)] = body.data.tobytes()
        return Ack()

    async def _abort(self, call: Call, body: WeightsAbort) -> Ack:
        self._staged.pop(body.version, None)
        return Ack()

    async def _commit(self, call: Call, body: WeightsCommit) -> WeightsDone:
        begin, staged = self._staged[body.version]
        weights, offset = {}, 0
        for spec in begin.manifest:
            dtype = getattr(torch, spec.dtype)
            size = int(np.prod(spec.shape)) * dtype.itemsize
            part = staged[offset : offset + size]
            if zlib.crc32(part) != spec.crc32:
                raise InvalidError(f"checksum of {spec.name}")
            weights[spec.name] = torch.frombuffer(part, dtype=dtype).reshape(spec.shape)
            offset += size
        assert offset == begin.total_bytes == len(staged)
        return await self._serve(body.version, weights)

    async def _load(self, call: Call, body: WeightsLoad) -> WeightsDone:
        weights = load_folder(Path(body.path))
        assert body.manifest is not None
        assert {spec.name: spec for spec in body.manifest} == {n: spec_of(n, t) for n, t in weights.items()}
        return await self._serve(body.version, weights)

    async def _serve(self, version: Version, weights: dict[str, torch.Tensor]) -> WeightsDone:
        if self.broken:
            raise UnavailableError("this replica is broken")
        await self.gate.wait()
        self.version, self.weights = version, weights
        self.history.append(version)
        self._revision.bump()
        async with self.arrived:
            self.arrived.notify_all()
        return WeightsDone(version=version)


class Membership:
    """An orchestrator that says which replicas there are."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._replicas: list[ReplicaEntry] = []
        self._revision = Revision()
        self.server = Server("orchestrator", LOCAL)
        self.server.route("info", InfoRequest, self._info, control=True)

    def set(self, *replicas: ReplicaEntry) -> None:
        self._replicas = list(replicas)
        self._revision.bump()

    async def _info(self, call: Call, body: InfoRequest) -> OrchestratorInfo:
        await self._revision.wait(body)
        return OrchestratorInfo(
            revision=self._revision.value, run=self._run, term=1, replicas=self._replicas, state="running"
        )


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a folder of safetensors."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return TensorSpec(name=name, dtype=str(tensor.dtype).split(".")[1], shape=list(tensor.shape), crc32=zlib.crc32(raw))
