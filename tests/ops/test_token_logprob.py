"""The op against float64, in its C++ and its plain-torch form, and as a citizen of torch's op system."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ops.build import load_kernels
from ops.token_logprob import reference_backward, reference_forward, token_logprob

assert load_kernels(), "the tests need a C++ compiler"


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, temperature):
        logp, entropy, lse = reference_forward(logits, target, temperature)
        ctx.save_for_backward(logits, target, temperature, lse, entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, *grads):
        return reference_backward(*grads, *ctx.saved_tensors), None, None


Form = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
FORMS: dict[str, Form] = {"cpp": token_logprob, "reference": _Reference.apply}


def in_float64(logits: Tensor, target: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (logits.double() / temperature.double()[:, None]).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0.0)).sum(-1)
    return log_p.gather(1, target[:, None]).squeeze(1), entropy


def rows(count: int, vocab: int, dtype: torch.dtype, *, masked: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count * 100_003 + vocab)
    logits = (torch.randn(count, vocab, generator=generator) * 4).to(dtype)
    target = torch.randint(0, vocab, (count,), generator=generator)
    if masked:
        logits[:, 3::7] = -torch.inf
        target[target % 7 == 3] = 0
    return logits.requires_grad_(), target, torch.rand(count, generator=generator) + 0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "masked"), [(1, False), (7, False), (1000, True), (32_001, True)])
def test_equals_float64(form: str, dtype: torch.dtype, vocab: int, masked: bool) -> None:
    logits, target, temperature = rows(33, vocab, dtype, masked=masked)
    ours, exact = FORMS[form](logits, target, temperature), in_float64(logits, target, temperature)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() <= 2e-5
    weights = torch.randn(2, 33, dtype=torch.float64)
    grads = [torch.autograd.grad((x[0] * weights[0] + x[1] * weights[1]).sum(), logits)[0] for x in (ours, exact)]
    error = (grads[0].double() - grads[1].double().nan_to_num()).abs().max()
    # the gradient has the logits' type: float32 is exact to rounding, half types keep 8 or 11 bits
    assert grads[0].dtype == dtype and grads[0].isfinite().all() and error <= (1e-5 if dtype == torch.float32 else 3e-2)


def test_gradcheck() -> None:
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    target, temperature = torch.randint(0, 11, (5,)), torch.rand(5, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, target, temperature), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    logits, target, temperature = rows(5, 11, dtype)
    torch.library.opcheck(torch.ops.igrpo.token_logprob.default, (logits, target, temperature))


def test_a_number_is_a_temperature_for_all_rows() -> None:
    logits, target, _ = rows(4, 9, torch.float32)
    one, many = token_logprob(logits, target, 0.7), token_logprob(logits, target, torch.full((4,), 0.7))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_empty_and_strided_rows() -> None:
    none = token_logprob(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert [part.shape for part in none] == [(0,), (0,)]
    wide = torch.randn(6, 40)
    target = torch.randint(0, 10, (6,))
    for view in (wide[:, 5:15], wide[:, ::4], torch.randn(10, 6).t()):
        torch.testing.assert_close(token_logprob(view, target), token_logprob(view.contiguous(), target))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", [-1, 9])
def test_a_target_outside_of_the_vocabulary_is_an_error(form: str, target: int) -> None:
    with pytest.raises(IndexError, match="outside of the vocabulary of 9"):
        FORMS[form](torch.zeros(2, 9), torch.tensor([0, target]), torch.ones(2))
