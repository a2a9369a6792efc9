"""Importance ratios between two log-probs (ALGORITHMS.md section 2.2)."""

from __future__ import annotations

from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log ratios are clamped to +-20 before exp, as in verl, AReaL and VESPO; beyond it the gradient is cut."""


def log_ratio(numerator_T: Tensor, denominator_T: Tensor) -> Tensor:
    """log(numerator / denominator) per token, clamped to +-LOG_RATIO_BOUND."""
    return (numerator_T - denominator_T).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def token_ratio(current_T: Tensor, proximal_T: Tensor) -> Tensor:
    """r_t = exp(lp - lprox): how far the update has moved each token's probability. Gradient flows through lp."""
    return log_ratio(current_T, proximal_T.detach()).exp()
