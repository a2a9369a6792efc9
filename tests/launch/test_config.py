"""A configuration that cannot be used is refused before anything is started or written, with one line per mistake."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.config import load
from launch.errors import ConfigError, LaunchError
from launch.folder import claim, mark_failed_start, write_resolved
from launch.resolve import make_socket_folder, reach, replica, resolve, socket_folder
from launch.validate import check_addresses

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration that passes every check."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 40)
    file = tmp_path / "config.yaml"
    file.write_text(
        f"""run:
  name: test
  dir: {tmp_path}/runs
  steps: 10
model:
  path: {tmp_path}/model
orchestrator:
  data:
    train: {tmp_path}/train.jsonl
  prompts_per_step: 8
  draft_sampling: {{max_new_tokens: 100}}
  refine_sampling: {{max_new_tokens: 100}}
  evaluation:
    sampling: {{max_new_tokens: 100}}
trainer:
  optimizer:
    learning_rate: 1e-4
"""
    )
    return file


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    return str(caught.value)


def test_numbers_without_a_dot_are_numbers(file: Path) -> None:
    assert load(file).trainer.optimizer.learning_rate == 1e-4


def test_an_unknown_key_names_line_and_nearest_key(file: Path) -> None:
    file.write_text(file.read_text().replace("learning_rate", "lerning_rate"))
    line = file.read_text().splitlines().index("    lerning_rate: 1e-4") + 1
    assert refusal(file) == (
        f"{file}:{line}: unknown key trainer.optimizer.lerning_rate; did you mean trainer.optimizer.learning_rate?"
    )


def test_a_key_of_another_section_is_found(file: Path) -> None:
    assert "did you mean orchestrator.prompts_per_step?" in refusal(file, "trainer.prompts_per_step=3")


def test_a_wrong_type_names_line_key_and_value(file: Path) -> None:
    file.write_text(file.read_text().replace("steps: 10", "steps: ten"))
    assert refusal(file) == f"{file}:4: run.steps: expected a whole number, not 'ten'"


def test_every_mistake_has_its_own_line_in_order(file: Path) -> None:
    file.write_text(file.read_text().replace("steps: 10", "steps: 0").replace("prompts_per_step: 8", "drafts: -1"))
    first, second = refusal(file).splitlines()
    assert "run.steps" in first and "orchestrator.drafts" in second


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("run: {name: a", "not valid YAML"),
        ("run: {name: a}\nrun: {name: b}\n", ":2: run is given twice"),
        ("- a\n- b\n", ":1: expected sections with keys"),
        ("verifer: {}\n", ":1: unknown key verifer; did you mean verifier?"),
        ("orchestrator: {drafts: 2}\n", "orchestrator.data is missing"),
        ("run: 5\n", ":1: run: expected a section with keys, not 5"),
    ],
)
def test_malformed_files(file: Path, text: str, part: str) -> None:
    file.write_text(text)
    assert part in refusal(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: cannot read the configuration: No such file or directory"
    )


def test_overrides_are_typed_and_win(file: Path) -> None:
    config = load(file, ["run.steps=7", "run.name=5", "trainer.optimizer.betas=[0.8, 0.9]", "trainer.lora.rank=4"])
    assert (config.run.steps, config.run.name) == (7, "5")
    assert config.trainer.optimizer.betas == (0.8, 0.9)
    assert config.trainer.lora and config.trainer.lora.rank == 4


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("run.steps=many", "override run.steps=many: run.steps: expected a whole number, not 'many'"),
        ("run.stepz=1", "override run.stepz=1: unknown key run.stepz; did you mean run.steps?"),
        ("run.steps", "expected section.key=value"),
        ("run.steps.more=1", "run.steps holds a value, not a section"),
        ("trainer=3", "trainer: expected a section with keys"),
    ],
)
def test_refused_overrides(file: Path, override: str, part: str) -> None:
    assert part in refusal(file, override)


def test_sections_that_a_service_does_not_need_may_be_missing(file: Path) -> None:
    file.write_text("verifier: {workers: 2}\n")
    config = load(file)
    assert config.verifier.workers == 2
    with pytest.raises(ConfigError, match="section `model` is missing"):
        config.need_model()


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_dry_run_prints_the_plan_and_writes_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "train", str(file), "--dry-run", "run.max_staleness=2")
    assert code == 0
    assert "64 = 8 prompts x (4 drafts + 4 refinements)" in out
    assert "at most 6,400" in out  # 8 prompts x 8 samples x 100 tokens
    assert "lag <= 2; window of 24 prompts" in out
    assert "5 (40 prompts / 8)" in out and "the data end after about 5 of 10 steps" in out
    assert not (file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("override", "code", "part"),
    [
        ("model.path={here}/nowhere", 1, "model.path: no model folder {here}/nowhere"),
        ("model.path={here}", 1, "model.path: {here} is not a model folder"),
        ("orchestrator.data.train={here}/no.jsonl", 1, "orchestrator.data.train: no file {here}/no.jsonl"),
        ("orchestrator.data.train={here}/bad.jsonl", 1, "orchestrator.data.train: {here}/bad.jsonl:2: not JSON"),
        ("orchestrator.data.answer_column=solution", 1, "train.jsonl:1: no field 'solution'"),
        ("orchestrator.refine_sampling.max_new_tokens=512", 2, "leave no room for a question in 512 of context"),
        ("trainer.deepspeed.zero_stage=0", 2, "model.dtype: bfloat16 needs trainer.deepspeed.zero_stage >= 1"),
        ("verifier.address=ipc:///{here}/x orchestrator.address=ipc:///{here}/x", 2, "is already the address of"),
        ("launch.replica_devices=[0,1]", 2, "launch.replica_devices: 2 entries for launch.replicas = 1"),
        ("trainer.address=tcp://127.0.0.1:0", 2, "trainer.address: tcp://127.0.0.1:0 has no fixed port"),
    ],
)
def test_faults_end_the_command_with_one_line_and_nothing_written(
    file: Path, capsys: pytest.CaptureFixture[str], override: str, code: int, part: str
) -> None:
    here = str(file.parent)
    (file.parent / "bad.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": \n')
    got, _, err = command(capsys, "train", str(file), *override.replace("{here}", here).split())
    assert part.replace("{here}", here) in err
    assert len(err.strip().splitlines()) == 1
    assert got == code
    assert not (file.parent / "runs").exists()


def test_a_draft_that_may_be_cut_needs_no_budget_and_one_that_may_not_does(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ("--dry-run", "orchestrator.draft_sampling.max_new_tokens=450")
    assert command(capsys, "train", str(file), *long)[0] == 0
    code, _, err = command(capsys, "train", str(file), *long, "rollout_server.draft_overflow=reject")
    assert code == 2 and "rollout_server.context_tokens: a draft of 450 and a refinement of 100" in err


def test_a_port_in_use_is_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = command(capsys, "train", str(file), f"verifier.address={address}")
    assert code == 1
    assert err == f"igrpo: verifier.address: {address}: port in use\n"
    assert not (file.parent / "runs").exists()


def test_a_used_run_folder_is_refused_with_a_free_name(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = file.parent / "runs" / "test"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    code, _, err = command(capsys, "train", str(file))
    assert code == 1
    assert "holds an earlier run" in err and "run.name=test-2" in err


def test_a_run_that_failed_before_its_first_step_frees_its_folder(file: Path) -> None:
    run = load(file).run
    claim(run)
    (run.folder / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 0}\n')
    mark_failed_start(run.folder)
    claim(run)
    (run.folder / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    mark_failed_start(run.folder)
    with pytest.raises(LaunchError, match="holds an earlier run"):
        claim(run)


def test_auto_addresses_lie_in_the_run_folder_or_in_a_short_one(file: Path, tmp_path: Path) -> None:
    config = resolve(load(file))
    deep = resolve(load(file, [f"run.dir={tmp_path}/{'deep/' * 20}"]))
    assert len(deep.verifier.address) < 107 and "deep" not in deep.verifier.address
    assert deep.verifier.address == resolve(deep).verifier.address
    assert deep.verifier.address != config.verifier.address
    make_socket_folder(deep)
    assert socket_folder(deep.run.folder).stat().st_mode & 0o777 == 0o700
    socket_folder(deep.run.folder).rmdir()


def test_replicas_differ_in_name_address_and_http_port(file: Path) -> None:
    tcp = ["rollout_server.address=tcp://127.0.0.1:7000", "rollout_server.http_address=127.0.0.1:8000"]
    config = resolve(load(file, tcp))
    second = replica(config, 1)
    assert (second.name, second.address, second.http_address) == ("rollout-1", "tcp://127.0.0.1:7001", "127.0.0.1:8001")
    local = resolve(load(file))
    assert replica(local, 2).address == local.rollout_server.address.replace(".sock", "-2.sock")
    assert replica(local, 0) == local.rollout_server


def test_where_others_reach_a_service(file: Path) -> None:
    wildcard = "verifier.address=tcp://0.0.0.0:7000"
    assert reach(load(file, [wildcard]), "verifier") == "tcp://127.0.0.1:7000"
    assert reach(load(file, [wildcard, "addresses.verifier=tcp://graders:7000"]), "verifier") == "tcp://graders:7000"
    check_addresses(resolve(load(file)))


def test_the_resolved_file_reads_back_as_the_same_configuration(file: Path, tmp_path: Path) -> None:
    config = resolve(load(file, ["trainer.lora.rank=4", "orchestrator.reward.weights={accuracy: 1.0, format: 0.5}"]))
    write_resolved(config, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == config
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text())["verifier"]["address"].startswith("ipc://")


@pytest.mark.parametrize("module", ["verifier.service", "orchestrator.service", "launch.train", "launch.services"])
def test_no_torch_where_none_is_needed(module: str) -> None:
    heavy = "{'torch', 'sglang', 'transformers', 'deepspeed'}"
    probe = f"import sys, {module}; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=60)


def test_the_configuration_reference_is_current() -> None:
    from launch.reference import render

    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == render(), "run: .venv/bin/igrpo config-reference > docs/configuration.md"
