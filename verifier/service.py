"""The verifier's service: `verify`, `info` and `health` over the wire, and the process that offers them."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter

import uvloop
from prometheus_client import CollectorRegistry

from protocol.config import RunConfig
from protocol.errors import AddressError, DeadlineError, InvalidError, OverloadedError, UnavailableError
from protocol.http import HttpStatus
from protocol.messages import Health, InfoRequest, Verdict, VerifierInfo, VerifyReply, VerifyRequest
from protocol.process import announce, serve_until_signal
from protocol.revision import Revision
from protocol.server import Call, Server, ServerLimits
from verifier.config import VerifierConfig
from verifier.grading import Glance, MathGrading
from verifier.metrics import VerifierMetrics
from verifier.pool import Batch, Pool, PoolLimits, QueueFullError, StartError

log = logging.getLogger(__name__)

GLANCES_PER_TURN = 64
"""Items looked at before the event loop gets its turn."""

RETRY_AFTER_MS = 500
"""Advice to a client that met a full queue."""

MAX_ITEMS = 4096
"""Items of one request (VerifyRequest's bound)."""

MAX_REQUESTS = 4096
"""Requests at work at once. They cost little: what is scarce are workers, which the pool's own queue shares out."""


def pool_limits(config: VerifierConfig) -> PoolLimits:
    """The pool's share of the configuration."""
    return PoolLimits(**{name: getattr(config, name) for name in PoolLimits.__dataclass_fields__})


class VerifierService:
    """Grades requests: at a glance where that suffices, the rest through the pool, verdicts streamed as they come."""

    def __init__(self, config: VerifierConfig, name: str, registry: CollectorRegistry) -> None:
        self.config = config
        self.name = name
        self.metrics = VerifierMetrics(registry)
        self.grading = MathGrading(config)
        self.statuses: Counter[str] = Counter()
        observe = self.metrics.queue_seconds.observe
        self.pool = Pool(pool_limits(config), on_change=self._pool_changed, on_dequeue=observe)
        self.metrics.watch(self.pool)
        self._tasks = ["math"]
        self._revision = Revision()
        self._was_ready = False

    async def verify(self, call: Call, request: VerifyRequest) -> VerifyReply:
        """Each item is answered exactly once, in the order in which verdicts are reached."""
        self._check(request)
        decided: list[Verdict] = []
        pending: list[Glance] = []
        for number, item in enumerate(request.items, start=1):
            glance = self.grading.glance(item)
            if glance.verdict is None:
                pending.append(glance)
            else:
                decided.append(self._count(glance.verdict, glance.source))
            if number % GLANCES_PER_TURN == 0:
                await asyncio.sleep(0)
        if not pending:
            return VerifyReply(verdicts=decided)
        batch = self._submit(pending)
        try:
            if decided:
                await call.reply(VerifyReply(verdicts=decided))
            return await self._stream(call, batch, pending)
        finally:
            self.pool.cancel(batch)

    async def _stream(self, call: Call, batch: Batch, pending: list[Glance]) -> VerifyReply:
        while True:
            try:
                async with asyncio.timeout(max(0.0, call.remaining_s)):
                    outcomes = await batch.take()
            except TimeoutError:
                raise DeadlineError(f"{batch.outstanding} items were not graded in time") from None
            verdicts = []
            for index, outcome in outcomes:
                self.metrics.grading_seconds.observe(outcome.seconds)
                verdicts.append(self._count(self.grading.conclude(pending[index], outcome), "worker"))
            if not batch.outstanding:
                return VerifyReply(verdicts=verdicts)
            await call.reply(VerifyReply(verdicts=verdicts))

    async def info(self, _call: Call, request: InfoRequest) -> VerifierInfo:
        """State of the service; with `known`, once readiness has changed or `wait_ms` has passed."""
        await self._revision.wait(request)
        return VerifierInfo(
            revision=self._revision.value,
            name=self.name,
            tasks=self._tasks,
            workers=self.config.workers,
            queued=self.pool.queued,
            max_items=min(MAX_ITEMS, self.config.max_queued),
            statuses=dict(self.statuses),
        )

    def health(self) -> Health:
        """Ready while a worker is there and the queue has room."""
        reason = self.pool.problem
        if not reason and self.pool.queued >= self.config.max_queued:
            reason = "the queue is full"
        return Health(alive=True, ready=not reason, reason=reason)

    def _check(self, request: VerifyRequest) -> None:
        if len({item.id for item in request.items}) != len(request.items):
            raise InvalidError("item ids repeat within the request")
        unknown = next((item.task for item in request.items if item.task and item.task not in self._tasks), None)
        if len(request.items) > self.config.max_queued:
            raise InvalidError(f"{len(request.items)} items are more than the {self.config.max_queued} of a full queue")
        if unknown is not None:
            raise InvalidError(f"unknown task {unknown!r}; this verifier has {', '.join(self._tasks)}")

    def _submit(self, pending: list[Glance]) -> Batch:
        try:
            return self.pool.submit([glance.task for glance in pending if glance.task is not None])
        except QueueFullError as error:
            self.metrics.overloaded.inc()
            raise OverloadedError(str(error), retry_after_ms=RETRY_AFTER_MS) from None
        except StartError as error:
            raise UnavailableError(str(error)) from None

    def _count(self, verdict: Verdict, source: str) -> Verdict:
        self.statuses[verdict.status.value] += 1
        self.metrics.verdicts.labels(verdict.status.value, source).inc()
        return verdict

    def _pool_changed(self) -> None:
        ready = not self.pool.problem
        if ready != self._was_ready:
            self._was_ready = ready
            self._revision.bump()


async def _serve(config: VerifierConfig, run: RunConfig) -> None:
    registry = CollectorRegistry()
    service = VerifierService(config, f"{run.name}-verifier", registry)
    server = Server(
        "verifier",
        config.address,
        limits=ServerLimits(max_concurrent=MAX_REQUESTS),
        health=service.health,
        registry=registry,
        insecure=config.insecure,
    )
    server.route("verify", VerifyRequest, service.verify)
    server.route("info", InfoRequest, service.info, control=True)
    http = HttpStatus(config.http_address, service.health, registry) if config.http_address else None
    try:
        await service.pool.start()
        address = await server.start()
        if http is not None:
            await http.start()
        if not service.pool.isolated:
            log.warning("this system gives worker processes no network namespace: they run with the network in reach")
        announce("verifier", address)
        await serve_until_signal(server, drain_s=config.drain_s)
    finally:
        if http is not None:
            await http.close()
        await server.close()
        await service.pool.close()


def main(config: VerifierConfig, run: RunConfig) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. Nothing is left behind, workers included."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        uvloop.run(_serve(config, run))
    except (AddressError, StartError) as error:
        print(f"verifier: {error}", file=sys.stderr)
        return 1
    return 0
