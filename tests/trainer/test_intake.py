"""Which batches are accepted: pure decisions, without sockets or torch."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from protocol.errors import InvalidError, OverloadedError, ProtocolError, RefusedError, StaleError
from protocol.messages import PushRequest, Version, VersionSpan
from tests.trainer.recorded import VOCAB, recorded_push
from trainer.incarnation import Lineage, raise_incarnation
from trainer.intake import Bounds, Intake

BOUNDS = Bounds(max_staleness=1, max_queued=2, total_steps=5, vocab=VOCAB, context_tokens=128)


def intake(*branch_steps: int) -> Intake:
    return Intake(Lineage(branch_steps or (0,)), BOUNDS)


def push(step: int = 0, **kinds: Any) -> PushRequest:
    return recorded_push(step=step, groups=2, samples=2, first=2 * step, **kinds)


def test_steps_are_taken_in_order_and_once() -> None:
    desk = intake()
    assert desk.accept(push(0))
    assert not desk.accept(push(0)), "the same push again is the same push"
    with pytest.raises(RefusedError, match="another batch was accepted"):
        desk.accept(recorded_push(groups=2, samples=2, first=50))
    with pytest.raises(RefusedError, match="the next one is 1"):
        desk.accept(push(2))
    desk.done(0)
    assert desk.ledger == [(0, 0), (0, 1)]
    assert not desk.accept(push(0)), "also after it was trained"
    with pytest.raises(RefusedError, match="trained already"):
        desk.accept(recorded_push(step=1, groups=2, samples=2, first=0))


def test_a_prompt_that_waits_in_another_batch_is_refused() -> None:
    desk = intake()
    desk.accept(push(0))
    with pytest.raises(RefusedError, match="index 0\\) waits to be trained already"):
        desk.accept(recorded_push(step=1, groups=2, samples=2, first=0))
    assert desk.accept(push(1)), "what was refused leaves no trace"


def test_the_queue_is_bounded() -> None:
    desk = intake()
    desk.accept(push(0))
    desk.accept(push(1))
    with pytest.raises(OverloadedError) as error:
        desk.accept(push(2))
    assert error.value.retry_after_ms
    desk.done(0)
    assert desk.accept(push(2))


def test_no_batch_beyond_the_last_step() -> None:
    desk = intake(5)
    with pytest.raises(RefusedError, match="all 5 steps"):
        desk.accept(recorded_push(step=5))


def test_lag_is_bounded() -> None:
    desk = intake(3)
    with pytest.raises(StaleError, match="lag 2 exceeds max_staleness 1"):
        desk.accept(push(3, lag=2))
    assert desk.accept(push(3, lag=1))


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        (Version(1, 3), True),
        (Version(1, 4), False),
        (Version(2, 4), True),
        (Version(0, 3), False),
        (Version(3, 4), False),
    ],
)
def test_only_the_lineage_is_trained_on(version: Version, accepted: bool) -> None:
    """Incarnation 2 went on from step 3 of incarnation 1, which began at step 0."""
    desk = intake(0, 3)
    desk.accept(with_version(recorded_push(step=3, incarnation=2, groups=1), Version(2, 3)))
    candidate = with_version(recorded_push(step=4, incarnation=2, first=10, groups=1), version)
    if accepted:
        assert desk.accept(candidate)
    else:
        with pytest.raises(RefusedError, match="off the lineage"):
            desk.accept(candidate)


def with_version(request: PushRequest, version: Version) -> PushRequest:
    def changed(sample):
        span = VersionSpan(version.incarnation, version.step, 0, len(sample.output_ids))
        return msgspec.structs.replace(sample, versions=[span])

    groups = [msgspec.structs.replace(g, samples=[changed(s) for s in g.samples]) for g in request.groups]
    return msgspec.structs.replace(request, groups=groups)


def with_sample(**changes: Any) -> PushRequest:
    request = push()
    group = request.groups[0]
    sample = msgspec.structs.replace(group.samples[0], **changes)
    group = msgspec.structs.replace(group, samples=[sample, *group.samples[1:]])
    return msgspec.structs.replace(request, groups=[group, *request.groups[1:]])


def with_group(**changes: Any) -> PushRequest:
    request = push()
    return msgspec.structs.replace(
        request, groups=[msgspec.structs.replace(request.groups[0], **changes), *request.groups[1:]]
    )


IDS = np.array([5, 6], np.int32)
LOGPROBS = np.array([-1.0, -2.0], np.float32)
SPANS = [VersionSpan(1, 0, 0, 2)]


@pytest.mark.parametrize(
    ("request_", "error", "match"),
    [
        (recorded_push(incarnation=2), RefusedError, "incarnation 2"),
        (with_group(temperature=0.0), InvalidError, "temperature"),
        (with_group(temperature=float("nan")), InvalidError, "temperature"),
        (with_group(index=1), InvalidError, "a prompt comes twice"),
        (with_group(prompt_ids=np.zeros(0, np.int32)), InvalidError, "T > 0"),
        (with_group(prompt_ids=np.zeros(127, np.int32)), InvalidError, "longer than the context"),
        (with_sample(index=1), InvalidError, "sample index comes twice"),
        (with_sample(reward=float("nan")), InvalidError, "reward"),
        (with_sample(output_ids=IDS.astype(np.int64)), InvalidError, "int32"),
        (with_sample(output_ids=IDS + VOCAB), InvalidError, "outside of the vocabulary"),
        (with_sample(output_ids=-IDS), InvalidError, "outside of the vocabulary"),
        (with_sample(logprobs=LOGPROBS[:1]), InvalidError, "one per token"),
        (with_sample(output_ids=IDS, logprobs=LOGPROBS * np.nan), InvalidError, "finite"),
        (with_sample(output_ids=IDS, logprobs=-LOGPROBS), InvalidError, "not positive"),
        (with_sample(output_ids=IDS, logprobs=LOGPROBS, versions=[]), InvalidError, "do not cover"),
        (with_sample(output_ids=IDS, logprobs=LOGPROBS, versions=SPANS[:1] * 2), InvalidError, "do not cover"),
        (with_sample(output_ids=IDS, logprobs=LOGPROBS, versions=[VersionSpan(1, 2, 0, 2)]), InvalidError, "newer"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(request_: PushRequest, error: type[ProtocolError], match: str) -> None:
    desk = intake()
    with pytest.raises(error, match=match):
        desk.accept(request_)
    assert desk.next_step == 0 and desk.accept(push())


def test_the_incarnation_is_raised_at_every_start(tmp_path) -> None:
    path = tmp_path / "trainer" / "incarnation.json"
    assert raise_incarnation(path, 0).incarnation == 1
    assert raise_incarnation(path, 7) == Lineage((0, 7))
    path.write_text("{")
    with pytest.raises(OSError, match="is damaged"):
        raise_incarnation(path, 0)
