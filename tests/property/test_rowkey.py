"""Long keys in a map of short ones: order, lookups and scans are those of the plain byte strings."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import example, given
from hypothesis import strategies as st

from storaged.meta.names import KEY_BYTES_MAX
from storaged.meta.storage.rowkey import ROW_KEY_BYTES_MAX, SEGMENT_BYTES, find, is_link, link_key, row_key, split, walk

ROOT = 1
OTHER_ROOT = 2


class DictRows:
    """``Rows`` over a dict, with the writer's half: missing links are made."""

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}
        self.order: list[bytes] = []
        self.nodes = OTHER_ROOT

    def add(self, root: int, key: bytes) -> None:
        links, segment = split(key)
        node = root
        for part in links:
            link = link_key(node, part)
            if link not in self.entries:
                self.nodes += 1
                self._put(link, self.nodes.to_bytes(8, "big"))
            node = self.child(link, self.entries[link])
        self._put(row_key(node, segment), b"value of " + key)

    def _put(self, key: bytes, value: bytes) -> None:
        assert len(key) <= ROW_KEY_BYTES_MAX
        if key not in self.entries:
            self.order.insert(bisect_left(self.order, key), key)
        self.entries[key] = value

    def get(self, key: bytes) -> bytes | None:
        return self.entries.get(key)

    def read(self, first: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        assert len(first) <= 511
        at = bisect_left(self.order, first)
        return [(key, self.entries[key]) for key in self.order[at : at + limit]]

    def child(self, link: bytes, value: bytes) -> int:
        assert is_link(link)
        return int.from_bytes(value, "big")


# Keys that share long runs, so that links, exact 480-byte keys and their neighbours are common.
PIECES = st.sampled_from(
    [b"", b"\0", b"\x01", b"a", b"\xff", b"/", b"a" * 479, b"a" * 480, b"a" * 481, b"\xff" * 480, b"a" * 240]
)
KEYS = st.one_of(
    st.binary(min_size=1, max_size=6),
    st.lists(PIECES, max_size=4).map(lambda pieces: b"".join(pieces)[:KEY_BYTES_MAX]).filter(bool),
    st.builds(
        lambda run, tail: (run + tail)[:KEY_BYTES_MAX],
        st.sampled_from([b"a" * 480, b"a" * 960, b"\xff" * 960]),
        st.binary(max_size=90),
    ),
)
EDGES = [
    b"a" * 480,
    b"a" * 480 + b"\0",
    b"a" * 481,
    b"a" * 960,
    b"a" * 960 + b"\0",
    b"a" * 479 + b"b",
    b"a" * 1041,
    b"\xff" * 1041,
]


def rows_with(keys: set[bytes]) -> DictRows:
    rows = DictRows()
    for key in keys:
        rows.add(ROOT, key)
    for key in EDGES:
        rows.add(OTHER_ROOT, key)
    return rows


@given(st.sets(KEYS, max_size=40))
@example(set(EDGES))
def test_a_walk_over_everything_is_the_sorted_keys(keys: set[bytes]) -> None:
    rows = rows_with(keys)
    assert walk(rows, ROOT, after=b"", prefix=b"", limit=1000) == [(key, b"value of " + key) for key in sorted(keys)]
    assert walk(rows, OTHER_ROOT, after=b"", prefix=b"", limit=1000) == [
        (key, b"value of " + key) for key in sorted(EDGES)
    ]


@given(st.sets(KEYS, max_size=40), KEYS)
def test_a_key_is_found_exactly_when_it_is_there(keys: set[bytes], stranger: bytes) -> None:
    rows = rows_with(keys)
    for key in keys | {stranger}:
        place = find(rows, ROOT, key)
        assert (place is not None and place in rows.entries) == (key in keys)
        if key in keys:
            assert place is not None
            assert rows.entries[place] == b"value of " + key


@given(st.sets(KEYS, max_size=40), st.one_of(st.just(b""), KEYS), st.one_of(st.just(b""), KEYS), st.integers(0, 9))
@example(set(EDGES), b"a" * 480, b"a" * 480, 3)
@example(set(EDGES), b"a" * 700, b"a" * 650, 3)
@example(set(EDGES), b"\xff" * 1041, b"", 3)
def test_a_scan_gives_what_lies_behind_after_within_the_prefix(
    keys: set[bytes], after: bytes, prefix: bytes, limit: int
) -> None:
    rows = rows_with(keys)
    expected = [key for key in sorted(keys) if key > after and key.startswith(prefix)][:limit]
    assert [key for key, _ in walk(rows, ROOT, after=after, prefix=prefix, limit=limit)] == expected


@given(st.sets(KEYS, min_size=1, max_size=40), st.data())
def test_scans_from_any_key_of_the_set_page_through_all_of_it(keys: set[bytes], data: st.DataObject) -> None:
    rows = rows_with(keys)
    after = data.draw(st.sampled_from(sorted(keys)))
    prefix = after[: data.draw(st.integers(0, len(after)))]
    seen: list[bytes] = []
    at = b""
    while batch := walk(rows, ROOT, after=at, prefix=prefix, limit=data.draw(st.integers(1, 5))):
        seen += [key for key, _ in batch]
        at = seen[-1]
    assert seen == sorted(key for key in keys if key.startswith(prefix))


@given(KEYS)
def test_splitting_loses_nothing_and_leaves_the_last_node_something(key: bytes) -> None:
    links, segment = split(key)
    assert b"".join(links) + segment == key
    assert all(len(part) == SEGMENT_BYTES for part in links)
    assert 1 <= len(segment) <= SEGMENT_BYTES
    assert len(links) <= 2
