"""Learning rate by step, a pure function: nothing to save, nothing to get out of step."""

from __future__ import annotations

import math

from trainer.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, total_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Rate of the update at `step` (from 0): linear warm-up to the peak, then decay to min_ratio at the last step."""
    peak = optimizer.learning_rate
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = round(schedule.warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    match schedule.kind:
        case "constant":
            return peak
        case "linear":
            remaining = 1.0 - progress
        case "cosine":
            remaining = (1.0 + math.cos(math.pi * progress)) / 2
    return peak * (schedule.min_ratio + (1.0 - schedule.min_ratio) * remaining)
