"""Each piece against its formula written by hand in float64, and gradients against finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from trainer.config import ObjectiveConfig
from trainer.objective.advantage import active_groups, group_advantages
from trainer.objective.aggregate import aggregate, segment_sum
from trainer.objective.kl import kl_estimate
from trainer.objective.loss import Tokens, policy_loss
from trainer.objective.ratio import log_ratio, token_ratio
from trainer.objective.staleness import importance_weight, truncated_weight
from trainer.objective.surrogate import clipped_surrogate, is_clipped

Std = Literal["none", "biased", "unbiased"]
Mode = Literal["token_mean", "seq_mean_token_mean"]


def objective(**changes) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(changes)


def advantages(rewards: list[list[float]], std: Std) -> list[Tensor]:
    flat = torch.tensor([r for group in rewards for r in group])
    group = torch.tensor([n for n, g in enumerate(rewards) for _ in g])
    return list(group_advantages(flat, group, std=std, eps=1e-6).split([len(g) for g in rewards]))


class TestAdvantage:
    GROUPS = ([1.0, 0.0, 0.0, 1.0], [0.3, 0.9, 0.1], [1.0, 1.0], [0.7])

    @pytest.mark.parametrize(("std", "correction"), [("biased", 0), ("unbiased", 1)])
    def test_is_the_deviation_in_standard_deviations(self, std: Std, correction: int) -> None:
        for rewards, ours in zip(self.GROUPS[:2], advantages(list(self.GROUPS), std), strict=False):
            r = torch.tensor(rewards).double()
            torch.testing.assert_close(ours, (r - r.mean()) / (r.std(correction=correction) + 1e-6))

    def test_without_std_is_the_deviation(self) -> None:
        torch.testing.assert_close(advantages([[1.0, 0.0, 0.0]], "none")[0], torch.tensor([2, -1, -1]).double() / 3)

    def test_no_spread_is_exactly_zero(self) -> None:
        for std in get_args(Std):
            for ours in advantages([[0.1] * 3, [1.0, 1.0], [0.7], [0.1 + 0.2] * 7], std):
                assert (ours == 0).all()

    def test_binary_rewards_have_the_closed_form(self) -> None:
        ours = advantages([[1.0] * 3 + [0.0] * 5], "biased")[0]
        assert ours[0].item() == pytest.approx(math.sqrt(5 / 3), rel=1e-5)
        assert ours[-1].item() == pytest.approx(-math.sqrt(3 / 5), rel=1e-5)

    def test_sums_to_zero_and_ignores_affine_changes(self) -> None:
        plain = advantages([[0.2, 0.9, 0.4]], "unbiased")[0]
        scaled = advantages([[7 + 3 * 0.2, 7 + 3 * 0.9, 7 + 3 * 0.4]], "unbiased")[0]
        assert abs(plain.sum().item()) < 1e-12
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-5)

    def test_active_groups(self) -> None:
        reward = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5])
        assert active_groups(reward, torch.tensor([0, 0, 1, 1, 2])).tolist() == [True, False, False]


def test_ratio_is_clamped_and_its_gradient_cut() -> None:
    current = torch.tensor([0.0, 1.0, 100.0, -100.0], dtype=torch.float64, requires_grad=True)
    ratio = token_ratio(current, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(ratio, torch.tensor([0.0, 1.0, 20.0, -20.0], dtype=torch.float64).exp())
    (grad,) = torch.autograd.grad(ratio.sum(), current)
    torch.testing.assert_close(grad, torch.tensor([1.0, math.e, 0.0, 0.0], dtype=torch.float64))
    assert log_ratio(torch.tensor([50.0]), torch.tensor([0.0])).item() == 20.0


def test_truncated_weights() -> None:
    proximal = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([-1.0, -3.0, -0.5])
    weight = truncated_weight(proximal, behaviour, 2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.0, math.exp(-0.5)]))
    assert not weight.requires_grad and not importance_weight(proximal, behaviour).requires_grad


def test_clipped_surrogate_by_hand() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5, 1.25])
    advantage = torch.tensor([2.0, -2.0, 1.0, 2.0, -2.0, 1.0])
    ours = clipped_surrogate(ratio, advantage, 0.2, 0.28)
    torch.testing.assert_close(ours, torch.tensor([-1.0, 1.6, -1.0, -2.56, 3.0, -1.25]))
    assert is_clipped(ratio, advantage, 0.2, 0.28).tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates(kind) -> None:
    lp, ref = torch.tensor([-1.0, -2.0, -0.3]).double(), torch.tensor([-1.0, -1.5, -0.9]).double()
    d = lp - ref
    expected = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() + d - 1}[kind]
    torch.testing.assert_close(kl_estimate(lp, ref, kind), expected)
    assert kl_estimate(lp, ref, kind)[0] == 0
    if kind != "k1":
        assert (kl_estimate(lp, ref, kind) >= 0).all()


def test_aggregates_of_parts_add_up() -> None:
    loss, lengths = torch.arange(9).double(), torch.tensor([4, 2, 3])
    segment = torch.repeat_interleave(torch.arange(3), lengths)
    modes: list[tuple[Mode, float]] = [("token_mean", 4.0), ("seq_mean_token_mean", (1.5 + 4.5 + 7.0) / 3)]
    for mode, expected in modes:
        parts = [
            aggregate(loss[:6], segment[:6], lengths[:2], mode=mode, total_tokens=9, total_sequences=3),
            aggregate(loss[6:], segment[6:] - 2, lengths[2:], mode=mode, total_tokens=9, total_sequences=3),
        ]
        assert sum(part.item() for part in parts) == pytest.approx(expected)
    torch.testing.assert_close(segment_sum(loss, segment, 3), torch.tensor([6.0, 9.0, 21.0]).double())


def random_tokens(seed: int = 0) -> tuple[Tensor, Tokens]:
    torch.manual_seed(seed)
    lengths = torch.tensor([3, 1, 5])
    segment = torch.repeat_interleave(torch.arange(3), lengths)

    def lp() -> Tensor:
        return -2 + 0.4 * torch.randn(9, dtype=torch.float64)

    tokens = Tokens(
        behaviour_T=lp(),
        advantage_T=torch.randn(3, dtype=torch.float64)[segment],
        segment_T=segment,
        length_B=lengths,
        total_tokens=20,
        total_sequences=6,
        proximal_T=lp(),
        reference_T=lp(),
    )
    return lp().requires_grad_(), tokens


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize("correction", ["none", "tis"])
@pytest.mark.parametrize("kl", ["none", "k1", "k2", "k3"])
def test_the_composition_and_its_gradient(aggregation: str, correction: str, kl: str) -> None:
    config = objective(
        aggregation=aggregation, correction={"kind": correction}, kl={"kind": kl, "beta": 0.3 if kl != "none" else 0.0}
    )
    current, tokens = random_tokens()
    loss = policy_loss(current, tokens, config)
    (grad,) = torch.autograd.grad(loss, current)

    def by_hand(lp: list[float]) -> float:
        total = 0.0
        assert tokens.proximal_T is not None and tokens.reference_T is not None
        for t, value in enumerate(lp):
            a, prox = tokens.advantage_T[t].item(), tokens.proximal_T[t].item()
            r = math.exp(value - prox)
            part = -min(r * a, min(max(r, 0.8), 1.2) * a)
            if correction == "tis":
                part *= min(math.exp(prox - tokens.behaviour_T[t].item()), 2.0)
            d = value - tokens.reference_T[t].item()
            part += 0.3 * {"none": 0.0, "k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}[kl]
            length = tokens.length_B[tokens.segment_T[t]].item()
            total += part / 20 if aggregation == "token_mean" else part / length / 6
        return total

    point = current.detach().tolist()
    assert loss.item() == pytest.approx(by_hand(point), abs=1e-12)
    for t in range(9):
        up, down = (by_hand([x + (h if n == t else 0.0) for n, x in enumerate(point)]) for h in (1e-6, -1e-6))
        assert grad[t].item() == pytest.approx((up - down) / 2e-6, abs=1e-8)


def test_one_update_uses_the_current_policy_as_proximal() -> None:
    current, tokens = random_tokens()
    config = objective()
    on_policy = policy_loss(current, replace(tokens, proximal_T=None), config)
    explicit = policy_loss(current, replace(tokens, proximal_T=current.detach()), config)
    assert torch.equal(on_policy, explicit)
    (grad,) = torch.autograd.grad(on_policy, current)
    weight = truncated_weight(current, tokens.behaviour_T, 2.0)
    reinforce = -weight * tokens.advantage_T / tokens.length_B[tokens.segment_T] / 6
    torch.testing.assert_close(grad, reinforce)


def test_a_penalty_without_reference_is_an_error() -> None:
    current, tokens = random_tokens()
    with pytest.raises(ValueError, match="reference"):
        policy_loss(current, replace(tokens, reference_T=None), objective(kl={"kind": "k3", "beta": 0.1}))


def test_extreme_log_ratios_stay_finite() -> None:
    current, tokens = random_tokens()
    far = replace(tokens, behaviour_T=tokens.behaviour_T - 100, proximal_T=current.detach() + 100)
    loss = policy_loss(current, far, objective(kl={"kind": "k3", "beta": 0.1}))
    (grad,) = torch.autograd.grad(loss, current)
    assert loss.isfinite() and grad.isfinite().all()
