"""Cuts a batch into minibatches and micro-batches per rank, and packs a micro-batch without padding.

INVARIANTS: the plan depends on the batch alone, so every rank computes the same one. Every sample lies whole in exactly
one micro-batch. All ranks have equally many micro-batches in a minibatch; where samples are few, some are empty.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.batch import TrainBatch

Plan = list[list[list[list[int]]]]
"""plan[minibatch][micro-batch][rank]: indices of samples, ascending."""


def plan(batch: TrainBatch, *, ranks: int, tokens_per_microbatch: int, minibatches: int) -> Plan:
    """Whole groups to minibatches in order; each minibatch over ranks and micro-batches, balanced by token count.

    A sample longer than tokens_per_microbatch is a micro-batch by itself; fewer groups than minibatches: fewer updates.
    """
    cuts = np.array_split(np.arange(batch.groups), min(minibatches, batch.groups))
    members = [np.flatnonzero((batch.group >= cut[0]) & (batch.group <= cut[-1])) for cut in cuts]
    return [_split(indices, batch.length[indices], ranks, tokens_per_microbatch) for indices in members]


def _split(indices: np.ndarray, length: np.ndarray, ranks: int, cap: int) -> list[list[list[int]]]:
    """Longest first into the emptiest bin; one more micro-batch per rank until every bin holds at most `cap` tokens."""
    cap = max(cap, int(length.max()))
    count = max(1, -(-int(length.sum()) // (cap * ranks)))
    order = np.argsort(-length, kind="stable")
    while True:
        bins: list[list[int]] = [[] for _ in range(count * ranks)]
        load = np.zeros(len(bins), np.int64)
        for position in order:
            fullest = int(load.argmin())
            bins[fullest].append(int(indices[position]))
            load[fullest] += length[position]
        if load.max() <= cap:
            break
        count += 1
    heaviest_first = np.argsort(-load, kind="stable")
    return [[sorted(bins[heaviest_first[micro * ranks + rank]]) for rank in range(ranks)] for micro in range(count)]


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Packed samples. Sequence positions are [1, T]; O refinement tokens are predicted, those of B sequences.

    row_O: positions in T whose hidden state predicts target_O; segment_O: the sequence of each, from 0.
    output_O: where each of them lies among all refinement tokens of the batch. An empty micro-batch has B = 0 and one
    stand-in token to predict, so that every rank runs every layer; its loss is to be multiplied by 0.
    """

    ids_1T: Tensor
    position_1T: Tensor
    boundary: Tensor
    max_length: int
    row_O: Tensor
    target_O: Tensor
    temperature_O: Tensor
    segment_O: Tensor
    length_B: Tensor
    output_O: Tensor

    @property
    def empty(self) -> bool:
        return not len(self.length_B)

    def to(self, device: torch.device | str) -> Microbatch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def pack(batch: TrainBatch, samples: list[int]) -> Microbatch:
    """Concatenate the samples. Only refinement tokens are predicted: prompts carry no loss."""
    if not samples:
        return _empty()
    starts = np.concatenate([[0], np.cumsum(batch.length)])
    output_starts = np.concatenate([[0], np.cumsum(batch.output_length, dtype=np.int64)])
    length = batch.length[samples]
    output_length = batch.output_length[samples].astype(np.int64)
    boundary = np.concatenate([[0], np.cumsum(length)])
    rows = [np.arange(end - n - 1, end - 1) for end, n in zip(boundary[1:], output_length, strict=True)]
    ids = np.concatenate([batch.token[starts[s] : starts[s + 1]] for s in samples]).astype(np.int64)
    row = np.concatenate(rows)
    segment = np.repeat(np.arange(len(samples)), output_length)
    return Microbatch(
        ids_1T=torch.from_numpy(ids)[None],
        position_1T=torch.from_numpy(np.concatenate([np.arange(n) for n in length]))[None],
        boundary=torch.from_numpy(boundary.astype(np.int32)),
        max_length=int(length.max()),
        row_O=torch.from_numpy(row),
        target_O=torch.from_numpy(ids[row + 1]),
        temperature_O=torch.from_numpy(batch.temperature[samples][segment]),
        segment_O=torch.from_numpy(segment),
        length_B=torch.from_numpy(output_length),
        output_O=torch.from_numpy(np.concatenate([np.arange(output_starts[s], output_starts[s + 1]) for s in samples])),
    )


def _empty() -> Microbatch:
    none, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return Microbatch(
        ids_1T=torch.zeros(1, 2, dtype=torch.int64),
        position_1T=torch.arange(2)[None],
        boundary=torch.tensor([0, 2], dtype=torch.int32),
        max_length=2,
        row_O=zero,
        target_O=zero,
        temperature_O=torch.ones(1),
        segment_O=none,
        length_B=none,
        output_O=none,
    )
