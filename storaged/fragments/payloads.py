"""Small objects on a disk: whole copies beside the register that refers to them, as one acceptor stores and loads
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from storaged.errors import DiskUnusable, FragmentDamaged, FragmentMissing, PeerRefused
from storaged.fragments.format import ID_AT, KEY_BYTES
from storaged.fragments.ports import CellRead, FragmentHeader, FragmentId, NearStore
from storaged.fragments.write import Write
from storaged.units import KIB, MIB
from storaged.wire import Buffer, decode, encode

HEADER_BYTES_MAX = 4 * KIB
"""A longer header, or one that another encoder made, is encoded again for the disk."""

COPY_BYTES_MAX = MIB
"""A copy is loaded whole. Objects that are kept as copies are far smaller."""


class CopyStore(NearStore, Protocol):
    """The implementation for local disks. It finds a copy without knowing for which of the replicas it was made."""

    async def locate_copy(self, data_id: bytes) -> FragmentId | None:
        """The whole copy of a data id, if the disk has one."""

    def holds_copy(self, data_id: bytes, was_durable: bool) -> bool:
        """Whether the disk has a durable whole copy of a data id, as far as is known without reading it.
        ``was_durable``: it was.
        """

    def try_read_copy(self, data_id: bytes) -> memoryview | None:
        """The payload of a whole copy when it is in memory and undamaged, else None. Raises DiskUnusable."""


class Loaded(NamedTuple):
    """A whole copy: the encoded header of its fragment, and the payload."""

    header: bytes
    payload: memoryview


def copy_write(header: bytes, payload: Sequence[Buffer], check: bytes = b"") -> Write:
    """What the log appends for a copy with this encoded FragmentHeader. ``check``: as of ``FragmentStore.write``.
    Raises PeerRefused (BAD_FRAGMENT).
    """
    parsed = _parse(header)
    usual = len(header) <= HEADER_BYTES_MAX and header[ID_AT : ID_AT + KEY_BYTES] == parsed.id
    return Write.of(parsed, payload, header if usual else b"", check)


def header_at_position(header: bytes, position: int) -> bytes:
    """The encoded header of the same copy on another of the replicas."""
    parsed = _parse(header)
    moved = FragmentId.unpack(parsed.id)._replace(position=position)
    return encode(msgspec.structs.replace(parsed, id=moved.pack()))


def _parse(header: bytes) -> FragmentHeader:
    try:
        return decode(header, FragmentHeader)
    except msgspec.MsgspecError as error:
        raise PeerRefused(f"not a fragment's header: {error}", remote_code="BAD_FRAGMENT") from None


class Payloads:
    """Stores and loads whole copies in one disk's fragment store, for the replica on that disk."""

    def __init__(self, store: CopyStore) -> None:
        self._store = store

    async def store_payload(self, header: bytes, payload: Sequence[Buffer] | Buffer, check: bytes = b"") -> None:
        """Writes and syncs the copy with this encoded FragmentHeader. ``check``: as of ``FragmentStore.write``.
        Raises PeerRefused (BAD_FRAGMENT), DiskUnusable, FragmentDamaged.
        """
        pieces = [payload] if isinstance(payload, bytes | bytearray | memoryview) else payload
        await self._store.write(_parse(header), pieces, sync=True, check=check)

    def holds_payload(self, data_id: bytes, was_durable: bool) -> bool:
        """See ``CopyStore.holds_copy``."""
        return self._store.holds_copy(data_id, was_durable)

    def try_load_payload(self, data_id: bytes) -> memoryview | None:
        """The payload of the copy when it is in memory; None otherwise, whatever the reason."""
        try:
            return self._store.try_read_copy(data_id)
        except DiskUnusable:
            return None

    async def load_payload(self, data_id: bytes) -> Loaded | None:
        """The whole copy, every cell verified; None when this disk has none, or a damaged one (the read has reported
        the damage). Raises DiskUnusable when the drive can't read it now.
        """
        fragment = await self._store.locate_copy(data_id)
        if fragment is None:
            return None
        try:
            found = await self._store.read(fragment, 0, COPY_BYTES_MAX)
        except FragmentMissing:
            return None
        except FragmentDamaged as error:
            if error.unread:
                raise DiskUnusable(error.message) from None
            return None
        if found.unread:
            raise DiskUnusable(f"the drive can't read the copy {data_id.hex()} now")
        payload = _joined(found)
        return None if payload is None else Loaded(encode(found.header), payload)


def _joined(found: CellRead) -> memoryview | None:
    """The cells in one piece; None when one of them is damaged."""
    whole = [cell for cell in found.cells if cell is not None]
    if len(whole) != len(found.cells):
        return None
    return whole[0] if len(whole) == 1 else memoryview(b"".join(whole))
