"""From losses per token to one number (ALGORITHMS.md section 2.1 and convention 8: the counts are global)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def aggregate(
    loss_T: Tensor,
    segment_T: Tensor,
    length_B: Tensor,
    *,
    mode: Literal["token_mean", "seq_mean_token_mean"],
    total_tokens: int,
    total_sequences: int,
) -> Tensor:
    """This micro-batch's share of the mean over the whole optimiser step; shares add up over micro-batches and ranks.

    token_mean: sum of all losses / total_tokens. seq_mean_token_mean: sum over sequences of their token means /
    total_sequences. length_B: refinement tokens of each sequence, all of which lie in this micro-batch.
    """
    match mode:
        case "token_mean":
            return loss_T.sum() / total_tokens
        case "seq_mean_token_mean":
            return (loss_T / length_B.to(loss_T.dtype)[segment_T]).sum() / total_sequences


def segment_sum(value_T: Tensor, segment_T: Tensor, sequences: int) -> Tensor:
    """Sum of each sequence's values: [B]."""
    return torch.zeros(sequences, dtype=value_T.dtype, device=value_T.device).index_add_(0, segment_T, value_T)
