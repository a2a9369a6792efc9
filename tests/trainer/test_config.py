"""The schedule, and what the configuration refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from trainer.config import OptimizerConfig, ScheduleConfig, TrainerConfig
from trainer.schedule import learning_rate


def rate(step: int, schedule: ScheduleConfig, steps: int = 101) -> float:
    return learning_rate(step, steps, OptimizerConfig(learning_rate=1.0), schedule)


def test_cosine_with_warmup() -> None:
    c = ScheduleConfig(warmup_fraction=0.1, min_ratio=0.1)
    assert [rate(s, c) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rate(55, c) == pytest.approx(0.55)
    assert rate(100, c) == pytest.approx(0.1) and rate(500, c) == pytest.approx(0.1)
    rates = [rate(s, c) for s in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_other_schedules() -> None:
    linear = ScheduleConfig(kind="linear", warmup_steps=0, min_ratio=0.0)
    assert [rate(s, linear) for s in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
    assert rate(77, ScheduleConfig(kind="constant", warmup_steps=0)) == 1.0
    assert rate(0, ScheduleConfig(), steps=1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"zero_stage": 2},
        {"deepspeed": {"zero_stage": 4}},
        {"deepspeed": {"zero_stage": 0, "offload_optimizer": True}},
        {"deepspeed": {"zero_stage": 2, "offload_parameters": True}},
        {"objective": {"kl": {"beta": 0.1}}},
        {"optimizer": {"gradient_clipping": 0.0}},
        {"tokens_per_microbatch": 0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        TrainerConfig.model_validate(wrong)


def test_every_field_is_described_and_no_torch_is_imported() -> None:
    code = "import sys, trainer.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    models = [TrainerConfig, *(field.annotation for field in TrainerConfig.model_fields.values())]
    for model in models:
        for name, field in getattr(model, "model_fields", {}).items():
            assert field.description, f"{model}.{name}"
