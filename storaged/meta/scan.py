"""Scanning one replica: what listings ask of a disk, and how its store answers.

A request names the shards it wants of one disk, each with its own place to start behind. The replica looks at rows in key order, tombstones included,
and stops at the ``limit``-th entry, or after ``examine_max`` rows or ``bytes_max`` bytes. With a delimiter, the first visible key
behind a common prefix stands for all of them: the scan seeks behind the prefix instead of reading through it.

Every row looked at goes into the digest, not only the visible ones: a tombstone that only a minority has is a disagreement, too. Replicas that hold the
same rows stop at the same place, so equal (digest, through, done) mean equal answers, and nothing but one replica's rows needs to be sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import msgspec
import xxhash

from storaged import wire
from storaged.meta.names import KEY_BYTES_MAX, RegisterName, Value
from storaged.meta.ports import MetaStore, RowDamaged
from storaged.meta.rowvalue import STAMP_BYTES, heads_of, row_parts, seed_of, sound_check, sound_rows, stamps_in, visibility_of
from storaged.wire import Message

SHARDS_MAX = 256
LIMIT_MAX = 4_096
EXAMINE_MAX = 8_192

_SLICE_ROWS_WITH_DELIMITER = 16
"""The first step of a scan that may jump: rows read behind the jump's start are wasted, 16 of them cost about as much as the seek."""


class Want(IntEnum):
    DIGEST = 0
    VISIBLE = 1
    """The rows that count as entries."""
    ALL = 2
    """Every row looked at, to find out where replicas differ."""
    STAMPS = 3
    """As DIGEST, of rows that nobody verified."""
    HEADS = 4
    """Of the rows that count as entries the keys, and the heads of the bodies (``meta.heads``)."""


class ShardAsk(Message, frozen=True):
    """``after`` is exclusive; ``limit`` counts entries (visible rows, or common prefixes)."""

    shard: int
    after: bytes
    limit: int
    want: int
    examine_max: int
    bytes_max: int


class ScanRequest(Message, frozen=True):
    """``visible``: rows with at least this Visibility are entries. ``epoch`` of the asker's layout."""

    disk: str
    epoch: int
    table: int
    scope: bytes
    shards: tuple[ShardAsk, ...]
    prefix: bytes = b""
    delimiter: bytes = b""
    visible: int = 0


class ScanRow(Message, frozen=True):
    """``ballot``: 18 bytes and more, comparable for equality; empty when the row is damaged here, and the value is None then."""

    key: bytes
    ballot: bytes
    visibility: int
    value: Value | None


class ShardSlice(Message, frozen=True):
    """``through``: everything up to and including this key was looked at (but for what common prefixes stand for); ``done``: to the shard's end.
    ``rows`` is a list of ScanRow in msgpack, decoded only when it is used; ``keys`` and ``heads`` belong together, when heads were wanted.
    ``unreadable``: the shard can't be scanned here, nothing else counts."""

    shard: int
    through: bytes
    done: bool
    digest: int
    rows: bytes = b""
    looked_at: int = 0
    unreadable: bool = False
    keys: Sequence[bytes] = ()
    heads: Sequence[bytes] = ()


class ScanReply(Message, frozen=True):
    """``verdict`` is ``register.Verdict``; slices only when it is OK (0), one for every shard asked, in that order."""

    verdict: int = 0
    slices: tuple[ShardSlice, ...] = ()


def list_after_prefix(prefix: bytes) -> bytes:
    """What to list after so that no key with the prefix comes, and no other is missed: keys have at most 1,041 bytes."""
    return prefix + b"\xff" * max(0, KEY_BYTES_MAX - len(prefix))


def common_prefix(key: bytes, prefix: bytes, delimiter: bytes) -> bytes:
    """The part of ``key`` up to and including the first delimiter behind the prefix; empty when there is none."""
    at = key.find(delimiter, len(prefix)) if delimiter else -1
    return key[: at + len(delimiter)] if at >= 0 else b""


def decode_rows(rows: bytes) -> list[ScanRow]:
    """Raises msgspec.MsgspecError."""
    return wire.decode(rows, list[ScanRow]) if rows else []


def scan_store(store: MetaStore, request: ScanRequest) -> ScanReply:
    """Blocks for about a microsecond a row. Raises ValueError for a request beyond the limits above."""
    if len(request.shards) > SHARDS_MAX:
        raise ValueError(f"a scan covers at most {SHARDS_MAX} shards, not {len(request.shards)}")
    for ask in request.shards:
        if not (0 <= ask.limit <= LIMIT_MAX and 1 <= ask.examine_max <= EXAMINE_MAX):
            raise ValueError(
                f"a scan looks at 1 to {EXAMINE_MAX} rows for up to {LIMIT_MAX} entries, not {ask.examine_max} for {ask.limit}"
            )
    return ScanReply(slices=tuple(_scan_shard(store, request, ask) for ask in request.shards))


def _scan_shard(store: MetaStore, request: ScanRequest, ask: ShardAsk) -> ShardSlice:
    try:
        found = _plain(store, request, ask) if ask.want in (Want.STAMPS, Want.HEADS) and ask.limit and not request.delimiter else None
        return _look(store, request, ask) if found is None else found
    except RowDamaged:
        return ShardSlice(ask.shard, ask.after, False, 0, unreadable=True)


def _plain(store: MetaStore, request: ScanRequest, ask: ShardAsk) -> ShardSlice | None:
    """What ``_look`` would answer, when all rows are visible, whole, and together small enough; else None."""
    limit, shipped = min(ask.limit, ask.examine_max), ask.want == Want.HEADS
    keys: list[bytes] = []
    rows: list[bytes] = []
    read = (request.table, request.scope, ask.shard)
    if shipped:
        keys, rows, more = store.columns(*read, after=ask.after, prefix=request.prefix, limit=limit)
        seen = stamps_in(keys, rows, more)
    else:
        seen = store.stamps(*read, after=ask.after, prefix=request.prefix, limit=limit)
    visibilities = seen.stamps[STAMP_BYTES - 1 :: STAMP_BYTES]
    if len(visibilities) < seen.rows or min(visibilities, default=request.visible) < request.visible or seen.row_bytes >= ask.bytes_max:
        return None
    if shipped and not sound_rows(_seed(request, ask), keys, rows):
        return None
    digest = xxhash.xxh3_64_intdigest(seen.stamps)
    return ShardSlice(
        ask.shard, seen.last or ask.after, not seen.more, digest, looked_at=seen.rows, keys=keys, heads=heads_of(rows) if rows else ()
    )


def _look(store: MetaStore, request: ScanRequest, ask: ShardAsk) -> ShardSlice:
    scan = _ShardScan(request, ask)
    step = _SLICE_ROWS_WITH_DELIMITER if request.delimiter else ask.limit + 1
    while not scan.finished:
        limit = min(step, scan.rows_left)
        batch = store.slice(request.table, request.scope, ask.shard, after=scan.through, prefix=request.prefix, limit=limit)
        scan.take(batch)
        scan.finished = scan.finished or len(batch) < limit
        step = min(2 * step, EXAMINE_MAX) if not scan.jumped else _SLICE_ROWS_WITH_DELIMITER
    return scan.slice()


def _seed(request: ScanRequest, ask: ShardAsk) -> int:
    return seed_of(RegisterName(request.table, request.scope, ask.shard, b"").pack())


class _ShardScan:
    """How far the scan of one shard is. It ends on seeing a row more than it may take, or none: only then it knows whether it is done."""

    def __init__(self, request: ScanRequest, ask: ShardAsk) -> None:
        self.through = ask.after
        self.finished = False
        self.jumped = False
        self._request = request
        self._ask = ask
        self._seed = _seed(request, ask)
        self._damaged_mark = b"damaged at " + request.disk.encode()
        self._stamps: list[bytes] = []
        self._shown: list[tuple[bytes, bytes]] = []
        self._rows: list[tuple[bytes, bytes, int, msgspec.Raw | None]] = []
        self._entries = self._bytes = 0
        self._more = False

    @property
    def rows_left(self) -> int:
        return self._ask.examine_max - len(self._stamps) + 1

    def take(self, batch: list[tuple[bytes, bytes]]) -> None:
        """The one loop over rows. Locals, and no calls that can be avoided: a page of 1,000 keys is 4,000 rows here, on all replicas together."""
        request, ask, seed, stamps = self._request, self._ask, self._seed, self._stamps
        visible, delimiter, everything, heads = request.visible, request.delimiter, ask.want == Want.ALL, ask.want == Want.HEADS
        verified, shipped = ask.want != Want.STAMPS, ask.want == Want.VISIBLE
        entries, looked_at, size, through = self._entries, len(stamps), self._bytes, self.through
        group = b""
        self.jumped = False
        for key, row in batch:
            if group and key.startswith(group):
                continue
            if entries >= ask.limit or looked_at >= ask.examine_max or size >= ask.bytes_max:
                self._more = self.finished = True
                break
            looked_at += 1
            through, group = key, b""
            if (verified or len(row) < STAMP_BYTES) and not sound_check(seed, key, row):
                stamps.append(self._damaged_mark)
                if everything:
                    self._rows.append((key, b"", 0, None))
                continue
            stamps.append(row[:STAMP_BYTES])
            size += len(row)
            shown = visibility_of(row) >= visible
            if shown:
                entries += 1
                if delimiter and (group := common_prefix(key, request.prefix, delimiter)):
                    through = list_after_prefix(group)
                    self.jumped = True
            if shown and heads:
                self._shown.append((key, row))
            elif everything or (shown and shipped):
                visibility, ballot, value = row_parts(row)
                self._rows.append((key, ballot, visibility, msgspec.Raw(value)))
        self._entries, self._bytes, self.through = entries, size, through

    def slice(self) -> ShardSlice:
        return ShardSlice(
            shard=self._ask.shard,
            through=self.through,
            done=not self._more,
            digest=xxhash.xxh3_64_intdigest(b"".join(self._stamps)),
            rows=wire.encode(self._rows) if self._rows else b"",
            looked_at=len(self._stamps),
            keys=[key for key, _ in self._shown],
            heads=heads_of([row for _, row in self._shown]),
        )
