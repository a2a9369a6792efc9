"""The output head fused with token_logprob: hidden states to log-probs, logits of one chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.token_logprob import temperature_tensor

CHUNK_ROWS = 1024
"""Rows whose logits exist at once: large enough for efficient matrix products, small against whole batches."""


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, temperature, chunk):
        outputs = [
            torch.ops.igrpo.token_logprob(_logits(hidden[rows], weight, bias), target[rows], temperature[rows])
            for rows in _chunks(hidden.shape[0], chunk)
        ]
        logp, entropy, lse = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        ctx.save_for_backward(hidden, weight, bias, target, temperature, lse, entropy)
        ctx.chunk = chunk
        return logp, entropy

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight, bias, target, temperature, lse, entropy = ctx.saved_tensors
        g_logp, g_entropy = grads
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if ctx.needs_input_grad[2] else None
        for rows in _chunks(hidden.shape[0], ctx.chunk):
            logits = _logits(hidden[rows], weight, bias)
            d_logits = torch.ops.igrpo.token_logprob_backward(
                g_logp[rows], g_entropy[rows], logits, target[rows], temperature[rows], lse[rows], entropy[rows]
            )
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                if hidden.dtype == wide:
                    d_weight.addmm_(d_logits.t(), hidden[rows])
                else:
                    d_weight += d_logits.t() @ hidden[rows]
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)] or [slice(0, 0)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 logits even of bfloat16 inputs: rounding them would cost log-probs up to 0.016 (STACK.md section 4)."""
    if hidden.dtype in (torch.float32, torch.float64):
        logits = hidden @ weight.t()
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().t()
    return logits if bias is None else logits + bias


def linear_logprob(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    bias_V: Tensor | None = None,
    chunk: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Log-prob of target_T and entropy of softmax((hidden @ weight.T + bias) / temperature), both [T] float32.

    Logits are float32, of `chunk` rows at a time, and computed again in the backward pass, so that [T, V] never exists.
    """
    scale = temperature_tensor(temperature, hidden_TH)
    return _LinearLogprob.apply(hidden_TH, weight_VH, bias_V, target_T, scale, chunk)
