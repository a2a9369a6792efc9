"""Typed clients of the four services: thin names over Client.request and Client.stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from protocol.client import Client
from protocol.messages import (
    Ack,
    DraftRequest,
    FinishReply,
    FinishRequest,
    GenerateRequest,
    GenerationDone,
    Health,
    HealthRequest,
    InfoRequest,
    OrchestratorInfo,
    PauseRequest,
    PushReceived,
    PushRequest,
    RefineRequest,
    ReplicaHello,
    ReplicaWelcome,
    RolloutInfo,
    Sample,
    StepDone,
    TrainerHello,
    TrainerState,
    Verdict,
    VerdictStatus,
    VerifierInfo,
    VerifyItem,
    VerifyReply,
    VerifyRequest,
    WeightsAbort,
    WeightsBegin,
    WeightsChunk,
    WeightsCommit,
    WeightsDone,
    WeightsLoad,
)


class ServiceClient(Client):
    """What every service answers."""

    async def health(self, *, timeout_s: float) -> Health:
        return await self.request("health", HealthRequest(), Health, timeout_s=timeout_s)


class RolloutClient(ServiceClient):
    """Client of one rollout server. Streams yield each Sample once, by index, then GenerationDone."""

    def draft(
        self, body: DraftRequest, *, timeout_s: float, request_id: str | None = None
    ) -> AsyncGenerator[Sample | GenerationDone, None]:
        return self._generation("draft", body, timeout_s, request_id)

    def refine(
        self, body: RefineRequest, *, timeout_s: float, request_id: str | None = None
    ) -> AsyncGenerator[Sample | GenerationDone, None]:
        return self._generation("refine", body, timeout_s, request_id)

    def generate(
        self, body: GenerateRequest, *, timeout_s: float, request_id: str | None = None
    ) -> AsyncGenerator[Sample | GenerationDone, None]:
        return self._generation("generate", body, timeout_s, request_id)

    async def _generation(
        self, kind: str, body: DraftRequest, timeout_s: float, request_id: str | None
    ) -> AsyncGenerator[Sample | GenerationDone, None]:
        seen: set[int] = set()
        replies = self.stream(kind, body, Sample, GenerationDone, timeout_s=timeout_s, request_id=request_id)
        try:
            async for reply in replies:
                if isinstance(reply, Sample):
                    if reply.index in seen:
                        continue
                    seen.add(reply.index)
                yield reply
        finally:
            await replies.aclose()

    async def weights_begin(self, body: WeightsBegin, *, timeout_s: float) -> Ack:
        return await self.request("weights.begin", body, Ack, timeout_s=timeout_s)

    async def weights_chunk(self, body: WeightsChunk, *, timeout_s: float) -> Ack:
        return await self.request("weights.chunk", body, Ack, timeout_s=timeout_s)

    async def weights_commit(self, body: WeightsCommit, *, timeout_s: float) -> WeightsDone:
        return await self.request("weights.commit", body, WeightsDone, timeout_s=timeout_s)

    async def weights_abort(self, body: WeightsAbort, *, timeout_s: float) -> Ack:
        return await self.request("weights.abort", body, Ack, timeout_s=timeout_s)

    async def weights_load(self, body: WeightsLoad, *, timeout_s: float) -> WeightsDone:
        return await self.request("weights.load", body, WeightsDone, timeout_s=timeout_s)

    async def pause(self, *, timeout_s: float) -> Ack:
        return await self.request("pause", PauseRequest(), Ack, timeout_s=timeout_s)

    async def resume(self, *, timeout_s: float) -> Ack:
        return await self.request("resume", PauseRequest(), Ack, timeout_s=timeout_s)

    async def info(self, known: int | None = None, wait_ms: int = 0, *, timeout_s: float) -> RolloutInfo:
        return await self.request("info", InfoRequest(known, wait_ms), RolloutInfo, timeout_s=timeout_s)


class VerifierClient(ServiceClient):
    """Client of a verifier, ours or one in any other language."""

    async def verify(
        self, items: list[VerifyItem], *, timeout_s: float, request_id: str | None = None
    ) -> list[Verdict]:
        """One verdict per item, in the order of items. An item that got none is status `error`, detail `unanswered`."""
        verdicts: dict[str, Verdict] = {}
        replies = self.stream(
            "verify", VerifyRequest(items), VerifyReply, VerifyReply, timeout_s=timeout_s, request_id=request_id
        )
        async for reply in replies:
            for verdict in reply.verdicts:
                verdicts.setdefault(verdict.id, verdict)
        return [verdicts.get(item.id) or _unanswered(item) for item in items]

    async def info(self, known: int | None = None, wait_ms: int = 0, *, timeout_s: float) -> VerifierInfo:
        return await self.request("info", InfoRequest(known, wait_ms), VerifierInfo, timeout_s=timeout_s)


def _unanswered(item: VerifyItem) -> Verdict:
    return Verdict(id=item.id, status=VerdictStatus.ERROR, score=0.0, detail="unanswered")


class TrainerClient(ServiceClient):
    """Client of the trainer's rank 0."""

    async def hello(self, body: TrainerHello, *, timeout_s: float) -> TrainerState:
        return await self.request("hello", body, TrainerState, timeout_s=timeout_s)

    def push(
        self, body: PushRequest, *, timeout_s: float, request_id: str | None = None
    ) -> AsyncGenerator[PushReceived | StepDone, None]:
        """PushReceived (again, if the trainer restarted meanwhile), then StepDone."""
        return self.stream("push", body, PushReceived, StepDone, timeout_s=timeout_s, request_id=request_id)

    async def finish(self, *, timeout_s: float) -> FinishReply:
        return await self.request("finish", FinishRequest(), FinishReply, timeout_s=timeout_s)

    async def info(self, known: int | None = None, wait_ms: int = 0, *, timeout_s: float) -> TrainerState:
        return await self.request("info", InfoRequest(known, wait_ms), TrainerState, timeout_s=timeout_s)


class OrchestratorClient(ServiceClient):
    """Client of the orchestrator."""

    async def hello(self, body: ReplicaHello, *, timeout_s: float) -> ReplicaWelcome:
        return await self.request("hello", body, ReplicaWelcome, timeout_s=timeout_s)

    async def info(self, known: int | None = None, wait_ms: int = 0, *, timeout_s: float) -> OrchestratorInfo:
        return await self.request("info", InfoRequest(known, wait_ms), OrchestratorInfo, timeout_s=timeout_s)
