"""Weights that correct staleness and the mismatch of engines (ALGORITHMS.md section 2.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.objective.ratio import log_ratio


def importance_weight(proximal_T: Tensor, behaviour_T: Tensor) -> Tensor:
    """w_t = exp(lprox - lmu), detached: proximal policy against the policy that sampled the token."""
    return log_ratio(proximal_T.detach(), behaviour_T.detach()).exp()


def truncated_weight(proximal_T: Tensor, behaviour_T: Tensor, cap: float) -> Tensor:
    """Token-level truncated importance sampling: min(w_t, C), detached."""
    return importance_weight(proximal_T, behaviour_T).clamp(max=cap)


def effective_sample_share(log_weight_B: Tensor) -> Tensor:
    """ESS / B = (sum w)^2 / (B sum w^2) in [1/B, 1] of unclipped sequence weights, from their logs. 1 if B = 0."""
    if not log_weight_B.numel():
        return torch.ones((), dtype=torch.float64)
    log_w = log_weight_B.double()
    return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp() / log_w.numel()
