"""The window, the terminal stages and the staleness bound, on the pure state machine."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.config import LastBatch, OnStale
from orchestrator.data import DataOrder, Key
from orchestrator.pipeline import (
    GENERATING,
    Dispatch,
    Leave,
    Pipeline,
    PipelineRules,
    Restart,
    Stage,
    WakeAt,
)


def rules(**changes: object) -> PipelineRules:
    values: dict[str, object] = {
        "prompts_per_step": 2,
        "max_staleness": 1,
        "total_steps": 100,
        "max_attempts": 3,
        "on_stale": OnStale.WAIT,
        "stale_wait_s": 10.0,
        "last_batch": LastBatch.CARRY,
    }
    return PipelineRules(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def to_ready(pipeline: Pipeline, key: Key, step: int) -> None:
    pipeline.move(key, Stage.REFINING, step=step)
    pipeline.move(key, Stage.GRADING)
    pipeline.ready(key, step)


def plan(pipeline: Pipeline, now: float = 0.0, *, data_left: bool = True, drained: bool = False) -> list:
    return pipeline.plan(now, data_left=data_left, drained=lambda epoch: drained)


def test_oldest_policy_first_then_order_of_admission() -> None:
    pipeline = Pipeline(rules(prompts_per_step=2, max_staleness=2))
    for index in range(4):
        pipeline.admit((0, index))
    pipeline.next_step = 1
    to_ready(pipeline, (0, 0), 1)
    to_ready(pipeline, (0, 3), 0)
    assert plan(pipeline) == [Dispatch(1, ((0, 3), (0, 0)))]


def test_a_batch_waits_for_a_group_in_flight_that_it_would_expire_then_restarts_it() -> None:
    pipeline = Pipeline(rules())
    for index in range(4):
        pipeline.admit((0, index))
    pipeline.move((0, 0), Stage.REFINING, step=0)
    for index in (1, 2, 3):
        to_ready(pipeline, (0, index), 0)
    assert plan(pipeline) == [Dispatch(0, ((0, 1), (0, 2)))]
    assert plan(pipeline, 5.0) == []
    pipeline.step_done(0)
    pipeline.admit((0, 4))
    to_ready(pipeline, (0, 4), 1)
    assert plan(pipeline, 6.0) == [WakeAt(16.0)], "step 1 is the last that the group of step 0 can go into"
    actions = plan(pipeline, 16.0)
    assert actions == [Restart((0, 0)), Dispatch(1, ((0, 3), (0, 4)))]
    again = pipeline.groups[(0, 0)]
    assert (again.stage, again.step) == (Stage.SELECTING, None), "its new refinements will have their own age"


def test_on_stale_drop_frees_the_slot() -> None:
    pipeline = Pipeline(rules(prompts_per_step=1, max_staleness=1, on_stale=OnStale.DROP))
    for index in range(2):
        pipeline.admit((0, index))
    pipeline.move((0, 0), Stage.REFINING, step=0)
    to_ready(pipeline, (0, 1), 0)
    assert plan(pipeline) == [Dispatch(0, ((0, 1),))]
    pipeline.step_done(0)
    pipeline.admit((0, 2))
    to_ready(pipeline, (0, 2), 1)
    assert Leave((0, 0)) in plan(pipeline)
    assert pipeline.terminal[(0, 0)] == (Stage.FILTERED, "stale")


@pytest.mark.parametrize("policy", list(LastBatch))
def test_last_batch(policy: LastBatch) -> None:
    pipeline = Pipeline(rules(prompts_per_step=2, max_staleness=1, last_batch=policy))
    for key in ((0, 0), (1, 0), (1, 1)):
        pipeline.admit(key)
        to_ready(pipeline, key, 0)
    actions = plan(pipeline, drained=True)
    match policy:
        case LastBatch.CARRY:
            assert actions == [Dispatch(0, ((0, 0), (1, 0)))]
            assert plan(pipeline, data_left=False) == [Dispatch(1, ((1, 1),))], "short at the very end"
        case LastBatch.SHORT:
            assert actions[:2] == [Dispatch(0, ((0, 0),)), Dispatch(1, ((1, 0), (1, 1)))]
        case LastBatch.DROP:
            assert actions == [Leave((0, 0)), Dispatch(0, ((1, 0), (1, 1)))]


def test_no_more_is_admitted_than_the_steps_left_can_train() -> None:
    pipeline = Pipeline(rules(prompts_per_step=4, max_staleness=3, total_steps=1))
    for index in range(4):
        pipeline.admit((0, index))
    assert not pipeline.can_admit()


def test_the_target_step_knows_that_epochs_end_batches_early() -> None:
    """Three prompts an epoch, two a batch: with `short` the epochs take two batches each."""
    keys = [(epoch, index) for epoch in range(2) for index in range(3)]
    expected = {
        LastBatch.CARRY: [0, 0, 1, 1, 2, 2],
        LastBatch.SHORT: [0, 0, 1, 2, 2, 3],
        LastBatch.DROP: [0, 0, 1, 1, 1, 2],
    }
    for policy, steps in expected.items():
        pipeline = Pipeline(rules(max_staleness=3, last_batch=policy))
        for key in keys:
            pipeline.admit(key)
        assert [pipeline.target_step(key) for key in keys] == steps, policy


def test_impossible_transitions_are_refused() -> None:
    pipeline = Pipeline(rules())
    pipeline.admit((0, 0))
    with pytest.raises(ValueError, match="admitted before"):
        pipeline.admit((0, 0))
    with pytest.raises(ValueError, match="transition of its own"):
        pipeline.move((0, 0), Stage.TRAINED)
    with pytest.raises(ValueError, match="names a step"):
        pipeline.move((0, 0), Stage.REFINING)
    with pytest.raises(ValueError, match="not open"):
        pipeline.ready((0, 9), 0)


class Simulation(RuleBasedStateMachine):
    """Random prompts, delays, failures and publications; the invariants of pipeline.py after every event."""

    @initialize(
        P=st.integers(1, 4),
        S=st.integers(0, 3),
        rows=st.integers(1, 12),
        epochs=st.integers(1, 3),
        on_stale=st.sampled_from(list(OnStale)),
        last=st.sampled_from(list(LastBatch)),
        steps=st.integers(1, 12),
    )
    def start(self, P: int, S: int, rows: int, epochs: int, on_stale: OnStale, last: LastBatch, steps: int) -> None:
        self.fixed = rules(prompts_per_step=P, max_staleness=S, on_stale=on_stale, last_batch=last, total_steps=steps)
        self.pipeline = Pipeline(self.fixed)
        self.data = DataOrder(rows, seed=1, epochs=epochs, shuffle=True)
        self.served, self.trained, self.now = 0, 0, 0.0
        self.batches: dict[int, tuple[Key, ...]] = {}
        self.seen: set[Key] = set()

    def keys(self, *stages: Stage) -> list[Key]:
        return [key for key, group in self.pipeline.groups.items() if group.stage in stages]

    def plan(self) -> None:
        steps = {key: group.step for key, group in self.pipeline.groups.items()}
        for action in self.pipeline.plan(self.now, data_left=self.data.left, drained=self.data.drained):
            if isinstance(action, Dispatch):
                assert action.step not in self.batches and 0 < len(action.keys) <= self.fixed.prompts_per_step
                for key in action.keys:
                    step = steps[key]
                    assert step is not None and 0 <= action.step - step <= self.fixed.max_staleness, "the hard bound"
                self.batches[action.step] = action.keys

    @rule()
    def admit(self) -> None:
        if self.data.left and self.pipeline.can_admit():
            key = self.data.next()
            self.pipeline.admit(key)
            self.seen.add(key)

    @rule(pick=st.randoms(use_true_random=False))
    def refine(self, pick: random.Random) -> None:
        able = [k for k in self.keys(Stage.DRAFTING, Stage.SELECTING) if self.pipeline.may_refine(k, self.served)]
        if able:
            self.pipeline.move(pick.choice(able), Stage.REFINING, step=self.served)

    @rule(pick=st.randoms(use_true_random=False))
    def finish(self, pick: random.Random) -> None:
        if keys := self.keys(*GENERATING):
            key = pick.choice(keys)
            step = self.pipeline.groups[key].step
            assert step is not None
            self.pipeline.ready(key, pick.randint(step, max(step, self.served)))
            self.plan()

    @rule(pick=st.randoms(use_true_random=False), abandon=st.booleans())
    def lose(self, pick: random.Random, abandon: bool) -> None:
        if keys := self.keys(Stage.DRAFTING, Stage.SELECTING, *GENERATING):
            key = pick.choice(keys)
            if abandon:
                self.pipeline.leave(key, Stage.ABANDONED, "lost")
            elif self.pipeline.requeue(key, "lost"):
                self.data.put_back(key)

    @precondition(lambda self: self.batches)
    @rule()
    def train(self) -> None:
        if self.trained in self.batches:
            self.pipeline.step_done(self.trained)
            self.trained += 1
            self.plan()

    @rule()
    def publish(self) -> None:
        self.served = self.trained

    @rule(seconds=st.floats(0.1, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.plan()

    @invariant()
    def window(self) -> None:
        if hasattr(self, "pipeline"):
            limit = (self.fixed.max_staleness + 1) * self.fixed.prompts_per_step
            assert self.pipeline.outstanding <= limit
            assert not (self.pipeline.groups.keys() & self.pipeline.terminal.keys())

    def teardown(self) -> None:
        """From wherever we are, with one live replica and data left, every step is trained or the data ends."""
        if not hasattr(self, "pipeline"):
            return
        for _ in range(4000):
            self.now += 1.0
            while self.data.left and self.pipeline.can_admit():
                self.admit()
            self.served = self.trained
            for key in self.keys(Stage.DRAFTING, Stage.SELECTING):
                if self.pipeline.may_refine(key, self.served):
                    self.pipeline.move(key, Stage.REFINING, step=self.served)
            for key in self.keys(*GENERATING):
                self.pipeline.ready(key, self.pipeline.groups[key].step or 0)
            self.plan()
            if self.trained in self.batches:
                self.pipeline.step_done(self.trained)
                self.trained += 1
            if self.pipeline.finished or (not self.data.left and not self.pipeline.groups):
                break
        else:
            raise AssertionError(f"stuck at step {self.trained}: {self.pipeline.groups}")
        pushed = [key for keys in self.batches.values() for key in keys]
        assert len(pushed) == len(set(pushed)), "trained twice"
        assert self.seen == self.pipeline.terminal.keys() | self.pipeline.groups.keys(), "lost"


TestSimulation = Simulation.TestCase
TestSimulation.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@given(rows=st.integers(1, 50), epochs=st.integers(1, 4), seed=st.integers(0, 99), cut=st.integers(0, 200))
@settings(deadline=None)
def test_data_order_resumes_where_it_stopped(rows: int, epochs: int, seed: int, cut: int) -> None:
    whole = DataOrder(rows, seed=seed, epochs=epochs, shuffle=True)
    keys = [whole.next() for _ in range(rows * epochs)]
    assert not whole.left and sorted(keys) == [(e, i) for e in range(epochs) for i in range(rows)]
    first = DataOrder(rows, seed=seed, epochs=epochs, shuffle=True)
    cut = min(cut, len(keys))
    head = [first.next() for _ in range(cut)]
    rest = DataOrder(rows, seed=seed, epochs=epochs, shuffle=True, position=first.position)
    assert head + [rest.next() for _ in range(len(keys) - cut)] == keys
