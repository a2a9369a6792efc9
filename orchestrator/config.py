"""Configuration of the orchestrator."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from protocol.config import EndpointConfig, StrictConfig


class SelectionRule(StrEnum):
    """Which draft stands in the refinement prompt."""

    BEST = "best"
    RANDOM = "random"
    WORST = "worst"
    WORST_FORMATTED = "worst_formatted"
    NONE = "none"


class TieRule(StrEnum):
    """Which of equally good drafts is taken."""

    FIRST = "first"
    RANDOM = "random"
    SHORTEST = "shortest"
    LONGEST = "longest"


class OnStale(StrEnum):
    """What a batch does about a group in flight that it would make too old."""

    WAIT = "wait"
    RESTART = "restart"
    DROP = "drop"


class LastBatch(StrEnum):
    """What becomes of prompts that do not fill a batch at an epoch's end."""

    CARRY = "carry"
    SHORT = "short"
    DROP = "drop"


class TimeoutPolicy(StrEnum):
    """What a verdict `timeout` means for its sample."""

    DROP = "drop"
    ZERO = "zero"


class DataConfig(StrictConfig):
    """Where prompts come from: JSONL or Parquet files on disk, or a Hugging Face data set."""

    train: str = Field(
        description="Training prompts: path of a .jsonl or .parquet file, or the name of a Hugging Face data set."
    )
    heldout: str = Field(default="", description="Held-out prompts for evaluation, likewise; empty: no evaluation.")
    train_split: str = Field(default="train", description="Split of a Hugging Face data set to train on.")
    heldout_split: str = Field(default="test", description="Split of a Hugging Face data set to evaluate on.")
    subset: str = Field(default="", description="Configuration name of a Hugging Face data set.")
    prompt_column: str = Field(
        default="prompt",
        min_length=1,
        description="Column with the question: a string, or a list of {role, content} messages.",
    )
    answer_column: str = Field(
        default="answer", min_length=1, description="Column with the reference answer (string or number)."
    )
    task: str = Field(default="", description="Name of the grader that the verifier shall use; empty: its default.")
    epochs: int = Field(
        default=1, ge=1, description="Passes over the training prompts at most; `run.steps` may end the run earlier."
    )
    shuffle: bool = Field(default=True, description="Permute the prompts anew in every epoch (seeded by run.seed).")
    last_batch: LastBatch = Field(
        default=LastBatch.CARRY,
        description="Prompts that do not fill a batch at an epoch's end: carry on, short batch, or drop.",
    )


class SamplingConfig(StrictConfig):
    """Sampling of one stage."""

    max_new_tokens: int = Field(default=1024, ge=1, description="Longest completion, in tokens.")
    temperature: float = Field(default=1.0, gt=0.0, le=100.0, description="Sampling temperature.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="Nucleus sampling; below 1 it cannot be trained on.")
    top_k: int = Field(default=-1, ge=-1, description="Top-k sampling; -1: off. Others cannot be trained on.")
    min_p: float = Field(default=0.0, ge=0.0, lt=1.0, description="Min-p sampling; above 0 it cannot be trained on.")


class SelectionConfig(StrictConfig):
    """The choice among the drafts of a prompt."""

    rule: SelectionRule = Field(
        default=SelectionRule.BEST,
        description="best (the paper), random, worst, worst_formatted, or none (plain GRPO; drafts must be 0).",
    )
    ties: TieRule = Field(
        default=TieRule.FIRST, description="Among equal scores: first, random, shortest or longest draft."
    )


class RewardConfig(StrictConfig):
    """Reward of a sample from its verdict: sum of weight x score over `accuracy` and the verdict's named parts."""

    weights: dict[str, float] = Field(
        default={"accuracy": 1.0},
        description="Weight of the verdict's score (`accuracy`) and of its named parts (such as `format`).",
    )
    timeout: TimeoutPolicy = Field(
        default=TimeoutPolicy.DROP, description="Verdict `timeout`: drop the sample from its group, or score it 0."
    )
    shuffle: bool = Field(
        default=False,
        description="Control experiment: permute the rewards within each group, so that they say nothing.",
    )


class EvaluationConfig(StrictConfig):
    """Single-shot evaluation on the held-out prompts, through the rollout servers."""

    every_steps: int = Field(
        default=0,
        ge=0,
        description="Evaluate on `prompts_during` prompts every so many steps; 0: only before and after.",
    )
    prompts_during: int = Field(default=256, ge=1, description="Held-out prompts of an evaluation during training.")
    prompts: int = Field(default=0, ge=0, description="Held-out prompts before and after training; 0: all of them.")
    samples: int = Field(default=1, ge=1, description="Completions per prompt (avg@k and pass@k).")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="Sampling of evaluation completions.")
    max_in_flight: int = Field(default=128, ge=1, description="Evaluation prompts in flight at once.")


class DeadlineConfig(StrictConfig):
    """How long the orchestrator waits for others, in seconds."""

    generate_s: float = Field(default=1800.0, gt=0, description="One draft, refine or generate request.")
    verify_s: float = Field(default=60.0, gt=0, description="One verify request.")
    step_s: float = Field(default=3600.0, gt=0, description="From a batch's push to the end of its training step.")
    start_s: float = Field(
        default=600.0, gt=0, description="Until trainer, verifier and the first rollout server answer at the start."
    )
    publish_s: float = Field(
        default=600.0,
        gt=0,
        description="Until a rollout server serves the newest version, where the run must wait for it.",
    )
    replica_silent_s: float = Field(
        default=20.0, gt=0, description="A rollout server that has not answered for so long gets no work."
    )


class OrchestratorConfig(EndpointConfig):
    """Streams prompts through draft, verify, select, refine, verify and assembles the trainer's batches."""

    data: DataConfig = Field(description="Prompts and reference answers.")
    prompts_per_step: int = Field(default=64, ge=1, description="Groups per batch, that is prompts per policy update.")
    drafts: int = Field(default=4, ge=0, description="Stage-1 samples per prompt (N); 0: plain GRPO.")
    refinements: int = Field(
        default=4, ge=2, description="Stage-2 samples per prompt (G); the only ones that are trained on."
    )
    plain_share: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Share of prompts that skip Stage 1 and are trained as plain GRPO groups.",
    )
    draft_sampling: SamplingConfig = Field(default=SamplingConfig(), description="Sampling of Stage 1.")
    refine_sampling: SamplingConfig = Field(default=SamplingConfig(), description="Sampling of Stage 2.")
    selection: SelectionConfig = Field(default=SelectionConfig(), description="The choice among the drafts.")
    reward: RewardConfig = Field(default=RewardConfig(), description="From verdicts to rewards.")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="Single-shot evaluation.")
    min_valid: int = Field(default=2, ge=2, description="Graded refinements that a group needs.")
    max_attempts: int = Field(default=3, ge=1, description="Attempts at a prompt before it is abandoned.")
    max_draft_age: int = Field(
        default=8, ge=0, description="Policy updates between a draft and its refinement at most; older: drafted again."
    )
    on_stale: OnStale = Field(
        default=OnStale.WAIT,
        description="A group in flight that the next batch would make too old: wait, restart it, or drop it.",
    )
    stale_wait_s: float = Field(default=120.0, gt=0, description="Longest wait of `on_stale: wait`.")
    deadlines: DeadlineConfig = Field(default=DeadlineConfig(), description="Deadlines of waits on other services.")

    @model_validator(mode="after")
    def _consistent(self) -> OrchestratorConfig:
        if (self.drafts == 0) != (self.selection.rule is SelectionRule.NONE):
            raise ValueError("drafts: 0 and selection.rule: none go together (plain GRPO); set both or neither")
        if self.min_valid > self.refinements:
            raise ValueError(f"min_valid ({self.min_valid}) exceeds refinements ({self.refinements})")
        for name in ("top_p", "top_k", "min_p"):
            if getattr(self.refine_sampling, name) != SamplingConfig.model_fields[name].default:
                raise ValueError(f"refine_sampling.{name}: truncated sampling cannot be trained on")
        return self


class Addresses(StrictConfig):
    """Where the orchestrator finds the services that do not register with it."""

    trainer: str = Field(description="ZeroMQ address of the trainer.")
    verifier: str = Field(description="ZeroMQ address of the verifier.")
