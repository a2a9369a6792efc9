"""One supervised process: started in its own group, its output kept in a log file, its `ready` line noticed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

LAST_LINES = 12
"""Lines of a dead child's log that are shown; enough for the end of a traceback."""
MAX_LINE_BYTES = 1 << 16
"""A longer line is broken into pieces of this size."""
EXIT_POLL_S = 0.5
"""How often the exit code is looked at: some Python versions report an exit only once all pipes are closed."""
LATE_OUTPUT_S = 1.0
"""Time for output that was written before the end and not read yet."""


@dataclass(frozen=True)
class Service:
    """What to start. name: as people call it; also the log file's stem."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


class Child:
    """A running service. `run` returns its exit code, after its output has been read to the end."""

    def __init__(self, service: Service, log_file: Path, on_line: Callable[[str], None]) -> None:
        self.name = service.name
        self.log_file = log_file
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.ready_address = asyncio.get_running_loop().create_future()
        self.ended_at = 0.0
        self._service = service
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Start, read until the end, reap. Raises OSError if the log cannot be written or the program not started."""
        with self.log_file.open("a", encoding="utf-8", errors="replace") as log:
            process = self._process = await asyncio.create_subprocess_exec(
                *self._service.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=os.environ | self._service.env,
                process_group=0,
            )
            assert process.stdout and process.stderr
            readers = [
                asyncio.create_task(self._read(process.stdout, log, self._take_stdout)),
                asyncio.create_task(self._read(process.stderr, log, None)),
            ]
            try:
                code = await self._ended(process, readers)
                self.signal_group(signal.SIGKILL)
                # Somebody outside the group may hold the pipes open; what it writes now concerns nobody.
                await asyncio.wait(readers, timeout=LATE_OUTPUT_S)
            finally:
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)
        return code

    async def _ended(self, process: asyncio.subprocess.Process, readers: list[asyncio.Task[None]]) -> int:
        """The exit code, as soon as the process has one, whoever holds its pipes. Raises what a reader raised."""
        end = asyncio.create_task(process.wait())
        try:
            while process.returncode is None:
                broken = [reader for reader in readers if reader.done()]
                for reader in broken:
                    reader.result()
                waiting = {end, *readers} - set(broken)
                await asyncio.wait(waiting, timeout=EXIT_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            self.ended_at = time.monotonic()
            return process.returncode
        finally:
            end.cancel()

    async def _read(self, stream: asyncio.StreamReader, log: TextIO, take: Callable[[str], None] | None) -> None:
        async for line in _lines(stream):
            self.last_lines.append(line)
            log.write(line + "\n")
            log.flush()
            if take:
                take(line)

    def _take_stdout(self, line: str) -> None:
        if line.startswith("ready ") and not self.ready_address.done():
            self.ready_address.set_result(line.split()[-1])
        else:
            self._on_line(line)

    def terminate(self) -> None:
        """Ask it to end. Only the service itself: it ends its own children in order."""
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def signal_group(self, number: signal.Signals) -> None:
        """Signal whatever is left of its process group."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines without their ends, in pieces of MAX_LINE_BYTES at most."""
    rest = b""
    while chunk := await stream.read(MAX_LINE_BYTES):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")
        if len(rest) >= MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")
