"""safetensors as bytes: headers read and written without torch, tensors checked where they lie.

Format: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, then the data, gapless.
"""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.messages import TensorSpec

MAX_HEADER_BYTES = 100 << 20  # the format's own limit

_SHORT = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip
_LONG = {short: name for name, short in _SHORT.items()}
_BYTES = {"64": 8, "32": 4, "16": 2, "8": 1}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as it lies in a file. `offset`: of its first byte, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    size: int


def tensor_bytes(spec: TensorSpec) -> int:
    """Size of one tensor. Raises ValueError for a dtype that safetensors does not have."""
    short = _SHORT.get(spec.dtype)
    if short is None:
        raise ValueError(f"tensor {spec.name}: unknown dtype {spec.dtype!r}")
    width = 1 if short == "BOOL" or short.startswith("F8") else _BYTES[short.lstrip("BFIU")]
    return math.prod(spec.shape) * width


def header_of(manifest: Sequence[TensorSpec]) -> bytes:
    """Header (length word included) of a file whose data are the manifest's tensors in its order."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in manifest:
        end = offset + tensor_bytes(spec)
        table[spec.name] = {"dtype": _SHORT[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(table).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_folder(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a folder's *.safetensors. Raises OSError or ValueError for what is not there or is damaged."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    found: dict[str, TensorEntry] = {}
    for path in files:
        for name, entry in _read_file(path):
            if name in found:
                raise ValueError(f"{path}: tensor {name} is in {found[name].path.name} too")
            found[name] = entry
    return found


def _read_file(path: Path) -> Iterator[tuple[str, TensorEntry]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path}: damaged header")
        try:
            table = json.loads(file.read(length))
            named = {name: entry for name, entry in table.items() if name != "__metadata__"}
            entries = [(name, str(t["dtype"]), t["shape"], *t["data_offsets"]) for name, t in named.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged header ({error})") from None
    for name, dtype, shape, start, end in entries:
        if not 0 <= start <= end <= size - 8 - length:
            raise ValueError(f"{path}: tensor {name} reaches beyond the end of the file")
        yield name, TensorEntry(_LONG.get(dtype, dtype), tuple(shape), path, 8 + length + start, end - start)


def verify(entries: dict[str, TensorEntry], manifest: Sequence[TensorSpec]) -> None:
    """Names, dtypes, shapes and crc32 of what lies on disk, against the manifest. ValueError names the tensor."""
    if missing := [s.name for s in manifest if s.name not in entries]:
        raise ValueError(f"{len(missing)} tensors of the manifest are missing, first {missing[0]}")
    if extra := entries.keys() - {s.name for s in manifest}:
        raise ValueError(f"{len(extra)} tensors are not in the manifest, first {min(extra)}")
    for path in {entry.path for entry in entries.values()}:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data, memoryview(data) as v:
            for spec in manifest:
                entry = entries[spec.name]
                if entry.path != path:
                    continue
                if (entry.dtype, entry.shape) != (spec.dtype, tuple(spec.shape)):
                    raise ValueError(f"tensor {spec.name} is {entry.dtype} {list(entry.shape)}, not as in the manifest")
                if zlib.crc32(v[entry.offset : entry.offset + entry.size]) != spec.crc32:
                    raise ValueError(f"tensor {spec.name}: checksum differs")
