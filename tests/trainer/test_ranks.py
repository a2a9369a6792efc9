"""One step of the real DeepSpeed engine, alone and on two ranks, against naive float64 code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_model import make_tiny_model
from tests.trainer.cases import CASES, case_config, case_dtype, case_groups
from tests.trainer.recorded import ENVIRONMENT, naive_step, recorded_push

WORKER = Path(__file__).with_name("ranks_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for dtype in ("float32", "bfloat16"):
        make_tiny_model(folder / dtype, dtype=dtype)
    return folder


@pytest.fixture(scope="session")
def outcomes(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with the results of all cases on one and two ranks; both run at the same time."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    launchers = {1: [sys.executable], 2: TORCHRUN}
    processes = {
        ranks: subprocess.Popen(
            [*launchers[ranks], str(WORKER), str(models), str(folder)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for ranks, folder in folders.items()
    }
    try:
        for ranks, process in processes.items():
            output, _ = process.communicate(timeout=150)
            assert process.returncode == 0, f"{ranks} ranks:\n{output[-6000:]}"
    finally:
        for process in processes.values():
            process.kill()
    return folders


@pytest.fixture(scope="session")
def expected(models: Path) -> dict[str, tuple[dict[str, np.ndarray], list[float]]]:
    return {
        name: naive_step(models / case_dtype(name), recorded_push(**case_groups(name)), case_config(name))
        for name in CASES
        if "lora" not in name
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [name for name in CASES if "lora" not in name])
def test_a_step_is_the_naive_step(name: str, ranks: int, outcomes: dict, expected: dict, models: Path) -> None:
    weights, losses = expected[name]
    metrics = json.loads((outcomes[ranks] / f"{name}.json").read_text())
    after = np.load(outcomes[ranks] / f"{name}.npz")
    assert set(after.files) == set(weights)
    bfloat16 = case_dtype(name) == "bfloat16"
    # bfloat16 keeps 8 bits of mantissa: activations and gradients differ by about one part in a hundred
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), abs=2e-3 if bfloat16 else 1e-6)
    before = dict(load(models / case_dtype(name)))
    largest = max(np.abs(weights[key] - before[key]).max() for key in weights)
    for key, value in weights.items():
        error = np.abs(after[key] - value).max()
        assert error <= (0.1 * largest if bfloat16 else 1e-5), (key, error, largest)
    assert largest > 1e-2, "the step must move the weights, or nothing was compared"


@pytest.mark.parametrize("name", ["zero2-lora", "zero3-lora"])
def test_adapters_are_trained_and_published_merged(name: str, outcomes: dict, models: Path) -> None:
    before = load(models / "float32")
    one, two = (np.load(outcomes[ranks] / f"{name}.npz") for ranks in (1, 2))
    assert set(one.files) == set(two.files) == set(before)
    changed = {key for key in before if not np.array_equal(one[key], before[key])}
    assert changed == {key for key in before if key.endswith("proj.weight")}
    for key in changed:
        assert np.linalg.matrix_rank((one[key] - before[key]).astype(np.float64), tol=1e-5) <= 4


def test_few_samples_leave_ranks_empty_microbatches(outcomes: dict) -> None:
    metrics = json.loads((outcomes[2] / "zero2-few-samples.json").read_text())
    assert metrics["samples"] == 3.0 and metrics["microbatches"] == 2.0, "four places for three samples"


def test_metrics_do_not_depend_on_the_ranks(outcomes: dict) -> None:
    one, two = (json.loads((outcomes[ranks] / "zero2.json").read_text()) for ranks in (1, 2))
    for key in one.keys() - {"microbatches", "tokens_per_second"}:
        if not key.startswith("seconds_"):
            assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-6), key
    assert one["gradient_norm"] > 0 and 0 < one["truncated_weight_share"] < 1
    assert one["active_group_share"] == pytest.approx(4 / 6)


def test_the_gradient_norm_is_that_of_the_whole_gradient(outcomes: dict, expected: dict, models: Path) -> None:
    before = load(models / "float32")
    steps = [expected["zero2"][0][key] - before[key] for key in before]
    norm = np.sqrt(sum(np.square(step / (1 - np.abs(step))).sum() for step in steps))  # step = g / (|g| + 1)
    for name in ("zero0", "zero1-clipping", "zero2", "zero3"):
        for ranks in (1, 2):
            metrics = json.loads((outcomes[ranks] / f"{name}.json").read_text())
            assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4), (name, ranks)


def load(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {key: tensor.float().numpy() for key, tensor in load_file(folder / "model.safetensors").items()}
