"""One configuration for all services: a section per service, composed of the rooms' own models.

`load` turns a YAML file and overrides into a checked Config, or raises ConfigError with one line per mistake, each with
its place. Sections that a command does not need may be missing; those that are there are always checked.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from launch.errors import ConfigError
from launch.source import Path_, Source, dotted, read
from orchestrator.config import OrchestratorConfig
from protocol.config import ModelConfig, RunConfig, StrictConfig
from rollout_server.config import RolloutServerConfig
from trainer.config import TrainerConfig
from verifier.config import VerifierConfig

MAX_MISTAKES = 10
"""Mistakes that one error lists; who made more wants to see the first ones first."""


M = TypeVar("M", bound=BaseModel)


def _text_of_number(value: Any) -> Any:
    """`[0, 1]` in YAML is a list of numbers and means devices "0" and "1"."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class LaunchConfig(StrictConfig):
    """What `igrpo train` starts on this machine, and how patient it is."""

    replicas: int = Field(default=1, ge=1, le=1024, description="Rollout servers on this machine.")
    replica_devices: list[Annotated[str, BeforeValidator(_text_of_number)]] = Field(
        default=[],
        description="CUDA_VISIBLE_DEVICES of each rollout server, in order (such as `0,1`); empty: as inherited.",
    )
    trainer_devices: Annotated[str, BeforeValidator(_text_of_number)] = Field(
        default="", description="CUDA_VISIBLE_DEVICES of the trainer; empty: as inherited."
    )
    start_s: float = Field(default=900.0, gt=0, le=86_400, description="Seconds until every service must be ready.")
    stop_s: float = Field(
        default=10.0, gt=0, le=600, description="Seconds services get to end by themselves; then killed."
    )


class AddressesConfig(StrictConfig):
    """Where services are reached by the others, if not where they listen (other hosts, wildcard addresses)."""

    orchestrator: str = Field(default="", description="Address of the orchestrator; empty: orchestrator.address.")
    trainer: str = Field(default="", description="Address of the trainer; empty: trainer.address.")
    verifier: str = Field(default="", description="Address of the verifier; empty: verifier.address.")
    rollout_server: str = Field(default="", description="Address of a running rollout server, for `igrpo eval` only.")


def _defaults(model: type[M]) -> Callable[[], M]:
    return lambda: model.model_validate({})


class Config(StrictConfig):
    """The whole file."""

    run: RunConfig = Field(default_factory=_defaults(RunConfig), description="Identity of the run.")
    model: ModelConfig | None = Field(default=None, description="The policy; needed by rollout servers and trainer.")
    launch: LaunchConfig = Field(default_factory=_defaults(LaunchConfig), description="Processes on this machine.")
    addresses: AddressesConfig = Field(default_factory=_defaults(AddressesConfig), description="Services elsewhere.")
    rollout_server: RolloutServerConfig = Field(
        default_factory=_defaults(RolloutServerConfig), description="SGLang replicas."
    )
    verifier: VerifierConfig = Field(default_factory=_defaults(VerifierConfig), description="Grading.")
    orchestrator: OrchestratorConfig | None = Field(
        default=None, description="The conductor; needed by itself and `eval`."
    )
    trainer: TrainerConfig = Field(default_factory=_defaults(TrainerConfig), description="DeepSpeed.")

    def need_model(self) -> ModelConfig:
        """The section, or ConfigError if the file has none."""
        if self.model is None:
            raise ConfigError("section `model` is missing: model.path names the policy to train")
        return self.model

    def need_orchestrator(self) -> OrchestratorConfig:
        """The section, or ConfigError if the file has none."""
        if self.orchestrator is None:
            raise ConfigError("section `orchestrator` is missing: orchestrator.data.train names the prompts")
        return self.orchestrator


def load(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and check. Raises ConfigError."""
    return parse(read(file, overrides))


def parse(source: Source) -> Config:
    """Check values against the sections' models. Raises ConfigError with a line per mistake."""
    sections = {name: {} if value is None else value for name, value in source.values.items()}  # `verifier:` alone
    try:
        return Config.model_validate(sections)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=True)
    if _as_text(source, mistakes):
        return parse(source)
    found = {_written(mistake["loc"], source.values): mistake for mistake in reversed(mistakes)}  # one per place
    lines = sorted((_explain(source, path, mistake) for path, mistake in found.items()), key=_order)
    if len(lines) > MAX_MISTAKES:
        lines[MAX_MISTAKES:] = [f"… and {len(lines) - MAX_MISTAKES} more"]
    raise ConfigError("\n".join(lines))


def _as_text(source: Source, mistakes: Sequence[Any]) -> bool:
    """`run.name=5` on the command line means the text 5: restore the raw text where a string is wanted."""
    changed = False
    for mistake in mistakes:
        raw = source.overrides.get(mistake["loc"])
        if mistake["type"] in ("string_type", "path_type", "enum", "literal_error") and raw is not None:
            target: Any = source.values
            for part in mistake["loc"][:-1]:
                target = target[part]
            changed |= target[mistake["loc"][-1]] != raw
            target[mistake["loc"][-1]] = raw
    return changed


def _explain(source: Source, path: Path_, mistake: Any) -> str:
    """`file:line: section.key: what is wrong`."""
    place, name = source.place(path), dotted(path)
    if mistake["type"] == "extra_forbidden":
        return f"{place}: unknown key {name}{_suggestion(path)}"
    if mistake["type"] == "missing":
        return f"{place}: {name} is missing"
    given = mistake["input"]
    message = next((text for prefix, text in _EXPECTED.items() if mistake["type"].startswith(prefix)), None)
    if message is None:
        message = mistake["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = "" if isinstance(given, dict | BaseModel) else f", not {given!r:.80}"
    return f"{place}: {name or 'configuration'}: {message}{shown}"


_EXPECTED = {
    "int_": "expected a whole number",
    "float_": "expected a number",
    "bool_": "expected true or false",
    "string_type": "expected text",
    "list_": "expected a list",
    "tuple_": "expected a list",
    "model_": "expected a section with keys",
    "dict_": "expected a section with keys",
}


def _order(line: str) -> tuple[int, str]:
    """By line of the file; overrides and the file as a whole come first."""
    number = line.split(": ", 1)[0].rpartition(":")[2]
    return (int(number) if number.isdigit() else 0, line)


def _written(loc: Path_, values: Any) -> Path_:
    """The error's location without the parts that pydantic adds for the members of a union."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif index < len(loc) - 1 or not isinstance(values, dict):
            continue
        path.append(part)
    return tuple(path)


def _suggestion(path: Path_) -> str:
    """`; did you mean …?` from the keys of the same section, or from all sections if none there is near."""
    key = str(path[-1])
    here = [name for name, _ in _fields(Config, path[:-1])]
    everywhere = {str(where[-1]): where for where in walk(Config)}
    for cutoff, names in ((0.8, here), (0.85, everywhere), (0.6, here)):
        if near := difflib.get_close_matches(key, names, 1, cutoff):
            found = (*path[:-1], near[0]) if names is here else everywhere[near[0]]
            return f"; did you mean {dotted(found)}?"
    return f"; known here: {', '.join(here)}" if 0 < len(here) <= 12 else ""


def _fields(model: type[BaseModel], path: Path_) -> list[tuple[str, Any]]:
    """The fields of the model that lies at `path` below `model`; none if there is no model there."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = model_of(field.annotation) if field else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields.items())


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation such as `Model` or `Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            if found := model_of(member):
                return found
    return None


def walk(model: type[BaseModel], path: Path_ = ()) -> Iterator[Path_]:
    """The paths of all fields below `model`, depth first."""
    for name, field in model.model_fields.items():
        yield (*path, name)
        if inner := model_of(field.annotation):
            yield from walk(inner, (*path, name))
