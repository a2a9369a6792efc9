"""Draft, refinement and plain accuracy over steps, from a run's metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from launch.errors import LaunchError

WINDOW = 5
"""Steps over which the curves of training batches are averaged; a batch alone is a noisy estimate."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl. Raises LaunchError, naming the line, if one cannot be read."""
    file = folder / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LaunchError(f"{file}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise LaunchError(f"{file}:{number}: not JSON") from None
    return records


def series(records: list[dict[str, Any]], kind: str, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, records without it left out."""
    points = [(r["step"], r[metric]) for r in records if r.get("kind") == kind and r.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(values: list[float], window: int = WINDOW) -> list[float]:
    """Trailing mean over at most `window` values."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def plot_accuracy(folder: Path) -> Path:
    """Write accuracy.png beside summary.json and return its path."""
    records = read_metrics(folder)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    curves = (("draft_accuracy", "drafts", "C0"), ("refine_accuracy", "refinements", "C1"))
    for metric, label, colour in curves:
        steps, values = series(records, "step", metric)
        if steps:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(values), color=colour, label=f"{label} (training batches)")
    steps, values = series(records, "evaluation", "plain_accuracy")
    if steps:
        axes.plot(steps, values, color="C2", marker="o", label="single shot (held out)")
    axes.set(xlabel="step", ylabel="accuracy", title=folder.name)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    file = folder / "accuracy.png"
    aside = folder / "accuracy.tmp.png"
    try:
        figure.savefig(aside)
        aside.replace(file)
    except OSError as error:
        raise LaunchError(f"{file}: cannot be written: {error.strerror}") from None
    return file
