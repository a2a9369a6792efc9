"""Hidden states to log-probs without full logits: the same numbers, whatever the chunk."""

from __future__ import annotations

import pytest
import torch

from ops.build import load_kernels
from ops.linear_logprob import linear_logprob
from ops.token_logprob import token_logprob

assert load_kernels(), "the tests need a C++ compiler"


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_head_followed_by_the_op(chunk: int, with_bias: bool) -> None:
    hidden = torch.randn(23, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    bias = torch.randn(50, requires_grad=True) if with_bias else None
    target, temperature = torch.randint(0, 50, (23,)), torch.rand(23) + 0.5
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    fused = linear_logprob(hidden, weight, target, temperature, bias_V=bias, chunk=chunk)
    plain = token_logprob(torch.nn.functional.linear(hidden, weight, bias), target, temperature)
    weights = torch.randn(2, 23)
    grads = [torch.autograd.grad((x[0] * weights[0] + x[1] * weights[1]).sum(), inputs) for x in (fused, plain)]
    for a, b in zip((*fused, *grads[0]), (*plain, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (9, 4), (9,))
    )
    target = torch.randint(0, 9, (6,))
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, target, 0.8, bias_V=b, chunk=4), (hidden, weight, bias)
    )


def test_bfloat16_inputs_have_float32_logits() -> None:
    hidden, weight = (torch.randn(*shape).bfloat16() for shape in ((40, 64), (500, 64)))
    target = torch.randint(0, 500, (40,))
    logp, entropy = linear_logprob(hidden, weight, target)
    exact = token_logprob(hidden.double() @ weight.double().t(), target)
    assert (logp - exact[0]).abs().max() < 2e-5 and (entropy - exact[1]).abs().max() < 2e-5


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64))[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_no_rows() -> None:
    logp, _ = linear_logprob(
        torch.zeros(0, 4, requires_grad=True), torch.zeros(5, 4), torch.zeros(0, dtype=torch.int64)
    )
    logp.sum().backward()
    assert logp.shape == (0,)
