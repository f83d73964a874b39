"""Scans of one replica: what listings ask of a disk, and how its store answers.

A request names the shards it wants of one disk, each with its own position to start after. The replica looks at rows in
key order, tombstones included, and stops at the ``limit``-th entry, or after ``examine_max`` rows or ``bytes_max``
bytes. With a delimiter the first visible key with a common prefix represents all of them: the scan seeks past the
prefix instead of reading through it.

The digest covers every row looked at, not only the visible ones: a tombstone that only a minority has is a disagreement
too. Replicas that hold the same rows stop at the same place, so equal (digest, through, done) mean equal answers, and
only one replica has to send its rows. Even that one sends none to a caller that has them from before and passes their
digest (``known``).

A digest is 64 bits that have no cryptographic strength: it says that a replica's rows are what the same rows were
before, or what those of an honest replica are. It says nothing about rows that a replica sends. So the others hash what
they would send (HEADS_HASH, ROWS_HASH), and the caller hashes what it got. That costs a replica as much as sending, and
only for a range that changed: where the digest is the one that the caller knows, its own piece counts, which was
compared with such a hash when it was read.

A disk caches the digests of the ranges that it scanned last (``DigestCache``), and does not scan a range again in which
nothing was written since.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import msgspec

from storaged import wire
from storaged.hashes import listed_hash
from storaged.meta.messages import ScanReply, ScanRequest, ScanRow, ShardAsk, ShardSlice
from storaged.meta.names import KEY_BYTES_MAX, RegisterName
from storaged.meta.storage.pieces import pieces_in
from storaged.meta.storage.rowvalue import (
    STAMP_BYTES,
    digest_of_stamps,
    heads_of,
    row_parts,
    seed_of,
    sound_check,
    sound_rows,
    stamps_in,
    visibility_of,
)
from storaged.meta.store_ports import MetaStore, RowDamaged, RowRange
from storaged.units import MIB

SHARDS_MAX = 256
LIMIT_MAX = 4_096
EXAMINE_MAX = 8_192

CHANGED_BYTES_MAX = MIB
"""Of keys and heads in one reply that differ from what the caller knows. Mostly nothing has changed, and so callers ask
for more than a message takes.
"""

DIGEST_CACHE_BYTES_MAX = 4 * MIB
"""Of one disk: about 8,000 ranges, half a million rows of listings."""

_DIGEST_BYTES = 500
"""Memory of a range in the cache, besides the keys at its ends."""

_SLICE_ROWS_WITH_DELIMITER = 16
"""The first step of a scan that may seek past a common prefix: the rows read after the seek's start are wasted, and 16
of them cost about as much as the seek.
"""


class Want(IntEnum):
    DIGEST = 0
    VISIBLE = 1
    """The rows that count as entries, and those that are damaged, of which nobody can tell."""
    ALL = 2
    """Every row looked at, to find where replicas differ."""
    STAMPS = 3
    """As DIGEST, of unverified rows."""
    HEADS = 4
    """Keys of the rows that count as entries, and the heads of their bodies (``meta.storage.row_head``)."""
    HEADS_HASH = 5
    """As HEADS, but ``listing_hash`` the answer in the place of keys and heads."""
    ROWS_HASH = 6
    """As VISIBLE, but ``listing_hash`` the answer in the place of rows."""
    SUM = 7
    """The sum of all rows of the shard (``meta.storage.sums``) in the place of the digest, with ``limit`` 0. A replica
    that does not know this looks at no row, and says that there are more, or that there are none.
    """
    PIECES = 8
    """As STAMPS, and the pieces of these rows (``meta.storage.pieces``): their last keys in the place of ``keys``,
    their marks in that of ``heads``, the bytes of the rows in that of the digest. A replica that does not know this
    sends no keys.
    """


_SENT: dict[int, Want] = {Want.HEADS_HASH: Want.HEADS, Want.ROWS_HASH: Want.VISIBLE}
"""What the hash is of."""

_CACHED = (Want.STAMPS, Want.HEADS, Want.HEADS_HASH)


def list_after_prefix(prefix: bytes) -> bytes:
    """The position after all keys with the prefix and before any other, since keys have at most 1,041 bytes."""
    return prefix + b"\xff" * max(0, KEY_BYTES_MAX - len(prefix))


def common_prefix(key: bytes, prefix: bytes, delimiter: bytes) -> bytes:
    """The part of ``key`` up to and including the first delimiter after the prefix; empty when there is none."""
    at = key.find(delimiter, len(prefix)) if delimiter else -1
    return key[: at + len(delimiter)] if at >= 0 else b""


def decode_rows(rows: bytes) -> list[ScanRow]:
    """Raises msgspec.MsgspecError."""
    return wire.decode(rows, list[ScanRow]) if rows else []


def listing_hash(answer: ShardSlice) -> bytes:
    """The hash, 16 bytes, of what an answer says of its rows."""
    return listed_hash(wire.encode((answer.digest, answer.rows, answer.keys, answer.heads)))


def bare(answer: ShardSlice, answer_hash: bytes = b"") -> ShardSlice:
    """The answer without its rows."""
    return ShardSlice(
        answer.shard, answer.through, answer.done, answer.digest, looked_at=answer.looked_at, hash=answer_hash
    )


_RangeKey = tuple[object, ...]


class _CachedDigest(NamedTuple):
    """A range as it was at ``shard_count`` (``ports.DirtyRanges``). ``row_bytes`` of all rows looked at; ``slice``
    without rows; ``cost``: its memory, about.
    """

    shard_count: int
    row_bytes: int
    slice: ShardSlice
    cost: int

    def is_valid(self, store: MetaStore, request: ScanRequest, ask: ShardAsk, name_prefix: bytes) -> bool:
        """Whether a scan would still answer the same."""
        if not _within_bounds(ask, self.slice, self.row_bytes):
            return False
        through = None if self.slice.done else self.slice.through
        return not store.dirty_ranges.changed_since(
            self.shard_count, name_prefix, after=ask.after, key_prefix=request.prefix, through=through
        )


class DigestCache:
    """Digests of the ranges of one disk's shards that were scanned last, in about ``bytes_max`` of memory."""

    def __init__(self, bytes_max: int = DIGEST_CACHE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._digests: OrderedDict[_RangeKey, _CachedDigest] = OrderedDict()

    def has_answer(self, store: MetaStore, request: ScanRequest, ask: ShardAsk) -> bool:
        """Whether ``answer`` needs no look at the rows."""
        cached = self._digests.get(_range_key(request, ask)) if ask.want in _CACHED else None
        if cached is None or not _suffices(ask, cached.slice):
            return False
        return cached.is_valid(store, request, ask, _name_prefix(request, ask))

    def answer(self, store: MetaStore, request: ScanRequest, ask: ShardAsk) -> ShardSlice:
        """To an ask for STAMPS, HEADS or HEADS_HASH."""
        key, name_prefix = _range_key(request, ask), _name_prefix(request, ask)
        count = store.dirty_ranges.count_of(name_prefix)
        cached = self._digests.get(key)
        if cached is not None and cached.is_valid(store, request, ask, name_prefix):
            found, row_bytes = cached.slice, cached.row_bytes
            self._digests.move_to_end(key)
            if cached.shard_count != count:
                self._digests[key] = cached._replace(shard_count=count)
        elif ask.want == Want.STAMPS or ask.known:
            found, row_bytes = _scan(store, request, ask, Want.STAMPS)
            self._put(key, ask, count, found, row_bytes)
        else:
            found = None
        if found is not None and _suffices(ask, found):
            return found
        answer, row_bytes = _scan(store, request, ask, Want.HEADS)
        if ask.want == Want.HEADS_HASH:
            answer = bare(answer, listing_hash(answer))
        if found is None or answer.hash:
            self._put(key, ask, count, bare(answer, answer.hash), row_bytes)
        return answer

    def _put(self, key: _RangeKey, ask: ShardAsk, count: int, found: ShardSlice, row_bytes: int) -> None:
        before = self._digests.pop(key, None)
        if before is not None:
            self._bytes -= before.cost
        if _within_bounds(ask, found, row_bytes):
            cost = _DIGEST_BYTES + len(found.through) + sum(len(part) for part in key if isinstance(part, bytes))
            self._digests[key] = _CachedDigest(count, row_bytes, found, cost)
            self._bytes += cost
            while self._bytes > self._bytes_max:
                self._bytes -= self._digests.popitem(last=False)[1].cost

    def __len__(self) -> int:
        return len(self._digests)


def _suffices(ask: ShardAsk, found: ShardSlice) -> bool:
    """Whether what is known of a range without its rows answers the ask."""
    if ask.want == Want.STAMPS or found.digest == ask.known:
        return True
    return ask.want == Want.HEADS_HASH and bool(found.hash)


def _range_key(request: ScanRequest, ask: ShardAsk) -> _RangeKey:
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


def _name_prefix(request: ScanRequest, ask: ShardAsk) -> bytes:
    return RegisterName(request.table, request.scope, ask.shard, b"").prefix


def _within_bounds(ask: ShardAsk, found: ShardSlice, row_bytes: int) -> bool:
    """Whether the answer ended at the ask's ``limit`` or the shard's end. Then other bounds that are wide enough give
    the same answer.
    """
    return row_bytes < ask.bytes_max and found.looked_at < ask.examine_max


def scan_store(
    store: MetaStore,
    request: ScanRequest,
    cache: DigestCache | None = None,
    *,
    changed_bytes_max: int = CHANGED_BYTES_MAX,
) -> ScanReply:
    """Blocks for about a microsecond a row that ``cache`` does not cover. Leaves out changes of what the caller knows
    when they do not fit the reply. Raises ValueError for a request beyond the limits above.
    """
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
        found = _scan_shard(store, request, ask, cache)
        if ask.known and found.keys:
            size = sum(map(len, found.keys)) + sum(map(len, found.heads))
            if size > left:
                found = ShardSlice(ask.shard, ask.after, False, 0, unreadable=True)
            else:
                left -= size
        slices.append(found)
    return ScanReply(slices=tuple(slices))


def asks_to_read_ahead(store: MetaStore, request: ScanRequest, cache: DigestCache) -> Sequence[ShardAsk]:
    """The asks for which ``read_ahead`` should run in another thread before ``scan_store``."""
    if not store.large:
        return ()
    return [ask for ask in request.shards[:SHARDS_MAX] if not cache.has_answer(store, request, ask)]


def read_ahead(store: MetaStore, request: ScanRequest, asks: Sequence[ShardAsk]) -> None:
    for ask in asks:
        limit = min(ask.limit, ask.examine_max, LIMIT_MAX)
        if limit < 1:
            continue  # there is nothing to read, or the request is refused
        # Mostly nothing of what the caller knows has changed: then stamps are enough.
        stamps = ask.want in (Want.STAMPS, Want.PIECES) or ask.known
        whole = not stamps or bool(request.delimiter)  # ``_scan_rows`` reads the rows themselves
        store.read_ahead(_row_range(request, ask, ask.after, limit), whole=whole)


def _row_range(request: ScanRequest, ask: ShardAsk, after: bytes, limit: int) -> RowRange:
    return RowRange(request.table, request.scope, ask.shard, after, request.prefix, limit)


def _scan_shard(store: MetaStore, request: ScanRequest, ask: ShardAsk, cache: DigestCache | None) -> ShardSlice:
    try:
        if ask.want == Want.SUM:
            total = store.shard_sum(_name_prefix(request, ask))
            return ShardSlice(ask.shard, ask.after, total is not None, total or 0, unreadable=total is None)
        if ask.want == Want.PIECES:
            return _scan_pieces(store, request, ask)
        if cache is not None and ask.want in _CACHED:
            return cache.answer(store, request, ask)
        sent = _SENT.get(ask.want)
        if sent is None:
            return _scan(store, request, ask, ask.want)[0]
        answer = _scan(store, request, ask, sent)[0]
        return bare(answer, listing_hash(answer))
    except RowDamaged:
        return ShardSlice(ask.shard, ask.after, False, 0, unreadable=True)


def _scan_pieces(store: MetaStore, request: ScanRequest, ask: ShardAsk) -> ShardSlice:
    """Every row counts as an entry."""
    seen = store.stamps(_row_range(request, ask, ask.after, min(ask.limit, ask.examine_max)), with_keys=True)
    keys, marks = pieces_in(seen) if seen.rows else ([], [])
    through = seen.last or ask.after
    return ShardSlice(ask.shard, through, not seen.more, seen.row_bytes, looked_at=seen.rows, keys=keys, heads=marks)


def _scan(store: MetaStore, request: ScanRequest, ask: ShardAsk, want: int) -> tuple[ShardSlice, int]:
    """The answer, and the bytes of all rows that were looked at."""
    found = None
    if want in (Want.STAMPS, Want.HEADS) and ask.limit and not request.delimiter:
        found = _try_scan_columns(store, request, ask, want)
    return _scan_rows(store, request, ask, want) if found is None else found


def _try_scan_columns(
    store: MetaStore, request: ScanRequest, ask: ShardAsk, want: int
) -> tuple[ShardSlice, int] | None:
    """As ``_scan_rows``, when all rows are visible, intact, and together small enough; otherwise None."""
    wanted = _row_range(request, ask, ask.after, min(ask.limit, ask.examine_max))
    keys: list[bytes] = []
    rows: list[bytes] = []
    if want == Want.HEADS:
        keys, rows, more = store.columns(wanted)
        seen = stamps_in(keys, rows, more)
    else:
        seen = store.stamps(wanted)
    visibilities = seen.stamps[STAMP_BYTES - 1 :: STAMP_BYTES]
    if (
        len(visibilities) < seen.rows
        or min(visibilities, default=request.visible) < request.visible
        or seen.row_bytes >= ask.bytes_max
    ):
        return None
    if want == Want.HEADS and not sound_rows(seed_of(_name_prefix(request, ask)), keys, rows):
        return None
    digest = digest_of_stamps(seen.stamps)
    heads = heads_of(rows) if rows else ()
    found = ShardSlice(
        ask.shard, seen.last or ask.after, not seen.more, digest, looked_at=seen.rows, keys=keys, heads=heads
    )
    return found, seen.row_bytes


def _scan_rows(store: MetaStore, request: ScanRequest, ask: ShardAsk, want: int) -> tuple[ShardSlice, int]:
    scan = _ShardScan(request, ask, want)
    step = _SLICE_ROWS_WITH_DELIMITER if request.delimiter else ask.limit + 1
    while not scan.finished:
        limit = min(step, scan.rows_left)
        batch = store.slice(_row_range(request, ask, scan.through, limit))
        scan.add(batch)
        scan.finished = scan.finished or len(batch) < limit
        step = min(2 * step, EXAMINE_MAX) if not scan.jumped else _SLICE_ROWS_WITH_DELIMITER
    return scan.slice(), scan.row_bytes


class _ShardScan:
    """The progress of one shard's scan. It ends when it sees a row more than it may take, or none: only then it knows
    whether it is done.
    """

    def __init__(self, request: ScanRequest, ask: ShardAsk, want: int) -> None:
        self.through = ask.after
        self.finished = False
        self.jumped = False
        self._request = request
        self._ask = ask
        self._want = want
        self._seed = seed_of(_name_prefix(request, ask))
        self._damaged_mark = b"damaged at " + request.disk.encode()
        self._stamps: list[bytes] = []
        self._shown: list[tuple[bytes, bytes]] = []
        self._rows: list[tuple[bytes, bytes, int, msgspec.Raw | None]] = []
        self._entries = self.row_bytes = 0
        self._more = False

    @property
    def rows_left(self) -> int:
        return self._ask.examine_max - len(self._stamps) + 1

    def add(self, batch: list[tuple[bytes, bytes]]) -> None:
        """The only loop over rows. It uses locals and avoids calls: a page of 1,000 keys is 4,000 rows here, on all
        replicas together.
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
                if everything or shipped:  # it may be visible: who asks what no replica has must know
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
            digest=digest_of_stamps(b"".join(self._stamps)),
            rows=wire.encode(self._rows) if self._rows else b"",
            looked_at=len(self._stamps),
            keys=[key for key, _ in self._shown],
            heads=heads_of([row for _, row in self._shown]),
        )
