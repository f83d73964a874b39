"""Completes, aborts, PUTs and DELETEs of one key in random order, on gateways that may stop: an upload becomes an
object once, and all answers agree with that."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from storaged.errors import ConditionalRequestConflict, NoSuchUpload, SlowDown
from storaged.meta.names import RegisterName, Table, Value
from storaged.objects.api import PutResult
from storaged.objects.records import decode_object
from storaged.objects.upload_records import UploadRecord
from storaged.objects.write import complete as module
from storaged.objects.write.uploads import parse_upload_id
from storaged.wire import decode
from tests.doubles.ring import MemoryRing
from tests.unit.test_objects_multipart import complete, uploaded, world_of
from tests.unit.test_objects_put_get import put

Interfere = Callable[[RegisterName], Awaitable[None]] | None


class _Watched(dict[RegisterName, Value]):
    """Counts how often the object's record begins to hold the version of one upload, and how often that was opened
    again."""

    context_id = b""
    begun = 0
    reopened = 0

    def holds(self, name: RegisterName) -> bool:
        value = self.get(name)
        return bool(value and value.body) and any(
            its.context_id == self.context_id for its in decode_object(value.body).versions
        )  # type: ignore[union-attr]

    def __setitem__(self, name: RegisterName, value: Value) -> None:
        before = name.table == Table.OBJECT and self.holds(name)
        if name.table == Table.UPLOAD and value.body and name in self:
            self.reopened += [decode(its.body, UploadRecord).state for its in (self[name], value)] == [
                "completing",
                "open",
            ]
        super().__setitem__(name, value)
        if name.table == Table.OBJECT and not before and self.holds(name):
            self.begun += 1


class _Uneven(MemoryRing):
    """Every change takes a random time between its promise and its accept."""

    chance = random.Random(0)

    @property
    def interfere(self) -> Interfere:
        return self._pause

    @interfere.setter
    def interfere(self, value: Interfere) -> None:
        pass

    async def _pause(self, _name: RegisterName) -> None:
        for _ in range(self.chance.choice((0, 0, 1, 5, 30, 100, 300))):
            await asyncio.sleep(0)


async def outcome(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except (NoSuchUpload, ConditionalRequestConflict, SlowDown) as error:
        return error


@pytest.mark.parametrize("seed", range(100))
async def test_an_upload_becomes_an_object_at_most_once(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(
        module, "WAITS_MAX", chance.choice((0, 0, 1))
    )  # the others don't wait for the first, as if it were slow or dead
    world, objects, bucket = world_of()
    world.ring.__class__ = _Uneven
    world.ring.chance = random.Random(seed + 1000)  # type: ignore[attr-defined]
    upload_id, parts = await uploaded(objects, bucket, [b"a" * 1000, b"b"])
    watched = _Watched(world.ring.values)
    watched.context_id = parse_upload_id(upload_id)
    world.ring.values = watched
    calls: list[Callable[[], Awaitable[Any]]] = [lambda: complete(objects, bucket, upload_id, parts)] * 4
    calls += [lambda: complete(objects, bucket, upload_id, parts[:1])] * chance.randrange(2)
    calls += [lambda: objects.abort(bucket, b"key", upload_id)] * chance.randrange(2)
    calls += [lambda: put(objects, bucket, b"other")] * chance.randrange(2)
    calls += [lambda: objects.delete(bucket, b"key")] * chance.randrange(4)
    chance.shuffle(calls)

    async def later(call: Callable[[], Awaitable[Any]], turns: int) -> Any:
        for _ in range(turns):
            await asyncio.sleep(0)
        return await outcome(call())

    tasks = [asyncio.ensure_future(later(call, chance.randrange(60))) for call in calls]
    if chance.random() < 0.3:  # a client that goes away
        for _ in range(chance.randrange(200)):
            await asyncio.sleep(0)
        tasks[0].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [
        answer
        for answer in found
        if isinstance(answer, Exception) and not isinstance(answer, NoSuchUpload | ConditionalRequestConflict)
    ]
    if watched.reopened:
        await objects.close()
        return  # the upload is open again: whether it had become the object before can't be known (``complete``)
    assert not any(
        isinstance(answer, ConditionalRequestConflict) and "object changed" in answer.message for answer in found
    )
    told = {
        answer.etag: answer for answer in found if isinstance(answer, PutResult) and answer.etag.endswith(("-1", "-2"))
    }
    same = [answer for answer in found if isinstance(answer, PutResult) and "-" in answer.etag]
    assert all(answer == same[0] for answer in same), "all are told the same"
    assert watched.begun <= 1, "the version came into the record twice"
    assert watched.begun == 1 or not told, "a success was told of what never was"
    again = await outcome(complete(objects, bucket, upload_id, parts))
    if told and next(iter(told)).endswith("-2"):
        assert again == next(iter(told.values())), "a retry is told the same"
    assert watched.begun <= 1
    await objects.plane.background.settle()
    await objects.close()
