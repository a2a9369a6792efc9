"""The training loop, on every rank: wait for an order of rank 0, train one batch, publish, again.

A step (DESIGN section 7): group advantages over the whole batch; split it over minibatches, micro-batches and ranks by
token count; pack without padding; log-probs; objective; backward with global counts; update; publish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import monotonic

import torch

from protocol.messages import Version
from trainer.batch import TrainBatch
from trainer.config import TrainerConfig
from trainer.desk import Desk
from trainer.metrics import StepMetrics
from trainer.objective.advantage import group_advantages
from trainer.objective.loss import Tokens, policy_loss
from trainer.packing import Microbatch, pack, plan
from trainer.policy import Policy
from trainer.ranks import Order, Ranks
from trainer.schedule import learning_rate


def run_loop(
    policy: Policy, ranks: Ranks, desk: Desk | None, config: TrainerConfig, total_steps: int, version: Version
) -> None:
    """Train from `version` on until rank 0 orders to stop. `desk`: where orders come from; rank 0 has it."""
    policy.publish(version, desk)
    waiting_since = monotonic()
    while True:
        order, payload = ranks.order(*desk.next_order()) if desk else ranks.order()
        match order:
            case Order.WAIT:
                continue
            case Order.TRAIN:
                batch = TrainBatch.decode(payload)
                metrics = {"seconds_wait": monotonic() - waiting_since}
                rate = learning_rate(batch.step, total_steps, config.optimizer, config.schedule)
                metrics |= train_step(policy, ranks, batch, config, rate)
                version = Version(version.incarnation, batch.step + 1)
                started = monotonic()
                policy.publish(version, desk)
                if desk:
                    metrics["seconds_publish"] = monotonic() - started
                    desk.trained(batch.step, version, metrics)
                waiting_since = monotonic()
            case Order.EXPORT:
                policy.export(version, desk)
            case Order.STOP:
                return


def train_step(policy: Policy, ranks: Ranks, batch: TrainBatch, config: TrainerConfig, rate: float) -> dict[str, float]:
    """All optimiser updates of one batch at learning rate `rate`; the same metrics on every rank."""
    metrics = StepMetrics()
    started = monotonic()
    with metrics.phase("prepare"):
        pieces = _pieces(batch, ranks, config)
    if len(pieces) > 1:
        with metrics.phase("proximal"):
            for piece in (piece for minibatch in pieces for piece in minibatch):
                piece.proximal = policy.engine.logprobs_detached(piece.micro)
    if policy.reference is not None:
        with metrics.phase("reference"):
            for piece in (piece for minibatch in pieces for piece in minibatch):
                piece.reference = policy.reference.logprobs_detached(piece.micro)

    norms, skipped = [], 0
    for minibatch in pieces:
        finite = True
        with metrics.phase("forward_backward"):
            for piece in minibatch:
                finite &= _accumulate(piece, policy, config, metrics, last=piece is minibatch[-1])
        with metrics.phase("optimizer"):
            update = policy.engine.update(rate, finite=finite)
        skipped += update.skipped
        norms.append(update.gradient_norm)

    result = metrics.reduce(ranks, batch)
    seconds = monotonic() - started
    return result | {
        "loss": result["loss"] / len(pieces),
        "learning_rate": rate,
        "gradient_norm": math.fsum(norms) / len(norms),
        "updates": float(len(norms)),
        "updates_skipped": float(skipped),
        "microbatches": float(sum(map(len, pieces))),
        "seconds_step": seconds,
        "tokens_per_second": float(batch.length.sum()) / seconds,
    }


@dataclass(eq=False)
class _Piece:
    """One micro-batch with all that its loss needs."""

    micro: Microbatch
    behaviour: torch.Tensor
    advantage: torch.Tensor
    lag: torch.Tensor
    total_tokens: int
    total_sequences: int
    proximal: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    def tokens(self) -> Tokens:
        return Tokens(
            behaviour_T=self.behaviour,
            advantage_T=self.advantage,
            segment_T=self.micro.segment_O,
            length_B=self.micro.length_B,
            total_tokens=self.total_tokens,
            total_sequences=self.total_sequences,
            proximal_T=self.proximal,
            reference_T=self.reference,
        )


def _pieces(batch: TrainBatch, ranks: Ranks, config: TrainerConfig) -> list[list[_Piece]]:
    """This rank's micro-batches of every minibatch. Advantages are of whole groups, before anything is split."""
    objective = config.objective
    advantage_S = group_advantages(
        torch.tensor(batch.reward), torch.tensor(batch.group), std=objective.advantage_std, eps=objective.advantage_eps
    )
    advantage = advantage_S.float().repeat_interleave(torch.tensor(batch.output_length))
    behaviour, lag = torch.tensor(batch.behaviour), torch.tensor(batch.lag)
    minibatches = plan(
        batch,
        ranks=ranks.size,
        tokens_per_microbatch=config.tokens_per_microbatch,
        minibatches=config.minibatches_per_step,
    )
    pieces = []
    for split in minibatches:
        samples = [sample for micro in split for share in micro for sample in share]
        total_tokens = int(batch.output_length[samples].sum())
        micros = [pack(batch, micro[ranks.rank]) for micro in split]
        pieces.append(
            [
                _Piece(
                    micro=micro.to(ranks.device),
                    behaviour=behaviour[micro.output_O].to(ranks.device),
                    advantage=advantage[micro.output_O].to(ranks.device),
                    lag=lag[micro.output_O].to(ranks.device),
                    total_tokens=total_tokens,
                    total_sequences=len(samples),
                )
                for micro in micros
            ]
        )
    return pieces


def _accumulate(piece: _Piece, policy: Policy, config: TrainerConfig, metrics: StepMetrics, *, last: bool) -> bool:
    """Forward and backward of one micro-batch. False if its loss is not finite."""
    current, entropy = policy.engine.logprobs(piece.micro)
    if piece.micro.empty:
        loss = current.sum() * 0.0
    else:
        tokens = piece.tokens()
        loss = policy_loss(current, tokens, config.objective)
        metrics.add(loss.detach(), current.detach(), entropy.detach(), piece.lag, tokens, config.objective)
    policy.engine.backward(loss, last=last)
    return bool(torch.isfinite(loss.detach()))
