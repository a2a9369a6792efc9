"""A rollout server in a process of its own, as launch would start it, and what the tests ask of it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from protocol.clients import RolloutClient
from protocol.messages import (
    ChatMessage,
    DraftRequest,
    GenerationDone,
    Sample,
    TensorSpec,
    Version,
    WeightsBegin,
    WeightsChunk,
    WeightsCommit,
    WeightsDone,
)
from rollout_server.safetensors_file import read_folder

START_S = 150.0
CALL_S = 60.0

_MAIN = """
import json, sys
from pathlib import Path
from protocol.config import ModelConfig, RunConfig
from rollout_server.config import RolloutServerConfig
from rollout_server.service import main
if __name__ == "__main__":
    a = json.loads(sys.argv[1])
    run = RunConfig(name="test", dir=Path(a["runs"]))
    model = ModelConfig(path=a["model"], dtype="float32")
    sys.exit(main(RolloutServerConfig(**a["config"]), model, run, a["orchestrator"]))
"""


class ServerProcess:
    """Started by the constructor; `wait_ready` gives its address. Output goes to `folder`/server.log."""

    def __init__(self, folder: Path, model: Path, orchestrator: str | None = None, **config: Any) -> None:
        self.log = folder / "server.log"
        settings = {
            "name": "r0",
            "address": f"ipc://{folder}/r0.sock",
            "device": "cpu",
            "staging_dir": f"{folder}/staging",
        } | config
        arguments = {
            "runs": str(folder / "runs"),
            "model": str(model),
            "config": settings,
            "orchestrator": orchestrator,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, json.dumps(arguments)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self._lines: queue.Queue[str] = queue.Queue(maxsize=100)
        self.address = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def wait_ready(self) -> str:
        line = self._lines.get(timeout=START_S)
        assert line.startswith("ready rollout_server "), f"{line!r}\n{self.log.read_text()[-2000:]}"
        self.address = line.split()[2]
        return self.address

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """SIGTERM, and at most 30 s."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30.0)

    def end(self) -> None:
        """Whatever is left of it."""
        left = self.tree() if self.alive else []
        self.process.kill()
        self.process.wait(30.0)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def question(text: str = "What is 12 + 7 * 3?") -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


async def collect(stream: Any) -> tuple[list[Sample], GenerationDone]:
    """All samples, by index, and the last reply."""
    samples: list[Sample] = []
    async for reply in stream:
        if isinstance(reply, GenerationDone):
            return sorted(samples, key=lambda s: s.index), reply
        samples.append(reply)
    raise AssertionError("the stream ended without its last reply")


async def drafts(client: RolloutClient, request: DraftRequest) -> tuple[list[Sample], GenerationDone]:
    return await collect(client.draft(request, timeout_s=CALL_S))


async def until_idle(client: RolloutClient, timeout_s: float = 20.0) -> None:
    """Until no sample runs at the server."""
    until = time.monotonic() + timeout_s
    while (await client.info(timeout_s=CALL_S)).running:
        assert time.monotonic() < until, "samples still run"


async def until_running(client: RolloutClient, samples: int, timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while (await client.info(timeout_s=CALL_S)).running < samples:
        assert time.monotonic() < until, "the samples never ran"


def tensors_of(folder: Path) -> tuple[list[TensorSpec], bytes]:
    """Manifest and concatenated bytes of a model folder, as the trainer's publisher would send them."""
    specs: list[TensorSpec] = []
    blobs: list[bytes] = []
    for name, entry in read_folder(folder).items():
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            blob = file.read(entry.size)
        specs.append(TensorSpec(name=name, dtype=entry.dtype, shape=list(entry.shape), crc32=zlib.crc32(blob)))
        blobs.append(blob)
    return specs, b"".join(blobs)


async def stream_weights(client: RolloutClient, version: Version, folder: Path, chunk: int = 100_000) -> WeightsDone:
    """begin, chunks (backwards, one of them twice: any order must do), commit."""
    manifest, data = tensors_of(folder)
    begin = WeightsBegin(version=version, manifest=manifest, total_bytes=len(data))
    await client.weights_begin(begin, timeout_s=CALL_S)
    offsets = list(range(0, len(data), chunk))
    for offset in [*reversed(offsets), offsets[0]]:
        part = np.frombuffer(data[offset : offset + chunk], np.uint8)
        await client.weights_chunk(WeightsChunk(version=version, offset=offset, data=part), timeout_s=CALL_S)
    return await client.weights_commit(WeightsCommit(version=version), timeout_s=CALL_S)
