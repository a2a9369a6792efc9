"""Decides which pushes are accepted: a pure state machine, without clock, socket or tensor.

INVARIANTS: at most one batch per step, steps in order, at most `max_queued` accepted and not trained; no prompt is
accepted twice in an epoch. A push that says the same as the one accepted for its step is the same push, however often
it comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protocol.errors import InvalidError, OverloadedError, RefusedError, StaleError
from protocol.messages import PushRequest, TrainGroup, TrainSample
from trainer.batch import group_lag, spans_cover
from trainer.incarnation import Lineage

RETRY_AFTER_MS = 500
LOGPROB_SLACK = 1e-3
"""A log-prob may exceed 0 by the rounding of the engine's kernels, no more."""

Keys = frozenset[tuple[int, int, int]]
"""(epoch, index, attempt) of a batch's groups."""


@dataclass(frozen=True)
class Bounds:
    """What a trainable batch keeps to. context_tokens: longest prompt + refinement; vocab: ids below it."""

    max_staleness: int
    max_queued: int
    total_steps: int
    vocab: int
    context_tokens: int


class Intake:
    """Accepts batches for steps from lineage.branch_step on."""

    def __init__(self, lineage: Lineage, bounds: Bounds) -> None:
        self._lineage = lineage
        self._bounds = bounds
        self._accepted: dict[int, Keys] = {}
        self._trained_groups: set[tuple[int, int]] = set()
        self._accepted_prompts: set[tuple[int, int]] = set()  # trained or waiting
        self.next_step = lineage.branch_step  # whose batch is wanted next
        self.trained = lineage.branch_step  # steps below it are done

    @property
    def ledger(self) -> list[tuple[int, int]]:
        """(epoch, index) of all groups trained, in order."""
        return sorted(self._trained_groups)

    def accept(self, push: PushRequest) -> bool:
        """True: a new batch, to be trained. False: one that was accepted before. Else raises a ProtocolError.

        Refused: another incarnation or step, off the lineage, accepted already. Stale: a group's lag. Invalid: content.
        """
        if push.incarnation != self._lineage.incarnation:
            raise RefusedError(f"push is for incarnation {push.incarnation}, this is {self._lineage.incarnation}")
        keys = frozenset((group.epoch, group.index, group.attempt) for group in push.groups)
        if push.step in self._accepted:
            if self._accepted[push.step] == keys:
                return False
            raise RefusedError(f"another batch was accepted for step {push.step}")
        if push.step != self.next_step:
            raise RefusedError(f"push is for step {push.step}, the next one is {self.next_step}")
        if push.step >= self._bounds.total_steps:
            raise RefusedError(f"all {self._bounds.total_steps} steps have their batch")
        self._check_groups(push, keys)
        if self.next_step - self.trained >= self._bounds.max_queued:
            raise OverloadedError(f"{self._bounds.max_queued} batches wait already", retry_after_ms=RETRY_AFTER_MS)
        self._accepted[push.step] = keys
        self._accepted_prompts |= {(epoch, index) for epoch, index, _ in keys}
        self.next_step += 1
        return True

    def done(self, step: int) -> None:
        """The accepted batch of `step` has been trained."""
        assert step == self.trained, (step, self.trained)
        self.trained += 1
        self._trained_groups |= {(epoch, index) for epoch, index, _ in self._accepted[step]}

    def _check_groups(self, push: PushRequest, keys: Keys) -> None:
        if len({(epoch, index) for epoch, index, _ in keys}) != len(push.groups):
            raise InvalidError("a prompt comes twice in the batch")
        for group in push.groups:
            name = f"group (epoch {group.epoch}, index {group.index})"
            self._check_content(group, name)
            for version in {span.version for sample in group.samples for span in sample.versions}:
                if not self._lineage.holds(version):
                    raise RefusedError(f"{name}: version {version.incarnation}.{version.step} is off the lineage")
                if version.step > push.step:
                    raise InvalidError(f"{name}: version {version.step} is newer than the step {push.step}")
            lag = group_lag(group, push.step)
            if lag > self._bounds.max_staleness:
                raise StaleError(f"{name}: lag {lag} exceeds max_staleness {self._bounds.max_staleness}")
            if (group.epoch, group.index) in self._accepted_prompts:
                trained = (group.epoch, group.index) in self._trained_groups
                raise RefusedError(f"{name} {'has been trained' if trained else 'waits to be trained'} already")

    def _check_content(self, group: TrainGroup, name: str) -> None:
        if not 0.0 < group.temperature <= 100.0:
            raise InvalidError(f"{name}: temperature {group.temperature} cannot be trained on")
        if len({sample.index for sample in group.samples}) != len(group.samples):
            raise InvalidError(f"{name}: a sample index comes twice")
        self._check_ids(group.prompt_ids, f"{name}, prompt")
        for sample in group.samples:
            self._check_sample(sample, len(group.prompt_ids), f"{name}, sample {sample.index}")

    def _check_sample(self, sample: TrainSample, prompt_tokens: int, name: str) -> None:
        self._check_ids(sample.output_ids, name)
        if prompt_tokens + len(sample.output_ids) > self._bounds.context_tokens:
            raise InvalidError(f"{name}: longer than the context of {self._bounds.context_tokens} tokens")
        if sample.logprobs.dtype != np.float32 or sample.logprobs.shape != sample.output_ids.shape:
            raise InvalidError(f"{name}: log-probs must be float32, one per token")
        if not np.isfinite(sample.logprobs).all() or sample.logprobs.max() > LOGPROB_SLACK:
            raise InvalidError(f"{name}: log-probs must be finite and not positive")
        if not np.isfinite(sample.reward):
            raise InvalidError(f"{name}: reward is not finite")
        if not spans_cover(sample):
            raise InvalidError(f"{name}: version spans do not cover the tokens")

    def _check_ids(self, ids: np.ndarray, name: str) -> None:
        if ids.dtype != np.int32 or ids.ndim != 1 or not len(ids):
            raise InvalidError(f"{name}: token ids must be int32 [T], T > 0")
        if ids.min() < 0 or ids.max() >= self._bounds.vocab:
            raise InvalidError(f"{name}: a token id lies outside of the vocabulary of {self._bounds.vocab}")
