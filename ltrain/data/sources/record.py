"""What makes a record a document."""

from __future__ import annotations


class BadRecord(str):
    """Why a file or record holds no text."""

    __slots__ = ()


def usable(value: object) -> str | BadRecord:
    """The text, or why it is none: not a string, empty, or not encodable as UTF-8."""
    if not isinstance(value, str):
        return BadRecord("holds no text")
    if not value.strip():
        return BadRecord("is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRecord(f"has half a surrogate pair at character {error.start}")
    return value
