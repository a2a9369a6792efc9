"""Weights as bytes over ZeroMQ: begin, chunks, commit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from protocol.clients import RolloutClient
from protocol.errors import ProtocolError
from protocol.messages import (
    TensorSpec,
    UpdatePolicy,
    Version,
    WeightsAbort,
    WeightsBegin,
    WeightsChunk,
    WeightsCommit,
    WeightsDone,
)
from trainer.gather import Bucket
from trainer.transports.base import Snapshot, bytes_of, spec_of

ABORT_TIMEOUT_S = 5.0
"""A server that does not answer an abort is not waited for: its staging is dropped when the next transfer begins."""


@dataclass
class StreamSnapshot:
    """One flat buffer per bucket; together they are the concatenation of all tensors in manifest order."""

    version: Version
    manifest: list[TensorSpec] = field(default_factory=list)
    buffers: list[np.ndarray] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def add(self, bucket: Bucket) -> None:
        self.manifest += [spec_of(name, tensor) for name, tensor in bucket]
        self.buffers.append(np.concatenate([np.frombuffer(bytes_of(tensor), np.uint8) for _, tensor in bucket]))

    def chunks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(offset, bytes) of at most `size` bytes each, views of the buffers."""
        offset = 0
        for buffer in self.buffers:
            for start in range(0, len(buffer), size):
                yield offset + start, buffer[start : start + size]
            offset += len(buffer)

    def discard(self) -> None:
        self.buffers = []
        self.manifest = []


class StreamTransport:
    """Snapshots lie in rank 0's memory: the newest, and the few that are still being sent."""

    def __init__(self, policy: UpdatePolicy, *, chunk_bytes: int) -> None:
        self._policy = policy
        self._chunk_bytes = chunk_bytes

    def take(self, version: Version, buckets: Iterable[Bucket]) -> Snapshot:
        snapshot = StreamSnapshot(version)
        for bucket in buckets:
            snapshot.add(bucket)
        return snapshot

    async def deliver(self, client: RolloutClient, snapshot: Snapshot, *, timeout_s: float) -> WeightsDone:
        assert isinstance(snapshot, StreamSnapshot)
        version = snapshot.version
        try:
            async with asyncio.timeout(timeout_s):
                begin = WeightsBegin(version=version, manifest=snapshot.manifest, total_bytes=snapshot.nbytes)
                await client.weights_begin(begin, timeout_s=timeout_s)
                for offset, data in snapshot.chunks(self._chunk_bytes):
                    chunk = WeightsChunk(version=version, offset=offset, data=data)
                    await client.weights_chunk(chunk, timeout_s=timeout_s)
                commit = WeightsCommit(version=version, policy=self._policy)
                return await client.weights_commit(commit, timeout_s=timeout_s)
        except (ProtocolError, TimeoutError, asyncio.CancelledError):
            with contextlib.suppress(ProtocolError, TimeoutError):
                await client.weights_abort(WeightsAbort(version=version), timeout_s=ABORT_TIMEOUT_S)
            raise
