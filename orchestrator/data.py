"""Prompts and their order: JSONL, Parquet and Hugging Face data sets; a seeded, resumable permutation per epoch."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import DataConfig
from protocol.messages import ChatMessage

Key = tuple[int, int]  # (epoch, data index): names one pass of one prompt for ever


class DataError(Exception):
    """A data set or one of its rows cannot be read; the message names file, line and field."""


@dataclass(frozen=True)
class Problem:
    """One row: a question (as chat messages) and its reference answer."""

    index: int
    messages: tuple[ChatMessage, ...]
    answer: str


def load_problems(source: str, config: DataConfig, *, split: str) -> list[Problem]:
    """All rows of `source`. Raises DataError for the first row that cannot be used, or if there is none."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        rows = _jsonl_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path, config)
    else:
        rows = _hub_rows(source, config.subset, split)
    problems = [_problem(index, place, row, config) for index, (place, row) in enumerate(rows)]
    if not problems:
        raise DataError(f"{source}: no rows")
    return problems


def _problem(index: int, place: str, row: Any, config: DataConfig) -> Problem:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with fields, found {type(row).__name__}")
    for column in (config.prompt_column, config.answer_column):
        if column not in row:
            raise DataError(f"{place}: no field {column!r}; the row has {', '.join(sorted(map(str, row))) or 'none'}")
    prompt, answer = row[config.prompt_column], row[config.answer_column]
    if isinstance(prompt, str) and prompt:
        messages: tuple[ChatMessage, ...] = (ChatMessage(role="user", content=prompt),)
    elif isinstance(prompt, list) and prompt and all(_is_message(part) for part in prompt):
        messages = tuple(ChatMessage(role=part["role"], content=part["content"]) for part in prompt)
    else:
        raise DataError(f"{place}: field {config.prompt_column!r}: expected text or a list of {{role, content}}")
    for column, texts in ((config.prompt_column, [m.content for m in messages]), (config.answer_column, [str(answer)])):
        if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
            raise DataError(f"{place}: field {column!r}: holds half a surrogate pair, which is not text")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise DataError(f"{place}: field {config.answer_column!r}: expected text or a number, found {answer!r:.60}")
    return Problem(index, messages, str(answer))


def _is_message(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("role"), str) and isinstance(part.get("content"), str)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}:{number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _parquet_rows(path: Path, config: DataConfig) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        columns = [name for name in (config.prompt_column, config.answer_column) if name in names]
        table = pyarrow.parquet.read_table(path, columns=columns or None)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    for number, row in enumerate(table.to_pylist()):
        yield f"{path}: row {number}", row


def _hub_rows(name: str, subset: str, split: str) -> Iterable[tuple[str, Any]]:
    if Path(name).suffix or name.startswith((".", "/")):
        raise DataError(f"{name}: expected a .jsonl or .parquet file, or the name of a Hugging Face data set")
    import datasets

    try:
        rows = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the library raises dozens of kinds; all mean that these rows cannot be had
        raise DataError(f"data set {name!r} split {split!r}: {type(error).__name__}: {error}") from error
    return ((f"{name}[{split}] row {number}", row) for number, row in enumerate(rows))


class DataOrder:
    """Which prompt is next: a permutation of [0, rows) per epoch, a pure function of (seed, epoch).

    INVARIANT: each key is handed out once, and again only after `put_back`. Prompts put back go first, oldest first.
    `position` (epoch, offset) with the keys put back is all there is to save and restore.
    """

    def __init__(self, rows: int, *, seed: int, epochs: int, shuffle: bool, position: tuple[int, int] = (0, 0)) -> None:
        if rows < 1:
            raise ValueError("rows must be positive")
        self._rows, self._seed, self._epochs, self._shuffle = rows, seed, epochs, shuffle
        self._epoch, self._offset = position
        self._order = self._permutation(self._epoch)
        self._returned: deque[Key] = deque()

    def _permutation(self, epoch: int) -> list[int]:
        order = list(range(self._rows))
        if self._shuffle:
            random.Random(f"data order {self._seed} {epoch}").shuffle(order)
        return order

    @property
    def position(self) -> tuple[int, int]:
        return self._epoch, self._offset

    @property
    def left(self) -> bool:
        """Whether `next` has something to give."""
        return bool(self._returned) or self._epoch < self._epochs

    def next(self) -> Key:
        """The next key; raises StopIteration at the end of the last epoch."""
        if self._returned:
            return self._returned.popleft()
        if self._epoch >= self._epochs:
            raise StopIteration
        key = (self._epoch, self._order[self._offset])
        self._offset += 1
        if self._offset == self._rows:
            self._epoch, self._offset = self._epoch + 1, 0
            self._order = self._permutation(self._epoch)
        return key

    def put_back(self, key: Key) -> None:
        """Hand `key` out again before anything new."""
        self._returned.append(key)

    def drained(self, epoch: int) -> bool:
        """Whether every key of `epoch` has been handed out and none waits to be handed out again."""
        return self._epoch > epoch and all(key[0] != epoch for key in self._returned)
