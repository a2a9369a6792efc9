"""The policy in a DeepSpeed engine: scoring, a varying number of backward passes per update, guarded updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainerConfig
from trainer.model import Scorer
from trainer.packing import Microbatch
from trainer.ranks import Ranks


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves everything as it is when any rank has a gradient (or a `veto`) that is not finite.

    clip: the largest norm, where DeepSpeed is not to clip: without ZeRO it would, but does not tell the norm.
    """

    def __init__(self, parameters: list[nn.Parameter], ranks: Ranks, *, clip: float | None, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._ranks = ranks
        self._clip = clip
        self.norm: float | None = None
        self.veto = False
        self.skipped = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        flags = [torch.isfinite(grad).all() for grad in grads]
        finite = not flags or bool(torch.stack(flags).all())
        if self._clip is not None:
            self.norm = float(nn.utils.clip_grad_norm_(self.param_groups[0]["params"], self._clip))
        if self._ranks.all(finite and not self.veto):
            super().step(closure)
        else:
            self.skipped = True


@dataclass(frozen=True)
class Update:
    """Outcome of one optimiser update. skipped: loss or gradient was not finite; nothing has changed."""

    gradient_norm: float
    skipped: bool


class PolicyEngine:
    """The policy on this rank, with its optimiser."""

    def __init__(self, scorer: Scorer, config: TrainerConfig, ranks: Ranks, *, bfloat16: bool) -> None:
        import deepspeed

        trained = [p for p in scorer.parameters() if p.requires_grad]
        o = config.optimizer
        self._adam = GuardedAdamW(
            trained,
            ranks,
            clip=None if config.deepspeed.zero_stage else o.gradient_clipping,
            lr=o.learning_rate,
            betas=o.betas,
            eps=o.eps,
            weight_decay=o.weight_decay,
        )
        self.scorer = scorer
        engine, *_ = deepspeed.initialize(
            model=scorer,
            optimizer=self._adam,
            config=deepspeed_settings(config, bfloat16=bfloat16),
        )
        self._engine: Any = engine  # DeepSpeed's classes are typed only in part
        self._ranks = ranks

    def logprobs(self, micro: Microbatch) -> tuple[Tensor, Tensor]:
        """(log-prob [O] with gradient, entropy [O]) of the micro-batch under the current weights."""
        return self._engine(micro)

    @torch.no_grad()
    def logprobs_detached(self, micro: Microbatch) -> Tensor:
        """Log-prob [O] without gradient."""
        return self._engine(micro)[0]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the loss. `last`: no micro-batch follows before `update`."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._ranks.size, scale_wrt_gas=False)  # DeepSpeed averages over ranks

    def update(self, learning_rate: float, *, finite: bool) -> Update:
        """One optimiser update with what was accumulated. `finite`: whether this rank's losses were."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        before = self._engine.skipped_steps
        self._adam.veto, self._adam.skipped = not finite, False
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._adam.norm is None else self._adam.norm
        skipped = self._adam.skipped or self._engine.skipped_steps > before
        return Update(math.nan if norm is None else float(norm), skipped)

    def close(self) -> None:
        self._engine.destroy()


class ReferenceEngine:
    """A frozen model that scores: partitioned like the policy under ZeRO-3, whole on each rank otherwise."""

    def __init__(self, scorer: Scorer, config: TrainerConfig, ranks: Ranks, *, bfloat16: bool) -> None:
        self._module: Any = scorer.to(ranks.device)
        if config.deepspeed.zero_stage == 3:
            import deepspeed

            settings = deepspeed_settings(config, bfloat16=bfloat16)
            self._module, *_ = deepspeed.initialize(model=scorer, config=settings)
            self._module.eval()

    @torch.no_grad()
    def logprobs_detached(self, micro: Microbatch) -> Tensor:
        """Log-prob [O] under the reference."""
        return self._module(micro)[0]


def deepspeed_settings(config: TrainerConfig, *, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. bfloat16 keeps fp32 masters, accumulates and reduces in fp32 (STACK.md section 3)."""
    zero: dict[str, Any] = {"stage": config.deepspeed.zero_stage}
    if config.deepspeed.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = config.deepspeed.persistent_parameter_elements
    if config.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.deepspeed.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.gradient_clipping if config.deepspeed.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings
