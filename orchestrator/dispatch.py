"""Requests to rollout servers: who gets which, when, and what happens when one fails. The shell around membership.

INVARIANTS
- Waiting requests are served by (priority, order); the replicas where one only lacks room are held for it.
- Up to EVALUATION_SHARE evaluation requests go first, so that an evaluation ends while training goes on.
- The first result per sample index wins; only indexes that are still missing are issued again elsewhere.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np

from orchestrator.membership import Membership, Replica
from protocol.clients import RolloutClient
from protocol.errors import ErrorCode, InternalError, ProtocolError, UnavailableError
from protocol.messages import DraftRequest, GenerateRequest, GenerationDone, RefineRequest, Sample

REFINE, DRAFT, GENERATE = 0, 1, 2  # priorities: a prompt that is under way goes before a new one

EVALUATION_SHARE = 16

MAX_LOGPROB = 1e-3  # rounding may lift a certain token's log-prob above 0 by so much

LOCAL_CODES = frozenset({ErrorCode.INVALID, ErrorCode.REFUSED, ErrorCode.VERSION_MISMATCH})  # the same everywhere


@dataclass(order=True)
class Ticket:
    """A request that waits for a replica. `order`: admission number; `fresh(step)`: whether weights of it will do."""

    priority: int
    order: int
    samples: int = field(compare=False)
    fresh: Callable[[int], bool] = field(compare=False)
    prefer: str | None = field(compare=False, default=None)


@dataclass(eq=False)
class _Waiter:
    """Each is itself only: two evaluations may hold equal tickets."""

    ticket: Ticket
    future: asyncio.Future[Replica]

    def __lt__(self, other: _Waiter) -> bool:
        return self.ticket < other.ticket


@dataclass(frozen=True)
class Generation:
    """All samples of one request. prompt_ids: int32 [T] as the engine saw them; replica: who served the last part."""

    prompt_ids: np.ndarray
    replica: str


class Dispatcher:
    """Hands requests to replicas. `incarnation` is the lineage that weights must be on."""

    def __init__(self, membership: Membership, *, max_tries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.membership = membership
        self.clients: dict[str, RolloutClient] = {}
        self.incarnation = 0
        self._max_tries = max_tries
        self._clock = clock
        self._waiting: list[_Waiter] = []
        self._evaluating = 0
        self._timer: asyncio.TimerHandle | None = None

    def pump(self) -> None:
        """Serve whoever can be served. Call whenever a version, a replica or the pipeline changed."""
        now = self._clock()
        self._waiting = [waiter for waiter in self._waiting if not waiter.future.done()]
        usable = {r.name for r in self.membership.replicas.values() if self.membership.usable(r, self.incarnation, now)}
        held: set[str] = set()
        for waiter in self._line():
            if held >= usable:
                break
            ticket = waiter.ticket
            replica = self._pick(ticket, now, held)
            if replica is not None:
                replica.in_flight += ticket.samples
                self._evaluating += ticket.priority == GENERATE
                self._waiting.remove(waiter)
                waiter.future.set_result(replica)
            else:
                held |= {name for name in usable if ticket.fresh(self.membership.replicas[name].version.step)}
        wake = self.membership.next_unblock(now)
        if self._waiting and wake is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wake - now) + 0.01, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.pump()

    def _line(self) -> list[_Waiter]:
        """Who waits, in the order in which they are served."""
        first = bisect.bisect_left(self._waiting, GENERATE, key=lambda waiter: waiter.ticket.priority)
        ahead = first + max(0, EVALUATION_SHARE - self._evaluating)
        return [*self._waiting[first:ahead], *self._waiting[:first], *self._waiting[ahead:]]

    def _pick(self, ticket: Ticket, now: float, held: set[str]) -> Replica | None:
        return self.membership.pick(
            ticket.samples, incarnation=self.incarnation, fresh=ticket.fresh, prefer=ticket.prefer, now=now, held=held
        )

    def _give_back(self, replica: Replica, ticket: Ticket) -> None:
        replica.in_flight -= ticket.samples
        self._evaluating -= ticket.priority == GENERATE

    @contextlib.asynccontextmanager
    async def lease(self, ticket: Ticket) -> AsyncIterator[Replica]:
        """Wait for a replica with room for the request and hold that room.

        How long that may take is the conductor's to watch: it ends the run when nobody serves it for publish_s.
        """
        waiter = _Waiter(ticket, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, waiter)
        self.pump()
        try:
            replica = await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled():
                self._give_back(waiter.future.result(), ticket)
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            raise
        try:
            yield replica
        finally:
            self._give_back(replica, ticket)
            self.pump()

    async def generate(
        self,
        ticket: Ticket,
        request: Callable[[int, int], DraftRequest | RefineRequest | GenerateRequest],
        *,
        timeout_s: float,
        on_start: Callable[[Replica], None],
        on_sample: Callable[[int, Sample], None],
    ) -> Generation:
        """Get samples 0..n-1 of `request(first_index, n)`, wherever they can be had; each goes to `on_sample` at once.

        Raises the last ProtocolError after `max_tries` failed tries, or at once one that would be the same everywhere.
        """
        missing = list(range(ticket.samples))
        tries = 0
        while True:
            wanted = list(missing) or [0]  # all samples came and the last reply did not: one more, for the prompt's ids
            part = Ticket(ticket.priority, ticket.order, len(wanted), ticket.fresh, ticket.prefer)
            async with self.lease(part) as replica:
                on_start(replica)
                error, done = None, None
                try:
                    done = await self._stream(replica, request(0, len(wanted)), wanted, missing, timeout_s, on_sample)
                    self.membership.succeeded(replica)
                except ProtocolError as failure:
                    if failure.code in LOCAL_CODES:
                        raise
                    error = failure
                    self.membership.failed(replica, self._clock())
            if done is not None and not missing:
                return Generation(done.prompt_ids, replica.name)
            tries += 1
            if tries >= self._max_tries:
                raise error or UnavailableError(f"{replica.name}: {len(missing)} samples missing after {tries} tries")

    async def _stream(
        self,
        replica: Replica,
        request: DraftRequest | RefineRequest | GenerateRequest,
        wanted: list[int],
        missing: list[int],
        timeout_s: float,
        on_sample: Callable[[int, Sample], None],
    ) -> GenerationDone:
        client = self.clients.get(replica.name)
        if client is None:
            raise UnavailableError(f"{replica.name} has left")
        if isinstance(request, RefineRequest):
            stream = client.refine(request, timeout_s=timeout_s)
        elif isinstance(request, GenerateRequest):
            stream = client.generate(request, timeout_s=timeout_s)
        else:
            stream = client.draft(request, timeout_s=timeout_s)
        async with contextlib.aclosing(stream) as replies:
            async for reply in replies:
                if isinstance(reply, GenerationDone):
                    return reply
                if not 0 <= reply.index < len(wanted):
                    raise InternalError(f"{replica.name} sent sample {reply.index} of {len(wanted)}")
                self._check(replica, reply)
                index = wanted[reply.index]
                if index in missing:
                    missing.remove(index)
                    on_sample(index, reply)
        raise InternalError(f"{replica.name} ended a request without a last reply")

    def _check(self, replica: Replica, sample: Sample) -> None:
        """A replica that answers wrongly is failed: spans that do not cover the tokens, another lineage, NaN."""
        tokens, position = len(sample.output_ids), 0
        for span in sample.versions:
            if span.start != position or span.end < span.start or span.incarnation != self.incarnation:
                raise InternalError(
                    f"{replica.name} sent version spans {sample.versions} on lineage {self.incarnation}"
                )
            position = span.end
        if tokens == 0 or position != tokens or len(sample.logprobs) != tokens:
            raise InternalError(
                f"{replica.name} sent {tokens} ids, {len(sample.logprobs)} log-probs, spans to {position}"
            )
        if sample.output_ids.dtype != np.int32 or sample.logprobs.dtype != np.float32 or sample.output_ids.min() < 0:
            raise InternalError(f"{replica.name} sent ids {sample.output_ids.dtype}, log-probs {sample.logprobs.dtype}")
        if not np.isfinite(sample.logprobs).all() or sample.logprobs.max() > MAX_LOGPROB:
            raise InternalError(f"{replica.name} sent log-probs that are not finite, or positive")


def oldest_step(sample: Sample) -> int:
    """Step of the oldest policy that sampled one of its tokens."""
    return min(span.step for span in sample.versions)
