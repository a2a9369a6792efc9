"""Writes weights as a folder of safetensors that transformers and SGLang load; it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from trainer.gather import Bucket

INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """One shard per bucket, in a folder beside `target` that takes its name, and its place, at the end."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, bucket: Bucket) -> None:
        """Write one shard. Raises OSError if the disk is full; then call `abandon`."""
        path = self.partial / self._shard(len(self._shards))
        try:
            save_file(dict(bucket), path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        _sync(path)
        self._shards.append([name for name, _ in bucket])
        self._bytes += sum(tensor.nbytes for _, tensor in bucket)

    def finish(self) -> Path:
        """Write the index and give the folder its name."""
        if len(self._shards) == 1:
            (self.partial / self._shard(0)).rename(self.partial / "model.safetensors")
        else:
            weight_map = {name: self._shard(n) for n, names in enumerate(self._shards) for name in names}
            index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=1))
            _sync(self.partial / INDEX)
        _sync(self.partial)
        shutil.rmtree(self.target, ignore_errors=True)
        self.partial.rename(self.target)
        _sync(self.target.parent)
        return self.target

    def abandon(self) -> None:
        """Leave nothing half-written."""
        shutil.rmtree(self.partial, ignore_errors=True)

    @staticmethod
    def _shard(number: int) -> str:
        return f"model-{number + 1:05d}.safetensors"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
