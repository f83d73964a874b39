"""What the answers of a shard's replicas agree on, and where they differ. Pure.

A common prefix represents its keys when one of them is visible and settled. Where replicas differ inside of it, none of
them has looked further than its own first visible key. So nothing is concluded about keys after the smallest of these:
if no key up to there turns out to be visible, the piece ends there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from storaged.cluster.partitions import step_of
from storaged.errors import ServiceUnavailable
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.listing.query import Answers, Feed, Piece, PieceRead, Query
from storaged.meta.messages import ScanRow, ShardSlice
from storaged.meta.names import KEY_BYTES_MAX, Value
from storaged.meta.storage.row_head import head_of
from storaged.meta.storage.rowvalue import unpack_ballot
from storaged.meta.storage.scan import common_prefix, decode_rows


def agreeing(read: PieceRead, answers: Answers) -> list[str]:
    """The disks of a quorum that answered the same, or none. What the supplier sent counts by its hash, which the
    others have computed of their own rows.
    """
    quorum = read.feed.quorum
    if not quorum.met(answers):
        return []
    supplied = answers.get(read.supplier)
    sent = read.sent_hash(supplied) if supplied is not None else b""
    same: dict[tuple[int, bytes, bool, bytes], list[str]] = {}
    for disk, answer in answers.items():
        # Without a hash: nothing was sent, or a node of 0.1.0 computes none.
        answer_hash = answer.hash if sent and answer.hash and disk != read.supplier else sent
        same.setdefault((answer.digest, answer.through, answer.done, answer_hash), []).append(disk)
    return next((disks for disks in same.values() if quorum.met(disks)), [])


def common_end(answers: Iterable[ShardSlice]) -> tuple[bytes, bool]:
    """Up to where all of the answers go, and whether all go to the end."""
    ends = [answer.through for answer in answers if not answer.done]
    return (min(ends), False) if ends else (b"", True)


def decoded_rows(answer: ShardSlice) -> list[ScanRow]:
    """Raises ServiceUnavailable when they can't be decoded."""
    try:
        return decode_rows(answer.rows)
    except msgspec.MsgspecError as error:
        raise ServiceUnavailable(f"A replica's answer to a scan cannot be read: {error}") from None


def rows_after(after: bytes, answer: ShardSlice) -> list[ScanRow]:
    """The rows of an answer about what comes after a key. Raises ServiceUnavailable for an answer that can't be read,
    names other keys, or comes no further.
    """
    rows = decoded_rows(answer)
    if not (answer.done or answer.through > after) or any(
        row.key <= after or len(row.key) > KEY_BYTES_MAX for row in rows
    ):
        raise ServiceUnavailable("A replica's answer to a scan is about something else.")
    return rows


def reported(answers: Mapping[str, Sequence[ScanRow]], through: bytes, done: bool) -> dict[bytes, dict[str, ScanRow]]:
    """Key -> disk -> its row, in key order, up to ``through``."""
    found: dict[bytes, dict[str, ScanRow]] = {}
    for disk, rows in answers.items():
        for row in rows:
            if done or row.key <= through:
                found.setdefault(row.key, {})[disk] = row
    return dict(sorted(found.items()))


class Settlement(NamedTuple):
    """What all rows of several replicas say of a range. ``values``: by key in order; None: not there, or not known yet.
    ``doubtful``: the keys that a read of their registers has to settle. ``horizons``: as from ``_horizons``.
    """

    values: dict[bytes, Value | None]
    doubtful: list[bytes]
    horizons: dict[bytes, bytes]
    through: bytes
    done: bool


def _agreed(view: View, rows: Mapping[str, ScanRow]) -> tuple[bytes, Value | None] | None:
    """The ballot and the value of a row that is settled; None where that is not known. ``rows``: of some replicas that
    are a quorum with those that have none.

    While a partition moves, the disk that comes lacks most rows. What a majority of the present set holds is chosen all
    the same if its ballot is of an earlier step, and no replica reports a later one: its quorum was the present set.
    """
    held = {disk: (row.ballot, row.value) for disk, row in rows.items() if row.ballot}
    settled = view.quorum.agreed(held)
    if settled is not None or view.quorum.single or not held:
        return settled
    try:
        newest = max(((unpack_ballot(its[0]), its) for its in held.values()), key=itemgetter(0))
    except ValueError:
        return None
    alike = [disk for disk, its in held.items() if its == newest[1]]
    earlier = step_of(newest[0].epoch) < step_of(view.epoch)
    return newest[1] if earlier and Quorum(view.quorum.sets[0]).met(alike) else None


def settle_by_majority(query: Query, feed: Feed, answers: Answers) -> Settlement:
    """Settles keys by majority: one value at one ballot, or absent. After a fence all answers have to agree on a key
    of which one of them may have an object. Raises ServiceUnavailable for rows that can't be decoded.
    """
    through, done = common_end(answers.values())
    decoded = {disk: decoded_rows(answer) for disk, answer in answers.items()}
    horizons = _horizons(query, decoded.values(), through, done)
    values: dict[bytes, Value | None] = {}
    doubtful = []
    for key, rows in reported(decoded, through, done).items():
        if key > horizons.get(common_prefix(key, query.prefix, query.delimiter), key):
            continue  # not all of the answers have looked this far into the common prefix
        settled = _agreed(feed.view, rows)
        values[key] = None
        if query.after_fence and _may_show(query, rows) and _differ(answers, rows):
            doubtful.append(key)
        elif settled is not None:
            values[key] = settled[1]
        elif not feed.quorum.met(answers.keys() - rows.keys()):
            doubtful.append(key)
    return Settlement(values, doubtful, horizons, through, done)


def _may_show(query: Query, rows: Mapping[str, ScanRow]) -> bool:
    """Whether one of the rows is visible, or damaged. A replica that was away may lack millions of tombstones."""
    return any(not row.ballot or row.visibility >= query.visible for row in rows.values())


def _differ(answers: Answers, rows: Mapping[str, ScanRow]) -> bool:
    return len(rows) < len(answers) or len({(row.ballot, row.value) for row in rows.values()}) > 1


def _horizons(query: Query, answers: Iterable[Sequence[ScanRow]], through: bytes, done: bool) -> dict[bytes, bytes]:
    """Common prefix -> the smallest key that represents it in one of the answers: that answer has nothing of the prefix
    after this key.
    """
    found: dict[bytes, bytes] = {}
    if query.delimiter:
        for rows in answers:
            for row in rows:
                group = common_prefix(row.key, query.prefix, query.delimiter)
                if group and row.ballot and row.visibility >= query.visible and (done or row.key <= through):
                    found[group] = min(row.key, found.get(group, row.key))
    return found


def assemble(query: Query, settled: Settlement) -> Piece:
    """The piece, when the values of doubtful keys have been filled in."""
    values, through, done = settled.values, settled.through, settled.done
    keys: list[bytes] = []
    shown: set[bytes] = set()
    for key, value in values.items():
        group = common_prefix(key, query.prefix, query.delimiter)
        if value is not None and value.visibility >= query.visible:
            keys.append(key)
            shown.add(group)
        if group and group not in shown and settled.horizons.get(group) == key:
            through, done = key, False  # the keys that represented the prefix are not visible: look further
            break
    found = [value for key in keys if (value := values[key]) is not None]
    return Piece(keys, [head_of(value.body) for value in found] if query.heads else found, through, done)


def join(run: Sequence[PieceRead], *, exactly: bool) -> Piece:
    """Joins the pieces of a feed's reads, as long as each begins no later than the one before it ends: a piece may end
    earlier than it did when it was cached. ``exactly``: nor earlier. With a delimiter a key represents all after it,
    and the piece before, which was read later, may have found that this key is gone.
    """
    reached, done = run[0].feed.through, False
    keys: list[bytes] = []
    held: list[Any] = []
    for read in run:
        piece = read.piece
        assert piece is not None
        if read.after > reached or (exactly and read.after < reached):
            break
        first = bisect_right(piece.keys, reached)
        keys += piece.keys[first:]
        held += piece.held[first:]
        reached, done = max(reached, piece.through), piece.done
        if done:
            break
    parts = [read.known for read in run if read.known is not None]
    return Piece(keys, held, reached, done, parts, bool(parts) and run[0].feed.through < parts[0].listed)
