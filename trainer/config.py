"""Configuration of the trainer. Imports no torch; each component has its own nested model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from protocol.config import EndpointConfig, StrictConfig
from protocol.messages import UpdatePolicy

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Seconds = Annotated[float, Field(gt=0.0, le=86_400.0)]


class DeepSpeedConfig(StrictConfig):
    """How parameters, gradients and optimiser states lie on the ranks."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=2, description="ZeRO: 0 shares nothing, 1 optimiser states, 2 also gradients, 3 also parameters."
    )
    offload_optimizer: bool = Field(default=False, description="Keep optimiser states in host memory (stages 1 to 3).")
    offload_parameters: bool = Field(default=False, description="Keep partitioned parameters in host memory (stage 3).")
    persistent_parameter_elements: int = Field(
        default=100_000, ge=0, description="Stage 3: parameters with fewer elements than this stay whole on every rank."
    )

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage >= 1")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        return self


class OptimizerConfig(StrictConfig):
    """AdamW."""

    learning_rate: float = Field(default=1e-6, gt=0.0, le=1.0, description="Peak learning rate.")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="Decay rates of the first and second moment.")
    eps: float = Field(default=1e-8, gt=0.0, description="Term added to the denominator of an update.")
    weight_decay: float = Field(default=0.0, ge=0.0, description="Decoupled weight decay.")
    gradient_clipping: float = Field(default=1.0, gt=0.0, description="Largest L2 norm of the whole gradient.")


class ScheduleConfig(StrictConfig):
    """Learning rate over steps: linear warm-up from 0, then decay towards min_ratio of the peak at the last step."""

    kind: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Shape of the decay.")
    min_ratio: Share = Field(default=0.1, description="Learning rate at the last step, as a share of the peak.")
    warmup_steps: int | None = Field(default=None, ge=0, description="Steps of warm-up; unset: warmup_fraction.")
    warmup_fraction: Share = Field(default=0.1, description="Share of all steps that is warm-up.")


class KlConfig(StrictConfig):
    """Penalty for leaving the reference model (ALGORITHMS.md section 2.6), added to the loss of each token."""

    kind: Literal["none", "k1", "k2", "k3"] = Field(default="none", description="Estimator of KL(policy || reference).")
    beta: float = Field(default=0.0, ge=0.0, description="Weight of the penalty.")
    reference: str = Field(default="initial", min_length=1, description="`initial` (the run's model), or another.")

    @model_validator(mode="after")
    def _kind_fits_beta(self) -> Self:
        if self.kind == "none" and self.beta > 0.0:
            raise ValueError("beta > 0 needs a kind of KL: k1, k2 or k3")
        return self


class CorrectionConfig(StrictConfig):
    """Correction of staleness and engine mismatch by weights proximal / behaviour (ALGORITHMS.md section 2.5)."""

    kind: Literal["none", "tis"] = Field(default="tis", description="none, or token-level truncation at `cap`.")
    cap: float = Field(default=2.0, gt=0.0, description="Largest weight (C).")


class ObjectiveConfig(StrictConfig):
    """The loss: a composition of the pieces in trainer/objective/."""

    clip_low: float = Field(default=0.2, ge=0.0, le=1.0, description="Ratios below 1 - clip_low are clipped.")
    clip_high: float = Field(default=0.2, ge=0.0, description="Ratios above 1 + clip_high are clipped.")
    advantage_std: Literal["none", "biased", "unbiased"] = Field(
        default="unbiased", description="Standard deviation of a group's rewards that divides its advantages."
    )
    advantage_eps: float = Field(default=1e-6, gt=0.0, description="Term added to that standard deviation.")
    aggregation: Literal["token_mean", "seq_mean_token_mean"] = Field(
        default="seq_mean_token_mean", description="Mean over tokens, or mean over sequences of their token means."
    )
    kl: KlConfig = Field(default_factory=KlConfig, description="KL penalty.")
    correction: CorrectionConfig = Field(default_factory=CorrectionConfig, description="Staleness correction.")


class LoraConfig(StrictConfig):
    """Low-rank adapters; only they are trained, and served merged into the model."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of the adapters.")
    alpha: int = Field(default=32, ge=1, description="Adapters are scaled by alpha / rank.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="Linear layers that get one; `all-linear`: all but the output head."
    )


class PublishConfig(StrictConfig):
    """How each new policy reaches the rollout servers."""

    transport: Literal["disk", "stream"] = Field(
        default="stream", description="disk: a folder that every server can read; stream: bytes over ZeroMQ."
    )
    policy: UpdatePolicy = Field(default=UpdatePolicy.IN_FLIGHT, description="What servers do with running samples.")
    dtype: Literal["model", "float32", "bfloat16"] = Field(default="model", description="Type of published weights.")
    bucket_mb: int = Field(default=256, ge=1, le=16_384, description="Weights gathered at a time, in MiB.")
    chunk_mb: int = Field(default=16, ge=1, le=60, description="Size of one message of the stream transport in MiB.")
    poll_s: Seconds = Field(default=2.0, description="How often a server is asked which version it serves.")


class TrainerDeadlines(StrictConfig):
    """Nothing waits longer than this."""

    request_s: Seconds = Field(default=10.0, description="One small request to the orchestrator or a rollout server.")
    transfer_s: Seconds = Field(default=600.0, description="One version to one rollout server, from begin to commit.")
    collective_s: Seconds = Field(default=1800.0, description="One collective operation among ranks.")
    idle_s: Seconds = Field(default=2.0, description="How often waiting ranks hear `no batch yet`.")
    build_s: Seconds = Field(default=300.0, description="Building the C++ ops; afterwards plain PyTorch is used.")
    stop_s: Seconds = Field(default=15.0, description="From SIGTERM to a forced end.")


class TrainerConfig(EndpointConfig):
    """The trainer, its optimiser and its objective."""

    processes: int = Field(default=1, ge=1, le=65_536, description="Ranks on this machine, one per accelerator.")
    tokens_per_microbatch: int = Field(
        default=16_384, ge=1, description="Packed tokens (prompt + refinement) of one forward pass on one rank."
    )
    minibatches_per_step: int = Field(default=1, ge=1, le=1024, description="Optimiser updates per batch (K).")
    activation_checkpointing: bool = Field(default=False, description="Recompute activations in the backward pass.")
    reference_ops: bool = Field(default=False, description="Use plain PyTorch instead of the C++ and CUDA ops.")
    max_queued_batches: int = Field(default=2, ge=1, le=64, description="Batches that wait for the trainer at most.")
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig, description="Sharding and offload.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="Learning rate over steps.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="The loss.")
    lora: LoraConfig | None = Field(default=None, description="Low-rank adapters; unset: all parameters are trained.")
    publish: PublishConfig = Field(default_factory=PublishConfig, description="Weight publishing.")
    deadlines: TrainerDeadlines = Field(default_factory=TrainerDeadlines, description="Deadlines.")
