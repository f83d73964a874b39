"""Small objects on a disk: whole copies beside the register that refers to them, as one acceptor
stores and loads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from storaged.errors import DiskUnusable, FragmentDamaged, FragmentMissing, PeerRefused
from storaged.fragments.engine import Write
from storaged.fragments.format import ID_AT, KEY_BYTES
from storaged.fragments.ports import CellRead, FragmentHeader, FragmentId, NearStore
from storaged.units import KIB, MIB
from storaged.wire import Buffer, decode, encode

HEADER_BYTES_MAX = 4 * KIB
"""An encoded header that is longer, or not laid out as ours, is encoded anew for the disk."""

COPY_BYTES_MAX = MIB
"""A copy is loaded whole; what is kept as copies is far smaller."""


class CopyStore(NearStore, Protocol):
    """A local body: it can find a copy without knowing which of the replicas it was made for."""

    def find_copy(self, data_id: bytes) -> FragmentId | None: ...

    def peek_copy(self, data_id: bytes) -> memoryview | None: ...


class Loaded(NamedTuple):
    """A whole copy: the encoded header of its fragment, and the payload."""

    header: bytes
    payload: memoryview


def copy_write(header: bytes, payload: Sequence[Buffer]) -> Write:
    """What the log appends for a copy whose encoded FragmentHeader this is. Raises PeerRefused (BAD_FRAGMENT)."""
    parsed = _parse(header)
    plain = (
        len(header) <= HEADER_BYTES_MAX and header[ID_AT : ID_AT + KEY_BYTES] == parsed.id
    )  # as everybody here encodes it
    return Write.of(parsed, payload, header if plain else b"")


def at_position(header: bytes, position: int) -> bytes:
    """The same copy's header for another of the replicas."""
    parsed = _parse(header)
    moved = FragmentId.unpack(parsed.id)._replace(position=position)
    return encode(msgspec.structs.replace(parsed, id=moved.pack()))


def _parse(header: bytes) -> FragmentHeader:
    try:
        return decode(header, FragmentHeader)
    except msgspec.MsgspecError as error:
        raise PeerRefused(f"not a fragment's header: {error}", remote_code="BAD_FRAGMENT") from None


class Payloads:
    """What a replica is given over one disk's fragments."""

    def __init__(self, store: CopyStore) -> None:
        self._store = store

    async def store_payload(self, header: bytes, payload: Sequence[Buffer] | Buffer) -> None:
        """Writes and syncs the copy whose encoded FragmentHeader this is. Raises PeerRefused (BAD_FRAGMENT),
        DiskUnusable, FragmentDamaged.
        """
        pieces = [payload] if isinstance(payload, bytes | bytearray | memoryview) else payload
        await self._store.write(_parse(header), pieces, sync=True)

    def peek_payload(self, data_id: bytes) -> memoryview | None:
        """The whole copy when it is in memory; None otherwise, whatever the reason."""
        try:
            return self._store.peek_copy(data_id)
        except DiskUnusable:
            return None

    async def load_payload(self, data_id: bytes) -> Loaded | None:
        """The whole copy, every cell verified; None when this disk has none, or not whole (its damage has been
        reported).
        """
        fragment = self._store.find_copy(data_id)
        if fragment is None:
            return None
        try:
            found = await self._store.read(fragment, 0, COPY_BYTES_MAX)
        except (FragmentMissing, FragmentDamaged):
            return None
        payload = _joined(found)
        return None if payload is None else Loaded(encode(found.header), payload)


def _joined(found: CellRead) -> memoryview | None:
    """The cells as one; None when one of them is damaged."""
    whole = [cell for cell in found.cells if cell is not None]
    if len(whole) != len(found.cells):
        return None
    return whole[0] if len(whole) == 1 else memoryview(b"".join(whole))
