"""The policy's weights as they stand in a Hugging Face checkpoint, gathered bucket by bucket on rank 0.

INVARIANTS: every rank iterates, in the same order. Shared (tied) tensors come once. Adapters are merged in float32.
Under ZeRO-3 one bucket at a time is whole, under one gather that contains no other (STACK.md section 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.model import Scorer

Bucket = list[tuple[str, Tensor]]
"""Names and contiguous CPU tensors, which the receiver owns."""


@dataclass(frozen=True)
class _Unit:
    """One published tensor and the parameters that it is made of."""

    name: str
    base: nn.Parameter
    adapter: tuple[nn.Parameter, nn.Parameter, float] | None = None  # A [r, in], B [out, r], alpha / r

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.base, *(self.adapter[:2] if self.adapter else ())]

    @property
    def elements(self) -> int:
        return getattr(self.base, "ds_numel", self.base.numel())

    def value(self, dtype: torch.dtype) -> Tensor:
        if self.adapter is None:
            return self.base.detach().to("cpu", dtype, copy=True).contiguous()
        a, b, scale = self.adapter
        merged = self.base.detach().float() + scale * (b.detach().float() @ a.detach().float())
        return merged.to("cpu", dtype).contiguous()


def gather(scorer: Scorer, *, zero_stage: int, dtype: torch.dtype, bucket_bytes: int, leads: bool) -> Iterator[Bucket]:
    """Buckets of about bucket_bytes each, full on rank 0 (`leads`) and empty elsewhere."""
    for units in _buckets(_units(scorer), dtype.itemsize, bucket_bytes):
        with _whole([p for unit in units for p in unit.parameters], zero_stage):
            bucket = [(unit.name, unit.value(dtype)) for unit in units] if leads else []
        yield bucket


def _units(scorer: Scorer) -> list[_Unit]:
    parameters = {name.removeprefix("lm."): p for name, p in scorer.named_parameters()}
    scaling = {
        name.removeprefix("lm."): float(scale["default"])
        for name, module in scorer.named_modules()
        if isinstance(scale := getattr(module, "scaling", None), dict)
    }
    units = []
    for name, parameter in parameters.items():
        if ".lora_" in name:
            continue
        published = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        owner, _, leaf = name.rpartition(".")
        layer = owner.removesuffix(".base_layer")
        adapter = None
        if leaf == "weight" and layer in scaling:
            a, b = (parameters[f"{layer}.lora_{half}.default.weight"] for half in "AB")
            adapter = (a, b, scaling[layer])
        units.append(_Unit(published, parameter, adapter))
    return units


def _buckets(units: list[_Unit], itemsize: int, bucket_bytes: int) -> Iterator[list[_Unit]]:
    bucket: list[_Unit] = []
    size = 0
    for unit in units:
        nbytes = unit.elements * itemsize
        if bucket and size + nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(unit)
        size += nbytes
    if bucket:
        yield bucket


def _whole(parameters: list[nn.Parameter], zero_stage: int) -> contextlib.AbstractContextManager[object]:
    if zero_stage < 3:
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=None)
