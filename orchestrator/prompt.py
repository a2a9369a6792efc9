"""The life of one prompt: drafts -> verdicts -> choice -> refinements -> verdicts -> ready.

Each draft and each refinement goes to the verifier the moment it ends. Nothing here waits for another prompt.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from orchestrator.config import OrchestratorConfig, SamplingConfig
from orchestrator.data import Key, Problem
from orchestrator.dispatch import DRAFT, REFINE, Dispatcher, Ticket, oldest_step
from orchestrator.grading import Grader
from orchestrator.membership import Replica
from orchestrator.pipeline import Pipeline, Stage
from orchestrator.rewards import FORMATTED, bad_reference, reward_of, shuffled
from orchestrator.selection import GradedDraft, select_draft
from protocol.errors import ErrorCode, InvalidError, ProtocolError
from protocol.messages import (
    DraftRequest,
    FinishReason,
    RefineRequest,
    Sample,
    Sampling,
    TrainGroup,
    TrainSample,
    Verdict,
)


@dataclass
class Graded:
    """A sample with its verdict and reward (None: it leaves its group)."""

    sample: Sample
    verdict: Verdict
    reward: float | None


@dataclass
class Record:
    """All that is known about one prompt under way. Times are seconds spent per phase; wasted counts sampled tokens."""

    key: Key
    problem: Problem
    plain: bool
    drafts: dict[int, Graded] = field(default_factory=dict)
    chosen: Graded | None = None
    refused: set[int] = field(default_factory=set)
    draft_step: int = 0
    refine_step: int = 0
    replica: str | None = None
    refinements: dict[int, Graded] = field(default_factory=dict)
    prompt_ids: np.ndarray | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    wasted_tokens: int = 0

    def rewarded(self) -> dict[int, Graded]:
        """The refinements that take part in the group, by sample index."""
        return {index: graded for index, graded in sorted(self.refinements.items()) if graded.reward is not None}

    @property
    def tokens(self) -> int:
        """All tokens that were sampled for it, wasted ones included."""
        return self.wasted_tokens + _tokens(self.drafts) + _tokens(self.refinements)

    def forget_refinements(self) -> None:
        self.wasted_tokens += _tokens(self.refinements)
        self.refinements, self.prompt_ids = {}, None

    def forget_drafts(self) -> None:
        self.wasted_tokens += _tokens(self.drafts)
        self.chosen, self.drafts, self.refused = None, {}, set()


def _tokens(graded: dict[int, Graded]) -> int:
    return sum(len(one.sample.output_ids) for one in graded.values())


def sampling_of(config: SamplingConfig) -> Sampling:
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
    )


class PromptRunner:
    """Drives records through the pipeline. Owns no sockets; `changed` is called after every transition."""

    def __init__(
        self,
        config: OrchestratorConfig,
        *,
        seed: int,
        pipeline: Pipeline,
        dispatcher: Dispatcher,
        grader: Grader,
        changed: Callable[[], None],
        put_back: Callable[[Key], None],
    ) -> None:
        self._config, self._seed = config, seed
        self._pipeline, self._dispatcher, self._grader = pipeline, dispatcher, grader
        self._changed, self._put_back = changed, put_back

    def record(self, key: Key, problem: Problem) -> Record:
        plain = self._config.drafts == 0 or self._rng(key, "plain").random() < self._config.plain_share
        return Record(key, problem, plain)

    def _rng(self, key: Key, purpose: str) -> random.Random:
        return random.Random(f"{purpose} {self._seed} {key[0]} {key[1]}")

    async def run(self, record: Record) -> None:
        """From where the record stands to `ready`, a terminal stage, or back to the data."""
        try:
            if record.chosen is None and not record.plain and not await self._draft(record):
                return
            while not await self._refined(record):
                pass
        except ProtocolError as error:
            self._failed(record, error)
        finally:
            self._changed()

    def _failed(self, record: Record, error: ProtocolError) -> None:
        if error.code is ErrorCode.INVALID:
            self._pipeline.leave(record.key, Stage.FILTERED, f"invalid: {error.detail}")
        elif self._pipeline.requeue(record.key, str(error)):
            self._put_back(record.key)

    def _give_up(self, record: Record, reason: str) -> bool:
        if reason == "bad_reference":
            self._pipeline.leave(record.key, Stage.ABANDONED, reason)
        elif self._pipeline.requeue(record.key, reason):
            self._put_back(record.key)
        return False

    # -- Stage 1 -----------------------------------------------------------------------------------------------------

    async def _draft(self, record: Record) -> bool:
        """Sample, grade and choose. False: the prompt has left the pipeline."""
        config, key, started = self._config, record.key, time.monotonic()
        sampling, record.replica = sampling_of(config.draft_sampling), None

        def request(first: int, n: int) -> DraftRequest:
            messages = list(record.problem.messages)
            return DraftRequest(n=n, sampling=sampling, messages=messages, first_index=first, group=_group_name(key))

        def on_start(replica: Replica) -> None:
            record.draft_step = min(record.draft_step, replica.version.step) if record.replica else replica.version.step
            record.replica = replica.name

        record.drafts = await self._sample_and_grade(
            record,
            Ticket(DRAFT, self._order(key), config.drafts, lambda step: self._pipeline.may_draft(key, step)),
            request,
            on_start,
        )
        record.seconds["draft"] = time.monotonic() - started
        self._pipeline.move(key, Stage.SELECTING)
        if any(bad_reference(graded.verdict) for graded in record.drafts.values()):
            return self._give_up(record, "bad_reference")
        if self._pipeline.next_step - record.draft_step > config.max_draft_age:
            return self._give_up(record, "its drafts took longer than max_draft_age")
        record.chosen = self._choose(record)
        return record.chosen is not None or self._give_up(record, "no graded draft")

    def _choose(self, record: Record) -> Graded | None:
        """The draft to refine, among those that have a verdict and that no rollout server refused, if any."""
        config, key = self._config, record.key
        graded = {i: draft for i, draft in sorted(record.drafts.items()) if draft.reward is not None}
        rewards = [draft.reward or 0.0 for draft in graded.values()]
        if config.reward.shuffle:
            rewards = shuffled(rewards, self._rng(key, "shuffle drafts"))
        candidates = [
            GradedDraft(i, reward, len(draft.sample.output_ids), draft.verdict.status in FORMATTED)
            for (i, draft), reward in zip(graded.items(), rewards, strict=True)
            if i not in record.refused
        ]
        if not candidates:
            return None
        rule = config.selection
        return graded[select_draft(candidates, rule.rule, rule.ties, self._rng(key, "select"))]

    # -- Stage 2 -----------------------------------------------------------------------------------------------------

    async def _refined(self, record: Record) -> bool:
        """Refine the chosen draft. False: it cannot stand in a prompt (control ids, length), and another was chosen."""
        try:
            await self._refine(record)
        except InvalidError:
            if record.chosen is None:
                raise
            record.refused.update(i for i, draft in record.drafts.items() if draft is record.chosen)
            other = self._choose(record)
            if other is None:
                raise
            record.chosen = other
            self._pipeline.move(record.key, Stage.SELECTING)
            return False
        return True

    async def _refine(self, record: Record) -> None:
        config, key, started = self._config, record.key, time.monotonic()
        sampling = sampling_of(config.refine_sampling)
        record.forget_refinements()

        def request(first: int, n: int) -> DraftRequest:
            messages, group = list(record.problem.messages), _group_name(key)
            if record.chosen is None:
                return DraftRequest(n=n, sampling=sampling, messages=messages, first_index=first, group=group)
            draft = record.chosen.sample
            return RefineRequest(
                n=n,
                sampling=sampling,
                messages=messages,
                first_index=first,
                group=group,
                draft_ids=draft.output_ids,
                draft_truncated=draft.finish_reason is not FinishReason.STOP,
            )

        def on_start(replica: Replica) -> None:
            self._pipeline.move(key, Stage.REFINING, step=replica.version.step)
            record.refine_step = replica.version.step

        record.refinements = await self._sample_and_grade(
            record,
            Ticket(
                REFINE,
                self._order(key),
                config.refinements,
                lambda step: self._pipeline.may_refine(key, step),
                record.replica,
            ),
            request,
            on_start,
        )
        record.seconds["refine"] = time.monotonic() - started
        if any(bad_reference(graded.verdict) for graded in record.refinements.values()):
            self._give_up(record, "bad_reference")
            return
        if len(record.rewarded()) < config.min_valid:
            self._give_up(record, "too few graded refinements")
            return
        if config.reward.shuffle:
            group = list(record.rewarded().values())
            rewards = shuffled([graded.reward or 0.0 for graded in group], self._rng(key, "shuffle"))
            for graded, reward in zip(group, rewards, strict=True):
                graded.reward = reward
        self._pipeline.ready(key, min(oldest_step(graded.sample) for graded in record.rewarded().values()))

    async def _sample_and_grade(
        self,
        record: Record,
        ticket: Ticket,
        request: Callable[[int, int], DraftRequest],
        on_start: Callable[[Replica], None],
    ) -> dict[int, Graded]:
        """All samples of a request with their verdicts; grading starts with the first sample that ends."""
        samples: dict[int, Sample] = {}
        try:
            verdicts = await self._stream(record, ticket, request, on_start, samples)
        except BaseException:
            record.wasted_tokens += sum(len(sample.output_ids) for sample in samples.values())
            raise
        graded = {}
        for index, sample in samples.items():
            reward = reward_of(verdicts[index], self._config.reward)
            graded[index] = Graded(sample, verdicts[index], reward)
        return graded

    async def _stream(
        self,
        record: Record,
        ticket: Ticket,
        request: Callable[[int, int], DraftRequest],
        on_start: Callable[[Replica], None],
        samples: dict[int, Sample],
    ) -> dict[int, Verdict]:
        """Fill `samples` as they end and grade each at once; returns the verdicts by sample index."""
        failure: ProtocolError | None = None
        async with asyncio.TaskGroup() as tasks:
            verdicts: dict[int, asyncio.Task[Verdict]] = {}

            def on_sample(index: int, sample: Sample) -> None:
                samples[index] = sample
                verdicts[index] = tasks.create_task(self._grader.grade(sample.text, record.problem.answer))

            try:
                generation = await self._dispatcher.generate(
                    ticket,
                    request,
                    timeout_s=self._config.deadlines.generate_s,
                    on_start=on_start,
                    on_sample=on_sample,
                )
            except ProtocolError as error:
                failure = error
                for task in verdicts.values():
                    task.cancel()
            else:
                record.prompt_ids = generation.prompt_ids
                if ticket.priority == REFINE:
                    self._pipeline.move(record.key, Stage.GRADING)
        if failure is not None:
            raise failure
        return {index: task.result() for index, task in verdicts.items()}

    def _order(self, key: Key) -> int:
        return self._pipeline.groups[key].order


def _group_name(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


def train_group(record: Record, attempt: int, temperature: float) -> TrainGroup:
    """The record as the trainer gets it: the very ids, log-probs and spans that the engine sampled."""
    assert record.prompt_ids is not None
    samples = [
        TrainSample(
            index=index,
            output_ids=graded.sample.output_ids,
            logprobs=graded.sample.logprobs,
            versions=graded.sample.versions,
            reward=graded.reward or 0.0,
            truncated=graded.sample.finish_reason is FinishReason.LENGTH,
        )
        for index, graded in record.rewarded().items()
    ]
    return TrainGroup(
        epoch=record.key[0],
        index=record.key[1],
        attempt=attempt,
        prompt_ids=record.prompt_ids,
        samples=samples,
        temperature=temperature,
    )
