"""The plot beside the summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.errors import LaunchError
from launch.plot import plot_accuracy, series, smoothed


def write(folder: Path, records: list[dict[str, object]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_png_is_written(tmp_path: Path) -> None:
    steps = [{"kind": "step", "step": n, "draft_accuracy": 0.4, "refine_accuracy": None} for n in range(3)]
    write(tmp_path, [{"kind": "evaluation", "step": 0, "plain_accuracy": 0.5}, *steps])
    file = plot_accuracy(tmp_path)
    assert file == tmp_path / "accuracy.png"
    assert file.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "metrics.jsonl"]


def test_records_without_the_metric_are_left_out() -> None:
    records = [{"kind": "step", "step": 1, "a": 0.5}, {"kind": "step", "step": 2, "a": None}, {"kind": "x", "step": 3}]
    assert series(records, "step", "a") == ([1], [0.5])


def test_smoothing_is_a_trailing_mean() -> None:
    assert smoothed([1.0, 2.0, 3.0, 4.0], window=2) == [1.0, 1.5, 2.5, 3.5]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{"ki')
    with pytest.raises(LaunchError, match=r"metrics\.jsonl:2: not JSON"):
        plot_accuracy(tmp_path)
