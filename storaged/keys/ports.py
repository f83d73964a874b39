"""What the keyring needs from the rest: system registers, a place for its own copies, and an audit log. ``node``
hands them in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

Audit = Callable[[str, Mapping[str, str]], Awaitable[None]]
"""``await audit(kind, fields)`` returns when the entry is durable; a key is released only then. Kinds: key.create,
key.release, key.refused, key.restore, key.destroy. The fields ``actor``, ``target`` and ``outcome`` are the entry's
own (``cluster.audit.format.Event``). What has the outcome ``refused CODE`` is counted, at most two entries a
minute,
and is not waited for."""


class Kept(NamedTuple):
    """A register's settled value. ``body`` may have been emptied."""

    sequence: int
    body: bytes


class KeyChange(NamedTuple):
    """What a register is to become; ``gone``: no scan shows it any more."""

    body: bytes
    gone: bool = False


class SystemRegisters(Protocol):
    """Registers of the system table, by path (``key/...``). All may raise ServiceUnavailable, ``change``
    OutcomeUnknown too."""

    async def read(self, path: str) -> Kept | None:
        """None: never written."""

    async def change(self, path: str, update: Callable[[Kept | None], KeyChange | None]) -> Kept | None:
        """Compare-and-set; durable on a majority when it returns, with what is there then. ``update`` is pure, may
        run more than once, and answers None to leave the register as it is. The new value has the sequence number of
        the old one plus one (1 where there was none)."""

    def scan(self, prefix: str) -> AsyncIterator[tuple[str, Kept]]:
        """All registers below a path that are not gone, in order."""


class KeyCopies(Protocol):
    """This gateway's own copies of bucket keys, wrapped: encoded ``bucketkey.KeyCopy``. All raise KeyringUnavailable
    when they can't be had."""

    async def get(self, bucket_id: bytes) -> bytes | None: ...

    async def keep(self, bucket_id: bytes, copy: bytes) -> None:
        """In place of the one before; durable when it returns."""

    async def forget(self, bucket_ids: Iterable[bytes]) -> None:
        """Durable when it returns; of the wrapped keys nothing is left in the file."""

    async def every(self) -> dict[bytes, bytes]:
        """All of them, by bucket id."""

    def report(self, bucket_id: bytes, damage: str, mended: bool) -> None:
        """For ``status``: the register ``key/BUCKET_ID`` was damaged, and is (not) mended. Empty ``damage``: it is as
        it should be."""
