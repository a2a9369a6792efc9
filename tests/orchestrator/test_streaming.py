"""No barrier: whatever is slow, the other prompts are trained meanwhile, and the slow one is trained in the end.

Fake services over the real wire; "slow" is an event that the test sets only once enough other steps are done.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.conductor import Conductor
from orchestrator.config import OrchestratorConfig
from orchestrator.data import Problem
from orchestrator.dispatch import Dispatcher
from orchestrator.grading import Grader
from orchestrator.membership import Membership
from orchestrator.replicas import ReplicaWatch
from orchestrator.report import Reporter
from protocol.clients import TrainerClient, VerifierClient
from protocol.config import RunConfig
from protocol.errors import DeadlineError, InternalError, InvalidError, UnavailableError
from protocol.messages import (
    UNVERSIONED,
    ChatMessage,
    PushRequest,
    ReplicaHello,
    Verdict,
    VerdictStatus,
    VerifyReply,
    Version,
)
from tests.fakes import FakeRollout, FakeTrainer, FakeVerifier

DEADLINE_S = 60.0


@dataclass
class Stage:
    """One run with fakes. Rows are questions "0", "1", …; `run` returns the summary."""

    folder: Path
    steps: int = 6
    prompts_per_step: int = 3
    max_staleness: int = 2
    rows: int = 40
    shuffle: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    heldout: int = 0
    replicas: list[FakeRollout] = field(default_factory=lambda: [FakeRollout("r0")])
    verifier: FakeVerifier = field(default_factory=FakeVerifier)

    @contextlib.asynccontextmanager
    async def conductor(self) -> AsyncIterator[Conductor]:
        self.trainer = FakeTrainer(self.steps, self.max_staleness, self.replicas)
        config = OrchestratorConfig.model_validate(
            {
                "data": {"train": "unused", "shuffle": self.shuffle},
                "prompts_per_step": self.prompts_per_step,
                "drafts": 2,
                "refinements": 3,
                "stale_wait_s": 30.0,
                **self.changes,
            }
        )
        run = RunConfig(name="t", dir=self.folder, seed=3, steps=self.steps, max_staleness=self.max_staleness)
        async with contextlib.AsyncExitStack() as stack:
            addresses = {}
            for name, fake in {"trainer": self.trainer, "verifier": self.verifier}.items():
                addresses[name] = await fake.start(f"ipc://{self.folder}/{name}")
                stack.push_async_callback(fake.server.close)
            trainer = TrainerClient(addresses["trainer"])
            verifier = VerifierClient(addresses["verifier"])
            stack.push_async_callback(trainer.close)
            stack.push_async_callback(verifier.close)
            dispatcher = Dispatcher(Membership(silent_s=10.0), max_tries=3)
            reporter = Reporter(self.folder / "run", io.StringIO())
            stack.callback(reporter.close)
            conductor = Conductor(
                config,
                run,
                problems=[Problem(i, (ChatMessage(role="user", content=str(i)),), str(i)) for i in range(self.rows)],
                heldout=[Problem(i, (ChatMessage(role="user", content=f"h{i}"),), "") for i in range(self.heldout)],
                trainer=trainer,
                grader=Grader(verifier, task="", timeout_s=30.0),
                dispatcher=dispatcher,
                reporter=reporter,
            )
            stack.push_async_callback(conductor.close)
            watch = ReplicaWatch(dispatcher, conductor.changed, conductor.revision.bump)
            stack.push_async_callback(watch.close)
            for replica in self.replicas:
                address = await replica.start(f"ipc://{self.folder}/{replica.name}")
                stack.push_async_callback(replica.server.close)
                watch.hello(
                    ReplicaHello(name=replica.name, address=address, capacity=replica.capacity, context_tokens=4096)
                )
            yield conductor

    async def run(self) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S), self.conductor() as conductor:
            return await conductor.run()

    def trained(self) -> list[tuple[int, int]]:
        return [(push.step, group.index) for push in self.trainer.pushes for group in push.groups]


def assert_sound(stage: Stage, pushes: list[PushRequest]) -> None:
    """Each prompt once, in step order, within the bound."""
    indexes = [group.index for push in pushes for group in push.groups]
    assert len(indexes) == len(set(indexes))
    assert [push.step for push in pushes] == list(range(stage.steps))
    for push in pushes:
        for group in push.groups:
            oldest = min(span.step for sample in group.samples for span in sample.versions)
            assert 0 <= push.step - oldest <= stage.max_staleness


def release_after(stage: Stage, event: asyncio.Event, step: int) -> None:
    """Set `event` when `step` updates have been done."""

    def on_step(done: int) -> None:
        if done >= step:
            event.set()

    stage.trainer.on_step = on_step


@pytest.mark.parametrize("kind", ["draft", "refine"])
async def test_a_slow_sample_delays_nobody(tmp_path: Path, kind: str) -> None:
    event = asyncio.Event()
    held = FakeRollout("r0", hold=lambda k, question, index: event if (k, question, index) == (kind, "1", 0) else None)
    stage = Stage(tmp_path, replicas=[held])
    async with asyncio.timeout(DEADLINE_S), stage.conductor() as conductor:
        release_after(stage, event, 2)
        await conductor.run()
    assert_sound(stage, stage.trainer.pushes)
    trained = dict((index, step) for step, index in stage.trained())
    assert trained[1] >= 2, "two steps were trained while it was held back"
    assert conductor.pipeline.terminal[(0, 1)][0] == "trained"


async def test_a_slow_verdict_delays_nobody(tmp_path: Path) -> None:
    event = asyncio.Event()
    verifier = FakeVerifier(hold=lambda completion, reference: event if reference == "1" else None)
    stage = Stage(tmp_path, verifier=verifier)
    async with asyncio.timeout(DEADLINE_S), stage.conductor() as conductor:
        release_after(stage, event, 2)
        await conductor.run()
    assert_sound(stage, stage.trainer.pushes)
    assert dict((index, step) for step, index in stage.trained())[1] >= 2


async def test_a_slow_replica_delays_nobody(tmp_path: Path) -> None:
    event = asyncio.Event()
    slow = FakeRollout("slow", hold=lambda kind, question, index: event)
    stage = Stage(tmp_path, replicas=[FakeRollout("quick"), slow])
    async with asyncio.timeout(DEADLINE_S), stage.conductor() as conductor:
        release_after(stage, event, 2)
        await conductor.run()
    assert_sound(stage, stage.trainer.pushes)
    stuck = {int(question) for _, question, _ in slow.requests}
    assert stuck, "the slow replica got work"
    assert stuck & {index for _, index in stage.trained()}, "what it held was trained in the end"


async def test_a_held_refinement_is_restarted_when_the_wait_is_over(tmp_path: Path) -> None:
    """It never ends on its own: after stale_wait_s it is sampled again from the same draft, and trained."""
    held: list[int] = []

    def hold(kind: str, question: str, index: int) -> asyncio.Event | None:
        if (kind, question, index) == ("refine", "1", 0) and not held:
            held.append(1)
            return asyncio.Event()
        return None

    stage = Stage(tmp_path, replicas=[FakeRollout("r0", hold=hold)], changes={"stale_wait_s": 0.2})
    await stage.run()
    assert_sound(stage, stage.trainer.pushes)
    assert 1 in {index for _, index in stage.trained()}
    assert sum(kind == "draft" and q == "1" for kind, q, _ in stage.replicas[0].requests) == 1, "not drafted again"


async def test_staleness_zero_is_synchronous(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_staleness=0, steps=5)
    summary = await stage.run()
    assert_sound(stage, stage.trainer.pushes)
    assert summary["max_lag"] == 0
    for push in stage.trainer.pushes:
        assert sorted(group.index for group in push.groups) == list(range(push.step * 3, push.step * 3 + 3))
    for kind, question, version in stage.replicas[0].requests:
        assert version.step == int(question) // 3, f"{kind} of {question} waited for the published version"


async def test_the_trainer_gets_the_very_ids_that_were_sampled(tmp_path: Path) -> None:
    stage = Stage(tmp_path, steps=3)
    await stage.run()
    served = {bytes(s.output_ids) + bytes(s.logprobs): s for s in stage.replicas[0].served}
    samples = [sample for push in stage.trainer.pushes for group in push.groups for sample in group.samples]
    assert len(samples) == 3 * 3 * 3
    for sample in samples:
        original = served[bytes(sample.output_ids) + bytes(sample.logprobs)]
        assert original.versions == sample.versions
        assert sample.reward == float(int(original.text[-2]) % 2 == 0)


async def test_a_verifier_that_only_errs_abandons_its_prompts_and_zeroes_nothing(tmp_path: Path) -> None:
    class Broken(FakeVerifier):
        async def _verify(self, call: Any, body: Any) -> Any:
            if any(item.reference == "1" for item in body.items):
                raise RuntimeError("a defect in the grader")
            return await super()._verify(call, body)

    stage = Stage(tmp_path, steps=2, verifier=Broken(), changes={"max_attempts": 1})
    async with asyncio.timeout(DEADLINE_S), stage.conductor() as conductor:
        await conductor.run()
    assert conductor.pipeline.terminal[(0, 1)][0] == "abandoned"
    assert 1 not in {index for _, index in stage.trained()}


async def test_data_that_ends_early_ends_the_run(tmp_path: Path) -> None:
    stage = Stage(tmp_path, steps=10, rows=7)
    summary = await stage.run()
    assert summary["steps"] == 3 and summary["groups_trained"] == 7
    assert [len(push.groups) for push in stage.trainer.pushes] == [3, 3, 1]


@pytest.mark.parametrize("plain", [True, False])
async def test_plain_prompts_have_no_drafts(tmp_path: Path, plain: bool) -> None:
    none = {"drafts": 0, "selection": {"rule": "none"}}
    stage = Stage(tmp_path, steps=2, changes=none if plain else {"plain_share": 0.5})
    await stage.run()
    kinds = {}
    for kind, question, _ in stage.replicas[0].requests:
        kinds.setdefault(question, []).append(kind)
    shapes = {tuple(sorted(value)) for value in kinds.values()}
    assert shapes == ({("draft",)} if plain else {("draft",), ("draft", "refine")})


async def test_a_draft_that_the_engine_refuses_makes_way_for_the_next(tmp_path: Path) -> None:
    """Control ids in a draft: the rollout server says `invalid`; the prompt takes another draft, or is filtered."""
    seen: dict[str, set[bytes]] = {}

    class Refusing(FakeRollout):
        async def _sample(self, call: Any, body: Any) -> Any:
            if call.kind == "refine":
                drafts = seen.setdefault(body.messages[-1].content, set())
                drafts.add(body.draft_ids.tobytes())
                if len(drafts) == 1 or body.messages[-1].content == "1":
                    raise InvalidError("control id 2 inside the draft")
            return await super()._sample(call, body)

    stage = Stage(tmp_path, steps=2, replicas=[Refusing("r0")])
    async with asyncio.timeout(DEADLINE_S), stage.conductor() as conductor:
        await conductor.run()
    assert 1 not in {index for _, index in stage.trained()} and len(stage.trained()) == 6
    assert conductor.pipeline.terminal[(0, 1)][0] == "filtered"
    assert all(len(drafts) == 2 for drafts in seen.values())


async def test_many_batches_ahead_are_pushed_in_order(tmp_path: Path) -> None:
    """S = 4: five batches are ready before the first step ends; the trainer takes them one after another."""
    gate = asyncio.Event()
    stage = Stage(tmp_path, max_staleness=4, steps=8)
    async with asyncio.timeout(DEADLINE_S), stage.conductor() as conductor:
        stage.trainer.on_push = lambda step: gate.set() if step == 4 else None
        stage.trainer.gate = lambda step: gate if step == 0 else None
        await conductor.run()
    assert_sound(stage, stage.trainer.pushes)


async def test_an_evaluation_ends_while_training_keeps_the_replica_full(tmp_path: Path) -> None:
    changes = {"evaluation": {"every_steps": 2, "prompts_during": 6, "prompts": 4, "samples": 2}}
    stage = Stage(tmp_path, steps=12, heldout=8, changes=changes, replicas=[FakeRollout("r0", capacity=3)])
    summary = await stage.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kinds = [(line["kind"], line["step"], line.get("prompts")) for line in lines]
    assert ("evaluation", 0, 4.0) == kinds[0] and ("evaluation", 12, 4.0) == kinds[-1]
    assert any(kind == "evaluation" and step > 0 and n == 6.0 for kind, step, n in kinds[:-2]), "one ended in between"
    assert summary["heldout_prompts"] == 4 and summary["gain"] == 0.0, "recorded samples do not improve"


async def test_a_replica_that_dies_before_its_last_reply_costs_no_prompt(tmp_path: Path) -> None:
    failed: set[str] = set()

    class Dying(FakeRollout):
        async def _sample(self, call: Any, body: Any) -> Any:
            done = await super()._sample(call, body)
            if call.kind == "refine" and body.messages[-1].content not in failed:
                failed.add(body.messages[-1].content)
                raise UnavailableError("the engine died")
            return done

    stage = Stage(tmp_path, steps=2, replicas=[Dying("r0"), FakeRollout("r1")])
    async with asyncio.timeout(DEADLINE_S), stage.conductor() as conductor:
        await conductor.run()
    assert failed and len(stage.trained()) == 6
    assert all(stage == "trained" for stage, _ in conductor.pipeline.terminal.values())


async def test_a_run_that_nobody_serves_ends_with_a_reason(tmp_path: Path) -> None:
    silent = FakeRollout("r0", version=Version(1, 0))
    stage = Stage(tmp_path, replicas=[silent], changes={"deadlines": {"publish_s": 0.5}})
    async with asyncio.timeout(DEADLINE_S), stage.conductor() as conductor:
        stage.trainer.on_step = lambda step: silent.publish(UNVERSIONED) if step >= 2 else None
        with pytest.raises(DeadlineError, match=r"no rollout server has served version 1\.\d or later.*r0 v0\.0"):
            await conductor.run()


async def test_a_verifier_that_fails_everything_ends_the_run(tmp_path: Path) -> None:
    class Broken(FakeVerifier):
        async def _verify(self, call: Any, body: Any) -> Any:
            items = [Verdict(id=i.id, status=VerdictStatus.ERROR, score=0.0, detail="bad disk") for i in body.items]
            return VerifyReply(verdicts=items)

    stage = Stage(tmp_path, verifier=Broken(), changes={"max_attempts": 1})
    async with asyncio.timeout(DEADLINE_S), stage.conductor() as conductor:
        with pytest.raises(InternalError, match=r"prompts in a row were abandoned.*no graded draft"):
            await conductor.run()
    assert not stage.trainer.pushes
