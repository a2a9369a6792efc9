"""Real services as processes of their own, for tests: started by the `igrpo` command, ended with the test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import yaml

READY_S = 150.0


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@contextlib.asynccontextmanager
async def service(
    name: str, config: Path, *overrides: str, ready: bool = True
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`igrpo NAME CONFIG`, ready to serve; killed at the end if it has not ended by itself."""
    log = config.parent / f"{name}.log"
    with log.open("wb") as err:
        process = await asyncio.create_subprocess_exec(
            *command(name, config, overrides),
            stdout=asyncio.subprocess.PIPE,
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            if ready:
                assert process.stdout is not None
                async with asyncio.timeout(READY_S):
                    while not (line := await process.stdout.readline()).startswith(b"ready "):
                        assert line, f"{name} ended: {log.read_text()[-2000:]}"
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await asyncio.wait_for(process.wait(), 30)


def command(name: str, config: Path, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "launch.cli", name, str(config), *overrides]
