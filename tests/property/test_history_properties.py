"""The versions of a key against a plain list, with pages so small that every change meets them."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.errors import DataDamaged, ServiceUnavailable
from storaged.hashes import page_hash
from storaged.meta.names import RegisterName, Table
from storaged.objects.code.history import BOUNDS, LEVELS_MAX, Bounds, Draft, Entry, PageNeeded, Shelf
from storaged.objects.code.version_names import NULL_NAME, parse_name, version_name
from storaged.objects.code.version_pages import read_page
from storaged.objects.code.version_walk import TOGETHER_MAX, every_entry, every_page, every_run
from storaged.objects.code.versions import EMPTY
from storaged.objects.records import (
    NAMED_VERSION,
    NULL_VERSION,
    Kept,
    ObjectRecord,
    Version,
    decode_object,
    encode_object,
)
from tests.examples import examples

NEAR = RegisterName(Table.OBJECT, bytes(16), 0, b"key")
SMALL = Bounds(versions_max=3, versions_bytes_max=10_000, leaf_versions=2, refs_max=3, branch_refs=2)


class Stored:
    """Pages as a ring has them."""

    def __init__(self) -> None:
        self.pages: dict[bytes, bytes] = {}
        self.read = 0
        self.reading = self.read_together = 0

    async def put_page(self, near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        raise NotImplementedError

    async def get_page(self, near: RegisterName, name: bytes) -> bytes:
        self.read += 1
        self.reading += 1
        self.read_together = max(self.read_together, self.reading)
        await asyncio.sleep(0)
        self.reading -= 1
        if name not in self.pages:
            raise DataDamaged
        return self.pages[name]


def version(ordinal: int, *, null: bool = False) -> Entry:
    made = Version(
        NULL_VERSION if null else NAMED_VERSION, 1, ordinal, "o", 1, ordinal.to_bytes(16, "big"), b"", False, b"", b""
    )
    return Entry(Kept(ordinal), made)


class Key:
    """A key whose versions change, and what they should be."""

    def __init__(self) -> None:
        self.stored = Stored()
        self.record = EMPTY
        self.model: list[Entry] = []
        self.sequence = 0

    async def change(self, work: str, index: int) -> None:
        self.sequence += 1
        entry = version(self.sequence, null=work == "null")
        at = index % len(self.model) if self.model else 0
        if not self.model and work in ("remove", "replace"):
            return
        draft = await self._drafted(work, entry, self.model[at] if self.model else entry)
        for name, body in draft.fresh.items():
            assert page_hash(body) == name
            self.stored.pages[name] = body
        removed = [one.context_id for one in draft.removed]
        before = [one.version.context_id for one in self.model]
        if work in ("add", "null"):
            self.model = [entry, *(one for one in self.model if work == "add" or not one.is_null)]
        elif work == "remove":
            del self.model[at]
        else:
            after = self.model[at].version
            self.model[at] = self.model[at]._replace(version=_other(after))
        left = {one.version.context_id for one in self.model}
        assert sorted(removed) == sorted(one for one in before if one not in left)
        self.record = decode_object(encode_object(draft.record())) if self.model else draft.record()

    async def give_up(self, lost: set[bytes]) -> None:
        shelf = Shelf()
        while True:
            draft = Draft(self.record, shelf, SMALL)
            try:
                draft.give_up(lost)
                break
            except PageNeeded as needed:
                shelf.put(needed.ref.hash, await read_page(self.stored, NEAR, needed.ref))
        self.stored.pages |= draft.fresh
        self.record = decode_object(encode_object(draft.record())) if self.model else draft.record()

    async def _drafted(self, work: str, entry: Entry, at: Entry) -> Draft:
        shelf = Shelf()
        while True:
            draft = Draft(self.record, shelf, SMALL)
            try:
                if work in ("add", "null"):
                    draft.add(entry)
                elif work == "remove":
                    draft.remove(draft.find(NULL_NAME if at.is_null else parse_name(at.name)) or at)
                else:
                    draft.replace(at, at._replace(version=_other(at.version)))
                return draft
            except PageNeeded as needed:
                shelf.put(needed.ref.hash, await read_page(self.stored, NEAR, needed.ref))

    async def check(self) -> None:
        found = [entry async for entry in every_entry(self.stored, NEAR, self.record)]
        assert found == self.model
        for wanted in (1, 5, 1000):
            assert [entry async for entry in every_entry(self.stored, NEAR, self.record, wanted=wanted)] == found
        assert bool(self.record.versions) == bool(self.model)
        assert len(self.record.versions) <= SMALL.versions_max
        reached = {name async for name, _ in every_page(self.stored, NEAR, self.record)}
        assert reached <= self.stored.pages.keys()
        self.stored.pages = {name: self.stored.pages[name] for name in reached}  # the others are garbage
        if self.model:
            middle = self.model[len(self.model) // 2].ordinal
            older = [entry async for entry in every_entry(self.stored, NEAR, self.record, below=middle)]
            assert older == [entry for entry in self.model if entry.ordinal < middle]


def _other(before: Version) -> Version:
    return msgspec.structs.replace(before, meta=before.meta + b"x")


WORK = st.tuples(st.sampled_from(("add", "add", "add", "null", "remove", "replace")), st.integers(0, 50))


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(WORK, max_size=60))
def test_versions_are_those_of_a_plain_list(works: list[tuple[str, int]]) -> None:
    async def play() -> None:
        key = Key()
        for work, index in works:
            await key.change(work, index)
            await key.check()

    asyncio.run(play())


@settings(max_examples=100, deadline=None)
@given(st.lists(WORK, min_size=20, max_size=60), st.sets(st.integers(0, 30)), st.lists(WORK, max_size=20))
def test_what_is_left_when_pages_are_given_up_are_the_versions_on_other_pages(
    works: list[tuple[str, int]], which: set[int], later: list[tuple[str, int]]
) -> None:
    async def play() -> None:
        key = Key()
        for work, index in works:
            await key.change(work, index)
            await key.check()
        pages = [name async for name, _ in every_page(key.stored, NEAR, key.record)]
        lost = {name for at, name in enumerate(pages) if at in which}
        for name in lost:
            del key.stored.pages[name]
        key.model = [
            entry async for entry in every_entry(key.stored, NEAR, key.record, on_unreadable=lambda _error: None)
        ]
        lenient = every_entry(key.stored, NEAR, key.record, wanted=1000, on_unreadable=lambda _error: None)
        assert [entry async for entry in lenient] == key.model
        await key.give_up(lost)
        await key.check()
        for work, index in later:
            await key.change(work, index)
            await key.check()

    asyncio.run(play())


def test_a_key_with_many_versions_costs_a_put_and_a_look_no_more() -> None:
    async def play() -> None:
        key, shelf = Key(), Shelf()
        most = 0
        for _ in range(5000):
            key.sequence += 1
            draft = Draft(key.record, shelf)
            draft.add(version(key.sequence))
            key.stored.pages |= draft.fresh
            key.record = draft.record()
            most = max(most, len(draft.fresh))
        assert most <= 4, "a page a level"
        assert len(encode_object(key.record)) < 40_000
        assert not key.stored.read, "to add a version reads no page"
        await _find_some(key)

    asyncio.run(play())


def test_a_page_of_a_list_reads_the_pages_that_have_its_versions_and_these_together() -> None:
    """Wherever it begins, and however many versions the key has."""

    async def play() -> None:
        key, shelf = Key(), Shelf()
        for size in (2000, 20_000):
            while key.sequence < size:
                key.sequence += 1
                draft = Draft(key.record, shelf)
                draft.add(version(key.sequence))
                key.stored.pages |= draft.fresh
                key.record = draft.record()
            for below in (size + 1, size // 2, 1000, 500):
                key.stored.read = key.stored.read_together = 0
                found: list[int] = []
                async for run in every_run(key.stored, NEAR, key.record, below=below, wanted=1001):
                    found += [entry.ordinal for entry in run]
                    if len(found) > 1000:
                        break
                assert found[:1000] == list(range(below - 1, max(below - 1001, 0), -1))
                leaves, branches = 1001 // BOUNDS.leaf_versions + 2, 4 + LEVELS_MAX
                assert key.stored.read <= leaves + branches
                assert key.stored.read_together == TOGETHER_MAX

    asyncio.run(play())


def test_a_failure_of_pages_that_are_read_together_is_that_of_one_page() -> None:
    class Failing(Stored):
        async def get_page(self, near: RegisterName, name: bytes) -> bytes:
            raise ServiceUnavailable

    async def play() -> None:
        key = Key()
        for _ in range(20):
            await key.change("add", 0)
        for wanted in (0, 1000):
            with pytest.raises(ServiceUnavailable):
                [entry async for entry in every_entry(Failing(), NEAR, key.record, wanted=wanted)]

    asyncio.run(play())


async def _find_some(key: Key) -> None:
    for ordinal in random.Random(1).sample(range(1, 5001), 50):
        shelf = Shelf()
        key.stored.read = 0
        name = parse_name(version(ordinal).name)
        assert name is not None
        while True:
            try:
                found = Draft(key.record, shelf).find(name)
                break
            except PageNeeded as needed:
                shelf.put(needed.ref.hash, await read_page(key.stored, NEAR, needed.ref))
        assert found == version(ordinal)
        assert key.stored.read <= 4


def test_ids_of_versions_are_read_back_and_others_refused() -> None:
    entry = version(77)
    assert len(entry.name) == 32
    assert parse_name(entry.name) == (77, (77).to_bytes(16, "big"))
    assert parse_name("null") == NULL_NAME
    for text in ("", "nul", entry.name[:-1], entry.name + "A", "é" * 32, "+" * 32, "x" * 1000):
        assert parse_name(text) is None
    assert version_name(Kept(1), version(1, null=True).version) == "null"


def test_a_page_that_is_not_what_its_record_says_is_damage() -> None:
    async def play() -> None:
        key = Key()
        for _ in range(8):
            await key.change("add", 0)
        assert key.record.history is not None
        [ref, *others] = key.record.history.levels[0]
        body = key.stored.pages[others[0].hash]
        key.stored.pages[ref.hash] = body
        with pytest.raises(DataDamaged):
            [entry async for entry in every_entry(key.stored, NEAR, key.record)]

    asyncio.run(play())


def test_a_record_of_another_count_of_kept_is_damage() -> None:
    record = ObjectRecord((version(1).version,))
    draft = Draft(record, Shelf())
    draft.add(version(2))
    broken = draft.record()
    assert broken.history is not None
    broken = msgspec.structs.replace(broken, versions=broken.versions[:1])
    with pytest.raises(msgspec.ValidationError):
        decode_object(encode_object(broken))
