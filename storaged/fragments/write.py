"""A fragment that is to be appended: checked and encoded where its caller runs, before any disk is involved."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from storaged.errors import FragmentDamaged, PeerRefused
from storaged.fragments.format import KEY_BYTES, PAYLOAD_BYTES_MAX, RecordWriter
from storaged.fragments.ports import FragmentHeader
from storaged.hashes import is_fragment, is_old, transfer_checksum
from storaged.wire import Buffer, encode

TIME_MS_MAX = 1 << 63
"""The index has 64 bits for when a fragment was created or is due, and a touch adds to it."""


def check_time(time_ms: int) -> None:
    """Raises PeerRefused (BAD_REQUEST) for a time outside of 0..2^63 ms."""
    if not 0 <= time_ms <= TIME_MS_MAX:
        raise PeerRefused(f"{time_ms} ms; a time lies in 0..2^63", remote_code="BAD_REQUEST")


class Write(Struct):
    """A fragment that is to be appended."""

    key: bytes
    header: FragmentHeader
    message: bytes
    """The encoded header."""
    payload: list[memoryview]
    payload_bytes: int
    room: int
    """The most bytes of a segment that its record takes."""
    check: bytes = b""
    """Compared with the payload instead of its hash; see ``ports.FragmentStore.write``."""
    spare_other: bool = False
    """As in ``ports.FragmentStore.write``."""

    @classmethod
    def of(
        cls,
        header: FragmentHeader,
        payload: Sequence[bytes | bytearray | memoryview],
        message: bytes = b"",
        check: bytes = b"",
    ) -> Write:
        """``message``: the encoded header, where the caller has it.

        Raises PeerRefused (BAD_FRAGMENT) when header and payload contradict each other.
        """
        first = payload[0] if len(payload) == 1 else None
        if type(first) is memoryview and first.format == "B" and len(first) == first.nbytes > 0:
            views, count = [first], len(first)  # most copies come like this
        else:
            views = [memoryview(buffer).cast("B") for buffer in payload if len(buffer)]
            count = sum([len(view) for view in views])
        key = header.id
        if len(key) != KEY_BYTES:
            raise _not_a_fragment(f"a fragment id has {KEY_BYTES} bytes, not {len(key)}")
        if count != header.length:
            raise _not_a_fragment(f"the header announces {header.length} bytes, the payload has {count}")
        if not 1 <= header.cell_bytes <= PAYLOAD_BYTES_MAX or count > PAYLOAD_BYTES_MAX:
            raise _not_a_fragment(
                f"cells of {header.cell_bytes} and a payload of {count} bytes; both are limited to {PAYLOAD_BYTES_MAX}"
            )
        if not 0 <= header.created_ms <= TIME_MS_MAX:
            raise _not_a_fragment(f"it was created at {header.created_ms} ms; a time lies in 0..2^63")
        message = message or encode(header)
        room = RecordWriter.bytes_max(len(message), count, header.cell_bytes)
        return cls(key, header, message, views, count, room, check)

    def matches_hash(self) -> bool:
        """Whether the payload matches the block's hashes (copies share one), or ``check`` where that is given."""
        if self.check:
            return transfer_checksum(self.payload) == self.check
        hashes, k, position = self.header.hashes, self.key[20], self.key[22]
        if not hashes:
            return True
        expected = hashes[0] if k == 1 and len(hashes) == 1 else hashes[position] if position < len(hashes) else b""
        return is_fragment(self.payload, expected)

    def may_replace(self, header: FragmentHeader, payload: Sequence[Buffer]) -> bool:
        """Whether a caller that may be hostile may replace this fragment, whose cells' checksums hold: it is the same,
        or not what its own header says.
        """
        of, by = header, self.header
        if not Write.of(of, payload).matches_hash() or not of.hashes:
            return True
        if (of.hashes, of.owner, of.part_header, of.cell_bytes) != (by.hashes, by.owner, by.part_header, by.cell_bytes):
            return False
        return not any(map(is_old, of.hashes)) or b"".join(payload) == b"".join(self.payload)

    def mismatch(self) -> FragmentDamaged | None:
        """The error for a payload that does not match; None when it does."""
        if self.matches_hash():
            return None
        return FragmentDamaged(f"the payload of {self.key.hex()} is not what the hashes in its header say; not written")


def _not_a_fragment(reason: str) -> PeerRefused:
    return PeerRefused(f"not a fragment: {reason}", remote_code="BAD_FRAGMENT")
