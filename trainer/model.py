"""Loads the policy and wraps it into a module that turns packed tokens into log-probs of the refinement tokens."""

from __future__ import annotations

import copy
import logging
import types
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from ops.linear_logprob import linear_logprob
from protocol.config import ModelConfig
from trainer.attention import attention_arguments, check_attention, register_attention
from trainer.config import LoraConfig
from trainer.dropout import disable_dropout
from trainer.model_path import ModelError, check_model_path, checkpoint_names
from trainer.packing import Microbatch

log = logging.getLogger("trainer")


class Scorer(nn.Module):
    """Log-prob and entropy of refinement tokens under a causal language model, temperature-scaled per token.

    lm: the model, or the model in its adapters; causal: the transformers model itself. Dropout is off for good;
    checkpoint_config: the configuration as it was before that, for the export.
    The head is called as a module, so that ZeRO-3's hooks gather its weight; only its forward is replaced.
    """

    causal: PreTrainedModel
    checkpoint_config: PreTrainedConfig
    _head: nn.Module
    _backbone: nn.Module

    def __init__(self, lm: nn.Module, causal: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.checkpoint_config = copy.deepcopy(causal.config)
        disable_dropout(lm, causal.config)
        head = _head(causal)
        head.forward = types.MethodType(_head_logprob, head)
        self.__dict__.update(causal=causal, _head=head, _backbone=causal.get_decoder())  # registered below `lm` already

    def forward(self, micro: Microbatch) -> tuple[Tensor, Tensor]:
        """(log-prob [O] float32 with gradient, entropy [O] float32)."""
        hidden = self._backbone(
            input_ids=micro.ids_1T,
            position_ids=micro.position_1T,
            attention_mask=None,
            use_cache=False,
            **attention_arguments(micro),
        ).last_hidden_state
        return self._head(hidden[0, micro.row_O], micro.target_O, micro.temperature_O)


def _head_logprob(head: nn.Linear, hidden: Tensor, target: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    return linear_logprob(hidden, head.weight, target, temperature, bias_V=head.bias)


def _head(causal: PreTrainedModel) -> nn.Linear:
    head = causal.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"model.path: the output head of {type(causal).__name__} is not a linear layer")
    return head


def load_policy(
    model: ModelConfig, *, lora: LoraConfig | None, activation_checkpointing: bool, device: torch.device
) -> Scorer:
    """The model to train, on the CPU, in its configured dtype. Raises ModelError."""
    causal = load_model(model, device)
    if activation_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm = causal if lora is None else _with_adapters(causal, lora)
    return Scorer(lm.train(), causal)


def load_reference(model: ModelConfig, path: str, device: torch.device) -> Scorer:
    """A frozen model for the KL penalty."""
    lm = load_model(model if path == "initial" else model.model_copy(update={"path": path}), device)
    lm.requires_grad_(False)
    return Scorer(lm.eval(), lm)


def load_model(model: ModelConfig, device: torch.device) -> PreTrainedModel:
    """AutoModelForCausalLM with packed attention. Raises ModelError, naming the place, if it is missing or unfit."""
    check_model_path(model.path)
    disable_progress_bar()
    dtype = getattr(torch, model.dtype)
    attention = register_attention(device, dtype)
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model.path: {model.path} cannot be loaded: {str(error).splitlines()[0]}") from error
    _check_names(lm, model.path)
    check_attention(lm, attention, model.path)
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(lm.config, name, None) not in (None, 1, 1.0):
            raise ModelError(f"model.path: {model.path} changes its logits by `{name}`, which the trainer does not do")
    return lm


def _check_names(lm: PreTrainedModel, path: str) -> None:
    """Weights are published under their parameters' names, so these must be the checkpoint's too."""
    names = checkpoint_names(_folder(path))
    if names:
        unknown = [name for name, _ in lm.named_parameters() if name not in names]
    else:
        unknown = [str(used.source_patterns) for used in getattr(lm, "_weight_conversions", None) or ()]
        if not unknown:
            log.warning("model.path: %s has no safetensors: servers must call its weights as transformers does", path)
    if unknown:
        raise ModelError(f"model.path: {path} calls its weights otherwise than transformers does ({unknown[0]}, …)")


def _folder(path: str) -> Path:
    """Where the files lie of which the model was loaded: `path`, or the hub's cache."""
    cached = None if Path(path).is_dir() else cached_file(path, "config.json", local_files_only=True)
    return Path(cached).parent if cached else Path(path)


def _with_adapters(lm: PreTrainedModel, config: LoraConfig) -> nn.Module:
    from peft import LoraConfig as PeftConfig  # peft takes seconds to import
    from peft import get_peft_model

    head = next(name for name, module in lm.named_modules() if module is _head(lm))
    targets = config.target_modules
    if not isinstance(targets, str) and head.rsplit(".", 1)[-1] in targets:
        raise ModelError(f"lora.target_modules: the output head {head} cannot have an adapter")
    try:
        adapters = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, task_type="CAUSAL_LM")
        return get_peft_model(lm, adapters)
    except ValueError as error:
        raise ModelError(f"lora.target_modules: {str(error).splitlines()[0]}") from error
