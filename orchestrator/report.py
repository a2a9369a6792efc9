"""What a run tells people and files: metrics.jsonl, TensorBoard, one live line per step, summary.json."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from orchestrator.evaluate import mean
from orchestrator.prompt import Graded, Record
from protocol.messages import VerdictStatus


def group_metrics(records: list[Record], target_step: int, oldest_steps: list[int]) -> dict[str, float]:
    """Scalars of one batch, from its records. oldest_steps: step of each group's oldest refinement token."""
    drafts = [g for record in records for g in record.drafts.values()]
    refinements = [g for record in records if not record.plain for g in record.rewarded().values()]
    plain = [g for record in records if record.plain for g in record.rewarded().values()]
    lags = [target_step - oldest for oldest in oldest_steps]
    copies = [
        float(_answer(graded) == _answer(record.chosen))
        for record in records
        if record.chosen is not None and _answer(record.chosen)
        for graded in record.rewarded().values()
    ]
    metrics: dict[str, float | None] = {
        "draft_accuracy": _accuracy(drafts),
        "best_draft_accuracy": mean([max(map(_correct, graded)) for graded in map(_graded, records) if graded]),
        "chosen_draft_accuracy": mean([_correct(r.chosen) for r in records if r.chosen is not None]),
        "refine_accuracy": _accuracy(refinements),
        "plain_group_accuracy": _accuracy(plain),
        "copy_rate": mean(copies),
        "lag_mean": mean([float(lag) for lag in lags]),
        "lag_max": float(max(lags)),
        "draft_age_mean": mean([float(r.refine_step - r.draft_step) for r in records if r.chosen is not None]),
        "draft_tokens": float(sum(len(g.sample.output_ids) for g in drafts)),
        "refine_tokens": float(sum(len(g.sample.output_ids) for r in records for g in r.refinements.values())),
        "wasted_tokens": float(sum(record.wasted_tokens for record in records)),
        "cached_share": _cached_share(records),
        **{
            f"{phase}_seconds": mean([record.seconds[phase] for record in records if phase in record.seconds])
            for phase in ("draft", "refine")
        },
    }
    return {name: value for name, value in metrics.items() if value is not None}


def _graded(record: Record) -> list[Graded]:
    """The drafts with a verdict that says anything about them."""
    return [draft for draft in record.drafts.values() if draft.verdict.status is not VerdictStatus.ERROR]


def _correct(graded: Graded) -> float:
    return float(graded.verdict.status is VerdictStatus.CORRECT)


def _accuracy(group: list[Graded]) -> float | None:
    """Share of correct verdicts among those that say anything about the sample."""
    return mean([_correct(graded) for graded in group if graded.verdict.status is not VerdictStatus.ERROR])


def _answer(graded: Graded) -> str:
    return graded.verdict.extracted


def _cached_share(records: list[Record]) -> float | None:
    """Share of Stage-2 prompt tokens whose keys and values the engine still had."""
    shares = [
        graded.sample.cached_tokens / len(record.prompt_ids)
        for record in records
        if record.prompt_ids is not None and len(record.prompt_ids)
        for graded in record.refinements.values()
    ]
    return mean(shares)


class Reporter:
    """Owns the run's metric files. Each line of metrics.jsonl is one step or one evaluation."""

    def __init__(self, folder: Path, out: TextIO) -> None:
        from orchestrator.tensorboard import TensorBoard

        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._out = folder, out
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = TensorBoard(folder / "tensorboard")

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """One line: {"kind": step | evaluation, "step": int, …}. Values that are not finite become null."""
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self._lines.write(json.dumps({"kind": kind, "step": step, **clean}) + "\n")
            self._lines.flush()
            self._board.add(kind, {name: value for name, value in metrics.items() if math.isfinite(value)}, step)
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or self._lines.name) from error

    def say(self, line: str) -> None:
        """A line for the terminal."""
        print(line, file=self._out, flush=True)

    def step_line(self, step: int, total: int, version: str, m: Mapping[str, float]) -> None:
        """The live line of one step."""

        def number(name: str, form: str) -> str:
            return format(m[name], form) if name in m and math.isfinite(m[name]) else "-"

        name = "refine_accuracy" if "refine_accuracy" in m else "plain_group_accuracy"
        trained = f"{'refine' if name == 'refine_accuracy' else 'group'} {number(name, '.3f')}"
        self.say(
            f"step {step:>4}/{total}  v{version}  draft {number('draft_accuracy', '.3f')}  "
            f"{trained}  plain {number('plain_accuracy', '.3f')}  "
            f"active {number('active_group_share', '.2f')}  lag {number('lag_mean', '.2f')}  "
            f"{number('tokens_per_second', '.0f')} tok/s  {number('step_seconds', '.1f')} s "
            f"(trainer waits {number('seconds_wait', '.1f')}, works {number('seconds_step', '.1f')})"
        )

    def summary(self, content: Mapping[str, Any]) -> Path:
        """Write summary.json aside, sync, and rename."""
        path = self._folder / "summary.json"
        aside = path.with_suffix(".tmp")
        try:
            with aside.open("w", encoding="utf-8") as file:
                json.dump({k: _finite(v) for k, v in content.items()}, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error
        return path

    def close(self) -> None:
        """Close the files. What a full disk did not take was reported when it was written."""
        for file in (self._lines, self._board):
            with contextlib.suppress(OSError):
                file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
