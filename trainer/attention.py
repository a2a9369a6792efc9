"""Attention over packed sequences: each sees itself only, causally, and no mask is ever built."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from trainer.packing import Microbatch

VARLEN_SDPA = "varlen_sdpa"


def varlen_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal SDPA of each segment by itself: [1, heads, T, D] to [1, T, heads, D] (STACK.md section 3, Packing)."""
    lengths = cu_seq_lens_q.diff().tolist()
    grouped = key.shape[1] != query.shape[1]
    pieces = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(pieces, 2).transpose(1, 2).contiguous(), None


def register_attention(device: torch.device) -> str:
    """The name of the attention to load models with: flash attention where it is, else varlen_sdpa."""
    if device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    AttentionInterface.register(VARLEN_SDPA, varlen_sdpa)
    AttentionMaskInterface.register(VARLEN_SDPA, lambda *_, **__: None)
    return VARLEN_SDPA


def attention_arguments(micro: Microbatch) -> dict[str, Tensor | int]:
    """What either implementation needs to know about the segments."""
    return {
        "cu_seq_lens_q": micro.boundary,
        "cu_seq_lens_k": micro.boundary,
        "max_length_q": micro.max_length,
        "max_length_k": micro.max_length,
    }
