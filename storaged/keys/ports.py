"""What the keyring needs from others: system registers, a place for its own copies, and an audit log. ``node`` provides
them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from storaged.clock import Clock

Audit = Callable[[str, Mapping[str, str]], Awaitable[None]]
"""``await audit(kind, fields)`` returns when the entry is durable; a key is released only then. Kinds: key.create,
key.release, key.refused, key.restore, key.destroy. The fields ``actor``, ``target`` and ``outcome`` are the entry's own
(``cluster.audit.format.Event``). Entries with the outcome ``refused CODE`` are counted, at most two a minute are
written, and the call does not wait for them.
"""


class StoredRegister(NamedTuple):
    """A register's settled value. ``body`` may have been emptied."""

    sequence: int
    body: bytes


class KeyChange(NamedTuple):
    """The new value of a register; ``gone``: scans do not show it any more."""

    body: bytes
    gone: bool = False


class KeyringPorts(NamedTuple):
    """What a keyring uses of its node."""

    registers: SystemRegisters
    copies: KeyCopies
    audit: Audit
    clock: Clock


class SystemRegisters(Protocol):
    """Registers of the system table, by path (``key/...``). All may raise ServiceUnavailable, ``change``
    OutcomeUnknown too."""

    async def read(self, path: str) -> StoredRegister | None:
        """None: never written."""

    async def change(
        self, path: str, update: Callable[[StoredRegister | None], KeyChange | None]
    ) -> StoredRegister | None:
        """Compare-and-set. When it returns, the result is durable on a majority; it returns the register's value.
        ``update`` is pure, may run more than once, and returns None to leave the register unchanged. The new value has
        the sequence number of the old one plus one (1 when there was none).
        """

    def scan(self, prefix: str) -> AsyncIterator[tuple[str, StoredRegister]]:
        """All registers below a path that are not gone, in order."""


class KeyCopies(Protocol):
    """This gateway's own copies of bucket keys, wrapped: encoded ``bucketkey.KeyCopy``. All raise KeyringUnavailable
    when the log can't be read or written.
    """

    async def get(self, bucket_id: bytes) -> bytes | None: ...

    async def keep(self, bucket_id: bytes, copy: bytes) -> None:
        """Replaces the copy before; durable when it returns."""

    async def forget(self, bucket_ids: Iterable[bytes]) -> None:
        """Durable when it returns; then the file has nothing of the wrapped keys any more."""

    async def every(self) -> dict[bytes, bytes]:
        """All of them, by bucket id."""

    def report(self, bucket_id: bytes, damage: str, repaired: bool) -> None:
        """For ``status``: the register ``key/BUCKET_ID`` was damaged, and is (or is not) ``repaired``. Empty
        ``damage``: it is intact.
        """
