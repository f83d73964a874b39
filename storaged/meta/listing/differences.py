"""Where the replicas of a shard differ, by the pieces of their rows (``meta.storage.pieces``). Pure."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from storaged.errors import ServiceUnavailable
from storaged.meta.listing.agreement import common_end
from storaged.meta.messages import ShardSlice
from storaged.meta.names import KEY_BYTES_MAX
from storaged.meta.storage.pieces import rows_of_marks


class Span(NamedTuple):
    """The keys > ``after`` up to ``through``; None: to the end of the shard. ``rows``: about so many a replica has."""

    after: bytes
    through: bytes | None
    rows: int


class Differences(NamedTuple):
    """``spans``: in order; outside of them the replicas are alike up to ``through``; with ``done`` to the end of the
    shard. ``rows``: so many the replica with the most has there. ``row_bytes``: at most so many in all of the range.
    """

    spans: list[Span]
    through: bytes
    done: bool
    rows: int
    row_bytes: int


def knows_pieces(answer: ShardSlice) -> bool:
    """False for a replica of a version that has no pieces; it looked at the rows all the same."""
    return bool(answer.keys) or not answer.looked_at


def checked_pieces(after: bytes, answer: ShardSlice) -> None:
    """Raises ServiceUnavailable for pieces that can't be those of rows after a key."""
    ends = [after, *answer.keys]
    sound = (
        len(answer.keys) == len(answer.heads)
        and all(low < high for low, high in pairwise(ends))
        and len(ends[-1]) <= KEY_BYTES_MAX
        and (ends[-1] == answer.through or (answer.done and not answer.looked_at))  # else nothing gets further
    )
    try:
        rows_of_marks(answer.heads)
    except struct.error:
        sound = False
    if not sound:
        raise ServiceUnavailable("A replica's answer to a scan has pieces that can't be.")


def differences(after: bytes, answers: Mapping[str, ShardSlice]) -> Differences:
    """Compares the pieces of the rows after a key, which were checked. It goes as far as the last piece that all
    replicas have; where that is not far, as far as all of the answers go.
    """
    through, done = common_end(answers.values())
    held = [
        [*zip((after, *answer.keys), answer.keys, answer.heads, strict=False)]  # (end of the one before, end, mark)
        for answer in answers.values()
    ]
    common = sorted(set.intersection(*map(set, held)))  # none of them ends after ``through``: that is an answer's last
    gaps: list[tuple[bytes, bytes | None]] = []
    reached = after
    for before, end, _ in common:
        if before != reached:
            gaps.append((reached, before))
        reached = end
    if done:
        if any(answer.keys and answer.keys[-1] > reached for answer in answers.values()):
            gaps.append((reached, None))
    elif any(_is_early(answer, reached) for answer in answers.values() if answer.through == through):
        gaps.append((reached, through))
    else:
        through = reached
    spans = [Span(*gap, max(_rows(answer, *gap) for answer in answers.values())) for gap in gaps]
    rows = sum(span.rows for span in spans) + rows_of_marks([mark for _, _, mark in common])
    return Differences(spans, through, done, rows, max(answer.digest for answer in answers.values()))


def _is_early(answer: ShardSlice, key: bytes) -> bool:
    """Whether most pieces of an answer come after a key."""
    return 2 * bisect_right(answer.keys, key) < len(answer.keys)


def _rows(answer: ShardSlice, after: bytes, through: bytes | None) -> int:
    """How many rows the pieces have that end in a span."""
    first = bisect_right(answer.keys, after)
    last = len(answer.keys) if through is None else bisect_right(answer.keys, through)
    return rows_of_marks(answer.heads[first:last])
