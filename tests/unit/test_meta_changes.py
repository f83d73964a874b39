"""Dirty ranges: a range of rows that may have changed is known as changed, also while it changes, however much was
written.
"""

from __future__ import annotations

import random
import tracemalloc

import pytest

from storaged.meta.storage.dirty_ranges import BYTES_MAX, KEYS_OF_ONE_MAX, DirtyRangeTracker

SHARD, OTHER = b"one shard", b"another one"


def changed(
    changes: DirtyRangeTracker, count: int, after: bytes = b"", through: bytes | None = None, key_prefix: bytes = b""
) -> bool:
    return changes.changed_since(count, SHARD, after=after, key_prefix=key_prefix, through=through)


def write(changes: DirtyRangeTracker, *keys: bytes, shard: bytes = SHARD) -> None:
    with changes.changing([(shard, key) for key in keys]):
        pass


def test_of_a_range_counts_what_was_written_in_it() -> None:
    changes = DirtyRangeTracker()
    count = changes.count_of(SHARD)
    assert not changed(changes, count)
    write(changes, b"k", b"p/1")
    assert changes.count_of(SHARD) != count
    for after, through, key_prefix, expected in (
        (b"", None, b"", True),
        (b"j", b"k", b"", True),
        (b"k", b"o", b"", False),
        (b"", b"j", b"", False),
        (b"k", None, b"", True),
        (b"p/1", None, b"", False),
        (b"", None, b"p/", True),
        (b"", None, b"q/", False),
    ):
        assert changed(changes, count, after, through, key_prefix) == expected
    assert not changed(changes, changes.count_of(SHARD))


def test_a_write_that_is_under_way_counts_for_who_begins_before_it_and_who_begins_meanwhile() -> None:
    changes = DirtyRangeTracker()
    before = changes.count_of(SHARD)
    with changes.changing([(SHARD, b"k")]):
        meanwhile = changes.count_of(SHARD)
        assert changed(changes, before)
        assert changed(changes, meanwhile), "the rows that it wrote may have come after a look at them"
        assert not changed(changes, meanwhile, after=b"k")
    assert changed(changes, before)
    assert changed(changes, meanwhile)
    assert not changed(changes, meanwhile, after=b"k")


def test_a_write_that_fails_counts_all_the_same() -> None:
    changes = DirtyRangeTracker()
    before = changes.count_of(SHARD)
    try:
        with changes.changing([(SHARD, b"k")]):
            raise OSError
    except OSError:
        pass
    assert changed(changes, before)
    assert not changed(changes, changes.count_of(SHARD))


def test_who_comes_after_more_writes_than_are_remembered_is_told_that_anything_may_have_changed() -> None:
    changes = DirtyRangeTracker()
    counts = []
    for number in range(2 * KEYS_OF_ONE_MAX):
        counts.append(changes.count_of(SHARD))
        write(changes, b"%04d" % number)
    assert changed(changes, counts[0], after=b"9")
    assert not changed(changes, counts[-KEYS_OF_ONE_MAX], after=b"9")


@pytest.mark.slow
@pytest.mark.parametrize("key_bytes", [30, 1024])
def test_what_is_remembered_of_many_shards_is_bounded_whatever_their_keys_are(key_bytes: int) -> None:
    tracemalloc.start()
    many = DirtyRangeTracker()
    count = many.count_of(SHARD)
    write(many, b"k")
    for number in range(50_000):
        write(many, b"%0*d" % (key_bytes, number), shard=b"shard%013d" % (number % 3000))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 1.2 * BYTES_MAX
    assert changed(many, count, after=b"k")
    assert not changed(many, many.count_of(SHARD), after=b"k")


def test_no_change_is_ever_missed() -> None:
    source = random.Random(1)
    changes, rows = DirtyRangeTracker(), dict[bytes, int]()
    snapshots: list[tuple[int, dict[bytes, int]]] = []
    for number in range(3000):
        keys = [b"%02d" % source.randrange(100) for _ in range(source.randrange(1, 4))]
        snapshots.append((changes.count_of(SHARD), dict(rows)))
        shard = source.choice((SHARD, OTHER))
        with changes.changing([(shard, key) for key in keys]):
            for key in keys:
                if source.random() < 0.3:
                    snapshots.append((changes.count_of(SHARD), dict(rows)))
                if shard == SHARD:
                    rows[key] = number
        count, then = source.choice(snapshots[-100:])
        after, through = sorted((b"%02d" % source.randrange(100), b"%02d" % source.randrange(100)))
        same = all(rows.get(key) == then.get(key) for key in rows if after < key <= through)
        assert same or changed(changes, count, after, through)
