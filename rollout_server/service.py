"""The rollout server's process: endpoints, start and end, heartbeats to the orchestrator."""

from __future__ import annotations

import asyncio
import logging
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry, Gauge

from protocol.clients import OrchestratorClient
from protocol.config import ModelConfig, RunConfig
from protocol.errors import AddressError, InvalidError, ProtocolError, UnavailableError
from protocol.http import HttpStatus
from protocol.messages import (
    Ack,
    Body,
    DraftRequest,
    GenerateRequest,
    Health,
    InfoRequest,
    PauseRequest,
    RefineRequest,
    ReplicaHello,
    RolloutInfo,
    WeightsAbort,
    WeightsBegin,
    WeightsChunk,
    WeightsCommit,
    WeightsLoad,
)
from protocol.process import announce, stop_signal
from protocol.server import Call, Handler, Server
from rollout_server.admission import Admission, SampleClass
from rollout_server.config import RolloutServerConfig
from rollout_server.engine import EngineSettings
from rollout_server.generation import Generation
from rollout_server.supervisor import EngineLostError, Supervisor
from rollout_server.templates import Prompter, TemplateSettings
from rollout_server.tokenizer import ModelTokenizer
from rollout_server.updates import Updates
from rollout_server.weights import ModelShape, Staging

log = logging.getLogger("rollout_server")

HELLO_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Endpoints:
    """What needs the tokenizer and the engine, and so exists only once both are there."""

    generation: Generation
    updates: Updates


_SAMPLING: list[tuple[str, type[Body], Callable[[Endpoints], Handler[Any]], SampleClass]] = [
    ("draft", DraftRequest, lambda e: e.generation.draft, SampleClass.DRAFT),
    ("refine", RefineRequest, lambda e: e.generation.refine, SampleClass.REFINE),
    ("generate", GenerateRequest, lambda e: e.generation.generate, SampleClass.GENERATE),
]
_WEIGHTS: list[tuple[str, type[Body], Callable[[Endpoints], Handler[Any]]]] = [
    ("weights.begin", WeightsBegin, lambda e: e.updates.begin),
    ("weights.chunk", WeightsChunk, lambda e: e.updates.chunk),
    ("weights.commit", WeightsCommit, lambda e: e.updates.commit),
    ("weights.abort", WeightsAbort, lambda e: e.updates.abort),
    ("weights.load", WeightsLoad, lambda e: e.updates.load),
]


class RolloutService:
    """One replica: `start`, then `run` until it is lost or cancelled, then `close`, always."""

    def __init__(self, config: RolloutServerConfig, model: ModelConfig, run: RunConfig) -> None:
        self.config = config
        self._model = model
        self._run = run
        self._registry = CollectorRegistry()
        self._admission = Admission(config.capacity, config.max_waiting)
        self.supervisor = Supervisor(config, _engine_settings(config, model, run), self._admission)
        self.server = Server(
            config.name, config.address, health=self._health, registry=self._registry, insecure=config.insecure
        )
        self._http: HttpStatus | None = None
        self._endpoints: Endpoints | None = None
        self._engine: asyncio.Task[None] | None = None
        self._greeting: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Bind, start the engine, load the tokenizer; returns the address. Raises ProtocolError, EngineLostError,
        OSError or ValueError, each with a text that names what is wrong."""
        _check_model(self._model.path)
        self._add_routes()
        address = await self.server.start()
        if self.config.http_address:
            self._http = HttpStatus(self.config.http_address, self._health, self._registry)
            await self._http.start()
        self._engine = asyncio.create_task(self.supervisor.run())
        tokenizer = await asyncio.to_thread(ModelTokenizer, self._model)
        shape = await asyncio.to_thread(ModelShape.of_folder, Path(self._model.path), tied=tokenizer.tied_embeddings)
        staging = await asyncio.to_thread(
            Staging, f"{self._run.name}-{self.config.name}", self._staging_places(), self.config.staging_budget_bytes
        )
        await self._engine_ready()
        generation = self._make_generation(tokenizer)
        self._endpoints = Endpoints(generation, Updates(self.supervisor, staging, shape))
        self._add_gauges(generation)
        self.supervisor.revision.bump()
        return address

    async def run(self) -> None:
        """Until the engine is lost for good (EngineLostError)."""
        assert self._engine is not None
        await asyncio.shield(self._engine)

    def greet(self, orchestrator_address: str) -> None:
        """Say `hello` every few seconds from now on; an orchestrator that is not there is waited for."""
        self._greeting = asyncio.create_task(self._greet(orchestrator_address))

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new work, let what runs end within drain_s, then take everything down, the engine included."""
        tasks = [task for task in (self._greeting, self._engine) if task is not None]
        if self._greeting is not None:
            self._greeting.cancel()
        await self.server.close(drain_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._endpoints is not None:
            await self._endpoints.updates.close()
        if self._http is not None:
            await self._http.close()

    # -- start ---------------------------------------------------------------------------------------------------

    def _add_routes(self) -> None:
        for kind, body, endpoint, order in _SAMPLING:
            self.server.route(kind, body, self._when_ready(endpoint), priority=-order)
        for kind, body, endpoint in _WEIGHTS:
            self.server.route(kind, body, self._when_ready(endpoint), control=True)
        self.server.route("pause", PauseRequest, self._pause, control=True)
        self.server.route("resume", PauseRequest, self._resume, control=True)
        self.server.route("info", InfoRequest, self._info, control=True)

    def _when_ready(self, endpoint: Callable[[Endpoints], Handler[Any]]) -> Handler[Any]:
        async def handler(call: Call, request: Body) -> Body:
            if self._endpoints is None:
                raise UnavailableError("starting")
            return await endpoint(self._endpoints)(call, request)

        return handler

    async def _engine_ready(self) -> None:
        """Until the engine serves; raises EngineLostError if it never will. Its own deadline is start_timeout_s."""
        assert self._engine is not None
        ready = asyncio.create_task(self.supervisor.first_ready.wait())
        await asyncio.wait([self._engine, ready], return_when=asyncio.FIRST_COMPLETED)
        if self._engine.done():
            ready.cancel()
            self._engine.result()

    def _make_generation(self, tokenizer: ModelTokenizer) -> Generation:
        config, context = self.config, self.supervisor.context_tokens
        if config.context_tokens > context:
            raise InvalidError(f"context_tokens {config.context_tokens}: the engine holds at most {context}")
        settings = TemplateSettings(
            kind=config.template,
            draft_prefix=config.draft_prefix,
            draft_suffix=config.draft_suffix,
            improve_request=config.improve_request,
            system_text=config.system_text,
            overflow=config.draft_overflow,
            draft_budget=config.draft_budget_tokens,
            context_tokens=context,
        )
        prompter = Prompter(tokenizer, settings)
        return Generation(self.supervisor, self._admission, tokenizer, prompter, context, self._registry)

    def _staging_places(self) -> list[Path]:
        if self.config.staging_dir is not None:
            return [self.config.staging_dir]
        memory = Path("/dev/shm")
        return [*([memory] if memory.is_dir() else []), self._run.folder / "staging"]

    def _add_gauges(self, generation: Generation) -> None:
        supervisor, admission = self.supervisor, self._admission
        for name, text, read in (
            ("rollout_running_samples", "Samples that hold a place.", lambda: admission.running),
            ("rollout_waiting_samples", "Samples that wait for a place.", lambda: admission.waiting),
            ("rollout_version_incarnation", "Served incarnation.", lambda: supervisor.version.incarnation),
            ("rollout_version_step", "Served step.", lambda: supervisor.version.step),
            ("rollout_weight_updates", "Weights taken since the start.", lambda: supervisor.updates),
            ("rollout_engine_restarts", "Engines lost since the start.", lambda: supervisor.restarts),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)

    # -- control -------------------------------------------------------------------------------------------------

    def _health(self) -> Health:
        state = self.supervisor.state if self._endpoints else "starting"
        return Health(alive=True, ready=state in ("ready", "draining"), reason="" if state == "ready" else state)

    async def _pause(self, call: Call, request: PauseRequest) -> Ack:
        self.supervisor.pause(True)
        return Ack()

    async def _resume(self, call: Call, request: PauseRequest) -> Ack:
        self.supervisor.pause(False)
        return Ack()

    async def _info(self, call: Call, request: InfoRequest) -> RolloutInfo:
        supervisor = self.supervisor
        await supervisor.revision.wait(request)
        return RolloutInfo(
            revision=supervisor.revision.value,
            name=self.config.name,
            version=supervisor.version,
            state=supervisor.state if self._endpoints else "starting",
            model=self._model.path,
            context_tokens=supervisor.context_tokens,
            capacity=self.config.capacity,
            running=self._admission.running,
            draft_budget_tokens=self.config.draft_budget_tokens,
            generated_tokens=self._endpoints.generation.generated_tokens if self._endpoints else 0,
            weight_updates=supervisor.updates,
        )

    async def _greet(self, orchestrator_address: str) -> None:
        hello = ReplicaHello(
            name=self.config.name,
            address=self.config.advertise_address or self.server.address,
            capacity=self.config.capacity,
            context_tokens=self.supervisor.context_tokens,
        )
        client = OrchestratorClient(orchestrator_address, name=self.config.name, run=self._run.name)
        said = ""
        try:
            while True:
                try:
                    welcome = await client.hello(hello, timeout_s=HELLO_TIMEOUT_S)
                    pause_s = min(self.config.heartbeat_s, welcome.heartbeat_s)
                    news = "registered" if welcome.accepted else f"not accepted: {welcome.reason}"
                except ProtocolError as error:
                    pause_s, news = self.config.heartbeat_s, f"no answer ({error.code.value})"
                if news != said:
                    log.info("orchestrator %s: %s", orchestrator_address, news)
                    said = news
                await asyncio.sleep(pause_s)
        finally:
            await client.close()


def _engine_settings(config: RolloutServerConfig, model: ModelConfig, run: RunConfig) -> EngineSettings:
    return EngineSettings(
        model_path=model.path,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        device=config.device,
        capacity=config.capacity,
        context_tokens=config.context_tokens,
        max_total_tokens=config.max_total_tokens,
        seed=(run.seed + zlib.crc32(config.name.encode())) % 2**31,  # replicas must not sample the same
        engine_args=dict(config.engine_args),
    )


def _check_model(path: str) -> None:
    """A path that can only be a folder must be one; anything else is for the hub to know."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InvalidError(f"model {path}: no config.json in this folder")
    elif folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise InvalidError(f"model {path}: no such folder")


async def _work(service: RolloutService, orchestrator_address: str | None) -> None:
    announce("rollout_server", await service.start())
    if orchestrator_address:
        service.greet(orchestrator_address)
    await service.run()


async def _serve(
    config: RolloutServerConfig, model: ModelConfig, run: RunConfig, orchestrator_address: str | None
) -> None:
    service = RolloutService(config, model, run)
    stop = asyncio.create_task(stop_signal())
    work = asyncio.create_task(_work(service, orchestrator_address))
    try:
        await asyncio.wait([stop, work], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        stop.cancel()
        work.cancel()
        await asyncio.gather(stop, work, return_exceptions=True)
        await service.close(config.stop_timeout_s)


def main(
    config: RolloutServerConfig, model: ModelConfig, run: RunConfig, orchestrator_address: str | None = None
) -> int:
    """Serve until SIGTERM or SIGINT (0), or until there is nothing to serve with (1, one line on stderr)."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s %(levelname)s {config.name}: %(message)s"
    )
    try:
        uvloop.run(_serve(config, model, run, orchestrator_address))
    except (ProtocolError, AddressError, EngineLostError, OSError, ValueError) as error:
        detail = error.detail if isinstance(error, ProtocolError) else str(error)
        print(f"rollout server {config.name}: {detail.strip().splitlines()[0]}", file=sys.stderr, flush=True)
        return 1
    return 0
