"""The error that a caller of the kernels sees."""

from __future__ import annotations


class ArgumentError(ValueError):
    """A bad argument. Its text names the argument, its value and the rule that it breaks."""

    def __init__(self, argument: str, value: object, rule: str) -> None:
        self.argument, self.value, self.rule = argument, value, rule
        super().__init__(f"{argument}={value!r} {rule}")


def require(ok: bool, argument: str, value: object, rule: str) -> None:
    """Raise ArgumentError unless `ok`."""
    if not ok:
        raise ArgumentError(argument, value, rule)
