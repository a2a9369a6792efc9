"""One step's batch as flat arrays: what push brings is ordered, flattened, sent to every rank, and cut into pieces."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import msgspec
import numpy as np

from protocol.messages import PushRequest, TrainGroup, TrainSample

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """S samples of one optimiser step, ordered by (epoch, index, attempt, sample index).

    token: int32, prompt and refinement of each sample, one after another. behaviour, lag: per refinement token, float32
    log-prob and int32 steps between its version and this step. Everything else: per sample. group counts from 0.
    """

    step: int
    token: Array
    behaviour: Array
    lag: Array
    prompt_length: Array
    output_length: Array
    group: Array
    reward: Array
    temperature: Array
    truncated: Array

    @property
    def samples(self) -> int:
        return len(self.prompt_length)

    @property
    def length(self) -> Array:
        """int64 [S], tokens of each sample, prompt included."""
        return self.prompt_length.astype(np.int64) + self.output_length

    @property
    def groups(self) -> int:
        return int(self.group[-1]) + 1

    def encode(self) -> bytes:
        """The batch as bytes for the other ranks; no pickle."""
        arrays = {name: (str(array.dtype), array.tobytes()) for name, array in self._arrays().items()}
        return msgspec.msgpack.encode((self.step, arrays))

    @staticmethod
    def decode(data: bytes | memoryview) -> TrainBatch:
        """The inverse of encode."""
        step, arrays = msgspec.msgpack.decode(data, type=tuple[int, dict[str, tuple[str, bytes]]])
        return TrainBatch(step=step, **{name: np.frombuffer(raw, dtype) for name, (dtype, raw) in arrays.items()})

    def _arrays(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "step"}


def batch_of(push: PushRequest) -> TrainBatch:
    """Flatten a validated push. The order does not depend on the order in which groups and samples came."""
    groups = sorted(push.groups, key=lambda group: (group.epoch, group.index, group.attempt))
    rows = [(number, group, sample) for number, group in enumerate(groups) for sample in _ordered(group)]
    samples = [sample for _, _, sample in rows]
    return TrainBatch(
        step=push.step,
        token=np.concatenate([ids for _, group, sample in rows for ids in (group.prompt_ids, sample.output_ids)]),
        behaviour=np.concatenate([sample.logprobs for sample in samples]),
        lag=np.concatenate([_lag(sample, push.step) for sample in samples]),
        prompt_length=np.array([len(group.prompt_ids) for _, group, _ in rows], np.int32),
        output_length=np.array([len(sample.output_ids) for sample in samples], np.int32),
        group=np.array([number for number, _, _ in rows], np.int64),
        reward=np.array([sample.reward for sample in samples], np.float64),
        temperature=np.array([group.temperature for _, group, _ in rows], np.float32),
        truncated=np.array([sample.truncated for sample in samples], np.bool_),
    )


def group_lag(group: TrainGroup, step: int) -> int:
    """Steps between the oldest version among the group's refinement tokens and the update at `step`."""
    return max(step - span.step for sample in group.samples for span in sample.versions)


def spans_cover(sample: TrainSample) -> bool:
    """Whether the version spans cover the tokens in order, without gap or overlap."""
    spans = sample.versions
    joined = all(left.end == right.start for left, right in pairwise(spans))
    whole = bool(spans) and spans[0].start == 0 and spans[-1].end == len(sample.output_ids)
    return whole and joined and all(span.start < span.end for span in spans)


def _ordered(group: TrainGroup) -> list[TrainSample]:
    return sorted(group.samples, key=lambda sample: sample.index)


def _lag(sample: TrainSample, step: int) -> Array:
    steps = np.array([step - span.step for span in sample.versions], np.int32)
    return np.repeat(steps, [span.end - span.start for span in sample.versions])
