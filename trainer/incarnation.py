"""The trainer's incarnations: raised at every start, durable before the first message (DESIGN section 5)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from protocol.messages import Version


@dataclass(frozen=True)
class Lineage:
    """branch_steps[k]: the step from which incarnation k + 1 went on. The last one is this trainer."""

    branch_steps: tuple[int, ...]

    @property
    def incarnation(self) -> int:
        return len(self.branch_steps)

    @property
    def branch_step(self) -> int:
        return self.branch_steps[-1]

    def holds(self, version: Version) -> bool:
        """Whether `version` is on the lineage: its step is at most the branch step of every later incarnation."""
        later = self.branch_steps[version.incarnation :]
        return version.incarnation <= self.incarnation and all(version.step <= branch for branch in later)


def raise_incarnation(path: Path, branch_step: int) -> Lineage:
    """Add an incarnation to the file and return it. On return it is on disk: written aside, fsynced, renamed."""
    lineage = Lineage((*_read(path), branch_step))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w") as file:
        json.dump({"incarnation": lineage.incarnation, "branch_steps": lineage.branch_steps}, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return lineage


def _read(path: Path) -> tuple[int, ...]:
    if not path.exists():
        return ()
    try:
        return tuple(int(step) for step in json.loads(path.read_text())["branch_steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is damaged: {error}") from error
