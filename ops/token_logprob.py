"""igrpo::token_logprob: log-prob of each row's target and entropy of softmax(logits / temperature).

Here: the declaration of the op, its plain-torch reference, shapes for tracing, and its gradient. csrc/ holds kernels
that take the reference's place on their device once build.load_kernels has loaded them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_forward(logits_TV: Tensor, target_T: Tensor, temperature_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, entropy, log-sum-exp), each [T] float32 (float64 for float64 logits)."""
    vocab = logits_TV.shape[1]
    if target_T.numel() and not bool(((target_T >= 0) & (target_T < vocab)).all()):
        raise IndexError(f"a target lies outside of the vocabulary of {vocab}")
    wide = _accumulate_type(logits_TV.dtype)
    scaled = logits_TV.to(wide) / temperature_T.to(wide)[:, None]
    lse = scaled.logsumexp(-1)
    logp = scaled.gather(1, target_T[:, None]).squeeze(1) - lse
    log_p = scaled.sub_(lse[:, None])
    entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)
    return logp, entropy, lse


def reference_backward(
    g_logp: Tensor,
    g_entropy: Tensor,
    logits_TV: Tensor,
    target_T: Tensor,
    temperature_T: Tensor,
    lse: Tensor,
    entropy: Tensor,
) -> Tensor:
    """dL/dlogits_j = (g_logp (1[j = target] - p_j) - g_entropy p_j (log p_j + entropy)) / temperature."""
    wide = _accumulate_type(logits_TV.dtype)
    temperature = temperature_T.to(wide)[:, None]
    log_p = (logits_TV.to(wide) / temperature).sub_(lse[:, None]).clamp_(min=-1e4)
    grad = log_p.exp().mul_(-(g_logp[:, None] + g_entropy[:, None] * (log_p + entropy[:, None])))
    grad.scatter_add_(1, target_T[:, None], g_logp[:, None].to(wide))
    return grad.div_(temperature).to(logits_TV.dtype)


def token_logprob(logits_TV: Tensor, target_T: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of target_T (int64) and entropy of softmax(logits / temperature), both [T], float32.

    temperature: one number or [T]. Differentiable in the logits (float32, bfloat16, float16; float64 stays float64).
    Raises IndexError for a target outside of the vocabulary (on the CPU; on a GPU the kernel asserts).
    """
    logp, entropy, _ = torch.ops.igrpo.token_logprob(logits_TV, target_T, temperature_tensor(temperature, logits_TV))
    return logp, entropy


def temperature_tensor(temperature: float | Tensor, rows: Tensor) -> Tensor:
    """[T] temperatures for the given rows."""
    if isinstance(temperature, Tensor):
        return temperature
    return torch.full((rows.shape[0],), temperature, dtype=_accumulate_type(rows.dtype), device=rows.device)


def _accumulate_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_forward(logits: Tensor, target: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp = logits.new_empty((logits.shape[0],), dtype=_accumulate_type(logits.dtype))
    return logp, torch.empty_like(logp), torch.empty_like(logp)


def _fake_backward(g_logp: Tensor, g_entropy: Tensor, logits: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, entropy, lse = output
    ctx.save_for_backward(*inputs, lse, entropy)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx, g_logp: Tensor, g_entropy: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    grad = torch.ops.igrpo.token_logprob_backward(g_logp, g_entropy, *ctx.saved_tensors)
    return grad, None, None


_library = torch.library.Library("igrpo", "DEF")
_library.define("token_logprob(Tensor logits, Tensor target, Tensor temperature) -> (Tensor, Tensor, Tensor)")
_library.define(
    "token_logprob_backward(Tensor g_logp, Tensor g_entropy, Tensor logits, Tensor target, Tensor temperature, "
    "Tensor lse, Tensor entropy) -> Tensor"
)
_library.impl("token_logprob", reference_forward, "CompositeExplicitAutograd")
_library.impl("token_logprob_backward", reference_backward, "CompositeExplicitAutograd")
torch.library.register_fake("igrpo::token_logprob", _fake_forward, lib=_library)
torch.library.register_fake("igrpo::token_logprob_backward", _fake_backward, lib=_library)
torch.library.register_autograd("igrpo::token_logprob", _differentiate, setup_context=_save, lib=_library)
