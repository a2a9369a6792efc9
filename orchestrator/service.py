"""The orchestrator's process: its endpoints, its HTTP paths, and one run of the conductor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry, Gauge

from orchestrator.conductor import Conductor
from orchestrator.config import Addresses, OrchestratorConfig
from orchestrator.data import DataError, Problem, load_problems
from orchestrator.dispatch import Dispatcher
from orchestrator.grading import Grader
from orchestrator.membership import Membership
from orchestrator.replicas import ReplicaWatch
from orchestrator.report import Reporter
from protocol.address import AddressError
from protocol.clients import TrainerClient, VerifierClient
from protocol.config import RunConfig
from protocol.errors import ProtocolError
from protocol.http import HttpStatus
from protocol.messages import (
    Health,
    InfoRequest,
    OrchestratorInfo,
    ReplicaEntry,
    ReplicaHello,
    ReplicaWelcome,
)
from protocol.process import announce
from protocol.server import Call, Server

log = logging.getLogger(__name__)

TERM = 1
LINGER_S = 1.0  # the trainer and the replicas may still ask for info while they end


def main(config: OrchestratorConfig, run: RunConfig, addresses: Addresses) -> int:
    """Run to the end. 0: trained and summarised; 1: failed, with one line on stderr; 130: stopped by a signal."""
    try:
        problems = load_problems(config.data.train, config.data, split=config.data.train_split)
        heldout = (
            load_problems(config.data.heldout, config.data, split=config.data.heldout_split)
            if config.data.heldout
            else []
        )
        return uvloop.run(_serve(config, run, addresses, problems, heldout))
    except (DataError, AddressError, ProtocolError, OSError) as error:
        print(f"orchestrator: {error}", file=sys.stderr, flush=True)
        return 1


async def _serve(
    config: OrchestratorConfig, run: RunConfig, addresses: Addresses, problems: list[Problem], heldout: list[Problem]
) -> int:
    registry = CollectorRegistry()
    membership = Membership(config.deadlines.replica_silent_s)
    dispatcher = Dispatcher(membership, max_tries=config.max_attempts + 2)
    async with contextlib.AsyncExitStack() as stack:
        trainer = TrainerClient(addresses.trainer, name="orchestrator", run=run.name, term=TERM)
        stack.push_async_callback(trainer.close)
        verifier = VerifierClient(addresses.verifier, name="orchestrator", run=run.name)
        stack.push_async_callback(verifier.close)
        reporter = Reporter(run.folder, sys.stdout)
        stack.callback(reporter.close)
        grader = Grader(verifier, task=config.data.task, timeout_s=config.deadlines.verify_s)
        conductor = Conductor(
            config,
            run,
            problems=problems,
            heldout=heldout,
            trainer=trainer,
            grader=grader,
            dispatcher=dispatcher,
            reporter=reporter,
        )
        stack.push_async_callback(conductor.close)
        watch = ReplicaWatch(dispatcher, conductor.changed, conductor.revision.bump)
        stack.push_async_callback(watch.close)
        server = Server(
            "orchestrator",
            config.address,
            health=lambda: _health(conductor),
            registry=registry,
            insecure=config.insecure,
        )

        async def hello(call: Call, body: ReplicaHello) -> ReplicaWelcome:
            return watch.hello(body)

        async def info(call: Call, body: InfoRequest) -> OrchestratorInfo:
            await conductor.revision.wait(body)
            return _info(conductor, dispatcher, run)

        server.route("hello", ReplicaHello, hello, control=True)
        server.route("info", InfoRequest, info, control=True)
        address = await server.start()
        stack.push_async_callback(server.close)
        if config.http_address:
            _gauges(conductor, registry)
            http = HttpStatus(config.http_address, lambda: _health(conductor), registry)
            await http.start()
            stack.push_async_callback(http.close)
        announce("orchestrator", address)
        summary = await _until_signal(conductor)
        if summary is None:
            return 130
        path = reporter.summary(summary)
        reporter.say(f"summary: {path}")
        await asyncio.sleep(LINGER_S)
        return 0


async def _until_signal(conductor: Conductor) -> dict[str, Any] | None:
    """The run's summary, or None if SIGTERM or SIGINT came first."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    run, stopped = asyncio.create_task(conductor.run()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({run, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return run.result() if run.done() else None
    finally:
        run.cancel()
        stopped.cancel()
        await asyncio.gather(run, stopped, return_exceptions=True)


def _health(conductor: Conductor) -> Health:
    return Health(alive=True, ready=True, reason=conductor.state)


def _info(conductor: Conductor, dispatcher: Dispatcher, run: RunConfig) -> OrchestratorInfo:
    counts: dict[str, int] = {}
    for group in conductor.pipeline.groups.values():
        counts[group.stage.value] = counts.get(group.stage.value, 0) + 1
    return OrchestratorInfo(
        revision=conductor.revision.value,
        run=run.name,
        term=TERM,
        replicas=[ReplicaEntry(name=r.name, address=r.address) for r in dispatcher.membership.replicas.values()],
        state=conductor.state,
        counts=counts,
    )


def _gauges(conductor: Conductor, registry: CollectorRegistry) -> None:
    Gauge("igrpo_outstanding_groups", "Groups admitted and not yet done.", registry=registry).set_function(
        lambda: conductor.pipeline.outstanding
    )
    Gauge("igrpo_policy_step", "Policy updates so far.", registry=registry).set_function(lambda: conductor.version.step)
