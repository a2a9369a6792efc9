"""What summary.json says of a run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.evaluate import Evaluation, paired_gain
from orchestrator.pipeline import Pipeline, Stage
from orchestrator.prompt import Record
from protocol.config import RunConfig
from protocol.messages import Version


@dataclass
class Tally:
    """Counted as the run goes. Times are monotonic seconds; tokens are those sampled for training, waste included."""

    started: float = field(default_factory=time.monotonic)
    training: float = 0.0
    trained: float = 0.0
    tokens: int = 0
    wasted_tokens: int = 0
    groups_trained: int = 0
    max_lag: int = 0

    def batch(self, records: Sequence[Record], lag: int) -> int:
        """A batch has been trained, its largest lag was `lag`; returns the tokens sampled for it."""
        tokens = sum(record.tokens for record in records)
        self.tokens += tokens
        self.wasted_tokens += sum(record.wasted_tokens for record in records)
        self.groups_trained += len(records)
        self.max_lag = max(self.max_lag, lag)
        return tokens

    def lost(self, record: Record) -> None:
        """A prompt has left without being trained."""
        self.tokens += record.tokens
        self.wasted_tokens += record.tokens


def summarise(
    run: RunConfig,
    pipeline: Pipeline,
    version: Version,
    tally: Tally,
    *,
    before: Evaluation | None,
    after: Evaluation | None,
    verdicts: Mapping[str, int],
    export: str,
) -> dict[str, Any]:
    """The content of summary.json; accuracies are None without held-out prompts."""
    gain, error = paired_gain(before, after) if before and after else (None, None)
    ended = pipeline.terminal.values()
    reasons = Counter(f"{stage}: {reason}" for stage, reason in ended if stage is not Stage.TRAINED)
    seconds = tally.trained - tally.training
    return {
        "name": run.name,
        "seed": run.seed,
        "steps": pipeline.completed_steps,
        "plain_accuracy_before": before.accuracy if before else None,
        "plain_accuracy_after": after.accuracy if after else None,
        "gain": gain,
        "paired_standard_error": error,
        "heldout_prompts": len(after.scores) if after else 0,
        "answered_share_before": _answered(before),
        "answered_share_after": _answered(after),
        "version": [version.incarnation, version.step],
        "max_staleness": run.max_staleness,
        "max_lag": tally.max_lag,
        "groups_trained": tally.groups_trained,
        "prompts": dict(Counter(stage.value for stage, _ in ended)),
        "prompts_not_trained": dict(reasons.most_common(20)),
        "verdicts": dict(verdicts),
        "wall_seconds": time.monotonic() - tally.started,
        "training_seconds": seconds,
        "tokens_per_second": tally.tokens / max(seconds, 1e-9),
        "wasted_token_share": tally.wasted_tokens / max(tally.tokens, 1),
        "export": export,
    }


def _answered(evaluation: Evaluation | None) -> float | None:
    """Share of completions with an answer that could be read."""
    if evaluation is None:
        return None
    total = sum(evaluation.statuses.values())
    return (evaluation.statuses["correct"] + evaluation.statuses["wrong"]) / max(total, 1)
