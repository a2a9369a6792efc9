"""Splitting and packing: every sample once, balanced, whatever the order of arrival; packed equals unpacked."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.config import ModelConfig
from protocol.messages import PushRequest
from tests.tiny_model import make_tiny_model
from tests.trainer.recorded import load_float64, logprobs, recorded_push
from trainer.batch import TrainBatch, batch_of
from trainer.model import Scorer, load_policy
from trainer.packing import pack, plan


@given(
    groups=st.integers(1, 9),
    samples=st.integers(1, 5),
    ranks=st.integers(1, 5),
    cap=st.integers(1, 400),
    minibatches=st.integers(1, 4),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_the_plan_holds_every_sample_once(groups, samples, ranks, cap, minibatches, seed) -> None:
    batch = batch_of(recorded_push(groups=groups, samples=samples, seed=seed))
    split = plan(batch, ranks=ranks, tokens_per_microbatch=cap, minibatches=minibatches)
    assert len(split) == min(minibatches, groups)
    assert sorted(s for mini in split for micro in mini for rank in micro for s in rank) == list(range(batch.samples))
    for minibatch in split:
        assert all(len(micro) == ranks for micro in minibatch)
        for micro in minibatch:
            for share in micro:
                assert sum(batch.length[share]) <= cap or len(share) == 1 or cap < batch.length.max()
        members = {int(batch.group[s]) for micro in minibatch for share in micro for s in share}
        assert all((batch.group == g).sum() == samples for g in members), "groups stay whole"


def test_ranks_get_balanced_work() -> None:
    batch = batch_of(recorded_push(groups=32, samples=8))
    for micro in plan(batch, ranks=4, tokens_per_microbatch=1000, minibatches=1)[0]:
        loads = [int(batch.length[share].sum()) for share in micro]
        assert max(loads) <= 1000 and min(loads) > 0.9 * max(loads)


def test_the_order_of_arrival_changes_nothing() -> None:
    push = recorded_push(groups=5)
    shuffled = list(push.groups)
    random.Random(0).shuffle(shuffled)
    again = [msgspec.structs.replace(group, samples=group.samples[::-1]) for group in shuffled]
    assert batch_of(push).encode() == batch_of(PushRequest(incarnation=1, step=0, groups=again)).encode()


def test_a_batch_survives_its_encoding() -> None:
    batch = batch_of(recorded_push(step=3, lag=2))
    again = TrainBatch.decode(batch.encode())
    assert again.step == 3 and again.encode() == batch.encode()
    assert set(batch.lag) == {0, 2}
    assert batch.lag.dtype == np.int32 and batch.behaviour.dtype == np.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    model = ModelConfig.model_validate({"path": str(folder), "dtype": "float32"})
    return load_policy(model, lora=None, activation_checkpointing=False, device=torch.device("cpu"))


def test_packed_equals_unpacked(folder: Path, scorer: Scorer) -> None:
    push = recorded_push()
    batch = batch_of(push)
    micro = pack(batch, list(range(batch.samples)))
    packed, entropy = scorer(micro)
    model = load_float64(folder)
    alone = torch.cat([logprobs(model, group, sample) for group in push.groups for sample in group.samples])
    assert (packed - alone).abs().max() <= 1e-5
    assert entropy.min() > 0

    weight = torch.randn(len(alone))
    scorer.zero_grad()
    (packed * weight).sum().backward()
    (alone * weight).sum().backward()
    ours = {name.removeprefix("lm."): p.grad for name, p in scorer.named_parameters()}
    for name, parameter in model.named_parameters():
        grad = ours[name]
        assert grad is not None and parameter.grad is not None
        scale = parameter.grad.abs().max()
        assert (grad - parameter.grad).abs().max() <= 1e-5 * max(1.0, scale.item()), name


def test_refinement_tokens_alone_carry_gradient(scorer: Scorer) -> None:
    """Changing what is predicted at a prompt position changes nothing; the rows are exactly the refinements'."""
    push = recorded_push(groups=2, samples=2)
    batch = batch_of(push)
    micro = pack(batch, [0, 3])
    lengths = [(len(group.prompt_ids), len(sample.output_ids)) for group in push.groups for sample in group.samples]
    rows, start = [], 0
    for prompt, output in (lengths[0], lengths[3]):
        rows += range(start + prompt - 1, start + prompt + output - 1)
        start += prompt + output
    assert micro.row_O.tolist() == rows
    assert micro.target_O.tolist() == [
        *push.groups[0].samples[0].output_ids.tolist(),
        *push.groups[1].samples[1].output_ids.tolist(),
    ]
    hidden = torch.zeros(0)

    def keep(_: torch.nn.Module, inputs: tuple, output) -> None:
        nonlocal hidden
        hidden = output.last_hidden_state
        hidden.retain_grad()

    handle = scorer.causal.get_decoder().register_forward_hook(keep)
    scorer(micro)[0].sum().backward()
    handle.remove()
    assert hidden.grad is not None
    assert hidden.grad[0].abs().sum(-1).nonzero().flatten().tolist() == rows


def test_an_empty_microbatch_has_a_graph_and_no_loss(scorer: Scorer) -> None:
    micro = pack(batch_of(recorded_push()), [])
    assert micro.empty
    scorer.zero_grad()
    (scorer(micro)[0].sum() * 0.0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in scorer.parameters())
