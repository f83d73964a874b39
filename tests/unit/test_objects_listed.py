"""Rows of listings are opened once, show what changed at once, and are forgotten with the bucket's key."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Sequence

import pytest

from storaged.errors import DataDamaged, KeyringUnavailable, ServiceUnavailable
from storaged.meta.names import Change, object_name
from storaged.objects.api import BodyChecks, NewMeta
from storaged.objects.cache.listed_rows import ROW_BYTES, ListedRowCache
from storaged.objects.listing_types import as_rows
from storaged.objects.records import BucketRecord, SealedList
from storaged.objects.service import ObjectService
from storaged.wire import Buffer
from tests.doubles.keys import PlainBucketKey
from tests.worlds.objects import World

pytestmark = pytest.mark.virtual_time


class Rig:
    """One bucket on doubles; ``opened`` counts the list fields that were opened, ``forgotten`` has the buckets that the
    scanner was asked to forget.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = World()
        self.objects = ObjectService(self.world.plane())
        self.bucket = BucketRecord("b", b"B" * 16, "f" * 64, 1, "active", 16, "eu-fr-1")
        self.world.keys.newest[self.bucket.id] = 1
        self.forgotten: list[bytes] = []
        monkeypatch.setattr(self.objects.plane.scanner, "forget", self.forgotten.append)

    @property
    def opened(self) -> int:
        return self.world.keys.uses.fields_opened

    async def put(self, data: bytes, key: bytes) -> None:
        async def pieces() -> AsyncIterator[Buffer]:
            yield data

        await self.objects.put(self.bucket, key, pieces(), NewMeta(), BodyChecks(size=len(data)), owner="f" * 64)

    async def listed(self) -> dict[bytes, tuple[str, int]]:
        page = await self.objects.list_objects(self.bucket)
        return {key: (row.printed.etag, row.size) for key, row in zip(page.keys, page.shown, strict=True)}


def etag(data: bytes) -> tuple[str, int]:
    return hashlib.md5(data).hexdigest(), len(data)


async def test_of_a_bucket_that_is_listed_again_only_what_changed_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    truth = {b"k%d" % number: b"%d" % number for number in range(5)}
    for key, data in truth.items():
        await rig.put(data, key)
    for _ in range(3):
        assert await rig.listed() == {key: etag(data) for key, data in truth.items()}
    assert rig.opened == 5
    truth |= {b"k3": b"another", b"k9": b"new"}
    for key in (b"k3", b"k9"):
        await rig.put(truth[key], key)
    await rig.objects.delete(rig.bucket, b"k1")
    del truth[b"k1"]
    assert await rig.listed() == {key: etag(data) for key, data in truth.items()}
    assert rig.opened == 7
    await rig.objects.close()


async def test_of_a_bucket_that_is_listed_for_the_first_time_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    await rig.put(b"data", b"k")
    monkeypatch.setattr(rig.objects.plane.scanner, "again", False)
    for times in (1, 2):
        assert await rig.listed() == {b"k": etag(b"data")}
        assert rig.opened == times
    await rig.objects.close()


async def test_another_keys_record_is_not_taken_for_one_that_was_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    for key in (b"a", b"b"):
        await rig.put(key, key)
    await rig.listed()
    first, second = (object_name(rig.bucket.id, rig.bucket.shard_numbers, key) for key in (b"a", b"b"))
    body = rig.world.ring.values[second].body
    await rig.world.ring.change(first, lambda _value: Change(body))
    with pytest.raises(DataDamaged, match="'a'"):
        await rig.listed()
    await rig.objects.close()


async def test_rows_and_what_the_scanner_remembers_are_forgotten_with_the_buckets_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    await rig.put(b"data", b"k")
    for _ in range(2):
        await rig.listed()
    assert (rig.opened, rig.forgotten) == (1, [])
    rig.world.keys.forget()
    await asyncio.sleep(0)
    assert rig.forgotten == [rig.bucket.id]
    assert await rig.listed() == {b"k": etag(b"data")}
    assert rig.opened == 2
    del rig.world.keys.newest[rig.bucket.id]
    with pytest.raises(KeyringUnavailable):
        await rig.listed()
    assert rig.forgotten == 2 * [rig.bucket.id]
    await rig.objects.close()


async def test_what_common_prefixes_were_found_by_is_forgotten_with_the_buckets_key_or_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    await rig.put(b"data", b"a/k")
    for _ in range(2):
        assert (await rig.objects.list_objects(rig.bucket, delimiter=b"/")).prefixes == (b"a/",)
    assert rig.forgotten == []
    rig.world.keys.forget()
    await asyncio.sleep(0)
    assert rig.forgotten == [rig.bucket.id]
    assert (await rig.objects.list_objects(rig.bucket, delimiter=b"/")).prefixes == (b"a/",)
    assert rig.forgotten == 2 * [rig.bucket.id]
    assert rig.opened == 0
    await rig.objects.close()


async def test_what_the_scanner_remembers_is_forgotten_on_the_loop_whichever_thread_lets_go_of_the_key_last() -> None:
    lately, held, threads = ListedRowCache(1000), [PlainBucketKey(1)], list[int]()
    lately.watch(held[0], lambda: threads.append(threading.get_ident()))
    await asyncio.to_thread(held.clear)
    await asyncio.sleep(0)
    assert threads == [threading.get_ident()]


@pytest.mark.parametrize("failure", [ServiceUnavailable("no majority"), asyncio.CancelledError()])
async def test_what_a_listing_that_failed_has_left_with_the_scanner_is_forgotten_with_the_buckets_key_or_at_once(
    monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    rig = Rig(monkeypatch)

    async def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(rig.objects.plane.scanner, "list_heads", fail)
    with pytest.raises(type(failure)):
        await rig.listed()
    assert rig.forgotten == [rig.bucket.id]
    await rig.put(b"data", b"k")
    with pytest.raises(type(failure)):
        await rig.listed()
    assert rig.forgotten == [rig.bucket.id]
    rig.world.keys.forget()
    await asyncio.sleep(0)
    assert rig.forgotten == 2 * [rig.bucket.id]
    await rig.objects.close()


async def test_a_keyring_that_is_closed_meanwhile_leaves_nothing_with_the_scanner_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    await rig.put(b"data", b"a/k")

    def closed(bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> None:
        raise KeyringUnavailable("The keyring is closed.")

    monkeypatch.setattr(rig.world.keys, "try_bucket_key", closed)
    assert (await rig.objects.list_objects(rig.bucket, delimiter=b"/")).prefixes == (b"a/",)
    assert rig.forgotten == [rig.bucket.id]
    await rig.objects.close()


def another(sizes: Sequence[int], times_ms: Sequence[int], printed: Sequence[SealedList]) -> Sequence[int]:
    return sizes


def test_the_rows_kept_are_bounded_and_those_in_use_stay() -> None:
    lately, bucket_key = ListedRowCache(20 * (ROW_BYTES + 8)), PlainBucketKey(1)
    for number in range(100):
        key = b"%04d" % number
        lately.put(bucket_key, as_rows, [key], [b"head"], [number])
        assert lately.find(bucket_key, as_rows, [b"0000"], [b"head"]) == [0]
    kept = [
        row
        for row in lately.find(bucket_key, as_rows, [b"%04d" % number for number in range(100)], [b"head"] * 100)
        if row is not None
    ]
    assert 10 <= len(kept) <= 20
    assert lately.find(bucket_key, as_rows, [b"0000", b"0099"], [b"daeh", b"head"]) == [None, 99]
    assert lately.find(PlainBucketKey(2), as_rows, [b"0000"], [b"head"]) == [None]
    assert lately.find(bucket_key, another, [b"0000"], [b"head"]) == [None]
    lately.clear()
    assert lately.find(bucket_key, as_rows, [b"0000"], [b"head"]) == [None]
