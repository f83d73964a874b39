"""The rows of the system table that this process found unusable, by name: ``status`` shows them (``system.rows``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import structlog

log = structlog.get_logger(__name__)

BAD_ROWS_MAX = 1000
"""Names in the table. Bad rows beyond it are not counted."""

NAME_CHARS_MAX = 128
"""Of a row's name in ``status``."""


class BadRow(NamedTuple):
    """``name`` in the form that an operator reads: ``bucket/photos``."""

    name: str
    reason: str


class BadRows:
    """The rows that this process found unusable. Bounded; each is logged once while it stays bad."""

    def __init__(self) -> None:
        self._reasons: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def listed(self) -> list[BadRow]:
        return [BadRow(display_name(key), reason) for key, reason in sorted(self._reasons.items())]

    def note(self, key: bytes, reason: str) -> None:
        if key in self._reasons or len(self._reasons) < BAD_ROWS_MAX:
            if self._reasons.get(key) != reason:
                log.error(
                    "a system record cannot be used",
                    record=display_name(key),
                    reason=reason,
                    code="SYSTEM_RECORD_DAMAGED",
                )
            self._reasons[key] = reason

    def clear(self, key: bytes) -> None:
        if self._reasons.pop(key, None) is not None:
            log.info("a system record can be used again", record=display_name(key))

    def replace(self, prefix: bytes, found: Mapping[bytes, str]) -> None:
        """``found``: the result of a whole scan of the rows under ``prefix``."""
        for key in [key for key in self._reasons if key.startswith(prefix) and key not in found]:
            self.clear(key)
        for key, reason in found.items():
            self.note(key, reason)


def display_name(key: bytes) -> str:
    """A row's key as text: escapes what is not printable, and cuts what is long."""
    return key[:NAME_CHARS_MAX].decode("utf-8", "backslashreplace").encode("unicode_escape").decode()
