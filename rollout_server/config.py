"""Settings of one rollout server. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from protocol.config import EndpointConfig

PAPER_SYSTEM_PROMPT = (
    "You are a helpful AI Assistant that provides well-reasoned and detailed responses. First think through your "
    "reasoning as an internal monologue, then give the answer: <think>...</think><answer>...</answer>. If the prompt "
    "contains feedback or a prior draft, treat it as guidance, not as ground truth. Use it to produce a strictly "
    "improved final answer: fix mistakes, fill gaps, strengthen justification, and improve clarity. Do not repeat the "
    "draft verbatim. If the feedback is wrong or incomplete, correct it and proceed."
)
"""The only template text the iGRPO paper gives (Appendix C; ALGORITHMS.md section 1.3), word for word."""

IMPROVE_REQUEST = (
    "Your answer above is a draft. Treat it as guidance, not as ground truth: fix its mistakes, fill its gaps and give "
    "a strictly improved final answer."
)

Template = Literal["paper", "multi_turn"]
Overflow = Literal["truncate_head", "truncate_tail", "reject"]


class RolloutServerConfig(EndpointConfig):
    """One replica of the policy. Several replicas share these settings and differ in name and address."""

    name: str = Field("rollout-0", min_length=1, max_length=128, description="Name of this replica, unique in the run.")
    capacity: int = Field(64, ge=1, le=65536, description="Samples that run at once; more wait, refinements first.")
    max_waiting: int = Field(4096, ge=1, description="Samples that may wait for a place before `overloaded`.")
    context_tokens: int = Field(
        0, ge=0, description="Prompt and completion together, in tokens; 0: what the model allows."
    )
    max_total_tokens: int = Field(
        0, ge=0, description="Tokens of KV cache; 0: SGLang decides on a GPU, 65536 (or one context) on CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the engine runs.")
    advertise_address: str = Field("", description="Address told to the orchestrator; empty: the one listened on.")
    template: Template = Field(
        "paper", description="How a draft enters the prompt: in the user's turn, or as the assistant's own turn."
    )
    draft_prefix: str = Field("\n\n[Prior draft]\n", description="`paper`: text between the question and the draft.")
    draft_suffix: str = Field("\n", description="`paper`: text after the draft.")
    improve_request: str = Field(
        IMPROVE_REQUEST, min_length=1, description="`multi_turn`: the user's words after the draft."
    )
    system_prompt: str = Field(
        "", description="System message for prompts that have none; `paper`: the paper's instruction; empty: none."
    )
    draft_overflow: Overflow = Field(
        "truncate_head", description="A draft over its budget loses its head, loses its tail, or is refused."
    )
    draft_budget_tokens: int = Field(
        0, ge=0, description="Draft tokens that may enter a prompt; 0: what context and completion leave."
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="More arguments for sglang.Engine (tp_size, mem_fraction_static, ...)."
    )
    staging_dir: Path | None = Field(
        None, description="Folder for incoming weights; none: /dev/shm, or the run folder where that is too small."
    )
    staging_budget_bytes: int = Field(64 << 30, ge=1, description="Bytes of incoming weights that may be staged.")
    start_timeout_s: float = Field(900.0, gt=0, description="Seconds the engine may take to start.")
    update_timeout_s: float = Field(120.0, gt=0, description="Seconds a switch of weights may take; then a restart.")
    drain_timeout_s: float = Field(120.0, gt=0, description="Seconds running samples get under policy `drain`.")
    stop_timeout_s: float = Field(2.0, ge=0, description="Seconds running requests get when the server is stopped.")
    max_restarts: int = Field(5, ge=0, description="Engine restarts in a row before the server gives up.")
    restart_backoff_s: float = Field(1.0, gt=0, description="Wait before the first restart; doubles up to 30 s.")
    heartbeat_s: float = Field(5.0, gt=0, description="Seconds between two `hello` to the orchestrator.")

    @property
    def system_text(self) -> str:
        """The system message, presets resolved."""
        return PAPER_SYSTEM_PROMPT if self.system_prompt == "paper" else self.system_prompt

    @model_validator(mode="after")
    def _budget_fits(self) -> Self:
        if self.context_tokens and self.draft_budget_tokens >= self.context_tokens:
            raise ValueError(
                f"draft_budget_tokens {self.draft_budget_tokens} leaves no room in context_tokens {self.context_tokens}"
            )
        owned = {"model_path", "skip_tokenizer_init", "weight_version", "random_seed", "context_length"}
        if taken := owned & self.engine_args.keys():
            raise ValueError(f"engine_args may not set {', '.join(sorted(taken))}: the server sets it itself")
        return self
