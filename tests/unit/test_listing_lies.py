"""Listings of which one replica sends other rows than it reports the digest of."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from storaged.meta.messages import ScanReply, ScanRow, ShardSlice
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.meta.ports import PageQuery
from storaged.meta.storage.scan import Want, decode_rows
from storaged.wire import encode
from tests.worlds.listing import BUCKET, Ring, value_of

SHARDS = range(4)
KEYS = [b"k%03d" % number for number in range(40)]
LIE = Value(1, b"o" * 16, Visibility.LIVE, b"a lie")
QUERY = PageQuery(Table.OBJECT, BUCKET, SHARDS)


def other_rows(reply: ScanReply) -> ScanReply:
    """Other bodies, under the ballots and with the digest of the true ones."""

    def other(piece: ShardSlice) -> ShardSlice:
        rows = [ScanRow(row.key, row.ballot, row.visibility, LIE) for row in decode_rows(piece.rows)]
        return msgspec.structs.replace(
            piece,
            rows=encode(rows) if rows else b"",
            heads=[LIE.body] * len(piece.heads),
            hash=b"l" * len(piece.hash),
        )

    return ScanReply(slices=tuple(map(other, reply.slices)))


def fewer_keys(reply: ScanReply) -> ScanReply:
    """Half of them is hidden."""

    def half(piece: ShardSlice) -> ShardSlice:
        rows = decode_rows(piece.rows)[::2]
        return msgspec.structs.replace(
            piece, rows=encode(rows) if rows else b"", keys=piece.keys[::2], heads=piece.heads[::2]
        )

    return ScanReply(slices=tuple(map(half, reply.slices)))


async def check(ring: Ring, keys: list[bytes]) -> None:
    page = await ring.scanner.list_page(QUERY)
    assert [(row.key, row.value) for row in page.rows] == [(key, value_of(1)) for key in keys]
    heads = await ring.scanner.list_heads(QUERY)
    assert list(zip(heads.keys, heads.heads, strict=True)) == [(key, value_of(1).body) for key in keys]


@pytest.mark.parametrize("lie", [other_rows, fewer_keys])
@pytest.mark.parametrize("liar", [f"d{index}" for index in range(6)])
async def test_a_lone_replica_neither_hides_keys_from_a_listing_nor_changes_them(
    liar: str, lie: Callable[[ScanReply], ScanReply]
) -> None:
    ring = Ring()
    await ring.fill(KEYS)
    ring.lies = {liar: lie}
    await check(ring, KEYS)
    for index, key in enumerate(new := [b"new%d" % number for number in range(8)]):
        await ring.put_everywhere(RegisterName(Table.OBJECT, BUCKET, index % 4, key))
    await check(ring, KEYS + new)  # the pieces that the listing before has left in the cache have changed


@pytest.mark.parametrize("position", range(3))
async def test_where_two_replicas_report_one_ballot_and_two_values_the_register_decides(position: int) -> None:
    """The third replica is away."""
    ring = Ring()
    await ring.fill(KEYS, shards=1)
    disks = ring.replicas_of(RegisterName(Table.OBJECT, BUCKET, 0, b""))
    ring.lies = {disks[position]: other_rows}
    ring.down = {disks[position - 1]}
    await check(ring, KEYS)
    assert ring.reads


async def test_replicas_of_the_version_before_hash_nothing_and_agree_by_their_digests() -> None:
    ring = Ring()
    await ring.fill(KEYS)
    ring.lies = {
        disk: lambda reply: ScanReply(slices=tuple(msgspec.structs.replace(piece, hash=b"") for piece in reply.slices))
        for disk in ring.stores
    }
    await check(ring, KEYS)
    assert ring.reads == []
    assert Want.ALL not in [ask.want for scan in ring.scans for ask in scan.shards]
