"""The policy on this rank with everything that is made from it: its engine, its reference, snapshots, the export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ops.build import load_kernels
from protocol.config import ModelConfig, RunConfig
from protocol.messages import Version
from trainer.config import TrainerConfig
from trainer.desk import Desk
from trainer.engine import PolicyEngine, ReferenceEngine
from trainer.export import export
from trainer.gather import Bucket, gather
from trainer.model import load_policy, load_reference
from trainer.model_path import ModelError
from trainer.ranks import Ranks
from trainer.transports.base import Transport


class Policy:
    """Engine and reference (if the objective has one), loaded and on their device. Raises ModelError."""

    def __init__(
        self, config: TrainerConfig, model: ModelConfig, run: RunConfig, ranks: Ranks, transport: Transport
    ) -> None:
        bfloat16 = model.dtype == "bfloat16"
        if bfloat16 and config.deepspeed.zero_stage == 0:
            raise ModelError("trainer.deepspeed.zero_stage: 0 cannot train a bfloat16 model; use 1, 2 or 3")
        if not config.reference_ops:
            load_kernels(config.deadlines.build_s)
        torch.manual_seed(run.seed)
        self.reference: ReferenceEngine | None = None
        if config.objective.kl.kind != "none":
            reference = load_reference(model, config.objective.kl.reference, ranks.device)
            self.reference = ReferenceEngine(reference, config, ranks, bfloat16=bfloat16)
        scorer = load_policy(
            model,
            lora=config.lora,
            activation_checkpointing=config.activation_checkpointing,
            device=ranks.device,
        )
        self.causal = scorer.causal
        self.engine = PolicyEngine(scorer, config, ranks, bfloat16=bfloat16)
        self._config = config
        self._model = model
        self._ranks = ranks
        self._transport = transport
        self._export_to = run.folder / "export"
        published = model.dtype if config.publish.dtype == "model" else config.publish.dtype
        self._dtype: torch.dtype = getattr(torch, published)

    def weights(self) -> Iterator[Bucket]:
        """The current weights in buckets; on all ranks, full on rank 0."""
        return gather(
            self.engine.scorer,
            zero_stage=self._config.deepspeed.zero_stage,
            dtype=self._dtype,
            bucket_bytes=self._config.publish.bucket_mb << 20,
            leads=self._ranks.leads,
        )

    def publish(self, version: Version, desk: Desk | None) -> None:
        """Take a snapshot of the current weights and hand it to the publisher. All ranks take part."""
        if desk:
            desk.publish(self._transport.take(version, self.weights()))
        else:
            self._take_part()

    def export(self, version: Version, desk: Desk | None) -> None:
        """Write the final model. All ranks take part."""
        if not desk:
            self._take_part()
            return
        path: Path = export(
            self._export_to,
            self.weights(),
            self.engine.scorer,
            dtype=self._dtype,
            tokenizer=self._model.path,
            remote_code=self._model.trust_remote_code,
        )
        desk.exported(path, version)

    def _take_part(self) -> None:
        for _ in self.weights():
            pass
