"""The pool's side of one worker process: start, exchange, kill. Thin; the pool decides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import msgspec

from verifier.frames import HEADER_BYTES, FrameError, Outcome, Ready, Settings, Task, body_length, header

ROOT = str(Path(__file__).resolve().parents[1])
"""Folder of the packages, for the workers to import from."""

WORKER_COMMAND = (sys.executable, "-m", "verifier.worker")

NICE_STEP = 10
"""How much less of the processor a long runner gets than its neighbours."""

PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
"""Environment that workers inherit; the rest, secrets above all, stays with the service."""


class WorkerDiedError(Exception):
    """The worker process ended, or sent what is no frame, before it answered."""


class WorkerProcess:
    """One live worker. Made by `start_worker`; `exchange` is for one task at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self.isolated = False
        self.served = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """The exit status, once the process has ended. The caller bounds the wait."""
        return await self._process.wait()

    async def handshake(self) -> None:
        """Wait until the worker has imported its graders. The caller bounds the wait."""
        ready = msgspec.msgpack.decode(await self._read(), type=Ready)
        self.isolated = ready.isolated

    async def exchange(self, task: Task) -> Outcome:
        """Have one task graded; WorkerDiedError if the worker is killed meanwhile. The caller bounds the wait."""
        body = msgspec.msgpack.encode(task)
        try:
            self._stdin.write(header(body) + body)
            await self._stdin.drain()
        except (ConnectionError, RuntimeError) as error:
            raise WorkerDiedError(str(error)) from error
        try:
            outcome = msgspec.msgpack.decode(await self._read(), type=Outcome)
        except msgspec.MsgspecError as error:
            raise WorkerDiedError(f"not an outcome: {error}") from error
        self.served += 1
        return outcome

    async def _read(self) -> bytes:
        try:
            length = body_length(await self._stdout.readexactly(HEADER_BYTES))
            return await self._stdout.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError, FrameError) as error:
            raise WorkerDiedError(str(error)) from error

    def yield_processor(self) -> None:
        """Lower the worker's priority, for good."""
        try:
            os.setpriority(os.PRIO_PROCESS, self.pid, NICE_STEP)
        except (ProcessLookupError, PermissionError):
            return  # it has just ended, or priorities are forbidden here: it only runs less politely

    def dismiss(self) -> None:
        """End its input, upon which an idle worker ends."""
        self._stdin.close()

    def kill(self) -> None:
        """SIGKILL, if it still lives."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


async def start_worker(settings: Settings, command: tuple[str, ...]) -> WorkerProcess:
    """Spawn a worker process; it is not ready before its handshake. OSError if the system refuses."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = await asyncio.create_subprocess_exec(
        *command,
        msgspec.json.encode(settings).decode(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    return WorkerProcess(process)
