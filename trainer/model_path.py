"""What can be said about a model before anything heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path


class ModelError(RuntimeError):
    """The model cannot be loaded or trained; the message says why in one line."""


def check_model_path(path: str) -> None:
    """Raise ModelError if `path` is meant to be a folder and is no model folder. Hub names pass."""
    local = Path(path)
    meant_local = local.is_absolute() or local.exists() or path.startswith(".") or len(local.parts) > 2
    if meant_local and not (local / "config.json").is_file():
        raise ModelError(f"model.path: {local} is no model folder (it has no config.json)")


def checkpoint_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder of safetensors; empty if it has none (other formats)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as reader:
            header = json.loads(reader.read(int.from_bytes(reader.read(8), "little")))
        names |= header.keys() - {"__metadata__"}
    return names
