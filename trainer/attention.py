"""Attention over packed sequences: each sees itself only, causally, and no mask is ever built."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from trainer.model_path import ModelError
from trainer.packing import Microbatch

VARLEN_SDPA = "varlen_sdpa"
FLASH = "flash_attention_2"


def varlen_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal SDPA of each segment by itself: [1, heads, T, D] to [1, T, heads, D] (STACK.md section 3, Packing).

    Raises ModelError where that is not what the model asks for: dropout, a window shorter than a segment, soft-capped
    scores, attention sinks (s_aux).
    """
    lengths = cu_seq_lens_q.diff().tolist()
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ModelError(
            f"model.path: its sliding window of {sliding_window} tokens is shorter than a sequence of {max(lengths)}: "
            "this needs flash attention, or shorter sequences"
        )
    for name, value_ in (("dropout", dropout), ("softcap", softcap), ("s_aux", s_aux)):
        if value_ is not None and (isinstance(value_, Tensor) or value_ != 0.0):
            raise ModelError(f"model.path: the model's attention asks for `{name}`, which {VARLEN_SDPA} does not do")
    grouped = key.shape[1] != query.shape[1]
    pieces = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(pieces, 2).transpose(1, 2).contiguous(), None


def register_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the attention to load models with: flash attention where it is and can be used, else varlen_sdpa."""
    if device.type == "cuda" and dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn"):
        return FLASH
    AttentionInterface.register(VARLEN_SDPA, varlen_sdpa)
    AttentionMaskInterface.register(VARLEN_SDPA, lambda *_, **__: None)
    return VARLEN_SDPA


def check_attention(lm: PreTrainedModel, attention: str, path: str) -> None:
    """Raise ModelError if the model's attention is certainly not what `attention` computes."""
    asked = None
    if any(name.rpartition(".")[2] == "sinks" for name, _ in lm.named_parameters()):
        asked = "attention sinks"
    elif attention == VARLEN_SDPA and getattr(lm.config.get_text_config(), "attn_logit_softcapping", None):
        asked = "soft-capped attention scores (attn_logit_softcapping)"
    if asked:
        raise ModelError(f"model.path: {path} has {asked}, which the trainer's {attention} does not do")


def attention_arguments(micro: Microbatch) -> dict[str, Tensor | int]:
    """What either implementation needs to know about the segments."""
    return {
        "cu_seq_lens_q": micro.boundary,
        "cu_seq_lens_k": micro.boundary,
        "max_length_q": micro.max_length,
        "max_length_k": micro.max_length,
    }
