"""Advantages relative to the group (ALGORITHMS.md section 2.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_advantages(
    reward_S: Tensor, group_S: Tensor, *, std: Literal["none", "biased", "unbiased"], eps: float
) -> Tensor:
    """A_i = (R_i - mean_g) / (std_g + eps), or without the division (GRPO, 2402.03300; Dr. GRPO, 2503.20783).

    reward_S: rewards of ALL samples of the batch, before it is split. group_S: int64, the group of each, from 0 on.
    A group without spread, of one sample for instance, has advantages of exactly 0. Returns float64 [S].
    """
    reward = reward_S.double()
    groups = int(group_S.max()) + 1 if group_S.numel() else 0
    count = torch.bincount(group_S, minlength=groups).double()
    mean = torch.zeros(groups, dtype=torch.float64).index_add_(0, group_S, reward) / count
    centred = torch.where(_uniform(reward, group_S, groups)[group_S], 0.0, reward - mean[group_S])
    if std == "none":
        return centred
    squares = torch.zeros(groups, dtype=torch.float64).index_add_(0, group_S, centred.square())
    freedom = count if std == "biased" else (count - 1).clamp(min=1)
    return centred / ((squares / freedom).sqrt()[group_S] + eps)


def active_groups(reward_S: Tensor, group_S: Tensor) -> Tensor:
    """Which groups have a spread of rewards, hence a gradient: bool, one per group."""
    groups = int(group_S.max()) + 1 if group_S.numel() else 0
    return ~_uniform(reward_S.double(), group_S, groups)


def _uniform(reward: Tensor, group_S: Tensor, groups: int) -> Tensor:
    """Groups whose rewards are all equal; rounding in the mean must not give them an advantage."""
    low = torch.full((groups,), torch.inf, dtype=torch.float64).scatter_reduce_(0, group_S, reward, "amin")
    high = torch.full((groups,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, group_S, reward, "amax")
    return low == high
