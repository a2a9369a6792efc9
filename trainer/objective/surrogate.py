"""Surrogates of the policy gradient (ALGORITHMS.md section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(ratio_T: Tensor, advantage_T: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """PPO's loss per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (1707.06347; clip-higher: 2503.14476)."""
    clipped = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio_T * advantage_T, clipped * advantage_T)


def is_clipped(ratio_T: Tensor, advantage_T: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Tokens whose gradient the clip has cut: r beyond the bound on the side towards which A pushes."""
    above = (ratio_T > 1.0 + clip_high) & (advantage_T > 0)
    below = (ratio_T < 1.0 - clip_low) & (advantage_T < 0)
    return above | below
