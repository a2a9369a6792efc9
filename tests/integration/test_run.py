"""`igrpo train` with every real part: SGLang, math-verify, DeepSpeed, ZeroMQ, each in its own process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "arithmetic"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, EXAMPLE / "problems.py", "--out", folder], check=True, timeout=60)
    return folder


def train(folder: Path, data: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Run the example with few steps; returns summary, the lines of metrics.jsonl of kind step, and the output."""
    fixed = [
        f"model.path={EXAMPLE / 'warm_start'}",
        f"orchestrator.data.train={data / 'train.jsonl'}",
        f"orchestrator.data.heldout={data / 'heldout.jsonl'}",
        f"run.dir={folder}",
        "run.name=r",
        "orchestrator.prompts_per_step=6",
        "orchestrator.evaluation.prompts=48",
        "orchestrator.evaluation.every_steps=0",
    ]
    command = [sys.executable, "-m", "launch.cli", "train", str(EXAMPLE / "config.yaml"), *fixed, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=ROOT)
    logs = "".join(path.read_text()[-1500:] for path in (folder / "r" / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    summary = json.loads((folder / "r" / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()]
    return summary, [line for line in lines if line["kind"] == "step"], done.stdout


def left_over(folder: Path) -> list[str]:
    """Command lines of processes that still know the run's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = process.info["cmdline"] or []
        if any(str(folder) in word for word in command):
            found.append(" ".join(command))
    return found


def test_synchronous_on_two_ranks_is_on_policy_through_every_update(tmp_path: Path, data: Path) -> None:
    """S = 0, ZeRO-3, weights by stream: every lag is 0, and the engine's log-probs are the trainer's, to 1e-4."""
    summary, steps, output = train(
        tmp_path, data, ["run.steps=4", "run.max_staleness=0", "trainer.processes=2", "trainer.deepspeed.zero_stage=3"]
    )
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert line["lag_max"] == 0 and line["draft_age_mean"] == 0
        assert abs(line["mismatch_max_ratio"] - 1) < 1e-4, "before the first update and after each"
    assert any(line["gradient_norm"] > 0 for line in steps)
    assert summary["max_lag"] == 0 and summary["groups_trained"] == 24
    assert summary["version"] == [1, 4] and summary["heldout_prompts"] == 48
    assert "step    4/4" in output
    assert left_over(tmp_path) == []


def test_streaming_with_bounded_staleness(tmp_path: Path, data: Path) -> None:
    """S = 1, two updates per batch, KL to a reference, weights by disk; transformers loads the export."""
    summary, steps, _ = train(
        tmp_path,
        data,
        [
            "run.steps=4",
            "run.max_staleness=1",
            "trainer.minibatches_per_step=2",
            "trainer.objective.kl.kind=k3",
            "trainer.objective.kl.beta=0.01",
            "trainer.publish.transport=disk",
        ],
    )
    assert summary["steps"] == 4 and summary["max_lag"] <= 1
    assert all(line["lag_max"] <= 1 and line["updates"] == 2 for line in steps)
    assert any(line["reference_kl"] > 0 for line in steps[1:]), "the policy has left the reference"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(summary["export"])
    tokenizer = AutoTokenizer.from_pretrained(summary["export"])
    assert model.config.vocab_size >= len(tokenizer)
    documented = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    for name in {name for line in steps for name in line} - {"kind", "step"}:
        assert re.sub("_(lag0|stale)$", "", name) in documented, f"docs/metrics.md does not explain {name}"
    names = {"summary.json", "metrics.jsonl", "accuracy.png", "tensorboard", "logs", "export"}
    assert names <= {path.name for path in (tmp_path / "r").iterdir()}
    assert_evaluates(tmp_path, data, summary["export"])


def assert_evaluates(folder: Path, data: Path, model: str) -> None:
    """`igrpo eval` of the exported model: pass@1, avg@k and pass@k over a rollout server of its own."""
    overrides = [
        f"orchestrator.data.train={data / 'train.jsonl'}",
        f"orchestrator.data.heldout={data / 'heldout.jsonl'}",
        f"run.dir={folder}",
        "run.name=r",
        "orchestrator.evaluation.prompts=12",
        "orchestrator.evaluation.samples=4",
    ]
    command = [sys.executable, "-m", "launch.cli", "eval", str(EXAMPLE / "config.yaml"), model, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("pass@1", "avg@4", "pass@4"):
        assert name in done.stdout
    assert left_over(folder) == []
