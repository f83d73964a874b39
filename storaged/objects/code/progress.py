"""Rows that say how far a worker is. They are hints: one that can't be read counts as none."""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from storaged.meta.names import Value, Visibility
from storaged.wire import decode


class _Progress(Protocol):
    @property
    def format(self) -> int: ...


P = TypeVar("P", bound=_Progress)


def progress_in(value: Value | None, kind: type[P], format_number: int) -> P | None:
    """None: there is none, or none of this format that can be read."""
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return None
    try:
        found = decode(value.body, kind)
    except msgspec.MsgspecError:
        return None
    return found if found.format == format_number else None
