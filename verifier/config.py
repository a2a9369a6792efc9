"""Configuration of the verifier. Importable without torch, math-verify and sympy."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, model_validator

from protocol.config import EndpointConfig

FormatName = Literal["none", "boxed_end", "think_answer"]


class VerifierConfig(EndpointConfig):
    """The grading service: its worker processes, their limits, and how answers are read."""

    workers: int = Field(
        default_factory=lambda: min(os.cpu_count() or 1, 64),
        ge=1,
        le=512,
        description="Worker processes that grade at once; the default is the number of cores.",
    )
    spare_workers: int = Field(
        1, ge=0, le=64, description="Warm worker processes beyond `workers`, so that a killed one is replaced at once."
    )
    long_runners: int = Field(
        8,
        ge=0,
        le=512,
        description="Items that may run on aside, at low priority, after `slow_after_s`; each frees its place.",
    )
    slow_after_s: float = Field(
        0.5,
        gt=0,
        le=60,
        description="Seconds after which a running item gives its place to the next one (see `long_runners`).",
    )
    soft_limit_s: float = Field(
        2.0,
        gt=0,
        le=600,
        description="Processor seconds after which a worker interrupts an item from within; the verdict is `timeout`.",
    )
    hard_limit_s: float = Field(
        5.0,
        gt=0,
        le=900,
        description="Real seconds after which a worker is killed from outside and replaced; the verdict is `timeout`.",
    )
    cancel_grace_s: float = Field(
        0.1,
        ge=0,
        le=10,
        description="Seconds that the running items of a cancelled request get before their workers are killed.",
    )
    memory_limit_mb: int = Field(
        1024,
        ge=256,
        le=1 << 20,
        description="Address space of one worker process in MiB; an item that exhausts it is a `timeout`.",
    )
    recycle_after: int = Field(
        5000, ge=1, le=10_000_000, description="Items after which a worker process is replaced by a fresh one."
    )
    crash_retries: int = Field(
        1,
        ge=0,
        le=10,
        description="Times an item is given to another worker after its worker died; then the verdict is `error`.",
    )
    start_timeout_s: float = Field(60.0, gt=0, le=600, description="Seconds a worker process may take to become ready.")
    max_queued: int = Field(
        16384,
        ge=1,
        le=1_000_000,
        description="Items that may wait for a worker; a request that would exceed it is `overloaded`.",
    )
    cache_entries: int = Field(
        65536,
        ge=0,
        le=10_000_000,
        description="Verdicts remembered by (reference, extracted answer), about 300 bytes each; 0: none.",
    )
    task: Literal["math"] = Field("math", description="Grader of items that name no task.")
    format: FormatName = Field(
        "boxed_end",
        description="What `parts.format` reports: `boxed_end` (exactly one well-formed box, at the end), "
        "`think_answer` (<think>…</think><answer>…</answer>), or `none` (nothing).",
    )
    require_evaluated: bool = Field(
        True,
        description="Where the reference is a plain number, an answer that leaves a calculation (`3+9`) is wrong.",
    )
    max_completion_chars: int = Field(
        1 << 20, ge=1, le=1 << 22, description="Characters of a completion; a longer one is `unparsable`."
    )
    max_answer_chars: int = Field(
        1000, ge=1, le=20_000, description="Characters of an extracted answer; a longer one is `unparsable`."
    )
    max_reference_chars: int = Field(
        4000, ge=1, le=20_000, description="Characters of a reference; a longer one is `bad_reference`."
    )
    drain_s: float = Field(
        5.0, ge=0, le=600, description="Seconds that running requests get when the service has to stop."
    )

    @model_validator(mode="after")
    def _limits_in_order(self) -> VerifierConfig:
        if self.soft_limit_s >= self.hard_limit_s:
            raise ValueError(f"soft_limit_s ({self.soft_limit_s}) must be below hard_limit_s ({self.hard_limit_s})")
        return self
