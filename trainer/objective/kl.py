"""Estimators of KL(policy || reference) per token (ALGORITHMS.md section 2.6), for the loss: gradient is live."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from trainer.objective.ratio import log_ratio


def kl_estimate(current_T: Tensor, reference_T: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """k1 = lp - lref; k2 = (lp - lref)^2 / 2; k3 = exp(lref - lp) - (lref - lp) - 1.

    As a loss term on-policy, k1 has expected gradient 0, k2 that of KL(policy || reference), k3 that of
    KL(reference || policy).
    """
    difference = log_ratio(reference_T.detach(), current_T)
    match kind:
        case "k1":
            return -difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return difference.expm1() - difference  # exp(d) - 1 cancels for the small d of a young policy
