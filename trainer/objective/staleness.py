"""Weights that correct staleness and the mismatch of engines (ALGORITHMS.md section 2.5)."""

from __future__ import annotations

from torch import Tensor

from trainer.objective.ratio import log_ratio


def importance_weight(proximal_T: Tensor, behaviour_T: Tensor) -> Tensor:
    """w_t = exp(lprox - lmu), detached: proximal policy against the policy that sampled the token."""
    return log_ratio(proximal_T.detach(), behaviour_T.detach()).exp()


def truncated_weight(proximal_T: Tensor, behaviour_T: Tensor, cap: float) -> Tensor:
    """Token-level truncated importance sampling: min(w_t, C), detached."""
    return importance_weight(proximal_T, behaviour_T).clamp(max=cap)
