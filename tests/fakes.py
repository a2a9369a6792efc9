"""Fake services for scheduling tests: they speak the real wire, and sample, grade and train by arithmetic.

A fake rollout server's samples are a pure function of (prompt, draft, index): recorded rollouts. Anything can be held
back until a test releases it, so that "slow" needs no clock.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from protocol.clients import OrchestratorClient
from protocol.errors import RefusedError
from protocol.messages import (
    DraftRequest,
    FinishReason,
    FinishReply,
    FinishRequest,
    GenerateRequest,
    GenerationDone,
    InfoRequest,
    PushReceived,
    PushRequest,
    RefineRequest,
    ReplicaHello,
    RolloutInfo,
    Sample,
    StepDone,
    TrainerHello,
    TrainerState,
    Verdict,
    VerdictStatus,
    VerifierInfo,
    VerifyReply,
    VerifyRequest,
    Version,
    VersionSpan,
    WeightsDone,
    WeightsLoad,
)
from protocol.revision import Revision
from protocol.server import Call, Server

PROMPT_BASE = 1000  # ids of a question are PROMPT_BASE + its number


def recorded_sample(seed: str, index: int, version: Version, *, tokens: int = 6, vocabulary: int = 50) -> Sample:
    """A sample that depends on nothing but its arguments; about half of the texts end in an even digit."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    ids = np.frombuffer(digest[:tokens], np.uint8).astype(np.int32) % vocabulary
    logprobs = -np.frombuffer(digest[8 : 8 + tokens], np.uint8).astype(np.float32) / 64.0
    spans = [VersionSpan(version.incarnation, version.step, 0, tokens)]
    return Sample(
        index=index,
        output_ids=ids,
        logprobs=logprobs,
        versions=spans,
        finish_reason=FinishReason.STOP,
        text=f"\\boxed{{{digest[20] % 10}}}",
    )


@dataclass
class FakeRollout:
    """A rollout server without an engine. hold(kind, question, index): an event to wait for before that sample ends."""

    name: str
    hold: Callable[[str, str, int], asyncio.Event | None] = lambda kind, question, index: None
    version: Version = field(default_factory=lambda: Version(1, 0))
    capacity: int = 64
    vocabulary: int = 50
    requests: list[tuple[str, str, Version]] = field(default_factory=list)
    served: list[Sample] = field(default_factory=list)
    revision: Revision = field(default_factory=Revision)

    async def start(self, address: str) -> str:
        self.server = Server(self.name, address)
        self.server.route("refine", RefineRequest, self._sample, priority=2)
        self.server.route("draft", DraftRequest, self._sample, priority=1)
        self.server.route("generate", GenerateRequest, self._sample)
        self.server.route("info", InfoRequest, self._info, control=True)
        self.server.route("weights.load", WeightsLoad, self._load, control=True)
        self.address = await self.server.start()
        return self.address

    async def register(self, orchestrator: OrchestratorClient) -> None:
        hello = ReplicaHello(name=self.name, address=self.address, capacity=self.capacity, context_tokens=4096)
        await orchestrator.hello(hello, timeout_s=10.0)

    def publish(self, version: Version) -> None:
        self.version = version
        self.revision.bump()

    async def _load(self, call: Call, body: WeightsLoad) -> WeightsDone:
        self.publish(body.version)
        return WeightsDone(version=body.version)

    async def _info(self, call: Call, body: InfoRequest) -> RolloutInfo:
        await self.revision.wait(body)
        return RolloutInfo(
            revision=self.revision.value,
            name=self.name,
            version=self.version,
            state="ready",
            model="fake",
            context_tokens=4096,
            capacity=self.capacity,
            running=0,
        )

    async def _sample(self, call: Call, body: DraftRequest) -> GenerationDone:
        assert body.messages is not None
        question, version = body.messages[-1].content, self.version
        self.requests.append((call.kind, question, version))
        prompt = [PROMPT_BASE % self.vocabulary, *(ord(c) % self.vocabulary for c in question)]
        if isinstance(body, RefineRequest):
            prompt += body.draft_ids.tolist()
        prompt_ids = np.array(prompt, np.int32)

        async def one(index: int) -> None:
            event = self.hold(call.kind, question, index)
            if event is not None:
                await event.wait()
            sample = recorded_sample(f"{prompt}", index, version, vocabulary=self.vocabulary)
            self.served.append(sample)
            await call.reply(sample)

        async with asyncio.TaskGroup() as tasks:
            for index in range(body.first_index, body.first_index + body.n):
                tasks.create_task(one(index))
        return GenerationDone(prompt_ids=prompt_ids, samples=body.n)


@dataclass
class FakeVerifier:
    """Correct iff the boxed digit is even. hold(completion, reference) -> an event to wait for before the verdict."""

    hold: Callable[[str, str], asyncio.Event | None] = lambda completion, reference: None

    async def start(self, address: str) -> str:
        self.server = Server("verifier", address)
        self.server.route("verify", VerifyRequest, self._verify)
        self.server.route("info", InfoRequest, self._info, control=True)
        return await self.server.start()

    async def _info(self, call: Call, body: InfoRequest) -> VerifierInfo:
        return VerifierInfo(revision=0, name="fake", tasks=[""], workers=1, queued=0, max_items=64)

    async def _verify(self, call: Call, body: VerifyRequest) -> VerifyReply:
        verdicts = []
        for item in body.items:
            event = self.hold(item.completion, item.reference)
            if event is not None:
                await event.wait()
            digit = item.completion[-2]
            status = VerdictStatus.CORRECT if int(digit) % 2 == 0 else VerdictStatus.WRONG
            score = float(status is VerdictStatus.CORRECT)
            verdicts.append(Verdict(id=item.id, status=status, score=score, extracted=digit))
        return VerifyReply(verdicts=verdicts)


@dataclass
class FakeTrainer:
    """Accepts batches, "trains" each at once, and gives the new version to its replicas."""

    total_steps: int
    max_staleness: int
    replicas: list[FakeRollout]
    pushes: list[PushRequest] = field(default_factory=list)
    on_step: Callable[[int], None] = lambda step: None
    on_push: Callable[[int], None] = lambda step: None
    gate: Callable[[int], asyncio.Event | None] = lambda step: None

    async def start(self, address: str) -> str:
        self.version = Version(1, 0)
        self._turn = asyncio.Condition()
        self.server = Server("trainer", address)
        self.server.route("hello", TrainerHello, self._hello, control=True)
        self.server.route("push", PushRequest, self._push)
        self.server.route("finish", FinishRequest, self._finish, control=True)
        return await self.server.start()

    async def _hello(self, call: Call, body: TrainerHello) -> TrainerState:
        return TrainerState(
            revision=0,
            version=self.version,
            next_step=self.version.step,
            total_steps=self.total_steps,
            max_staleness=self.max_staleness,
            state="waiting",
        )

    async def _push(self, call: Call, body: PushRequest) -> StepDone:
        if body.step != len(self.pushes):
            raise RefusedError(f"push is for step {body.step}, the next one is {len(self.pushes)}")
        self.pushes.append(body)
        self.on_push(body.step)
        await call.reply(PushReceived(step=body.step))
        async with self._turn:
            await self._turn.wait_for(lambda: self.version.step == body.step)
        gate = self.gate(body.step)
        if gate is not None:
            await gate.wait()
        async with self._turn:
            self.version = Version(1, body.step + 1)
            self._turn.notify_all()
        for replica in self.replicas:
            replica.publish(self.version)
        self.on_step(self.version.step)
        return StepDone(version=self.version, metrics={"loss": 0.0})

    async def _finish(self, call: Call, body: FinishRequest) -> FinishReply:
        return FinishReply(path="nowhere", version=self.version)
