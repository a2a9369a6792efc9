"""Run by torchrun (or alone): one step of every case; rank 0 writes weights and metrics to the folder given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from protocol.config import ModelConfig, RunConfig
from protocol.messages import UpdatePolicy
from tests.trainer.cases import CASES, case_config, case_dtype, case_groups
from tests.trainer.recorded import recorded_push
from trainer.batch import TrainBatch, batch_of
from trainer.loop import train_step
from trainer.policy import Policy
from trainer.ranks import Order, Ranks
from trainer.transports.stream import StreamTransport


def main(models: Path, out: Path) -> None:
    ranks = Ranks.start(60.0)
    for name in CASES:
        config, dtype = case_config(name), case_dtype(name)
        model = ModelConfig.model_validate({"path": str(models / dtype), "dtype": dtype})
        transport = StreamTransport(UpdatePolicy.IN_FLIGHT, chunk_bytes=1 << 20)
        policy = Policy(config, model, RunConfig.model_validate({"dir": out}), ranks, transport)
        payload = batch_of(recorded_push(**case_groups(name))).encode() if ranks.leads else b""
        order, payload = ranks.order(Order.TRAIN, payload)
        assert order is Order.TRAIN
        metrics = train_step(policy, ranks, TrainBatch.decode(payload), config, config.optimizer.learning_rate)
        weights = {key: tensor.float().numpy() for bucket in policy.weights() for key, tensor in bucket}
        if ranks.leads:
            np.savez(out / f"{name}.npz", allow_pickle=False, **weights)
            (out / f"{name}.json").write_text(json.dumps(metrics))
        else:
            assert not weights
    _skips_what_is_not_finite(ranks, models, out)
    ranks.close()


def _skips_what_is_not_finite(ranks: Ranks, models: Path, out: Path) -> None:
    """One rank alone has a bad loss: no rank's weights may move."""
    for stage, dtype in ((0, "float32"), (2, "bfloat16"), (3, "float32")):
        model = ModelConfig.model_validate({"path": str(models / dtype), "dtype": dtype})
        config = case_config("zero0").model_copy(
            update={"deepspeed": case_config("zero0").deepspeed.model_copy(update={"zero_stage": stage})}
        )
        policy = Policy(
            config,
            model,
            RunConfig.model_validate({"dir": out}),
            ranks,
            StreamTransport(UpdatePolicy.IN_FLIGHT, chunk_bytes=1 << 20),
        )
        before = [p.detach().clone() for p in policy.engine.scorer.parameters()]
        batch = batch_of(recorded_push())
        if ranks.rank == ranks.size - 1:
            batch.behaviour[:] = np.nan
        metrics = train_step(policy, ranks, batch, config, config.optimizer.learning_rate)
        assert metrics["updates_skipped"] == 1.0, metrics
        assert all(torch.equal(a, b) for a, b in zip(before, policy.engine.scorer.parameters(), strict=True))
        metrics = train_step(policy, ranks, batch_of(recorded_push()), config, config.optimizer.learning_rate)
        assert metrics["updates_skipped"] == 0.0 and np.isfinite(metrics["loss"]), metrics


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
