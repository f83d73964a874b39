"""Moves of blocks in records of keys with very many versions, and of keys that are written meanwhile."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import msgspec
import pytest

from storaged.cluster.layout import Profile
from storaged.maintain.moved_record import Move, RecordChange, body_after
from storaged.maintain.moves import MoveAsk
from storaged.meta.names import Table, Value
from storaged.objects.code.history import Draft, Entry, PageNeeded, Shelf
from storaged.objects.code.version_walk import every_entry
from storaged.objects.code.versions import decode_record, record_change
from storaged.objects.configuration.kinds import ENABLED, SUSPENDED
from storaged.objects.records import Kept, PartEntry, decode_object
from storaged.objects.write.references import parts_in
from tests.unit.test_objects_multipart import uploaded
from tests.unit.test_objects_versions import Made

pytestmark = pytest.mark.virtual_time

SIZE = 70_000


class Moving(Made):
    """Versions of the key ``key``, newest first, and moves of their blocks."""

    async def parts(self, value: Value | None = None) -> list[PartEntry]:
        """Those with blocks."""
        body = (value or self.value()).body
        return [part async for part in parts_in(self.world.ring, self.name(), body, Table.OBJECT) if part.runs]

    def move_of(self, part: PartEntry) -> Move:
        run = part.runs[0]
        new = msgspec.structs.replace(run, moved={0: "elsewhere"})
        return MoveAsk(self.name().pack(), part.data_id, run, new), Profile(run.k, run.m)

    async def moved(self, body: bytes) -> list[int]:
        """Which parts of a record are elsewhere."""
        parts = await self.parts(msgspec.structs.replace(self.value(), body=body))
        return [index for index, part in enumerate(parts) if part.runs[0].moved]


@pytest.fixture
async def made() -> AsyncIterator[Moving]:
    made = Moving(ENABLED)
    yield made
    await made.objects.close()


async def test_a_move_reads_no_older_versions_than_the_one_that_has_the_data(
    made: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(200):
        await made.put(os.urandom(SIZE))
    parts, get_page, read = await made.parts(), made.world.ring.get_page, list[bytes]()

    async def counted(*what: bytes) -> bytes:
        read.append(what[1])
        return await get_page(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(made.world.ring, "get_page", counted)
    for index, most in ((0, 0), (30, 5)):
        read.clear()
        found = await body_after(made.world.ring, made.name(), made.value(), [made.move_of(parts[index])])
        assert len(set(read)) <= most
        assert found is not None
        assert await made.moved(found.body) == [index]


async def test_a_move_is_made_in_what_the_record_is_then(made: Moving) -> None:
    """Others add versions, so that the version is on another page, and the record is one that names other pages."""
    ids = [(await made.put(os.urandom(SIZE))).version_id for _ in range(6)]
    seen, parts = made.value(), await made.parts()
    moves = [made.move_of(parts[1]), made.move_of(parts[5])]
    found = await body_after(made.world.ring, made.name(), seen, moves)
    assert found is not None
    change = RecordChange(seen, found, moves)
    same = change.update(seen)
    assert same is not None
    assert same.body == found.body
    for _ in range(30):
        await made.put(os.urandom(SIZE))
    with pytest.raises(PageNeeded):
        change.update(made.value())
    await change.load(made.world.ring, made.name(), made.value())
    before = set(made.world.ring.pages)
    later = change.update(made.value())
    assert later is not None
    await change.put_pages(made.world.ring, made.name())
    assert set(made.world.ring.pages) > before
    assert await made.moved(later.body) == [31, 35]
    entries = [entry async for entry in every_entry(made.world.ring, made.name(), decode_object(later.body))]
    assert len(entries) == 36
    await made.objects.delete(made.bucket, b"key", version_id=ids[0])
    await change.load(made.world.ring, made.name(), made.value())
    assert change.update(made.value()) is None, "one of the versions has gone"


async def test_a_move_of_a_null_version_is_none_of_the_one_that_took_its_place(made: Moving) -> None:
    made.set(SUSPENDED)
    await made.put(os.urandom(SIZE))
    seen = made.value()
    moves = [made.move_of((await made.parts())[0])]
    found = await body_after(made.world.ring, made.name(), seen, moves)
    assert found is not None
    change = RecordChange(seen, found, moves)
    await made.put(os.urandom(SIZE))
    assert change.update(made.value()) is None


async def test_parts_of_an_upload_move_in_every_version_that_has_them_and_only_in_the_record_that_was_read(
    made: Moving,
) -> None:
    """One that was completed twice may have made versions of some and of all of its parts."""
    upload_id, parts = await uploaded(made.objects, made.bucket, [os.urandom(SIZE), os.urandom(SIZE)])
    await made.objects.complete(made.bucket, b"key", upload_id, parts, owner="o" * 64)
    draft = Draft(decode_record(made.value()), Shelf())
    first = draft.inline[0]
    fewer = msgspec.structs.replace(first.version, parts=first.version.parts[:1], context_id=b"c" * 16, part_count=1)
    draft.add(Entry(Kept(first.ordinal + 1), fewer))
    change = record_change(draft.record())
    value = msgspec.structs.replace(made.value(), body=change.body, sequence=first.ordinal + 1)
    move = made.move_of(first.version.parts[0])
    found = await body_after(made.world.ring, made.name(), value, [move])
    assert found is not None
    versions = decode_object(found.body).versions
    assert [bool(version.parts[0].runs[0].moved) for version in versions] == [True, True]
    assert not found.versions
    later = msgspec.structs.replace(value, sequence=value.sequence + 1)
    assert RecordChange(value, found, [move]).update(later) is None
