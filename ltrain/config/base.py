"""The base of every configuration section, and the error that a user sees."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen configuration section that refuses unknown fields.

    Every field carries a description (`Field(description=...)`, or a docstring below it):
    `docs/configuration.md` and `ltrain train --help` are made from them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ConfigError(ValueError):
    """The user's input is wrong. Its text says field, value, rule and fix; the command line exits with code
    2.
    """

    def __init__(self, field: str, value: object, rule: str, fix: str = "") -> None:
        self.field, self.value, self.rule, self.fix = field, value, rule, fix
        super().__init__(f"{field}={value!r} {rule}" + (f"; {fix}" if fix else ""))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # Ranks send errors to one another; the default would call the class with the finished message only.
        return ConfigError, (self.field, self.value, self.rule, self.fix)
