"""What no section can check alone: budgets across services, files that must exist, addresses that must differ.

Everything here runs before a process is started or a file is written.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.config import Config
from launch.errors import ConfigError, LaunchError
from launch.resolve import reach, replica
from orchestrator.config import OrchestratorConfig
from orchestrator.data import DataError, load_problems

_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$|^[\w.-]+$")


@dataclass(frozen=True)
class Rows:
    """How many prompts the data sets hold; None where only the hub knows."""

    train: int | None
    heldout: int | None


def check_settings(config: Config) -> None:
    """Consistency of what is written; touches no file but the model's config.json. Raises ConfigError."""
    for mistake in _mistakes(config):
        raise ConfigError(mistake)


def _mistakes(config: Config) -> Iterator[str]:
    model, trainer = config.need_model(), config.trainer
    orchestrator = config.need_orchestrator()
    if model.dtype == "bfloat16" and trainer.deepspeed.zero_stage == 0:
        yield "model.dtype: bfloat16 needs trainer.deepspeed.zero_stage >= 1 (DeepSpeed keeps the fp32 copies there)"
    if config.launch.replica_devices and len(config.launch.replica_devices) != config.launch.replicas:
        given = len(config.launch.replica_devices)
        yield f"launch.replica_devices: {given} entries for launch.replicas = {config.launch.replicas}"
    yield from _budget_mistakes(config, orchestrator)
    seen: dict[str, str] = {}
    for name, address in listeners(config):
        if address in seen:
            yield f"{name}: {address} is already the address of {seen[address]}"
        if not re.search(r":(0|\*)$", address):
            seen[address] = name


def _budget_mistakes(config: Config, orchestrator: OrchestratorConfig) -> Iterator[str]:
    """Question + draft + completion must fit the context, with at least one token for the question."""
    context = context_tokens(config)
    if context is None:
        return
    refine = orchestrator.refine_sampling.max_new_tokens
    stages = {"refine_sampling": refine, "evaluation.sampling": orchestrator.evaluation.sampling.max_new_tokens}
    if orchestrator.drafts:
        stages["draft_sampling"] = orchestrator.draft_sampling.max_new_tokens
    for stage, tokens in stages.items():
        if tokens >= context:
            yield f"orchestrator.{stage}.max_new_tokens: {tokens} leave no room for a question in {context} of context"
    draft = draft_tokens(config, orchestrator)
    if orchestrator.drafts and draft is not None and draft + refine >= context:
        yield (
            f"rollout_server.context_tokens: a draft of {draft} and a refinement of {refine} tokens leave no room for "
            f"a question in {context}; lower *_sampling.max_new_tokens or rollout_server.draft_budget_tokens"
        )


def draft_tokens(config: Config, orchestrator: OrchestratorConfig) -> int | None:
    """Tokens of a draft that enter a refinement's prompt at most; None: whatever is left (longer drafts are cut)."""
    longest = orchestrator.draft_sampling.max_new_tokens
    if config.rollout_server.draft_budget_tokens:
        return min(longest, config.rollout_server.draft_budget_tokens)
    return longest if config.rollout_server.draft_overflow == "reject" else None


def context_tokens(config: Config) -> int | None:
    """The context of rollout servers: as configured, else as the model's own config.json says, else unknown."""
    if config.rollout_server.context_tokens:
        return config.rollout_server.context_tokens
    file = Path(config.need_model().path) / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = described.get("max_position_embeddings") if isinstance(described, dict) else None
    return found if isinstance(found, int) else None


def check_files(config: Config) -> Rows:
    """The model, the reference and the rows of local data sets. Raises LaunchError for the first fault."""
    check_model("model.path", config.need_model().path)
    reference = config.trainer.objective.kl.reference
    if config.trainer.objective.kl.kind != "none" and reference != "initial":
        check_model("trainer.objective.kl.reference", reference)
    orchestrator = config.need_orchestrator()
    data = orchestrator.data
    return Rows(
        train=count_rows("orchestrator.data.train", data.train, orchestrator, data.train_split),
        heldout=count_rows("orchestrator.data.heldout", data.heldout, orchestrator, data.heldout_split),
    )


def check_model(key: str, path: str) -> None:
    """A folder with a config.json, or something that may be the name of a model on the hub."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise LaunchError(f"{key}: {path} is not a model folder: it has no config.json")
        return
    local = path.startswith(("/", ".", "~")) or (folder.parts and Path(folder.parts[0]).is_dir())
    if folder.exists() or local or not _HUB_NAME.match(path):
        raise LaunchError(f"{key}: no model folder {path} (relative to {Path.cwd()})")


def count_rows(key: str, source: str, orchestrator: OrchestratorConfig, split: str) -> int | None:
    """Rows of a local data set, each of them checked; None for the hub's, which the orchestrator reads."""
    if not source:
        return 0
    if not is_local(source):
        return None
    if not Path(source).is_file():
        raise LaunchError(f"{key}: no file {source} (relative to {Path.cwd()})")
    try:
        return len(load_problems(source, orchestrator.data, split=split))
    except DataError as error:
        raise LaunchError(f"{key}: {error}") from None


def is_local(source: str) -> bool:
    """Whether a data source is a file rather than a name on the hub."""
    return Path(source).suffix in (".jsonl", ".json", ".parquet") or source.startswith((".", "/"))


def listeners(config: Config) -> Iterator[tuple[str, str]]:
    """Every (key, address) that `igrpo train` will listen on; HTTP as tcp://host:port. Addresses are resolved."""
    for index in range(config.launch.replicas):
        settings = replica(config, index)
        label = "rollout_server" if index == 0 else f"rollout_server (replica {index})"
        yield f"{label}.address", settings.address
        if settings.http_address:
            yield f"{label}.http_address", f"tcp://{settings.http_address}"
    for section in ("verifier", "orchestrator", "trainer"):
        settings = getattr(config, section)
        if settings is not None:
            yield f"{section}.address", settings.address
            if settings.http_address:
                yield f"{section}.http_address", f"tcp://{settings.http_address}"


def check_addresses(config: Config, *, probe: Callable[[str], str | None] | None = None) -> None:
    """Each tcp port is free now, and each service can be found by the others. Raises LaunchError."""
    for section in ("orchestrator", "trainer", "verifier"):
        reach(config, section)
    for key, address in listeners(config):
        if reason := (probe or port_problem)(address):
            raise LaunchError(f"{key}: {address}: {reason}")


def port_problem(address: str) -> str | None:
    """Why nobody can listen on this tcp address now; None if one can, or if it is no tcp address."""
    if not address.startswith("tcp://"):
        return None
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if port in ("0", "*"):
        return None
    host = "" if host == "*" else host.strip("[]")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, target = found[0]
        with socket.socket(family, kind, proto) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(target)
    except (OSError, OverflowError) as error:
        return "port in use" if getattr(error, "errno", None) == 98 else f"cannot listen: {error}"
    return None
