"""The configuration as written: a YAML file and command-line overrides, with the place of every key.

`read` knows nothing of the sections' types; it only remembers where each value came from, so that errors can say so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.errors import ConfigError

Path_ = tuple[str | int, ...]
"""A dotted path as its parts: ("trainer", "optimizer", "betas", 0)."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 does."""


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in resolvers if entry[0] != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
               r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+.0123456789"),
)  # fmt: skip


@dataclass
class Source:
    """Values as nested dicts and lists, and where each of them was written."""

    file: Path
    values: dict[str, Any]
    places: dict[Path_, str]
    overrides: dict[Path_, str]

    def place(self, path: Path_) -> str:
        """`file:line` or `override a.b=…` of this value, or of the nearest enclosing one."""
        for length in range(len(path), -1, -1):
            if (found := self.places.get(path[:length])) is not None:
                return found
        return str(self.file)


def dotted(path: Path_) -> str:
    """`trainer.optimizer.betas.0`."""
    return ".".join(map(str, path))


def read(file: Path, overrides: Sequence[str] = ()) -> Source:
    """Parse the file and apply `a.b=value` overrides in order. Raises ConfigError."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{file}: cannot read the configuration: {reason}") from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        source = Source(file, {}, {(): str(file)}, {})
        if root is not None:
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError(f"{file}:{root.start_mark.line + 1}: expected sections with keys")
            source.values = _build(loader, root, (), source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {str(error).splitlines()[0]}") from None
    finally:
        loader.dispose()
    for override in overrides:
        _apply(source, override)
    return source


def _build(loader: _Loader, node: yaml.Node, path: Path_, source: Source) -> Any:
    """The value of a node; notes the line of every key and item on the way."""
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)  # `<<` merges
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"{source.file}:{line}: keys must be text, not {key!r}")
            if (*path, key) in source.places and key in mapping:
                raise ConfigError(f"{source.file}:{line}: {dotted((*path, key))} is given twice")
            source.places[(*path, key)] = f"{source.file}:{line}"
            mapping[key] = _build(loader, value_node, (*path, key), source)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            source.places[(*path, index)] = f"{source.file}:{item.start_mark.line + 1}"
            items.append(_build(loader, item, (*path, index), source))
        return items
    return loader.construct_object(node, deep=True)


def _apply(source: Source, override: str) -> None:
    """Set one `a.b=value`; the value is read as YAML, so that lists, numbers and null can be given."""
    key, equals, text = override.partition("=")
    parts: Path_ = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: expected section.key=value")
    place = f"override {override}"
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    target: Any = source.values
    for depth, part in enumerate(parts[:-1], 1):
        child = target.get(part)
        if child is None:
            child = target[part] = {}
            source.places[parts[:depth]] = place
        if not isinstance(child, dict):
            raise ConfigError(f"{place}: {dotted(parts[:depth])} holds a value, not a section")
        target = child
    for known in [known for known in source.places if known[: len(parts)] == parts]:
        del source.places[known]
    target[parts[-1]] = value
    source.places[parts] = place
    source.overrides[parts] = text
