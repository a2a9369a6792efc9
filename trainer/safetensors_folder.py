"""Writes weights as a folder of safetensors that transformers and SGLang load; it appears whole or not at all.

INVARIANT: an older folder of that name lasts until the new one lies on the disk; a crash leaves one of them whole.
"""

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
        self._previous = target.with_name(f".{target.name}.previous")
        self._restore()
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
        self._shards.append([name for name, _ in bucket])
        self._bytes += sum(tensor.nbytes for _, tensor in bucket)

    def finish(self) -> Path:
        """Write the index, bring all files to the disk, give the folder its name. Raises OSError."""
        if len(self._shards) == 1:
            (self.partial / self._shard(0)).rename(self.partial / "model.safetensors")
        else:
            weight_map = {name: self._shard(n) for n, names in enumerate(self._shards) for name in names}
            index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=1))
        for path in (*self.partial.rglob("*"), self.partial):
            _sync(path)
        self._replace()
        return self.target

    def abandon(self) -> None:
        """Leave nothing half-written."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _replace(self) -> None:
        shutil.rmtree(self._previous, ignore_errors=True)
        if self.target.exists():
            self.target.rename(self._previous)
        try:
            self.partial.rename(self.target)
        except OSError:
            self._restore()
            raise
        _sync(self.target.parent)
        shutil.rmtree(self._previous, ignore_errors=True)

    def _restore(self) -> None:
        """Give an older folder its name back, if an end between two renames took it."""
        if self._previous.exists() and not self.target.exists():
            self._previous.rename(self.target)

    @staticmethod
    def _shard(number: int) -> str:
        return f"model-{number + 1:05d}.safetensors"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
