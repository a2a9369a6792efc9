"""Models that the trainer would compute otherwise than they are meant, or publish under wrong names, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from protocol.config import ModelConfig
from tests.tiny_model import make_tiny_model
from tests.trainer.recorded import recorded_push
from trainer.attention import FLASH, VARLEN_SDPA, check_attention, register_attention, varlen_sdpa
from trainer.batch import batch_of
from trainer.dropout import disable_dropout
from trainer.model import load_model, load_policy
from trainer.model_path import ModelError
from trainer.packing import pack

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}


def configured(path: str) -> ModelConfig:
    return ModelConfig.model_validate({"path": path, "dtype": "float32"})


@pytest.mark.parametrize(
    ("model", "attention", "message"),
    [
        (Gemma2ForCausalLM(Gemma2Config(**SMALL)), VARLEN_SDPA, "soft-capped"),
        (Gemma2ForCausalLM(Gemma2Config(**SMALL)), FLASH, None),
        (GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=2)), FLASH, "attention sinks"),
    ],
    ids=["softcap", "softcap-flash", "sinks"],
)
def test_other_attention_is_refused(model: PreTrainedModel, attention: str, message: str | None) -> None:
    if message is None:
        check_attention(model, attention, "here")
    else:
        with pytest.raises(ModelError, match=f"here has {message}"):
            check_attention(model, attention, "here")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sliding_window": 4}, "sliding window of 4 tokens is shorter than a sequence of 5"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_attention_cannot_do_it_does_not_pass_over(asked: dict, message: str) -> None:
    q, boundary = torch.randn(1, 2, 8, 4), torch.tensor([0, 3, 8], dtype=torch.int32)
    whole, _ = varlen_sdpa(nn.Module(), q, q, q, None, cu_seq_lens_q=boundary)
    same, _ = varlen_sdpa(nn.Module(), q, q, q, None, cu_seq_lens_q=boundary, sliding_window=5, dropout=0.0)
    assert torch.equal(whole, same)
    with pytest.raises(ModelError, match=message):
        varlen_sdpa(nn.Module(), q, q, q, None, cu_seq_lens_q=boundary, **asked)


def test_flash_attention_is_for_bfloat16_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    cuda = torch.device("cuda")
    assert register_attention(cuda, torch.bfloat16) == FLASH
    assert register_attention(cuda, torch.float32) == register_attention(CPU, torch.bfloat16) == VARLEN_SDPA


def test_dropout_is_off_in_training(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    scorer = load_policy(configured(str(folder)), lora=None, activation_checkpointing=False, device=CPU)
    assert scorer.lm.training
    micro = pack(batch_of(recorded_push(groups=1)), [0, 1])
    first, again = (scorer(micro)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_every_kind_of_dropout_is_found() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.resid_pdrop = nn.Dropout(0.5), 0.5

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.drop(x), self.resid_pdrop, self.training)

    layer, config = Layer(), Qwen3MoeConfig(attention_dropout=0.5)
    disable_dropout(layer, config)
    x = torch.ones(100)
    assert torch.equal(layer(x), x) and config.attention_dropout == 0.0


@pytest.mark.parametrize("hub", [False, True])
def test_a_model_of_fused_experts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: bool) -> None:
    folder = tmp_path / "models--team--moe/snapshots/0"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **EXPERTS)).save_pretrained(folder)
    with pytest.raises(ModelError, match="calls its weights otherwise"):
        load_model(configured(in_hub(folder, monkeypatch) if hub else str(folder)), CPU)


def test_a_hub_name_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "models--team--tiny/snapshots/0")
    load_model(configured(in_hub(folder, monkeypatch)), CPU)


def test_without_names_only_what_is_certain_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.model.checkpoint_names", lambda folder: set())
    load_model(configured(str(make_tiny_model(tmp_path / "tiny"))), CPU)
    assert "has no safetensors" in caplog.text
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **EXPERTS)).save_pretrained(tmp_path / "moe")
    with pytest.raises(ModelError, match="calls its weights otherwise"):
        load_model(configured(str(tmp_path / "moe")), CPU)


def in_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which the snapshot is found in a hub's cache, without a network."""
    repository = folder.parents[1]
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(folder.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(repository.parent))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository.name.removeprefix("models--").replace("--", "/")
