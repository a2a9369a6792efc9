"""What a transport is: it takes a snapshot of a version on rank 0, and later gives it to one server at a time."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from protocol.clients import RolloutClient
from protocol.messages import TensorSpec, Version, WeightsDone
from trainer.gather import Bucket


class Snapshot(Protocol):
    """The weights of one version, whole and unchanging."""

    @property
    def version(self) -> Version: ...

    def discard(self) -> None:
        """Free its memory or disk; no server will be given it any more."""


class Transport(Protocol):
    def take(self, version: Version, buckets: Iterable[Bucket]) -> Snapshot:
        """Keep a version's weights. Runs in the training thread; raises OSError if there is no room."""
        ...

    async def deliver(self, client: RolloutClient, snapshot: Snapshot, *, timeout_s: float) -> WeightsDone:
        """Give the snapshot to one server as a transaction. Raises ProtocolError; may be repeated."""
        ...


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own bytes, not copied."""
    return tensor.flatten().view(torch.uint8).numpy().data


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """The tensor's line in a manifest."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(name=name, dtype=dtype, shape=list(tensor.shape), crc32=zlib.crc32(bytes_of(tensor)))
