"""Run folders: taken once, never overwritten, and freed again if a run failed before its first step."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from launch.config import Config
from launch.errors import LaunchError
from protocol.config import RunConfig

START_FAILED = "start-failed"
"""File that marks a folder whose run ended before it trained anything; the next start may take the folder."""


def claim(run: RunConfig) -> None:
    """Make the run's folder with its logs/, or raise LaunchError if it holds a run already."""
    folder = run.folder
    try:
        if (folder / START_FAILED).is_file():
            shutil.rmtree(folder)
        if folder.exists() and (not folder.is_dir() or any(entry.name != "sock" for entry in folder.iterdir())):
            raise LaunchError(
                f"run.name: {folder} holds an earlier run and nothing is overwritten; choose another name, "
                f"such as run.name={free_name(run)}"
            )
        (folder / "logs").mkdir(parents=True)  # the second of two commands at the same time fails here
    except OSError as error:
        raise LaunchError(f"run.dir: cannot make {error.filename or folder}: {error.strerror}") from None


def free_name(run: RunConfig) -> str:
    """The first name `stem-2`, `stem-3`, … that is not taken."""
    stem = re.sub(r"-\d+$", "", run.name)
    number = 2
    while (run.dir / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def mark_failed_start(folder: Path) -> None:
    """Free the folder for the next start, unless a step was trained in it."""
    metrics = folder / "metrics.jsonl"
    try:
        if not metrics.is_file() or b'"kind": "step"' not in metrics.read_bytes():
            (folder / START_FAILED).touch()
    except OSError:
        return  # a full disk, say; the folder then stays taken, which loses nothing


def write_resolved(config: Config, file: Path) -> None:
    """The configuration that the services read: complete, addresses resolved."""
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
    aside = file.with_suffix(".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        raise LaunchError(f"cannot write {file}: {error.strerror}") from None
