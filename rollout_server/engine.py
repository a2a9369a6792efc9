"""Handle of one life of the engine child: start it, sample, switch weights, and know at once when it is gone.

Owns the child process and its whole group: SGLang's scheduler and helpers live in it and are killed with it.
Every request ends exactly once: with its result, or with UnavailableError when the child dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from protocol.errors import InternalError, UnavailableError, error_of
from protocol.messages import UNVERSIONED, FinishReason, Version, VersionSpan
from rollout_server.link import Link

log = logging.getLogger("rollout_server.engine")

KEPT_LINES = 30
"""Last lines of the child's output that are kept to explain its death."""

REPLY_MARGIN_S = 5.0
"""How much longer than the child's own deadline the server waits for the child to report it."""


@dataclass(frozen=True)
class EngineSettings:
    """First frame to the child. context_tokens, max_total_tokens: 0 leaves them to the model and SGLang."""

    model_path: str
    dtype: str
    trust_remote_code: bool
    device: str
    capacity: int
    context_tokens: int
    max_total_tokens: int
    seed: int
    engine_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSample:
    """output_ids int32 [T], logprobs float32 [T], spans that cover [0, T)."""

    output_ids: np.ndarray
    logprobs: np.ndarray
    versions: list[VersionSpan]
    finish_reason: FinishReason
    cached_tokens: int


class EngineProcess:
    """One child. `exited` is set when it is gone; `last_lines` then say why."""

    def __init__(self, process: asyncio.subprocess.Process, link: Link) -> None:
        self.exited = asyncio.Event()
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.device = ""
        self.context_tokens = 0  # longest prompt and completion together; known when ready
        self._process = process
        self._link = link
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._copy_output())]

    @classmethod
    async def launch(cls, settings: EngineSettings) -> EngineProcess:
        """Start the child (not yet ready). Must be called on the main thread: PDEATHSIG follows the forking thread."""
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parent.parent)
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
        if os.path.isdir(settings.model_path):  # noqa: ASYNC240 - one stat, before anything is served
            env.setdefault("HF_HUB_OFFLINE", "1")
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "rollout_server.engine_child", str(theirs.fileno()), str(os.getpid()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for the server; also makes one group of all its kin
                env=env,
            )  # fmt: skip
        engine = cls(process, await Link.over(ours))
        await engine._link.send(asdict(settings) | {"version": name_of(UNVERSIONED)})
        return engine

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> int:
        return len(self._waiting)

    async def wait_ready(self, timeout_s: float) -> None:
        """Until the engine serves. Raises UnavailableError if it dies before, or is not ready in time (then killed)."""
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), timeout_s)
        except TimeoutError:
            self.kill()
            raise UnavailableError(f"engine not ready within {timeout_s:g} s") from None

    async def sample(self, prompt: np.ndarray, sampling: dict[str, Any]) -> EngineSample:
        """One completion of `prompt` (int32 [T]). Cancelling this call aborts the sample in the engine."""
        rid = f"{next(self._numbers):016x}"  # equal lengths: SGLang aborts by prefix
        frame = {"op": "generate", "rid": rid, "prompt": prompt.astype(np.int32, copy=False).tobytes()}
        reply = await self._call(rid, frame | {"sampling": sampling})
        if reply["op"] == "failed":
            raise error_of(reply["code"], reply["detail"])
        return sample_of(reply)

    async def update(self, path: str, version: Version, timeout_s: float) -> float:
        """Switch to the safetensors in folder `path`; returns the seconds generation stood still.

        Any failure (InternalError, UnavailableError) leaves weights in doubt: the caller must kill this engine.
        """
        call = f"u{next(self._numbers)}"
        frame = {"op": "update", "call": call, "path": path, "version": name_of(version), "timeout_s": timeout_s}
        try:
            reply = await asyncio.wait_for(self._call(call, frame), timeout_s + REPLY_MARGIN_S)
        except TimeoutError:
            raise InternalError(f"the engine did not answer within {timeout_s:g} s") from None
        if not reply["ok"]:
            raise InternalError(reply["detail"])
        return reply["paused_s"]

    def kill(self) -> None:
        """SIGKILL to the child and everything in its group. Harmless when it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Kill and reap; returns when the child is gone. SGLang's own shutdown does no more than kill either."""
        self.kill()
        await asyncio.wait_for(self.exited.wait(), 30.0)

    async def _call(self, key: str, frame: dict[str, Any]) -> dict[str, Any]:
        if self.exited.is_set():
            raise UnavailableError("the engine is down")
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        try:
            await self._link.send(frame)
            return await future
        except ConnectionError:
            raise UnavailableError("the engine went down") from None
        finally:
            del self._waiting[key]
            if not future.done() or future.cancelled():
                self._abort(key)

    def _abort(self, key: str) -> None:
        if not self.exited.is_set() and not key.startswith("u"):
            with contextlib.suppress(ConnectionError):
                self._link.post({"op": "abort", "rid": key})

    async def _read(self) -> None:
        """Hands replies to their waiters until the child is gone, then fails whoever still waits."""
        while (frame := await self._link.recv()) is not None:
            if frame["op"] == "ready":
                self.device, self.context_tokens = frame["device"], frame["context_tokens"]
                if not self._ready.done():
                    self._ready.set_result(None)
                continue
            future = self._waiting.get(frame["call"] if frame["op"] == "updated" else frame["rid"])
            if future is not None and not future.done():
                future.set_result(frame)
        self.kill()  # the link is gone, so the child is, or is of no use; its kin must not outlive it
        code = await self._process.wait()
        await asyncio.wait([self._tasks[1]], timeout=2.0)  # its last words
        self._link.close()
        self.exited.set()
        error = UnavailableError(f"the engine went down (exit code {code})")
        for future in [self._ready, *self._waiting.values()]:
            if not future.done():
                future.set_exception(error)
        if self._ready.done() and not self._ready.cancelled():
            self._ready.exception()  # looked at, whether or not anybody waits for it

    async def _copy_output(self) -> None:
        """The child's output goes to our stderr (stdout is for `ready`), and its end is kept."""
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # a line over the reader's limit; readline has dropped it
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self.last_lines.append(text)
            print(f"engine: {text}", file=sys.stderr, flush=True)


def name_of(version: Version) -> str:
    """A version as SGLang carries it in `weight_version`."""
    return f"{version.incarnation}:{version.step}"


def _version_of(name: str) -> Version:
    incarnation, step = name.split(":")
    return Version(int(incarnation), int(step))


def sample_of(reply: dict[str, Any]) -> EngineSample:
    """A `sample` frame, checked: InternalError for log-probs that are not finite or spans that leave tokens out."""
    ids = np.frombuffer(reply["output_ids"], np.int32)
    logprobs = np.frombuffer(reply["logprobs"], np.float32)
    spans: list[VersionSpan] = []
    for name, start, end in reply["versions"]:
        if end > start:
            version = _version_of(name)
            spans.append(VersionSpan(version.incarnation, version.step, start, end))
    edges = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != edges[:-1] or edges[-1] != len(ids) or len(logprobs) != len(ids):
        raise InternalError(f"the engine's spans {reply['versions']} do not cover its {len(ids)} tokens")
    if not np.isfinite(logprobs).all():
        raise InternalError("the engine returned log-probs that are not finite")
    return EngineSample(ids, logprobs, spans, FinishReason(reply["finish"]), reply["cached_tokens"])
