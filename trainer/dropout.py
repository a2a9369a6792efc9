"""Training without dropout: current and proximal log-probs of the same weights must be the same numbers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig


def disable_dropout(lm: nn.Module, config: PreTrainedConfig) -> None:
    """Set every dropout rate to 0: of nn.Dropout, of modules that keep one by themselves, and of the configuration."""
    for module in lm.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero_rates(module)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        _zero_rates(part)


def _zero_rates(owner: Any) -> None:
    for name in [name for name, value in vars(owner).items() if "drop" in name and isinstance(value, float)]:
        setattr(owner, name, 0.0)
