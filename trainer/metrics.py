"""Numbers of one step: sums and maxima per micro-batch, added over ranks, turned into means (DESIGN section 7).

`mismatch_*` compares the trainer's log-probs before the update with those of the engine that sampled; it is split into
tokens of lag 0 (what differs is the engines) and older ones (what differs is also the policy).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import torch
from torch import Tensor

from trainer.batch import TrainBatch
from trainer.config import ObjectiveConfig
from trainer.objective.advantage import active_groups
from trainer.objective.aggregate import segment_sum
from trainer.objective.kl import kl_estimate
from trainer.objective.loss import Tokens
from trainer.objective.ratio import log_ratio, token_ratio
from trainer.objective.surrogate import is_clipped
from trainer.ranks import Ranks

SPLITS = ("", "_lag0", "_stale")


class StepMetrics:
    """Of one step on one rank; `reduce` makes them global."""

    def __init__(self) -> None:
        names = ["tokens", "sequences", "loss", "entropy", "clipped", "truncated_weights", "kl"]
        names += ["weight", "weight_squared"]
        for split in SPLITS:
            names += [f"{name}{split}" for name in ("mismatch_tokens", "mismatch", "mismatch_k1", "mismatch_k3")]
        self._sums: dict[str, float] = dict.fromkeys(names, 0.0)
        self._maxima: dict[str, float] = {f"mismatch_max_ratio{split}": 0.0 for split in SPLITS}
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time that is spent inside counts as `seconds_<name>`."""
        started = monotonic()
        try:
            yield
        finally:
            self._seconds[name] += monotonic() - started

    @torch.no_grad()
    def add(
        self, loss: Tensor, current_T: Tensor, entropy_T: Tensor, lag_T: Tensor, tokens: Tokens, config: ObjectiveConfig
    ) -> None:
        """Count one micro-batch."""
        proximal = current_T if tokens.proximal_T is None else tokens.proximal_T
        weight_log = log_ratio(proximal, tokens.behaviour_T)
        ratio = token_ratio(current_T, proximal)
        sums = self._sums
        sums["tokens"] += current_T.numel()
        sums["sequences"] += tokens.length_B.numel()
        sums["loss"] += loss.item()
        sums["entropy"] += entropy_T.sum().item()
        sums["clipped"] += is_clipped(ratio, tokens.advantage_T, config.clip_low, config.clip_high).sum().item()
        if config.correction.kind == "tis":
            sums["truncated_weights"] += (weight_log.exp() > config.correction.cap).sum().item()
        if tokens.reference_T is not None and config.kl.kind != "none":
            sums["kl"] += kl_estimate(current_T, tokens.reference_T, config.kl.kind).sum().item()
        sequence_log = segment_sum(weight_log.double(), tokens.segment_T, tokens.length_B.numel()).clamp(-20, 20)
        sums["weight"] += sequence_log.exp().sum().item()
        sums["weight_squared"] += (2 * sequence_log).exp().sum().item()
        self._add_mismatch(weight_log, lag_T)

    def _add_mismatch(self, weight_log: Tensor, lag_T: Tensor) -> None:
        for split, chosen in zip(SPLITS, (lag_T >= 0, lag_T == 0, lag_T > 0), strict=True):
            part = weight_log[chosen]
            if not part.numel():
                continue
            self._sums[f"mismatch_tokens{split}"] += part.numel()
            self._sums[f"mismatch{split}"] += part.abs().sum().item()
            self._sums[f"mismatch_k1{split}"] += -part.sum().item()
            self._sums[f"mismatch_k3{split}"] += (part.expm1() - part).sum().item()
            name = f"mismatch_max_ratio{split}"
            self._maxima[name] = max(self._maxima[name], part.max().exp().item())

    def reduce(self, ranks: Ranks, batch: TrainBatch) -> dict[str, float]:
        """Means over all ranks. Seconds are those of the slowest rank."""
        sums = ranks.total(self._sums)
        maxima = ranks.total(self._maxima | {f"seconds_{k}": v for k, v in self._seconds.items()}, largest=True)
        count = max(1.0, sums["tokens"])
        result = {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / count,
            "clipped_share": sums["clipped"] / count,
            "truncated_weight_share": sums["truncated_weights"] / count,
            "reference_kl": sums["kl"] / count,
            "effective_sample_share": sums["weight"] ** 2 / max(1e-300, sums["weight_squared"] * sums["sequences"]),
        }
        for split in SPLITS:
            tokens = sums[f"mismatch_tokens{split}"]
            if tokens:
                for name in ("mismatch", "mismatch_k1", "mismatch_k3"):
                    result[f"{name}{split}"] = sums[f"{name}{split}"] / tokens
                result[f"mismatch_max_ratio{split}"] = maxima[f"mismatch_max_ratio{split}"]
        result |= {name: value for name, value in maxima.items() if name.startswith("seconds_")}
        return result | _of_batch(batch)


def _of_batch(batch: TrainBatch) -> dict[str, float]:
    """What the batch alone tells."""
    active = active_groups(torch.tensor(batch.reward), torch.tensor(batch.group))
    return {
        "groups": float(batch.groups),
        "samples": float(batch.samples),
        "tokens": float(batch.output_length.sum()),
        "prompt_tokens": float(batch.prompt_length.sum()),
        "output_length": float(batch.output_length.mean()),
        "truncated_share": float(batch.truncated.mean()),
        "reward": float(batch.reward.mean()),
        "reward_std": float(batch.reward.std()),
        "active_group_share": float(active.double().mean()),
        "lag": float(batch.lag.mean()),
        "lag_max": float(batch.lag.max()),
    }
