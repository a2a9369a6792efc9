"""Recorded rollouts, and what the trainer should make of them, written down once more: naively, in float64."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from protocol.messages import PushRequest, TrainGroup, TrainSample, VersionSpan
from trainer.config import TrainerConfig

VOCAB = 320

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "DS_ACCELERATOR": "cpu",
}
"""For child processes."""


def recorded_push(
    *,
    groups: int = 6,
    samples: int = 4,
    step: int = 0,
    incarnation: int = 1,
    lag: int = 0,
    seed: int = 0,
    first: int = 0,
) -> PushRequest:
    """Random prompts and refinements of random lengths at temperatures 0.7 and 1.0; later tokens may be fresher."""
    rng = np.random.default_rng(seed)
    return PushRequest(
        incarnation=incarnation,
        step=step,
        groups=[_group(rng, first + n, samples, step - lag, step, incarnation) for n in range(groups)],
    )


def _group(rng: np.random.Generator, index: int, samples: int, oldest: int, step: int, incarnation: int) -> TrainGroup:
    def sample(number: int) -> TrainSample:
        length = int(rng.integers(2, 24))
        cut = int(rng.integers(1, length))
        return TrainSample(
            index=number,
            output_ids=rng.integers(3, VOCAB, length).astype(np.int32),
            logprobs=np.minimum(-5.5 + rng.normal(size=length), 0.0).astype(np.float32),
            versions=[VersionSpan(incarnation, oldest, 0, cut), VersionSpan(incarnation, step, cut, length)],
            reward=float(number % 2 == 0) if index % 4 else 1.0,
        )

    return TrainGroup(
        epoch=0,
        index=index,
        attempt=0,
        prompt_ids=rng.integers(3, VOCAB, int(rng.integers(3, 40))).astype(np.int32),
        samples=[sample(number) for number in range(samples)],
        temperature=0.7 if index % 2 else 1.0,
    )


def load_float64(folder: Path) -> torch.nn.Module:
    """The model with transformers' own attention and head, in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


def logprobs(model: torch.nn.Module, group: TrainGroup, sample: TrainSample) -> Tensor:
    """Log-probs of one refinement by itself, unpacked."""
    ids = torch.from_numpy(np.concatenate([group.prompt_ids, sample.output_ids]).astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
    chosen = ids[len(group.prompt_ids) :, None]
    return (logits.double() / group.temperature).log_softmax(-1).gather(1, chosen).squeeze(1)


def naive_loss(
    model: torch.nn.Module, groups: list[TrainGroup], config: TrainerConfig, prox: dict, ref: dict
) -> Tensor:
    """GRPO with TIS and KL over the given groups, sample by sample."""
    o = config.objective
    sequences = sum(len(group.samples) for group in groups)
    tokens = sum(len(sample.output_ids) for group in groups for sample in group.samples)
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        rewards = np.array([sample.reward for sample in group.samples])
        std = {"none": 1.0, "biased": rewards.std() + 1e-6, "unbiased": rewards.std(ddof=1) + 1e-6}[o.advantage_std]
        for sample, advantage in zip(group.samples, (rewards - rewards.mean()) / std, strict=True):
            key = (group.index, sample.index)
            lp = logprobs(model, group, sample)
            old = prox.get(key, lp.detach())
            ratio = (lp - old).exp()
            loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * advantage)
            if o.correction.kind == "tis":
                loss = loss * (old - torch.from_numpy(sample.logprobs).double()).exp().clamp(max=o.correction.cap)
            if o.kl.kind == "k3":
                loss = loss + o.kl.beta * ((ref[key] - lp).exp() - (ref[key] - lp) - 1)
            total = total + (loss.sum() / tokens if o.aggregation == "token_mean" else loss.mean() / sequences)
    return total


def naive_step(folder: Path, push: PushRequest, config: TrainerConfig) -> tuple[dict[str, np.ndarray], list[float]]:
    """Weights after the step (by checkpoint name) and the loss of each minibatch."""
    model = load_float64(folder)
    reference = load_float64(folder)
    groups = sorted(push.groups, key=lambda group: group.index)
    everything = [(group, sample) for group in groups for sample in group.samples]
    k = config.minibatches_per_step
    with torch.no_grad():
        ref = {(g.index, s.index): logprobs(reference, g, s) for g, s in everything}
        prox = {(g.index, s.index): logprobs(model, g, s) for g, s in everything} if k > 1 else {}
    o = config.optimizer
    adam = torch.optim.AdamW(model.parameters(), o.learning_rate, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    losses = []
    for indices in np.array_split(np.arange(len(groups)), k):
        loss = naive_loss(model, [groups[i] for i in indices], config, prox, ref)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.gradient_clipping)
        adam.step()
        losses.append(loss.item())
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, losses
