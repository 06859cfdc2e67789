"""From a YAML file and dotted overrides to a checked `RunConfig`, or to errors that say field, value, rule
and fix.
"""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ltrain.config.base import ConfigError
from ltrain.config.schema import RunConfig

MAX_CONFIG_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML without tags, repeated keys or aliases; `1e-4` is a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ConfigError("config", key, f"is a key at line {line} and must be text")
        if key in result:
            raise ConfigError(key, "(repeated)", f"stands twice, again at line {line}")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document. Raises ConfigError, with the line, on anything but plain data."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(source, f"{len(text)} bytes", f"must be at most {MAX_CONFIG_BYTES} bytes")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ConfigError(source, "*alias", "must not use YAML aliases", "write the value out")
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "the file"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(source, where, f"is not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(source, "(deep)", "is nested too deeply") from None


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` pairs as a flat dict. Raises ConfigError on anything else."""
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError("command line", argument, "is not an override", "write --section.field value")
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(name, "(nothing)", "needs a value", f"write --{name} VALUE")
            text = rest.pop(0)
        overrides[name.replace("-", "_")] = parse_yaml(text, f"--{name}")
    return overrides


def _merge(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    node = tree
    for i, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(path, value, f"cannot be set: {'.'.join(parents[: i + 1])} is not a section")
        node = child
    if isinstance(value, dict) and isinstance(node.get(leaf), dict) and "kind" not in value:
        node[leaf] = {**node[leaf], **value}
    else:
        node[leaf] = value


def load_tree(path: Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The file's data with the overrides laid over it, unchecked."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError("CONFIG", str(path), f"cannot be read: {reason}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError("CONFIG", str(path), "must hold sections such as `train:` and `data:`")
    for name, value in (overrides or {}).items():
        _merge(tree, name, value)
    return tree


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read, override and check a configuration. Raises ConfigError that lists every fault found."""
    return validate(load_tree(path, overrides))


def validate(tree: dict[str, Any]) -> RunConfig:
    """Check a configuration tree against the schema and the cross-field rules."""
    try:
        return RunConfig.model_validate(_with_default_kinds(tree))
    except ValidationError as error:
        items = error.errors()
        # pydantic adds that a tuple is too short when what is wrong with its items has been said already.
        deeper = {item["loc"][:-n] for item in items for n in range(1, len(item["loc"]))}
        faults = [_explain(i) for i in items if i["type"] != "too_short" or i["loc"] not in deeper]
        raise faults[0] if len(faults) == 1 else Faults(faults) from None


def _with_default_kinds(tree: dict[str, Any]) -> dict[str, Any]:
    """Name the default kind in sections that set fields of it without naming it."""
    named = dict(tree)
    for name, info in RunConfig.model_fields.items():
        section = tree.get(name)
        if isinstance(section, dict) and "kind" not in section and not info.is_required():
            default = info.get_default(call_default_factory=True, validated_data={})
            kind = getattr(default, "kind", None)
            if kind is not None:
                named[name] = {"kind": kind, **section}
    return named


class Faults(ConfigError):
    """Several faults at once, a line each."""

    def __init__(self, faults: list[ConfigError]) -> None:
        super().__init__("config", len(faults), "faults")
        self.faults = faults
        self.args = ("\n".join(str(fault) for fault in faults),)


def _explain(item: Any) -> ConfigError:
    context_error = (item.get("ctx") or {}).get("error")
    if isinstance(context_error, ConfigError):
        return context_error
    location = [part for part in item["loc"] if part not in ("function-after", "function-before")]
    model, names = _walk(location)
    field = ".".join(names)
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        known = _field_names(model)
        near = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
        meant = ".".join([*names[:-1], *near])
        fix = f"perhaps you meant {meant}" if near else f"known here: {', '.join(known)}"
        return ConfigError(field, value, "is not a known field", fix)
    if item["type"] == "missing":
        return ConfigError(field, "(missing)", "must be given")
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        expected = item["ctx"].get("expected_tags", "")
        tag = value.get("kind") if isinstance(value, dict) else value
        near = difflib.get_close_matches(str(tag), [t.strip(" '") for t in expected.split(",")], n=1)
        fix = f"perhaps you meant {near[0]}" if near else ""
        if not expected:
            return ConfigError(f"{field}.kind", "(missing)", "must be given", "name the kind")
        return ConfigError(f"{field}.kind", tag, f"must be one of {expected}", fix)
    message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return ConfigError(field, value, f"must be {message}" if message != item["msg"] else item["msg"])


def section_classes(annotation: Any) -> list[type[BaseModel]]:
    """Every section class that an annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple, list, dict):
        return [model for part in typing.get_args(annotation) for model in section_classes(part)]
    return []


def _walk(location: list[str | int]) -> tuple[list[type[BaseModel]], list[str]]:
    """The section classes that hold the last name of a pydantic location, and the location as the user wrote
    it.

    pydantic puts the tag of a union member into the location; the user wrote no such name.
    """
    models: list[type[BaseModel]] = [RunConfig]
    names: list[str] = []
    for i, part in enumerate(location):
        fields = {name: info for model in models for name, info in model.model_fields.items()}
        tags = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        if tags and part not in fields and i < len(location) - 1:
            models = tags
        elif isinstance(part, int):
            names[-1] += f"[{part}]"
        else:
            names.append(str(part))
            if part in fields and i < len(location) - 1:
                models = [
                    m
                    for model in models
                    if part in model.model_fields
                    for m in section_classes(model.model_fields[part].rebuild_annotation())
                ]
    return models, names


def _field_names(models: list[type[BaseModel]]) -> list[str]:
    return sorted({name for model in models for name in model.model_fields})
