"""From verdicts to rewards. Needs no model; an error is never a zero."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from orchestrator.config import RewardConfig, TimeoutPolicy
from protocol.messages import Verdict, VerdictStatus

FORMATTED = frozenset({VerdictStatus.CORRECT, VerdictStatus.WRONG})


def reward_of(verdict: Verdict, config: RewardConfig) -> float | None:
    """Weighted sum of the verdict's score (`accuracy`) and parts; None if the sample leaves its group.

    `error` and scores that are not finite always leave. `timeout` leaves or scores 0 by `config.timeout`. Parts without
    a weight count nothing.
    """
    if verdict.status is VerdictStatus.ERROR:
        return None
    if verdict.status is VerdictStatus.TIMEOUT:
        return None if config.timeout is TimeoutPolicy.DROP else 0.0
    parts = {**verdict.parts, "accuracy": verdict.score}
    reward = sum(weight * parts.get(name, 0.0) for name, weight in config.weights.items())
    return reward if math.isfinite(reward) else None


def bad_reference(verdict: Verdict) -> bool:
    """Whether the verdict says that the reference answer itself cannot be parsed."""
    return verdict.status is VerdictStatus.ERROR and verdict.detail.startswith("bad_reference")


def shuffled(rewards: Sequence[float], rng: random.Random) -> list[float]:
    """A permutation of a group's rewards: the control in which rewards say nothing about their samples."""
    result = list(rewards)
    rng.shuffle(result)
    return result
