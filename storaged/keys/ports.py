"""What the keyring needs from the rest: system registers, and an audit log. ``node.py`` hands them in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

Audit = Callable[[str, Mapping[str, str]], Awaitable[None]]
"""``await audit(kind, fields)`` returns when the entry is durable; a key is released only then. Kinds: key.create, key.release, key.refused.
The fields ``actor``, ``target`` and ``outcome`` are the entry's own (``cluster.audit_format.Event``). What has the outcome ``refused CODE`` is counted, at most
two entries a minute, and is not waited for."""


class AlreadyThere(Exception):
    """The register holds a value already."""


class SystemRegisters(Protocol):
    """Registers of the system table, by path (``key/...``). Both may raise ServiceUnavailable, ``create`` OutcomeUnknown."""

    async def read(self, path: str) -> bytes | None:
        """The settled value's body, None when the register was never written or is empty."""

    async def create(self, path: str, value: bytes) -> None:
        """Compare-and-set from absent; durable on a majority when it returns. Raises AlreadyThere when there is a value, and changes nothing then."""
