"""The composition: surrogate x staleness weight + beta KL, aggregated (ALGORITHMS.md section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.config import ObjectiveConfig
from trainer.objective.aggregate import aggregate
from trainer.objective.kl import kl_estimate
from trainer.objective.ratio import token_ratio
from trainer.objective.staleness import truncated_weight
from trainer.objective.surrogate import clipped_surrogate


@dataclass(frozen=True)
class Tokens:
    """The refinement tokens of one micro-batch. All log-probs are of each sample's temperature-scaled distribution.

    proximal_T: of the policy before the first update on this batch; None: the current one, detached (K = 1).
    behaviour_T: of the engine that sampled the token, under the version that the token carries.
    total_tokens, total_sequences: counts of the whole optimiser step, over all ranks and micro-batches.
    """

    behaviour_T: Tensor
    advantage_T: Tensor
    segment_T: Tensor
    length_B: Tensor
    total_tokens: int
    total_sequences: int
    proximal_T: Tensor | None = None
    reference_T: Tensor | None = None


def policy_loss(current_T: Tensor, tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """This micro-batch's share of the loss to minimise; gradient flows through current_T only."""
    proximal = current_T.detach() if tokens.proximal_T is None else tokens.proximal_T
    ratio = token_ratio(current_T, proximal)
    loss_T = clipped_surrogate(ratio, tokens.advantage_T.to(ratio.dtype), config.clip_low, config.clip_high)
    if config.correction.kind == "tis":
        loss_T = loss_T * truncated_weight(proximal, tokens.behaviour_T, config.correction.cap)
    if config.kl.kind != "none":
        if tokens.reference_T is None:
            raise ValueError("a KL penalty needs the reference model's log-probs")
        loss_T = loss_T + config.kl.beta * kl_estimate(current_T, tokens.reference_T, config.kl.kind)
    return aggregate(
        loss_T,
        tokens.segment_T,
        tokens.length_B,
        mode=config.aggregation,
        total_tokens=tokens.total_tokens,
        total_sequences=tokens.total_sequences,
    )
