"""Weights as a folder of safetensors that every server can read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from protocol.clients import RolloutClient
from protocol.messages import TensorSpec, UpdatePolicy, Version, WeightsDone, WeightsLoad
from trainer.gather import Bucket
from trainer.safetensors_folder import SafetensorsFolder
from trainer.transports.base import Snapshot, spec_of


@dataclass(frozen=True)
class DiskSnapshot:
    version: Version
    path: Path
    manifest: list[TensorSpec]

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class DiskTransport:
    """Snapshots lie in `folder`/v<incarnation>-<step>; those of earlier trainers are removed at the first take."""

    def __init__(self, folder: Path, policy: UpdatePolicy) -> None:
        self._folder = folder.resolve()
        self._policy = policy
        self._cleaned = False

    def take(self, version: Version, buckets: Iterable[Bucket]) -> Snapshot:
        if not self._cleaned:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._cleaned = True
        writer = SafetensorsFolder(self._folder / f"v{version.incarnation}-{version.step}")
        manifest: list[TensorSpec] = []
        try:
            for bucket in buckets:
                manifest += [spec_of(name, tensor) for name, tensor in bucket]
                writer.add(bucket)
            return DiskSnapshot(version, writer.finish(), manifest)
        except BaseException:
            writer.abandon()
            raise

    async def deliver(self, client: RolloutClient, snapshot: Snapshot, *, timeout_s: float) -> WeightsDone:
        assert isinstance(snapshot, DiskSnapshot)
        body = WeightsLoad(
            version=snapshot.version, path=str(snapshot.path), policy=self._policy, manifest=snapshot.manifest
        )
        return await client.weights_load(body, timeout_s=timeout_s)
