"""Incoming weights: staged to a file, checked against the manifest, only then shown to the engine (DESIGN.md §6).

A transfer is one safetensors file whose header is written at `begin`; chunks go to their offsets, in any order, as
often as they come. Nothing here touches live parameters.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from protocol.errors import InvalidError, UnavailableError
from protocol.messages import TensorSpec, Version
from rollout_server.safetensors_file import TensorEntry, header_of, read_folder, tensor_bytes, verify

_FREE_MARGIN_BYTES = 16 << 20
"""Left free beside a transfer, so that a full staging folder is found at `begin` and not by whoever writes next."""


class Ranges:
    """Which bytes have arrived: disjoint, ordered, merged [start, end)."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        kept: list[tuple[int, int]] = []
        for a, b in self._spans:
            if b < start or a > end:
                kept.append((a, b))
            else:
                start, end = min(a, start), max(b, end)
        self._spans = sorted([*kept, (start, end)])

    def covers(self, size: int) -> bool:
        return size == 0 or self._spans == [(0, size)]

    def first_gap(self) -> int:
        return self._spans[0][1] if self._spans and self._spans[0][0] == 0 else 0


class Transfer:
    """One version on its way in. `folder` then holds model.safetensors.

    Blocking, so callers use a thread, and a caller that is cancelled leaves its thread running: hence the lock, and
    hence nothing is written any more once `check` has passed or `discard` was called.
    """

    def __init__(self, version: Version, manifest: Sequence[TensorSpec], total_bytes: int, parent: Path) -> None:
        self.version = version
        self.name = f"version {version.incarnation}:{version.step}"
        self.manifest = list(manifest)
        self.total_bytes = total_bytes
        self._arrived = Ranges()
        self._lock = threading.Lock()
        self._sealed = False
        header = header_of(manifest)
        self._data_at = len(header)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{version.incarnation}-{version.step}-", dir=parent))
        self._fd = os.open(self.folder / "model.safetensors", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.pwrite(self._fd, header, 0)
            if total_bytes:
                os.posix_fallocate(self._fd, self._data_at, total_bytes)
        except OSError as error:
            self.discard()
            raise UnavailableError(f"staging {total_bytes} bytes in {parent}: {error.strerror}") from error

    def write(self, offset: int, data: np.ndarray) -> None:
        """Put bytes at their place. Raises InvalidError for bytes outside the transfer."""
        if data.dtype != np.uint8 or data.ndim != 1:
            raise InvalidError(f"chunk data must be uint8 [n], not {data.dtype} {list(data.shape)}")
        if offset + data.size > self.total_bytes:
            raise InvalidError(f"chunk [{offset}, {offset + data.size}) reaches beyond {self.total_bytes} bytes")
        with self._lock:
            if self._sealed or data.size == 0:
                return
            view, at = data.data.cast("B"), self._data_at + offset
            while view:
                written = os.pwrite(self._fd, view, at)
                view, at = view[written:], at + written
            self._arrived.add(offset, offset + data.size)

    def check(self) -> None:
        """All bytes there and every checksum right, else InvalidError."""
        with self._lock:
            if not self._arrived.covers(self.total_bytes):
                raise InvalidError(f"{self.name} is incomplete from byte {self._arrived.first_gap()} on")
            try:
                verify(read_folder(self.folder), self.manifest)
            except ValueError as error:
                raise InvalidError(f"{self.name}: {error}") from error
            self._sealed = True

    def discard(self) -> None:
        with self._lock:
            self._sealed = True
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        shutil.rmtree(self.folder, ignore_errors=True)


class Staging:
    """Where transfers lie. One folder per process, named by its pid, so that the next start can reclaim it."""

    def __init__(self, name: str, candidates: Sequence[Path], budget_bytes: int) -> None:
        self._prefix = f"igrpo-{name}-"
        self._candidates = list(candidates)
        self._budget = budget_bytes
        self._folders: list[Path] = []
        for parent in self._candidates:
            self._reclaim(parent)

    def begin(self, version: Version, manifest: Sequence[TensorSpec], total_bytes: int) -> Transfer:
        """Open a transfer in the first folder with room. InvalidError: bad sizes; UnavailableError: no room."""
        try:
            described = sum(tensor_bytes(spec) for spec in manifest)
        except ValueError as error:
            raise InvalidError(str(error)) from error
        if described != total_bytes:
            raise InvalidError(f"total_bytes {total_bytes} differs from the manifest's {described}")
        if len({spec.name for spec in manifest}) != len(manifest):
            raise InvalidError("the manifest names a tensor twice")
        if total_bytes > self._budget:
            raise InvalidError(f"{total_bytes} bytes exceed staging_budget_bytes {self._budget}")
        for parent in self._candidates:
            parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(parent).free >= total_bytes + _FREE_MARGIN_BYTES:
                return Transfer(version, manifest, total_bytes, self._folder(parent))
        places = ", ".join(str(parent) for parent in self._candidates)
        raise UnavailableError(f"no room for {total_bytes} bytes of weights in {places}")

    def close(self) -> None:
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, parent: Path) -> Path:
        folder = parent / f"{self._prefix}{os.getpid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder not in self._folders:
            self._folders.append(folder)
        return folder

    def _reclaim(self, parent: Path) -> None:
        """Remove what a killed server of the same name left here."""
        for left in parent.glob(f"{self._prefix}*"):
            pid = left.name.removeprefix(self._prefix)
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(left, ignore_errors=True)


class ModelShape:
    """Which tensors, of which shapes, make up the whole model: an update of fewer or others would leave a mixture.

    Taken from the model's own safetensors; without them (a hub name, another format) only the engine checks.
    """

    def __init__(self, tensors: Mapping[str, tuple[int, ...]] | None, *, tied: bool = False) -> None:
        self._tensors = tensors
        self._tied = tied

    @classmethod
    def of_folder(cls, path: Path, *, tied: bool) -> ModelShape:
        """`tied`: input and output matrix are one. Raises OSError or ValueError for a damaged file."""
        if not any(path.glob("*.safetensors")):
            return cls(None)
        return cls({name: entry.shape for name, entry in read_folder(path).items()}, tied=tied)

    def check(self, offered: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InvalidError unless `offered` is the whole model. A tied output matrix may be there or not."""
        if self._tensors is None:
            return
        for name in sorted(self._tensors.keys() | offered.keys()):
            if self._tied and name == "lm_head.weight" and not (name in self._tensors and name in offered):
                continue
            if name not in offered:
                raise InvalidError(f"tensor {name} of the model is missing: an update must be whole")
            if name not in self._tensors:
                raise InvalidError(f"tensor {name} does not belong to the model")
            if self._tensors[name] != offered[name]:
                raise InvalidError(f"tensor {name} has shape {list(offered[name])}, not {list(self._tensors[name])}")

    def check_manifest(self, manifest: Sequence[TensorSpec]) -> None:
        self.check({spec.name: tuple(spec.shape) for spec in manifest})

    def check_entries(self, entries: Mapping[str, TensorEntry]) -> None:
        self.check({name: entry.shape for name, entry in entries.items()})


def check_folder(path: Path, manifest: Sequence[TensorSpec] | None, shape: ModelShape) -> None:
    """A folder for `weights.load`: readable, whole, and equal to the manifest if one is given, else InvalidError."""
    try:
        entries = read_folder(path)
        if manifest is not None:
            verify(entries, manifest)
    except (OSError, ValueError) as error:
        raise InvalidError(f"weights in {path}: {error}") from error
    shape.check_entries(entries)
