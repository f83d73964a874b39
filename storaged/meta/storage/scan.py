"""Scanning one replica: what listings ask of a disk, and how its store answers.

A request names the shards it wants of one disk, each with its own place to start behind. The replica looks at rows in
key order, tombstones included,
and stops at the ``limit``-th entry, or after ``examine_max`` rows or ``bytes_max`` bytes. With a delimiter, the first
visible key
behind a common prefix stands for all of them: the scan seeks behind the prefix instead of reading through it.

Every row looked at goes into the digest, not only the visible ones: a tombstone that only a minority has is a
disagreement, too. Replicas that hold the
same rows stop at the same place, so equal (digest, through, done) mean equal answers, and nothing but one replica's
rows needs to be sent; nor those, to
an asker that has them from before and says so (``known``).

A disk keeps what ranges came to when they were looked at last (``DigestsKept``): those in which nothing was written
since are not looked at again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import msgspec
import xxhash

from storaged import wire
from storaged.meta.messages import ScanReply, ScanRequest, ScanRow, ShardAsk, ShardSlice
from storaged.meta.names import KEY_BYTES_MAX, RegisterName
from storaged.meta.ports import MetaStore, RowDamaged
from storaged.meta.storage.rowvalue import (
    STAMP_BYTES,
    heads_of,
    row_parts,
    seed_of,
    sound_check,
    sound_rows,
    stamps_in,
    visibility_of,
)
from storaged.units import MIB

SHARDS_MAX = 256
LIMIT_MAX = 4_096
EXAMINE_MAX = 8_192

CHANGED_BYTES_MAX = MIB
"""Of keys and heads in one reply that the asker knows otherwise: mostly nothing of it has changed, and so more is asked
for than a message takes.
"""

DIGESTS_BYTES_MAX = 4 * MIB
"""Of one disk: about 8,000 ranges, half a million rows of listings."""

_DIGEST_BYTES = 500
"""What is kept of a range, but for the keys that it goes from and to."""

_SLICE_ROWS_WITH_DELIMITER = 16
"""The first step of a scan that may jump: rows read behind the jump's start are wasted, 16 of them cost about as much
as the seek.
"""


class Want(IntEnum):
    DIGEST = 0
    VISIBLE = 1
    """The rows that count as entries."""
    ALL = 2
    """Every row looked at, to find out where replicas differ."""
    STAMPS = 3
    """As DIGEST, of rows that nobody verified."""
    HEADS = 4
    """Of the rows that count as entries the keys, and the heads of the bodies (``meta.storage.row_head``)."""


def list_after_prefix(prefix: bytes) -> bytes:
    """What to list after so that no key with the prefix comes, and no other is missed: keys have at
    most 1,041 bytes.
    """
    return prefix + b"\xff" * max(0, KEY_BYTES_MAX - len(prefix))


def common_prefix(key: bytes, prefix: bytes, delimiter: bytes) -> bytes:
    """The part of ``key`` up to and including the first delimiter behind the prefix; empty when there is none."""
    at = key.find(delimiter, len(prefix)) if delimiter else -1
    return key[: at + len(delimiter)] if at >= 0 else b""


def decode_rows(rows: bytes) -> list[ScanRow]:
    """Raises msgspec.MsgspecError."""
    return wire.decode(rows, list[ScanRow]) if rows else []


class _Looked(NamedTuple):
    """A range as it was at that count of changes. ``row_bytes`` of all rows looked at; ``slice`` without rows;
    ``cost``: about the memory that it takes.
    """

    changes: int
    row_bytes: int
    slice: ShardSlice
    cost: int

    def holds(self, store: MetaStore, request: ScanRequest, ask: ShardAsk, name_prefix: bytes) -> bool:
        """Whether that is still what is to be answered."""
        if not _whole(ask, self.slice, self.row_bytes):
            return False
        through = None if self.slice.done else self.slice.through
        return not store.changes.since(
            self.changes, name_prefix, after=ask.after, key_prefix=request.prefix, through=through
        )


class DigestsKept:
    """What the ranges of one disk's shards that were asked for lately came to, in about ``bytes_max`` of memory."""

    def __init__(self, bytes_max: int = DIGESTS_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._kept: OrderedDict[tuple[object, ...], _Looked] = OrderedDict()

    def at_hand(self, store: MetaStore, request: ScanRequest, ask: ShardAsk) -> bool:
        """Whether the answer is known without a look at the rows."""
        looked = self._kept.get(_place(request, ask)) if ask.want in (Want.STAMPS, Want.HEADS) else None
        if looked is None or not (ask.want == Want.STAMPS or looked.slice.digest == ask.known):
            return False
        return looked.holds(store, request, ask, RegisterName(request.table, request.scope, ask.shard, b"").prefix)

    def answer(self, store: MetaStore, request: ScanRequest, ask: ShardAsk) -> ShardSlice:
        """To an ask for STAMPS or HEADS."""
        place = _place(request, ask)
        name_prefix = RegisterName(request.table, request.scope, ask.shard, b"").prefix
        changes = store.changes.of(name_prefix)
        looked = self._kept.get(place)
        if looked is not None and looked.holds(store, request, ask, name_prefix):
            found, row_bytes = looked.slice, looked.row_bytes
            self._kept.move_to_end(place)
            if looked.changes != changes:
                self._kept[place] = looked._replace(changes=changes)
        elif ask.want == Want.STAMPS or ask.known:
            found, row_bytes = _looked_at(store, request, ask, Want.STAMPS)
            self._keep(place, ask, changes, found, row_bytes)
        else:
            found = None
        if found is not None and (ask.want == Want.STAMPS or found.digest == ask.known):
            return found
        answer, row_bytes = _looked_at(store, request, ask, Want.HEADS)
        if found is None:
            bare = ShardSlice(ask.shard, answer.through, answer.done, answer.digest, looked_at=answer.looked_at)
            self._keep(place, ask, changes, bare, row_bytes)
        return answer

    def _keep(self, place: tuple[object, ...], ask: ShardAsk, changes: int, found: ShardSlice, row_bytes: int) -> None:
        before = self._kept.pop(place, None)
        if before is not None:
            self._bytes -= before.cost
        if _whole(ask, found, row_bytes):
            cost = _DIGEST_BYTES + len(found.through) + sum(len(part) for part in place if isinstance(part, bytes))
            self._kept[place] = _Looked(changes, row_bytes, found, cost)
            self._bytes += cost
            while self._bytes > self._bytes_max:
                self._bytes -= self._kept.popitem(last=False)[1].cost

    def __len__(self) -> int:
        return len(self._kept)


def _place(request: ScanRequest, ask: ShardAsk) -> tuple[object, ...]:
    return (
        request.table,
        request.scope,
        request.prefix,
        request.delimiter,
        request.visible,
        ask.shard,
        ask.after,
        ask.limit,
    )


def _whole(ask: ShardAsk, found: ShardSlice, row_bytes: int) -> bool:
    """Whether such an answer ends at the ask's ``limit`` or at the shard's end, so that other bounds wide enough change
    nothing of it.
    """
    return row_bytes < ask.bytes_max and found.looked_at < ask.examine_max


def scan_store(
    store: MetaStore,
    request: ScanRequest,
    kept: DigestsKept | None = None,
    *,
    changed_bytes_max: int = CHANGED_BYTES_MAX,
) -> ScanReply:
    """Blocks for about a microsecond a row, but for what ``kept`` tells of them. Of what the asker knew and what
    changed no more is sent than fits.
    Raises ValueError for a request beyond the limits above."""
    if len(request.shards) > SHARDS_MAX:
        raise ValueError(f"a scan covers at most {SHARDS_MAX} shards, not {len(request.shards)}")
    for ask in request.shards:
        if not (0 <= ask.limit <= LIMIT_MAX and 1 <= ask.examine_max <= EXAMINE_MAX):
            raise ValueError(
                f"a scan looks at 1 to {EXAMINE_MAX} rows for up to {LIMIT_MAX} entries, not {ask.examine_max} for"
                f" {ask.limit}"
            )
    slices, left = [], changed_bytes_max
    for ask in request.shards:
        found = _scan_shard(store, request, ask, kept)
        if ask.known and found.keys:
            size = sum(map(len, found.keys)) + sum(map(len, found.heads))
            if size > left:
                found = ShardSlice(ask.shard, ask.after, False, 0, unreadable=True)
            else:
                left -= size
        slices.append(found)
    return ScanReply(slices=tuple(slices))


def cold_asks(store: MetaStore, request: ScanRequest, kept: DigestsKept) -> Sequence[ShardAsk]:
    """Those of which ``warm_up`` is to be called in another thread before ``scan_store``."""
    return [ask for ask in request.shards[:SHARDS_MAX] if not kept.at_hand(store, request, ask)] if store.large else ()


def warm_up(store: MetaStore, request: ScanRequest, asks: Sequence[ShardAsk]) -> None:
    for ask in asks:
        limit = min(ask.limit, ask.examine_max, LIMIT_MAX)
        if limit < 1:
            continue  # there is nothing to be read, or the request is refused
        stamps = ask.want == Want.STAMPS or ask.known  # of what the asker knows mostly nothing has changed
        whole = not stamps or bool(request.delimiter)  # ``_look`` goes through the rows themselves
        store.warm(
            request.table, request.scope, ask.shard, after=ask.after, prefix=request.prefix, limit=limit, whole=whole
        )


def _scan_shard(store: MetaStore, request: ScanRequest, ask: ShardAsk, kept: DigestsKept | None) -> ShardSlice:
    try:
        if kept is not None and ask.want in (Want.STAMPS, Want.HEADS):
            return kept.answer(store, request, ask)
        return _looked_at(store, request, ask, ask.want)[0]
    except RowDamaged:
        return ShardSlice(ask.shard, ask.after, False, 0, unreadable=True)


def _looked_at(store: MetaStore, request: ScanRequest, ask: ShardAsk, want: int) -> tuple[ShardSlice, int]:
    """With the bytes of all rows that were looked at."""
    found = (
        _plain(store, request, ask, want)
        if want in (Want.STAMPS, Want.HEADS) and ask.limit and not request.delimiter
        else None
    )
    return _look(store, request, ask, want) if found is None else found


def _plain(store: MetaStore, request: ScanRequest, ask: ShardAsk, want: int) -> tuple[ShardSlice, int] | None:
    """What ``_look`` would answer, when all rows are visible, whole, and together small enough; else None."""
    limit, shipped = min(ask.limit, ask.examine_max), want == Want.HEADS
    keys: list[bytes] = []
    rows: list[bytes] = []
    read = (request.table, request.scope, ask.shard)
    if shipped:
        keys, rows, more = store.columns(*read, after=ask.after, prefix=request.prefix, limit=limit)
        seen = stamps_in(keys, rows, more)
    else:
        seen = store.stamps(*read, after=ask.after, prefix=request.prefix, limit=limit)
    visibilities = seen.stamps[STAMP_BYTES - 1 :: STAMP_BYTES]
    if (
        len(visibilities) < seen.rows
        or min(visibilities, default=request.visible) < request.visible
        or seen.row_bytes >= ask.bytes_max
    ):
        return None
    if shipped and not sound_rows(_seed(request, ask), keys, rows):
        return None
    digest = xxhash.xxh3_64_intdigest(seen.stamps)
    heads = heads_of(rows) if rows else ()
    found = ShardSlice(
        ask.shard, seen.last or ask.after, not seen.more, digest, looked_at=seen.rows, keys=keys, heads=heads
    )
    return found, seen.row_bytes


def _look(store: MetaStore, request: ScanRequest, ask: ShardAsk, want: int) -> tuple[ShardSlice, int]:
    scan = _ShardScan(request, ask, want)
    step = _SLICE_ROWS_WITH_DELIMITER if request.delimiter else ask.limit + 1
    while not scan.finished:
        limit = min(step, scan.rows_left)
        batch = store.slice(
            request.table, request.scope, ask.shard, after=scan.through, prefix=request.prefix, limit=limit
        )
        scan.take(batch)
        scan.finished = scan.finished or len(batch) < limit
        step = min(2 * step, EXAMINE_MAX) if not scan.jumped else _SLICE_ROWS_WITH_DELIMITER
    return scan.slice(), scan.row_bytes


def _seed(request: ScanRequest, ask: ShardAsk) -> int:
    return seed_of(RegisterName(request.table, request.scope, ask.shard, b"").pack())


class _ShardScan:
    """How far the scan of one shard is. It ends on seeing a row more than it may take, or none: only then it knows
    whether it is done.
    """

    def __init__(self, request: ScanRequest, ask: ShardAsk, want: int) -> None:
        self.through = ask.after
        self.finished = False
        self.jumped = False
        self._request = request
        self._ask = ask
        self._want = want
        self._seed = _seed(request, ask)
        self._damaged_mark = b"damaged at " + request.disk.encode()
        self._stamps: list[bytes] = []
        self._shown: list[tuple[bytes, bytes]] = []
        self._rows: list[tuple[bytes, bytes, int, msgspec.Raw | None]] = []
        self._entries = self.row_bytes = 0
        self._more = False

    @property
    def rows_left(self) -> int:
        return self._ask.examine_max - len(self._stamps) + 1

    def take(self, batch: list[tuple[bytes, bytes]]) -> None:
        """The one loop over rows. Locals, and no calls that can be avoided: a page of 1,000 keys is 4,000 rows here, on
        all replicas together.
        """
        request, ask, want, seed, stamps = self._request, self._ask, self._want, self._seed, self._stamps
        visible, delimiter, everything, heads = request.visible, request.delimiter, want == Want.ALL, want == Want.HEADS
        verified, shipped = want != Want.STAMPS, want == Want.VISIBLE
        entries, looked_at, size, through = self._entries, len(stamps), self.row_bytes, self.through
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
        self._entries, self.row_bytes, self.through = entries, size, through

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
