"""Rank 0's side of the wire, in a thread with an event loop of its own: batches in, weights and results out.

Who owns what: everything here belongs to the loop's thread, except `_orders` (a bounded queue of the trainer's orders)
and the methods under "training thread", which only put something into a queue or schedule a call in the loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from protocol.clients import OrchestratorClient
from protocol.config import RunConfig
from protocol.errors import InternalError, RefusedError, UnavailableError
from protocol.http import HttpStatus
from protocol.messages import (
    FinishReply,
    FinishRequest,
    Health,
    InfoRequest,
    PushReceived,
    PushRequest,
    StepDone,
    TrainerHello,
    TrainerState,
    Version,
)
from protocol.revision import Revision
from protocol.server import Call, Server, ServerLimits
from trainer.batch import batch_of
from trainer.config import TrainerConfig
from trainer.incarnation import Lineage
from trainer.intake import Bounds, Intake
from trainer.publisher import Publisher
from trainer.ranks import Order
from trainer.transports.base import Snapshot, Transport

log = logging.getLogger("trainer")

LIMITS = ServerLimits(
    max_message_bytes=1 << 30, hard_frame_bytes=1 << 30, max_header_bytes=1 << 28, max_frames=1 << 18, max_concurrent=64
)
"""A push is one message: a whole batch, with two arrays per sample."""

RESULTS_KEPT = 64
"""Steps whose metrics can be told again to an orchestrator that asks twice."""

START_TIMEOUT_S = 30.0
CLOSE_DRAIN_S = 2.0
"""How long the last replies may take to be fetched when the trainer ends."""


class Desk:
    """Start it, then call the methods of the training thread, then `close`. Raises what start-up raised."""

    def __init__(
        self, config: TrainerConfig, run: RunConfig, lineage: Lineage, transport: Transport, orchestrator_address: str
    ) -> None:
        self._config = config
        self._run = run
        self._lineage = lineage
        self._transport = transport
        self._orchestrator_address = orchestrator_address
        self._intake: Intake | None = None
        batches = max(config.max_queued_batches, run.max_staleness + 1)
        self._orders: queue.Queue[tuple[Order, bytes]] = queue.Queue(batches + 2)
        self._stopping = threading.Event()
        self._state = "starting"
        self._version = Version(lineage.incarnation, lineage.branch_step)
        self._published = Version(0, 0)
        self._results: dict[int, asyncio.Future[StepDone]] = {}
        self._finished: asyncio.Future[FinishReply] | None = None
        self._thread = threading.Thread(target=self._in_thread, name="trainer desk", daemon=True)
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self.address = ""

    # -- training thread -----------------------------------------------------------------------------------------

    def start(self) -> str:
        """Listen; returns the real address. Raises AddressError and whatever else went wrong."""
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S):
            raise TimeoutError("the trainer's service did not start in time")
        if self._failure:
            raise self._failure
        return self.address

    def open(self, bounds: Bounds) -> None:
        """The model is loaded: take batches from now on."""
        self._intake = Intake(self._lineage, bounds)
        self._call(self._set_state, "waiting")

    def next_order(self) -> tuple[Order, bytes]:
        """The next order; WAIT if none came within idle_s; STOP as soon as the training thread asks again."""
        if not self._stopping.is_set():
            try:
                order = self._orders.get(timeout=self._config.deadlines.idle_s)
            except queue.Empty:
                self._check_alive()
                order = (Order.WAIT, b"")
            if not self._stopping.is_set():
                if order[0] is Order.TRAIN:
                    self._call(self._set_state, "training")
                return order
        return Order.STOP, b""

    def request_stop(self) -> None:
        """May be called from any thread."""
        self._stopping.set()
        if self._orders.empty():
            self._orders.put_nowait((Order.STOP, b""))

    def publish(self, snapshot: Snapshot) -> None:
        """Hand the newest version to the publisher."""
        self._call(self._on_publish, snapshot)

    def trained(self, step: int, version: Version, metrics: dict[str, float]) -> None:
        """The batch of `step` has been trained and `version` exists."""
        self._call(self._on_trained, step, StepDone(version=version, metrics=metrics))

    def exported(self, path: Path, version: Version) -> None:
        """The final model lies at `path`; the trainer ends when the orchestrator has been told."""
        self._call(self._on_exported, FinishReply(path=str(path), version=version))

    def fail(self, error: BaseException) -> None:
        """Training cannot go on: whoever waits for a result hears why, before `close`."""
        if self._thread.is_alive() and self._failure is None:
            self._call(self._on_failed, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """End the service and its thread."""
        self.request_stop()
        if self._thread.is_alive():
            self._call(self._closing.set)
            self._thread.join(CLOSE_DRAIN_S + 10.0)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._check_alive()
        self._loop.call_soon_threadsafe(function, *arguments)

    def _check_alive(self) -> None:
        if self._failure:
            raise RuntimeError(f"the trainer's service has ended: {self._failure}") from self._failure

    # -- the loop's thread ---------------------------------------------------------------------------------------

    def _in_thread(self) -> None:
        try:
            uvloop.run(self._main())
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._revision = Revision()
        deadlines, config = self._config.deadlines, self._config
        origin = {"run": self._run.name, "incarnation": self._lineage.incarnation}
        orchestrator = OrchestratorClient(self._orchestrator_address, name="trainer", **origin)
        self._publisher = Publisher(
            orchestrator,
            self._transport,
            **origin,
            request_s=deadlines.request_s,
            transfer_s=deadlines.transfer_s,
            poll_s=config.publish.poll_s,
        )
        server = Server("trainer", config.address, limits=LIMITS, health=self._health, insecure=config.insecure)
        server.route("push", PushRequest, self._push)
        server.route("finish", FinishRequest, self._finish, control=True)
        server.route("hello", TrainerHello, self._hello, control=True)
        server.route("info", InfoRequest, self._info, control=True)
        self.address = await server.start()
        http = HttpStatus(config.http_address, server.health, server.registry) if config.http_address else None
        publishing: asyncio.Task[None] | None = None
        try:
            if http:
                await http.start()
            publishing = asyncio.create_task(self._publisher.run(), name="publisher")
            closing = asyncio.create_task(self._closing.wait(), name="closing")
            self._started.set()
            await asyncio.wait((publishing, closing), return_when=asyncio.FIRST_COMPLETED)
            closing.cancel()
            if publishing.done():
                publishing.result()
        finally:
            if publishing:
                await _cancelled(publishing, deadlines.request_s)
            if self._state == "finished":
                self._publisher.discard()
            if http:
                await http.close()
            await server.close(CLOSE_DRAIN_S)
            await orchestrator.close()

    def _health(self) -> Health:
        ready = self._state in ("waiting", "training")
        return Health(alive=True, ready=ready, reason="" if ready else self._state)

    async def _push(self, call: Call, body: PushRequest) -> StepDone:
        if self._intake is None or self._state == "finished" or self._stopping.is_set():
            raise UnavailableError(f"the trainer is {'stopping' if self._stopping.is_set() else self._state}")
        if self._finished is not None:
            raise RefusedError("a batch after finish")
        if self._intake.accept(body):
            self._results[body.step] = self._loop.create_future()
            self._orders.put_nowait((Order.TRAIN, batch_of(body).encode()))
            self._revision.bump()
        await call.reply(PushReceived(step=body.step))
        if body.step not in self._results:
            return StepDone(version=Version(body.incarnation, body.step + 1), metrics={})
        return await asyncio.shield(self._results[body.step])

    async def _finish(self, call: Call, body: FinishRequest) -> FinishReply:
        if self._intake is None:
            raise UnavailableError(f"the trainer is {self._state}")
        if self._finished is None:
            self._finished = self._loop.create_future()
            self._orders.put_nowait((Order.EXPORT, b""))
        return await asyncio.shield(self._finished)

    async def _hello(self, call: Call, body: TrainerHello) -> TrainerState:
        if body.run != self._run.name:
            raise RefusedError(f"this trainer belongs to run {self._run.name!r}, not {body.run!r}")
        return self._trainer_state()

    async def _info(self, call: Call, body: InfoRequest) -> TrainerState:
        await self._revision.wait(body)
        return self._trainer_state()

    def _trainer_state(self) -> TrainerState:
        return TrainerState(
            revision=self._revision.value,
            version=self._version,
            next_step=self._intake.next_step if self._intake else self._lineage.branch_step,
            total_steps=self._run.steps,
            max_staleness=self._run.max_staleness,
            state=self._state,
            ledger=self._intake.ledger if self._intake else [],
            published=self._published,
        )

    def _set_state(self, state: str) -> None:
        if self._state != state:
            self._state = state
            self._revision.bump()

    def _on_publish(self, snapshot: Snapshot) -> None:
        self._version = self._published = snapshot.version
        self._publisher.offer(snapshot)
        self._revision.bump()

    def _on_trained(self, step: int, done: StepDone) -> None:
        assert self._intake is not None
        self._intake.done(step)
        done.metrics.update(self._publisher.metrics())
        self._results[step].set_result(done)
        self._results.pop(step - RESULTS_KEPT, None)
        self._set_state("waiting")
        self._revision.bump()

    def _on_failed(self, reason: str) -> None:
        self._set_state("failed")
        for waiting in [*self._results.values(), self._finished]:
            if waiting is not None and not waiting.done():
                waiting.set_exception(InternalError(f"the trainer failed: {reason}"))
                waiting.exception()  # nobody may be waiting; then nobody need hear of it

    def _on_exported(self, reply: FinishReply) -> None:
        assert self._finished is not None
        self._set_state("finished")
        self._finished.set_result(reply)
        self.request_stop()


async def _cancelled(task: asyncio.Task[Any], timeout_s: float) -> None:
    """Cancel the task and wait until it has ended."""
    task.cancel()
    await asyncio.wait((task,), timeout=timeout_s)
