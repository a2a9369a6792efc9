"""The exported folder: weights that were written stay, whatever becomes of the rest, and one whole folder is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from protocol.config import ModelConfig
from tests.tiny_model import make_tiny_model
from trainer import safetensors_folder
from trainer.export import export
from trainer.gather import gather
from trainer.model import load_policy
from trainer.safetensors_folder import SafetensorsFolder


def exported(model: Path, target: Path) -> Path:
    config = ModelConfig.model_validate({"path": str(model), "dtype": "float32"})
    scorer = load_policy(config, lora=None, activation_checkpointing=False, device=torch.device("cpu"))
    buckets = gather(scorer, zero_stage=0, dtype=torch.float32, bucket_bytes=1 << 20, leads=True)
    return export(target, buckets, scorer, dtype=torch.float32, tokenizer=str(model), remote_code=False)


def test_configurations_leave_as_they_came(tmp_path: Path) -> None:
    """Also one that transformers refuses to save: sampling parameters without do_sample."""
    model = make_tiny_model(tmp_path / "model")
    sampling = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 0]}
    (model / "generation_config.json").write_text(json.dumps(sampling))
    config = json.loads((model / "config.json").read_text()) | {"attention_dropout": 0.1}
    (model / "config.json").write_text(json.dumps(config))
    out = exported(model, tmp_path / "export")
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (model, out))
    assert before.pop("_name_or_path") != after.pop("_name_or_path")
    assert after == before and after["attention_dropout"] == 0.1
    before, after = (GenerationConfig.from_pretrained(folder).to_dict() for folder in (model, out))
    assert after == before and after["temperature"] == 0.6
    AutoModelForCausalLM.from_pretrained(out)


def test_weights_outlive_a_part_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no tokenizer here")

    monkeypatch.setattr("trainer.export._copy_tokenizer", fail)
    model = make_tiny_model(tmp_path / "model")
    out = exported(model, tmp_path / "export")
    assert "lacks the tokenizer: ValueError: no tokenizer here" in caplog.text
    assert load_file(out / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()


def written(target: Path, value: float) -> SafetensorsFolder:
    writer = SafetensorsFolder(target)
    writer.add([("x", torch.tensor([value]))])
    return writer


def content(target: Path) -> float:
    return load_file(target / "model.safetensors")["x"].item()


def test_an_older_folder_lasts_until_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    written(target, 1.0).finish()
    writer = written(target, 2.0)
    rename = Path.rename

    def refused(self: Path, to: Path) -> Path:
        if self == writer.partial:
            raise OSError("no")
        return rename(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        with pytest.raises(OSError, match="no"):
            writer.finish()
    assert content(target) == 1.0

    target.rename(tmp_path / ".out.previous")  # as a crash between the two renames leaves it
    writer = written(target, 3.0)
    assert content(target) == 1.0
    writer.finish()
    assert content(target) == 3.0 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(safetensors_folder, "_sync", lambda path: synced.append(path.name))
    writer = written(tmp_path / "out", 1.0)
    (writer.partial / "config.json").write_text("{}")
    writer.finish()
    assert set(synced[:2]) == {"model.safetensors", "config.json"}
    assert synced[2:] == [".out.partial", tmp_path.name]
