"""The run: admits prompts, carries out what the pipeline decides, pushes batches, evaluates. A thin shell.

INVARIANTS
- Every decision is the pipeline's; this file moves data and owns tasks, one per prompt under way and one per batch.
- A batch is pushed once, whole, for its named step; its groups are trained when the trainer says that the step is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from orchestrator.config import OrchestratorConfig
from orchestrator.data import DataOrder, Key, Problem
from orchestrator.dispatch import Dispatcher
from orchestrator.evaluate import Evaluation, evaluate
from orchestrator.grading import Grader
from orchestrator.pipeline import Dispatch, Leave, Pipeline, PipelineRules, Restart, Stage, WakeAt
from orchestrator.prompt import PromptRunner, Record, train_group
from orchestrator.report import Reporter, group_metrics
from orchestrator.summary import Tally, summarise
from protocol.clients import TrainerClient
from protocol.config import RunConfig
from protocol.errors import DeadlineError, InternalError, ProtocolError
from protocol.messages import PushRequest, StepDone, TrainerHello, TrainerState, Version
from protocol.revision import Revision

log = logging.getLogger(__name__)

T = TypeVar("T")

IDLE_S = 1.0  # the loop looks again this often even if nothing was reported, for timers and lost hints
SILENCE_S = 30.0  # say so when nothing moved for so long


class Conductor:
    """One run from the first prompt to the exported model."""

    def __init__(
        self,
        config: OrchestratorConfig,
        run: RunConfig,
        *,
        problems: Sequence[Problem],
        heldout: Sequence[Problem],
        trainer: TrainerClient,
        grader: Grader,
        dispatcher: Dispatcher,
        reporter: Reporter,
    ) -> None:
        self._config, self._run = config, run
        self._problems, self._heldout = problems, heldout
        self._trainer, self._grader, self._dispatcher, self._reporter = trainer, grader, dispatcher, reporter
        self._order = DataOrder(len(problems), seed=run.seed, epochs=config.data.epochs, shuffle=config.data.shuffle)
        self.pipeline = Pipeline(
            PipelineRules(
                prompts_per_step=config.prompts_per_step,
                max_staleness=run.max_staleness,
                total_steps=run.steps,
                max_attempts=config.max_attempts,
                on_stale=config.on_stale,
                stale_wait_s=config.stale_wait_s,
                last_batch=config.data.last_batch,
            )
        )
        self._event = asyncio.Event()
        self._runner = PromptRunner(
            config,
            seed=run.seed,
            pipeline=self.pipeline,
            dispatcher=dispatcher,
            grader=grader,
            changed=self.changed,
            put_back=self._order.put_back,
        )
        self._records: dict[Key, Record] = {}
        self._prompts: dict[Key, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self.version = Version(0, 0)
        self.state = "starting"
        self.revision = Revision()
        self._push_turn = asyncio.Lock()
        self._progress = 0
        self._abandoned_in_a_row = 0
        self._served_at = time.monotonic()
        self._tally = Tally()
        self._plain_accuracy: float | None = None
        self._evaluating = False
        self._step_ended = time.monotonic()

    def changed(self) -> None:
        """Something happened that may let something else happen."""
        self._dispatcher.pump()
        self._event.set()

    # -- the run -----------------------------------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """Evaluate, train all steps, evaluate again; returns the summary. Raises ProtocolError when it cannot go on."""
        tally = self._tally
        state = await self._hello()
        self.version = state.version
        self._dispatcher.incarnation = state.version.incarnation
        await self._wait_for_replica(state.version.step)
        before = await self._evaluate_all("before")
        tally.training = self._step_ended = time.monotonic()
        self.state = "training"
        await self._train()
        tally.trained = time.monotonic()
        try:
            after = await self._evaluate_all("after")
        finally:  # whatever became of the evaluation, the trained model is kept
            self.state = "exporting"
            export = await self._trainer.finish(timeout_s=self._config.deadlines.step_s)
        return summarise(
            self._run,
            self.pipeline,
            self.version,
            tally,
            before=before,
            after=after,
            verdicts=self._grader.statuses,
            export=export.path,
        )

    async def _hello(self) -> TrainerState:
        """The trainer's state, as soon as it answers."""
        deadline = time.monotonic() + self._config.deadlines.start_s
        while True:
            try:
                hello = TrainerHello(run=self._run.name, term=1)
                return await self._trainer.hello(hello, timeout_s=max(1.0, deadline - time.monotonic()))
            except ProtocolError:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(IDLE_S)

    async def _wait_for_replica(self, step: int) -> None:
        """Until some replica serves this lineage at `step` or later."""
        deadline = time.monotonic() + self._config.deadlines.start_s
        while not self._served(step):
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"no rollout server serves version {self.version.incarnation}.{step} "
                    f"after {self._config.deadlines.start_s:.0f} s; "
                    f"registered: {sorted(self._dispatcher.clients) or 'none'}"
                )
            await self._pause(IDLE_S)

    def _served(self, step: int) -> bool:
        membership, now = self._dispatcher.membership, time.monotonic()
        return any(
            membership.usable(replica, self.version.incarnation, now) and replica.version.step >= step
            for replica in membership.replicas.values()
        )

    async def _pause(self, seconds: float) -> None:
        """Wait for a change, for at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
        self._event.clear()

    async def _train(self) -> None:
        quiet_since = self._served_at = time.monotonic()
        while not self.pipeline.finished:
            self._check_served(max(0, self.version.step - self._run.max_staleness))
            self._admit()
            wake = self._carry_out(time.monotonic())
            self._dispatcher.pump()
            if self._failure is not None:
                raise self._failure
            if not self.pipeline.groups and not self._order.left:
                if not self.pipeline.completed_steps:
                    raise InternalError(f"the data ended before the first step: {self._reasons()}")
                log.warning("the data ended after %d of %d steps", self.pipeline.completed_steps, self._run.steps)
                break
            progress = self._progress
            await self._pause(min(IDLE_S, max(0.01, wake - time.monotonic())) if wake is not None else IDLE_S)
            if self._progress != progress or not self.pipeline.groups:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > SILENCE_S:
                quiet_since = time.monotonic()
                self._reporter.say(f"waiting: {self._where()}")
        for key in list(self._prompts):  # prompts of an epoch whose last batch was dropped
            self._stop(key)
        await self._while_served(asyncio.gather(*self._background), 0)
        if self._failure is not None:
            raise self._failure

    def _check_served(self, step: int) -> None:
        """Raise DeadlineError once nobody has served `step` or later for publish_s."""
        if self._served(step):
            self._served_at = time.monotonic()
        elif time.monotonic() - self._served_at > self._config.deadlines.publish_s:
            raise DeadlineError(
                f"for {self._config.deadlines.publish_s:.0f} s no rollout server has served version "
                f"{self.version.incarnation}.{step} or later; {self._where()}"
            )

    async def _while_served(self, work: Awaitable[T], step: int) -> T:
        """The result of `work`, which needs a rollout server that serves `step` or later."""
        future, self._served_at = asyncio.ensure_future(work), time.monotonic()
        try:
            while not future.done():
                await asyncio.wait({future}, timeout=IDLE_S)
                self._dispatcher.pump()
                self._check_served(step)
            return future.result()
        finally:
            future.cancel()
            await asyncio.gather(future, return_exceptions=True)

    def _reasons(self) -> str:
        """Why prompts left without being trained, most frequent first."""
        ended = Counter(reason for stage, reason in self.pipeline.terminal.values() if stage is not Stage.TRAINED)
        return "; ".join(f"{count} × {reason}" for reason, count in ended.most_common(3)) or "nothing was admitted"

    def _where(self) -> str:
        """Where prompts and replicas stand, for people."""
        stages: dict[str, int] = {}
        for group in self.pipeline.groups.values():
            stages[group.stage.value] = stages.get(group.stage.value, 0) + 1
        replicas = [
            f"{r.name} v{r.version.incarnation}.{r.version.step} {'' if r.ready else 'not '}ready, {r.in_flight} busy"
            for r in self._dispatcher.membership.replicas.values()
        ]
        return f"prompts {stages}; replicas {replicas or 'none'}; next step {self.pipeline.next_step}"

    def _admit(self) -> None:
        while self.pipeline.can_admit() and self._order.left:
            key = self._order.next()
            self.pipeline.admit(key)
            self._records[key] = self._runner.record(key, self._problems[key[1]])
            self._start(key)

    def _start(self, key: Key) -> None:
        task = asyncio.create_task(self._runner.run(self._records[key]), name=f"prompt {key}")
        self._prompts[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))

    def _ended(self, key: Key, task: asyncio.Task[None]) -> None:
        if self._prompts.get(key) is task:
            del self._prompts[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
        if key not in self.pipeline.groups:
            self._forget(key)
        self._progress += 1
        self.changed()

    def _forget(self, key: Key) -> None:
        """The prompt has left without being trained."""
        record = self._records.pop(key, None)
        if record is not None:
            self._tally.lost(record)
        stage, reason = self.pipeline.terminal.get(key, (None, ""))
        if stage is not Stage.ABANDONED or reason in ("bad_reference", "stale"):
            return
        self._abandoned_in_a_row += 1
        limit = (self._run.max_staleness + 1) * self._config.prompts_per_step
        if self._abandoned_in_a_row >= limit:
            self._failure = self._failure or InternalError(
                f"{self._abandoned_in_a_row} prompts in a row were abandoned, the last because of: {reason}"
            )

    def _carry_out(self, now: float) -> float | None:
        """Do what the pipeline decides; returns when to ask again at the latest (monotonic seconds)."""
        wake = None
        for action in self.pipeline.plan(now, data_left=self._order.left, drained=self._order.drained):
            match action:
                case Dispatch(step, keys):
                    self._in_background(self._push(step, [self._records[key] for key in keys]))
                case Restart(key):
                    self._stop(key)
                    record = self._records[key]
                    if self.pipeline.next_step - record.draft_step > self._config.max_draft_age:
                        record.forget_drafts()
                    self._start(key)
                case Leave(key):
                    self._stop(key)
                    self._forget(key)
                case WakeAt(at):
                    wake = at
        return wake

    def _stop(self, key: Key) -> None:
        task = self._prompts.pop(key, None)
        if task is not None:
            task.cancel()

    def _in_background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_ended)

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
        self.changed()

    # -- batches -----------------------------------------------------------------------------------------------------

    async def _push(self, step: int, records: list[Record]) -> None:
        """Push the batch of `step` and see it trained."""
        config, keys = self._config, [record.key for record in records]
        oldest = [self.pipeline.groups[key].step or 0 for key in keys]
        temperature = config.refine_sampling.temperature
        groups = [train_group(record, self.pipeline.attempts[record.key], temperature) for record in records]
        metrics = group_metrics(records, step, oldest)
        request = PushRequest(incarnation=self.version.incarnation, step=step, groups=groups)
        timeout_s = config.deadlines.step_s * (self._run.max_staleness + 2)
        async with (
            contextlib.AsyncExitStack() as turn,
            contextlib.aclosing(self._trainer.push(request, timeout_s=timeout_s)) as replies,
        ):
            await turn.enter_async_context(self._push_turn)  # the trainer takes batches in the order of their steps
            async for reply in replies:
                await turn.aclose()
                if isinstance(reply, StepDone):
                    self._step_done(step, reply, metrics, records)
                    return
        raise InternalError(f"the trainer did not finish step {step}")

    def _step_done(self, step: int, reply: StepDone, metrics: dict[str, float], records: list[Record]) -> None:
        now = time.monotonic()
        for key in self.pipeline.step_done(step):
            self._records.pop(key, None)
        self.version = reply.version
        self._progress += 1
        self._abandoned_in_a_row = 0
        self.revision.bump()
        seconds, self._step_ended = now - self._step_ended, now
        tokens = self._tally.batch(records, int(metrics["lag_max"]))
        metrics = {
            **metrics,
            **reply.metrics,
            "step_seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "outstanding": float(self.pipeline.outstanding),
        }
        if self._plain_accuracy is not None:
            metrics["plain_accuracy"] = self._plain_accuracy
        version = f"{reply.version.incarnation}.{reply.version.step}"
        self._reporter.write("step", reply.version.step, metrics)
        self._reporter.step_line(reply.version.step, self._run.steps, version, metrics)
        every = self._config.evaluation.every_steps
        due = every and reply.version.step % every == 0 and not self.pipeline.finished
        if self._heldout and due and not self._evaluating:
            self._evaluating = True
            self._in_background(self._evaluate_during(reply.version.step))
        self.changed()

    # -- evaluation --------------------------------------------------------------------------------------------------

    async def _evaluate(self, prompts: Sequence[Problem], low: int) -> Evaluation:
        return await evaluate(
            prompts,
            self._config.evaluation,
            self._dispatcher,
            self._grader,
            fresh=lambda step: step >= low,
            timeout_s=self._config.deadlines.generate_s,
        )

    async def _evaluate_during(self, step: int) -> None:
        """A small evaluation beside training; it reports the versions that it saw."""
        try:
            result = await self._evaluate(self._heldout[: self._config.evaluation.prompts_during], 0)
        except ProtocolError as error:
            log.warning("evaluation during training, at step %d, failed: %s", step, error)
        else:
            self._note(step, result)
        finally:
            self._evaluating = False

    async def _evaluate_all(self, when: str) -> Evaluation | None:
        """The evaluation before or after training, on one version."""
        if not self._heldout:
            return None
        self.state = f"evaluating ({when})"
        await self._wait_for_replica(self.version.step)
        limit = self._config.evaluation.prompts or len(self._heldout)
        result = await self._while_served(self._evaluate(self._heldout[:limit], self.version.step), self.version.step)
        if result.versions != {self.version}:
            raise InternalError(
                f"evaluation {when} training saw versions {sorted(result.versions)}, not {self.version}"
            )
        self._note(self.version.step, result)
        self._reporter.say(
            f"{when} training: single-shot accuracy {result.accuracy:.4f} on {len(result.scores)} held-out prompts "
            f"({', '.join(f'{name} {count}' for name, count in sorted(result.statuses.items()))})"
        )
        return result

    def _note(self, step: int, result: Evaluation) -> None:
        self._plain_accuracy = result.accuracy
        versions = [version.step for version in result.versions]
        metrics = {
            "plain_accuracy": result.accuracy,
            "pass_at_k": result.pass_at(self._config.evaluation.samples),
            "prompts": float(len(result.scores)),
            "oldest_step": float(min(versions, default=0)),
            "newest_step": float(max(versions, default=0)),
        }
        self._reporter.write("evaluation", step, metrics)

    async def close(self) -> None:
        """Stop all tasks."""
        tasks = [*self._prompts.values(), *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
