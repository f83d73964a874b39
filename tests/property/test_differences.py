"""Pieces of rows: replicas that are compared by them find all that differs, and little else."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.errors import ServiceUnavailable
from storaged.meta.listing.differences import Differences, checked_pieces, differences
from storaged.meta.messages import ShardSlice
from storaged.meta.storage.pieces import pieces_in, rows_of_marks
from storaged.meta.store_ports import Stamps
from tests.examples import examples

Shard = Mapping[bytes, int]
"""The rows of a replica: key -> what its row holds."""


def stamp_of(key: bytes, held: int) -> bytes:
    return b"\x01" + random.Random(b"%s %d" % (key, held)).randbytes(8) + b"\x02"


def answer_of(rows: Shard, after: bytes, limit: int) -> ShardSlice:
    keys = sorted(key for key in rows if key > after)
    more, keys = len(keys) > limit, keys[:limit]
    last = keys[-1] if keys else b""
    seen = Stamps(b"".join(stamp_of(key, rows[key]) for key in keys), len(keys), 100 * len(keys), last, more, keys)
    ends, marks = pieces_in(seen)
    assert rows_of_marks(marks) == len(keys)
    return ShardSlice(0, last or after, not more, seen.row_bytes, looked_at=len(keys), keys=ends, heads=marks)


def compare(replicas: list[Shard], limit: int) -> list[Differences]:
    """From the first row to the last."""
    found: list[Differences] = []
    while not found or not found[-1].done:
        after = found[-1].through if found else b""
        answers = {str(number): answer_of(rows, after, limit) for number, rows in enumerate(replicas)}
        for answer in answers.values():
            checked_pieces(after, answer)
        its = differences(after, answers)
        assert its.done or its.through > after
        found.append(its)
    return found


def keys_of(number: int) -> list[bytes]:
    return [b"k%05d" % index for index in range(number)]


@settings(max_examples=examples(200), deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(0, 120),
    st.integers(1, 60),
    st.integers(2, 3),
    st.sampled_from([0, 0.03, 0.3, 1]),
)
def test_all_that_differs_lies_in_a_span(seed: int, rows: int, limit: int, replicas: int, differing: float) -> None:
    """Whatever of it is missing, or is another row."""
    chance = random.Random(seed)
    held: list[dict[bytes, int]] = [dict.fromkeys(keys_of(rows), 0) for _ in range(replicas)]
    for key in keys_of(rows):
        if chance.random() < differing:
            some = chance.choice(held)
            if chance.random() < 0.5:
                del some[key]
            else:
                some[key] = 1
    wrong = {key for key in keys_of(rows) if len({replica.get(key) for replica in held}) > 1}
    in_spans: set[bytes] = set()
    after = b""
    for found in compare(held, limit):
        for span in found.spans:
            assert span.after >= after
            assert found.done or (span.through is not None and span.through <= found.through)
            in_spans |= {key for key in keys_of(rows) if key > span.after and (span.through or b"l") >= key}
            after = span.through or b"l"
        after = found.through
    assert wrong <= in_spans
    if not wrong:
        assert not in_spans


def test_what_is_compared_again_is_little_where_little_differs() -> None:
    keys = keys_of(20_000)
    whole = dict.fromkeys(keys, 0)
    lacking = {key: held for key, held in whole.items() if key not in random.Random(1).sample(keys, 20)}
    found = compare([whole, whole, lacking], 2000)
    assert len(found) <= 12
    assert 15 <= sum(len(its.spans) for its in found) <= 20
    assert sum(span.rows for its in found for span in its.spans) < 20 * 60
    assert sum(its.rows for its in found) >= 20_000


def test_one_replica_that_agrees_in_little_makes_no_more_messages() -> None:
    """It has the first rows of what is asked for, and nothing else in common with the others."""
    keys = keys_of(4000)
    whole, other = dict.fromkeys(keys, 0), {key: int(index % 500 >= 100) for index, key in enumerate(keys)}
    assert len(compare([whole, whole, other], 500)) <= 10
    assert len(compare([whole, whole, {}], 500)) <= 9


def test_an_answer_without_pieces_that_is_not_the_last_is_none() -> None:
    """A comparison with it would get no further, and ask the same again for ever."""
    with pytest.raises(ServiceUnavailable):
        checked_pieces(b"a", ShardSlice(0, b"b", False, 0))
    checked_pieces(b"a", ShardSlice(0, b"a", True, 0))


def test_rows_that_are_no_rows_are_in_a_piece_that_nobody_else_has() -> None:
    stamps = b"".join(stamp_of(key, 0) for key in keys_of(50))
    damaged = pieces_in(Stamps(stamps[:-3], 50, 50, b"k00049", False, keys_of(50)))
    assert damaged[0] == [b"k00049"]
    assert rows_of_marks(damaged[1]) == 50
    sound = pieces_in(Stamps(stamps, 50, 50, b"k00049", False, keys_of(50)))
    assert not set(damaged[1]) & set(sound[1])


def test_versions_of_a_row_that_say_the_same_cut_and_mark_the_same() -> None:
    """As replicas have them whose programs were replaced one after the other."""
    stamps = b"".join(stamp_of(key, 0) for key in keys_of(200))
    newer = bytearray(stamps)
    newer[::10] = b"\x02" * 200
    one, other = (pieces_in(Stamps(its, 200, 200, b"k00199", False, keys_of(200))) for its in (stamps, bytes(newer)))
    assert one == other
