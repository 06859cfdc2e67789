"""`docs/configuration.md`, made from the schema: python -m ltrain.config.document > docs/configuration.md"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ltrain.config.load import section_classes
from ltrain.config.schema import RunConfig

HEAD = """# Configuration

One YAML file describes a run. Every field can be overridden on the command line: `--train.steps 200`,
`--schedule "{kind: constant}"`. An unknown field, a wrong value and a contradiction between sections end with
exit code 2 and a line that says field, value, rule and fix. This page is generated from the schema.
"""


def configuration_page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, info in RunConfig.model_fields.items():
        parts.append(f"\n## {name}\n\n{_text(info)}\n")
        parts += _sections(name, info)
    return "".join(parts)


def _sections(name: str, info: FieldInfo) -> Iterator[str]:
    classes = section_classes(info.rebuild_annotation())
    for model in classes:
        kind = model.model_fields.get("kind")
        if kind is not None:
            doc = " ".join((model.__doc__ or "").split())
            default = " (default)" if len(classes) > 1 and _default_kind(info) == kind.default else ""
            yield f"\n### {name}: kind `{kind.default}`{default}\n\n" + (f"{doc}\n\n" if doc else "")
        else:
            yield "\n"
        rows = [_row(field, value) for field, value in model.model_fields.items() if field != "kind"]
        if rows:
            yield "| field | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)
        for field, value in model.model_fields.items():
            if section_classes(value.rebuild_annotation()):
                yield f"\n### {name}.{field}\n\n{_text(value)}\n\n"
                yield from _sections(f"{name}.{field}", value)


def _default_kind(info: FieldInfo) -> Any:
    default = None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
    return getattr(default, "kind", None)


def _text(info: FieldInfo) -> str:
    return " ".join((info.description or "").split())


def _row(name: str, info: FieldInfo) -> str:
    default = (
        "required" if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
    )
    if isinstance(default, BaseModel):
        shown = f"kind {getattr(default, 'kind', 'see below')}" if hasattr(default, "kind") else "see below"
    else:
        shown = default if default == "required" else f"`{default}`"
    kind = str(info.annotation)
    kind = getattr(info.annotation, "__name__", kind) if "[" not in kind and "|" not in kind else kind
    for noise in ("typing.", "ltrain.config.", "pathlib._local.", "pathlib.", "annotated_types."):
        kind = kind.replace(noise, "")
    if section_classes(info.rebuild_annotation()):
        kind = "section"
    return f"| `{name}` | {kind.replace('|', 'or')} | {shown} | {_text(info).replace('|', 'or')} |\n"


if __name__ == "__main__":
    print(configuration_page(), end="")
