"""Configurations under which one step must give the same weights, whatever the number of ranks."""

from __future__ import annotations

from trainer.config import TrainerConfig

LINEAR_ADAM = {"learning_rate": 1.0, "eps": 1.0, "gradient_clipping": 1e6}
"""With eps this large Adam's first update is g / (|g| + 1): comparing weights compares gradients."""

CASES: dict[str, dict] = {
    "zero0": {"deepspeed": {"zero_stage": 0}},
    "zero1-clipping": {"deepspeed": {"zero_stage": 1}, "optimizer": LINEAR_ADAM | {"gradient_clipping": 0.5}},
    "zero2": {"deepspeed": {"zero_stage": 2}},
    "zero3": {"deepspeed": {"zero_stage": 3, "persistent_parameter_elements": 0}},
    "zero2-one-microbatch": {"tokens_per_microbatch": 100_000},
    "zero2-offload-checkpointing": {
        "deepspeed": {"zero_stage": 2, "offload_optimizer": True},
        "activation_checkpointing": True,
        "reference_ops": True,
    },
    "zero2-token-mean": {"objective": {"aggregation": "token_mean", "advantage_std": "none"}},
    "zero3-two-minibatches-kl": {
        "deepspeed": {"zero_stage": 3, "persistent_parameter_elements": 0},
        "activation_checkpointing": True,
        "minibatches_per_step": 2,
        "optimizer": LINEAR_ADAM | {"learning_rate": 0.05},
        "objective": {"kl": {"kind": "k3", "beta": 0.1}, "clip_low": 0.01, "clip_high": 0.02},
    },
    "zero1-bfloat16": {"deepspeed": {"zero_stage": 1}},
    "zero2-bfloat16": {"deepspeed": {"zero_stage": 2}},
    "zero3-bfloat16": {"deepspeed": {"zero_stage": 3, "persistent_parameter_elements": 0}},
    "zero2-lora": {"lora": {"rank": 4}},
    "zero3-lora": {"lora": {"rank": 4}, "deepspeed": {"zero_stage": 3, "persistent_parameter_elements": 0}},
    "zero2-few-samples": {"tokens_per_microbatch": 1},
}


def case_config(name: str) -> TrainerConfig:
    constant = {"kind": "constant", "warmup_steps": 0}
    return TrainerConfig.model_validate(
        {"tokens_per_microbatch": 150, "optimizer": LINEAR_ADAM, "schedule": constant} | CASES[name]
    )


def case_dtype(name: str) -> str:
    return "bfloat16" if "bfloat16" in name else "float32"


def case_groups(name: str) -> dict[str, int]:
    return {"groups": 1, "samples": 3, "first": 1} if "few" in name else {}
