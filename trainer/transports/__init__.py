"""Ways by which weights reach rollout servers, behind one interface (base.py)."""

from __future__ import annotations

from pathlib import Path

from trainer.config import PublishConfig
from trainer.transports.base import Transport
from trainer.transports.disk import DiskTransport
from trainer.transports.stream import StreamTransport


def transport_of(config: PublishConfig, folder: Path) -> Transport:
    """The configured transport; `folder` is where the disk transport keeps its snapshots."""
    if config.transport == "disk":
        return DiskTransport(folder, config.policy)
    return StreamTransport(config.policy, chunk_bytes=config.chunk_mb << 20)
