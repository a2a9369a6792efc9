"""Keeps one engine alive and is the one place that knows what it serves: state, version, revision.

INVARIANTS: `version` is what every new sample runs under; it is (0, 0) in each new life of the engine, so that the
publisher sees the loss and gives the newest weights again. A switch of weights either ends served or ends the engine.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

from protocol.errors import InternalError, StaleError, UnavailableError
from protocol.messages import UNVERSIONED, UpdatePolicy, Version
from protocol.revision import Revision
from rollout_server.admission import Admission
from rollout_server.config import RolloutServerConfig
from rollout_server.engine import EngineProcess, EngineSettings

log = logging.getLogger("rollout_server")

MAX_BACKOFF_S = 30.0
STABLE_S = 600.0
"""After so long in service an engine's end counts as a first failure again."""


class EngineLostError(Exception):
    """The engine will not come (back); the text says what it said last."""


class Supervisor:
    """One engine at a time. `run` is its life; everything else may be called while it runs."""

    def __init__(self, config: RolloutServerConfig, settings: EngineSettings, admission: Admission) -> None:
        self._config = config
        self._settings = settings
        self._admission = admission
        self._engine: EngineProcess | None = None
        self._phase = "starting"
        self._paused = False
        self._draining = False
        self._switching = asyncio.Lock()
        self.first_ready = asyncio.Event()
        self.revision = Revision()
        self.version = UNVERSIONED
        self.updates = 0
        self.restarts = 0

    @property
    def state(self) -> str:
        if self._phase != "ready":
            return self._phase
        return "paused" if self._paused else "draining" if self._draining else "ready"

    @property
    def context_tokens(self) -> int:
        """Prompt and completion together; 0 before the engine was ready once."""
        return self._engine.context_tokens if self._engine else 0

    def engine(self) -> EngineProcess:
        """The engine, if it serves. Raises UnavailableError otherwise."""
        if self._phase != "ready" or self._engine is None or self._engine.exited.is_set():
            raise UnavailableError(f"the engine is {'restarting' if self.restarts else self._phase}")
        return self._engine

    def pause(self, paused: bool) -> None:
        """Stop, or go on with, the admission of samples. Idempotent."""
        if paused:
            self._admission.close("pause")
        else:
            self._admission.open("pause")
        if paused != self._paused:
            self._paused = paused
            self.revision.bump()

    async def run(self) -> None:
        """Start the engine, and again when it dies. Ends only by cancellation, or raises EngineLostError."""
        failures = 0
        clock = asyncio.get_running_loop().time
        try:
            while True:
                since = clock()
                reason = await self._one_life()
                if not self.first_ready.is_set():
                    raise EngineLostError(reason)
                failures = 1 if clock() - since > STABLE_S else failures + 1
                if failures > self._config.max_restarts:
                    raise EngineLostError(f"{reason}; gave up after {self._config.max_restarts} restarts")
                self.restarts += 1
                backoff = min(MAX_BACKOFF_S, self._config.restart_backoff_s * 2 ** (failures - 1))
                log.error("engine lost: %s; restart %d in %.1f s", reason, self.restarts, backoff)
                await asyncio.sleep(backoff)
        except EngineLostError:
            self._enter("failed")
            raise

    async def _one_life(self) -> str:
        """From launch to death; says why it died. Cancelled, it takes the engine along."""
        settings = replace(self._settings, seed=(self._settings.seed + self.restarts) % 2**31)
        engine = await EngineProcess.launch(settings)
        try:
            await engine.wait_ready(self._config.start_timeout_s)
            self._engine = engine
            self.version = UNVERSIONED
            self._enter("ready")
            self.first_ready.set()
            await engine.exited.wait()
            reason = "the engine process died"
        except UnavailableError as error:
            reason = error.detail
        finally:
            await engine.close()
        self.version = UNVERSIONED
        self._enter("starting")
        return f"{reason}: {_last_words(engine)}"

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self.revision.bump()

    async def switch(self, version: Version, folder: Path, policy: UpdatePolicy) -> float:
        """Serve the weights in `folder` as `version`; returns the seconds generation stood still, 0 if served already.

        Not to be cancelled half-way. Raises StaleError for an older version than the served one, UnavailableError if
        the engine is down or does not drain in time; any failure of the switch itself costs the engine its life.
        """
        async with self._switching:
            engine = self.engine()
            if version == self.version:
                return 0.0
            self.refuse_older(version)
            try:
                if policy is UpdatePolicy.DRAIN:
                    await self._drain()
                paused_s = await engine.update(str(folder), version, self._config.update_timeout_s)
                if engine.exited.is_set() or engine is not self._engine:
                    raise UnavailableError("the engine went down after the switch")
            except InternalError:
                log.exception("switch to %d:%d failed inside the engine: killing it", version.incarnation, version.step)
                engine.kill()
                raise
            finally:
                self._draining = False
                self._admission.open("drain")
            self.version = version
            self.updates += 1
            self.revision.bump()
            return paused_s

    def refuse_older(self, version: Version) -> None:
        if version < self.version:
            raise StaleError(
                f"version {version.incarnation}:{version.step} is older than the served "
                f"{self.version.incarnation}:{self.version.step}"
            )

    async def _drain(self) -> None:
        self._admission.close("drain")
        self._draining = True
        self.revision.bump()
        if not await self._admission.idle(self._config.drain_timeout_s):
            raise UnavailableError(
                f"{self._admission.running} samples still run after {self._config.drain_timeout_s:g} s of draining"
            )


def _last_words(engine: EngineProcess) -> str:
    """The last line of its output that names an error, else the last line at all."""
    lines = [line for line in engine.last_lines if line.strip()]
    named = [line for line in lines if "Error" in line or "error" in line]
    return (named or lines or ["it said nothing"])[-1]
