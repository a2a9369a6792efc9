"""The final model as a Hugging Face folder: weights, configuration, tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from trainer.gather import Bucket
from trainer.model import Scorer
from trainer.safetensors_folder import SafetensorsFolder


def export(
    target: Path, buckets: Iterable[Bucket], scorer: Scorer, *, dtype: torch.dtype, tokenizer: str, remote_code: bool
) -> Path:
    """Write `target`, whole or not at all. Rank 0 only; raises OSError if there is no room."""
    writer = SafetensorsFolder(target)
    try:
        for bucket in buckets:
            writer.add(bucket)
        config = scorer.causal.config
        config.dtype = dtype
        config.save_pretrained(writer.partial)
        if scorer.causal.can_generate() and scorer.causal.generation_config is not None:
            scorer.causal.generation_config.save_pretrained(writer.partial)
        _copy_tokenizer(tokenizer, writer.partial, remote_code)
        return writer.finish()
    except BaseException:
        writer.abandon()
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
