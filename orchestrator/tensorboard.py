"""TensorBoard scalars, written at once and in this thread.

tensorboardX's own SummaryWriter hands events to a thread through a bounded queue; when the disk is full the thread dies
and the next event blocks for ever. Its record format is used without that thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  # made at import
from tensorboardX.summary import scalar


class TensorBoard:
    """One event file in `folder`. Raises OSError where the disk does."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))

    def add(self, prefix: str, scalars: Mapping[str, float], step: int) -> None:
        """All scalars of one step, as `prefix/name`."""
        for name, value in scalars.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(f"{prefix}/{name}", value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
