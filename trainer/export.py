"""The final model as a Hugging Face folder: weights, configuration, tokenizer.

INVARIANT: weights that were written are kept. What else belongs into the folder is written after them and not
validated: a configuration that transformers calls inconsistent leaves as it came. A part that fails is logged.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from trainer.gather import Bucket
from trainer.model import Scorer
from trainer.safetensors_folder import SafetensorsFolder

log = logging.getLogger("trainer")


def export(
    target: Path, buckets: Iterable[Bucket], scorer: Scorer, *, dtype: torch.dtype, tokenizer: str, remote_code: bool
) -> Path:
    """Write `target`; its weights are there whole or not at all. Rank 0 only; raises OSError if there is no room."""
    writer = SafetensorsFolder(target)
    try:
        for bucket in buckets:
            writer.add(bucket)
        _attempt("config.json", lambda: _write_config(scorer, writer.partial, dtype))
        _attempt("generation_config.json", lambda: _write_generation_config(scorer, writer.partial))
        _attempt("the tokenizer", lambda: _copy_tokenizer(tokenizer, writer.partial, remote_code))
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _attempt(part: str, write: Callable[[], None]) -> None:
    try:
        write()
    except Exception as error:  # whatever transformers raises is no reason to throw the weights away
        log.error("the exported model lacks %s: %s: %s", part, type(error).__name__, error)


def _write_config(scorer: Scorer, folder: Path, dtype: torch.dtype) -> None:
    config = scorer.checkpoint_config
    config.dtype = dtype
    vars(config).pop("transformers_weights", None)  # names the files that were loaded, not those written
    _write(folder / "config.json", config.to_json_string())


def _write_generation_config(scorer: Scorer, folder: Path) -> None:
    config = scorer.causal.generation_config
    if scorer.causal.can_generate() and config is not None:
        _write(folder / "generation_config.json", config.to_json_string())


def _write(path: Path, text: str) -> None:
    """Nothing half-written stays: a local model's own file can still take the place."""
    try:
        path.write_text(text)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _copy_tokenizer(source: str, target: Path, remote_code: bool) -> None:
    """Local tokenizer files are copied as they are; a hub model's are loaded and saved."""
    local = Path(source)
    if not local.is_dir():
        AutoTokenizer.from_pretrained(source, trust_remote_code=remote_code).save_pretrained(target)
        return
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
    for path in local.iterdir():
        if path.is_file() and not path.name.endswith(weights) and not (target / path.name).exists():
            shutil.copy2(path, target / path.name)
