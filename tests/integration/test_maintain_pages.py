"""Manifests of large multipart objects: their pages are on all replicas again whatever happens to one, and those that
no record needs go, and no others. And uploads: what was uploaded is counted once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from storaged.cluster.move_settings import MoveSettings
from storaged.errors import OutcomeUnknown, PeerUnreachable, ServiceUnavailable, StoragedError
from storaged.hashes import page_hash
from storaged.maintain import moved_record
from storaged.maintain.context import MaintainLimits
from storaged.maintain.disuse import Judge, Proof
from storaged.meta import messages
from storaged.meta.names import RegisterName, Table, object_name
from storaged.meta.ports import Pages
from storaged.meta.store_ports import Fence, StoreBatch, StoredPage
from storaged.objects.api import CompletedPart, NewMeta
from storaged.objects.code.manifest import manifest_pages
from storaged.objects.code.versions import decode_record
from storaged.objects.records import BucketRecord, Version
from storaged.objects.write import complete as complete_module
from tests.doubles.meta_store import MemoryMetaStore
from tests.integration.memory_cluster import WHO, Cluster, Gateway, run

ORPHAN_S = MaintainLimits().orphan_age_ms / 1000
READERS_S = MaintainLimits().drop_delay_s
TINY, PART, LARGE = 100, 60_000, 1_500_000
"""A part in its row; one of one block; one of several."""


async def uploaded(
    cluster: Cluster, bucket: BucketRecord, key: bytes, count: int = 40, size: int = TINY
) -> tuple[str, list[CompletedPart], bytes]:
    upload = await cluster.objects.create_upload(bucket, key, NewMeta(), owner=WHO.user_id)
    parts, whole = [], b""
    for number in range(1, count + 1):
        data = os.urandom(size)
        result = await cluster.put_part(bucket, key, upload.upload_id, number, data)
        parts.append(CompletedPart(number, result.etag))
        whole += data
    return upload.upload_id, parts, whole


async def complete(
    cluster: Cluster, bucket: BucketRecord, key: bytes, upload_id: str, parts: list[CompletedPart]
) -> None:
    await cluster.objects.complete(bucket, key, upload_id, parts, owner=WHO.user_id)


async def many(
    cluster: Cluster, bucket: BucketRecord, key: bytes = b"many", count: int = 40, size: int = TINY
) -> bytes:
    """An object of so many parts."""
    upload_id, parts, whole = await uploaded(cluster, bucket, key, count, size)
    await complete(cluster, bucket, key, upload_id, parts)
    return whole


async def version_of(cluster: Cluster, bucket: BucketRecord, key: bytes = b"many") -> Version:
    return (await cluster.record(bucket, key)).versions[0]


def replicas(cluster: Cluster, bucket: BucketRecord, key: bytes = b"many") -> tuple[str, ...]:
    return cluster.layouts.current.replicas_of(object_name(bucket.id, bucket.shard_numbers, key).partition)


def disk_in(cluster: Cluster, rack: str, bucket: BucketRecord, key: bytes = b"many") -> str:
    return next(disk for disk in replicas(cluster, bucket, key) if disk.startswith(rack))


def are_everywhere(cluster: Cluster, bucket: BucketRecord, pages: Iterable[bytes], key: bytes = b"many") -> bool:
    return all(set(pages) <= set(cluster.pages(disk)) for disk in replicas(cluster, bucket, key))


def kept(cluster: Cluster) -> set[bytes]:
    """Pages on any disk."""
    return {page for disk in cluster.layouts.current.disk_by_id for page in cluster.pages(disk)}


async def sweep(cluster: Cluster) -> int:
    return sum(
        await asyncio.gather(*(node.maintenance.page_sweep.once() for node in cluster.nodes.values() if node.up))
    )


# --- what a version says of its pages


def test_a_version_lists_all_pages_of_its_parts_and_a_short_manifest_has_none() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket, b"few", 32)
        assert not kept(cluster)
        assert not (await version_of(cluster, bucket, b"few")).pages
        whole = await many(cluster, bucket, count=300)
        version = await version_of(cluster, bucket)
        name = object_name(bucket.id, bucket.shard_numbers, b"many")
        chain = [page async for page, _ in manifest_pages(cluster.gateway.ring, name, version)]
        assert (len(chain), len(version.pages)) == (2, 3)
        assert set(chain) < set(version.pages) == kept(cluster)
        assert await cluster.get(bucket, b"many") == whole

    run(scenario)


def test_recoding_lists_the_new_pages_and_keeps_those_that_it_cannot_read() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        whole = await many(cluster, bucket, count=34, size=PART)
        before = await version_of(cluster, bucket)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nc")
        await cluster.pass_s(MaintainLimits().recode_delay_s + 60)
        await cluster.settled()
        after = await version_of(cluster, bucket)
        assert after.manifest != before.manifest
        assert set(after.pages) == (set(before.pages) - {before.manifest}) | {after.manifest}
        cluster.start("nc")
        assert await cluster.settled() == (0, 0)
        last = await version_of(cluster, bucket)
        assert are_everywhere(cluster, bucket, last.pages)
        assert await cluster.get(bucket, b"many") == whole
        info = await cluster.objects.head(bucket, b"many")
        assert len(info.parts) == 34
        await cluster.leap(ORPHAN_S + 60)
        await sweep(cluster)
        assert kept(cluster) == set(last.pages)

    run(scenario)


@pytest.mark.parametrize("renews", [True, False])
def test_a_move_puts_its_new_pages_again_between_promise_and_accept(
    monkeypatch: pytest.MonkeyPatch, renews: bool
) -> None:
    if not renews:
        monkeypatch.setattr(moved_record, "renew_pages", not_renewed)

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket, count=34, size=PART)
        before = await version_of(cluster, bucket)
        name = object_name(bucket.id, bucket.shard_numbers, b"many")
        called: list[str] = []

        async def note(source: str, node: str, method: str, request: object) -> None:
            if source == "g" and (method == "meta.page_put" or getattr(request, "name", None) == name):
                called.append(method)

        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nc")
        cluster.intercept = note
        await cluster.pass_s(MaintainLimits().recode_delay_s + 60)
        await cluster.settled()
        assert (await version_of(cluster, bucket)).manifest != before.manifest
        accept = called.index("meta.accept")
        prepare = max(index for index, method in enumerate(called[:accept]) if method == "meta.prepare")
        assert ("meta.page_put" in called[prepare:accept]) == renews

    run(scenario)


# --- repair


@pytest.mark.parametrize("key", [b"many-0", b"many-1", b"many-2"])
def test_pages_written_while_a_rack_was_away_are_put_there_when_it_returns(key: bytes) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        whole = await many(cluster, bucket, key)
        pages = (await version_of(cluster, bucket, key)).pages
        assert not set(cluster.pages(disk_in(cluster, "b", bucket, key))) & set(pages)
        cluster.start("nb")
        assert await cluster.settled() == (0, 0)
        assert are_everywhere(cluster, bucket, pages, key)
        await cluster.kill("na", "nc")
        disk = disk_in(cluster, "b", bucket, key)
        assert [cluster.meta(disk).get_page(page) for page in pages].count(None) == 0
        cluster.start("na", "nc")
        assert await cluster.get(bucket, key) == whole

    run(scenario)


def test_an_object_is_below_target_while_a_replica_lacks_a_page() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        cluster.maintain()
        await cluster.settled()
        lossy = replicas(cluster, bucket)[2]

        async def refuse(source: str, node: str, method: str, request: object) -> None:
            if isinstance(request, messages.PagePut) and request.disk == lossy:
                raise PeerUnreachable("a broken line")

        cluster.intercept = refuse
        await many(cluster, bucket)
        pages = (await version_of(cluster, bucket)).pages
        await cluster.pass_s(5)
        assert (await cluster.counts())[:2] == (1, 0)
        assert not are_everywhere(cluster, bucket, pages)
        cluster.intercept = None
        assert await cluster.settled() == (0, 0)
        assert are_everywhere(cluster, bucket, pages)

    run(scenario)


def test_a_damaged_page_is_found_by_the_next_check_and_replaced() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket)
        pages = (await version_of(cluster, bucket)).pages
        cluster.maintain()
        await cluster.settled()
        for index, page in enumerate(pages):
            cluster.meta(replicas(cluster, bucket)[index]).damage_page(page)
        assert not are_everywhere(cluster, bucket, pages)
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        assert await cluster.settled() == (0, 0)
        assert are_everywhere(cluster, bucket, pages)

    run(scenario)


def test_a_disk_that_was_replaced_gets_all_pages_of_its_registers() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for index in range(3):
            await many(cluster, bucket, b"many-%d" % index)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        before = {disk: set(cluster.pages(disk)) for disk in ("b0", "b1")}
        assert any(before.values())
        cluster.nodes["nb"].meta = {disk: MemoryMetaStore() for disk in ("b0", "b1")}
        cluster.start("nb")
        assert await cluster.settled() == (0, 0)
        assert {disk: set(cluster.pages(disk)) for disk in ("b0", "b1")} == before

    run(scenario)


def test_an_object_with_one_copy_of_a_page_is_at_risk_and_one_without_any_is_lost() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket, b"risk")
        await many(cluster, bucket, b"lost")

        async def refuse(source: str, node: str, method: str, request: object) -> None:
            if method in ("meta.page_put", "meta.page_get") and source != "g":
                raise PeerUnreachable("a broken line")

        async def lose(key: bytes, copies: int) -> None:
            pages = (await version_of(cluster, bucket, key)).pages
            for disk in replicas(cluster, bucket, key)[-copies:]:
                ages = cluster.pages(disk)
                await cluster.meta(disk).delete_pages([(page, ages[page]) for page in pages])

        await lose(b"risk", 2)
        await lose(b"lost", 3)
        cluster.intercept = refuse
        cluster.maintain()
        await cluster.pass_s(5)
        told = await cluster.statuses()
        assert sum(status.below_target for status in told) == 2
        assert sum(status.lost for status in told) == 1
        cluster.intercept = None
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        assert await cluster.settled() == (1, 1)
        assert are_everywhere(cluster, bucket, (await version_of(cluster, bucket, b"risk")).pages, b"risk")

    run(scenario)


async def pinned_and_forgotten(
    cluster: Cluster, bucket: BucketRecord, key: bytes = b"many"
) -> tuple[str, list[CompletedPart], bytes]:
    """A Complete whose gateway died when the upload had pinned its version, and the object nothing yet."""
    upload_id, parts, whole = await uploaded(cluster, bucket, key)
    gateway = cluster.new_gateway("dying")

    async def hang(source: str, node: str, method: str, request: object) -> None:
        if source == "dying" and method == "meta.accept" and request.name.table == Table.OBJECT:  # type: ignore[attr-defined]
            await asyncio.Event().wait()

    cluster.intercept = hang
    task = asyncio.get_running_loop().create_task(
        gateway.objects.complete(bucket, key, upload_id, parts, owner=WHO.user_id)
    )
    await cluster.pass_s(3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    cluster.intercept = None
    assert kept(cluster)
    return upload_id, parts, whole


def test_pages_that_an_upload_has_pinned_are_repaired_and_kept_and_those_of_an_aborted_one_go() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, parts, whole = await pinned_and_forgotten(cluster, bucket)
        other_id, _, _ = await pinned_and_forgotten(cluster, bucket, b"other")
        disk = disk_in(cluster, "a", bucket)
        await cluster.meta(disk).delete_pages(list(cluster.pages(disk).items()))
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        assert await cluster.parts_below_target() == 0
        pages = kept(cluster)
        assert len(pages) == 4
        await cluster.leap(ORPHAN_S + 60)
        assert await sweep(cluster) == 0
        assert kept(cluster) == pages
        await cluster.objects.abort(bucket, b"other", other_id)
        await sweep(cluster)
        await complete(cluster, bucket, b"many", upload_id, parts)
        assert kept(cluster) == set((await version_of(cluster, bucket)).pages)
        assert are_everywhere(cluster, bucket, kept(cluster))
        assert await cluster.get(bucket, b"many") == whole

    run(scenario, limits=MaintainLimits(drop_delay_s=60.0))


def test_a_scrub_finds_damaged_pages_and_they_are_replaced() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket)
        pages = (await version_of(cluster, bucket)).pages
        cluster.maintain()
        await cluster.settled()
        for disk in replicas(cluster, bucket)[:2]:
            cluster.meta(disk).damage_page(pages[0])
        assert await cluster.gateway.maintain.start_scrub() == ["na", "nb", "nc"]
        assert await cluster.settled() == (0, 0)
        assert sum(status.damaged_found for status in await cluster.statuses()) == 2
        await cluster.pass_s(5)
        assert are_everywhere(cluster, bucket, pages)

    run(scenario)


# --- collection


def test_pages_of_replaced_and_deleted_objects_go_when_they_are_old_and_those_of_living_ones_stay() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket, b"replaced")
        await many(cluster, bucket, b"deleted")
        whole = await many(cluster, bucket, b"kept")
        await cluster.put(bucket, b"replaced", b"small now")
        await cluster.objects.delete(bucket, b"deleted")
        await cluster.leap(ORPHAN_S / 2)
        assert await sweep(cluster) == 0
        assert len(kept(cluster)) == 6
        await cluster.leap(ORPHAN_S / 2)
        assert await sweep(cluster) == 12
        assert kept(cluster) == set((await version_of(cluster, bucket, b"kept")).pages)
        assert are_everywhere(cluster, bucket, kept(cluster), b"kept")
        assert await cluster.get(bucket, b"kept") == whole
        assert await sweep(cluster) == 0

    run(scenario)


@pytest.mark.parametrize("lacks", ["nothing", "its fence", "a page"])
def test_pages_of_a_deleted_bucket_go_although_replicas_have_a_row_from_before(lacks: str) -> None:
    """One that got the partition again, or missed the deletion. Of those with a row from before one has lost a page."""

    async def scenario(cluster: Cluster) -> None:
        bucket, living = await cluster.bucket(), await cluster.bucket("living")
        await many(cluster, bucket)
        whole = await many(cluster, living)
        name = object_name(bucket.id, bucket.shard_numbers, b"many")
        store = cluster.meta(replicas(cluster, bucket)[0])
        row = store.get(name)
        assert row is not None
        await cluster.objects.delete(bucket, b"many")
        await cluster.pass_s(1)
        await cluster.buckets.delete(bucket)
        await cluster.pass_s(1)
        await store.commit(StoreBatch([row], unfence=[bucket.id] if lacks == "its fence" else []))
        if lacks == "a page":
            for disk in replicas(cluster, bucket):
                other = cluster.meta(disk)
                page = next(page for page in sorted(cluster.pages(disk)) if other.page_owners([page]) == [name.pack()])
                await other.delete_pages([(page, cluster.pages(disk)[page])])
        await cluster.leap(ORPHAN_S + 60)
        await sweep(cluster)
        assert kept(cluster) == set((await version_of(cluster, living)).pages)
        assert are_everywhere(cluster, living, kept(cluster))
        assert await cluster.get(living, b"many") == whole

    run(scenario)


def test_a_directory_that_leaves_out_a_bucket_costs_it_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        whole = await many(cluster, bucket)
        before = {disk: cluster.pages(disk) for disk in replicas(cluster, bucket)}
        monkeypatch.setattr(Judge, "is_gone", _says_gone)
        await cluster.leap(ORPHAN_S + 60)
        assert await sweep(cluster) == 0
        await cluster.gateway.ring.fence(bucket.id, bucket.shard_numbers, b"nonce")
        assert await sweep(cluster) == 0
        liar = cluster.meta(replicas(cluster, bucket)[0])
        await liar.commit(StoreBatch(fences=[Fence(bucket.id, b"nonce", True)]))
        assert await sweep(cluster) == 0
        assert {disk: cluster.pages(disk) for disk in replicas(cluster, bucket)} == before
        monkeypatch.undo()
        assert await cluster.get(bucket, b"many") == whole

    run(scenario)


async def _says_gone(_judge: Judge, _scope: bytes) -> bool:
    return True


def test_the_sweep_runs_by_itself() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket)
        await cluster.objects.delete(bucket, b"many")
        cluster.maintain()
        await cluster.leap(ORPHAN_S + 60)
        for _ in range(3):
            await cluster.leap(READERS_S + 10)
        assert not kept(cluster)

    run(scenario)


def test_a_reader_in_the_middle_of_a_replaced_object_finds_its_pages() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        whole = await many(cluster, bucket, count=300)
        await cluster.leap(ORPHAN_S + 60)
        stream = await cluster.objects.get(bucket, b"many")
        pieces = stream.chunks()
        begun = bytes(await anext(pieces))
        await cluster.put(bucket, b"many", b"new")
        sweeping = asyncio.ensure_future(sweep(cluster))
        await cluster.pass_s(READERS_S - 60)
        assert begun + b"".join([bytes(piece) async for piece in pieces]) == whole
        assert await sweeping == 9

    run(scenario)


def test_a_page_that_is_put_again_between_the_look_and_the_deletion_stays() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket)
        name = object_name(bucket.id, bucket.shard_numbers, b"many")
        pages = (await version_of(cluster, bucket)).pages
        again = await cluster.gateway.ring.get_page(name, pages[0])
        await cluster.objects.delete(bucket, b"many")
        await cluster.leap(ORPHAN_S + 60)
        sweeping = asyncio.ensure_future(sweep(cluster))
        await cluster.pass_s(READERS_S / 2)
        await cluster.gateway.ring.put_page(name, again)
        assert await sweeping == 3
        assert kept(cluster) == {pages[0]}

    run(scenario)


def test_a_disk_that_missed_the_row_learns_of_it_before_it_deletes() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        late = disk_in(cluster, "c", bucket)

        async def lose(source: str, node: str, method: str, request: object) -> None:
            if (
                isinstance(request, messages.Accept)
                and request.disk == late
                and request.name.table in (Table.OBJECT, Table.UPLOAD)
            ):
                raise PeerUnreachable("a broken line")

        cluster.intercept = lose
        whole = await many(cluster, bucket)
        cluster.intercept = None
        pages = set((await version_of(cluster, bucket)).pages)
        assert pages <= set(cluster.pages(late))
        assert object_name(bucket.id, bucket.shard_numbers, b"many").pack() not in cluster.rows(late)
        await cluster.leap(ORPHAN_S + 60)
        assert await cluster.nodes["nc"].maintenance.page_sweep.once() == 0
        assert pages <= set(cluster.pages(late))
        assert await cluster.get(bucket, b"many") == whole

    run(scenario)


def test_without_a_majority_or_with_a_damaged_row_no_page_is_swept() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket)
        await cluster.objects.delete(bucket, b"many")
        before = kept(cluster)
        await cluster.leap(ORPHAN_S + 60)
        await cluster.kill("na", "nb")
        assert await cluster.nodes["nc"].maintenance.page_sweep.once() == 0
        assert len(cluster.nodes["nc"].log) == 1
        cluster.start("na", "nb", maintain=False)
        for disk in replicas(cluster, bucket):
            cluster.meta(disk).damage(object_name(bucket.id, bucket.shard_numbers, b"many"))
        assert await sweep(cluster) == 0
        assert kept(cluster) == before

    run(scenario)


def completing(
    gateway: Gateway, bucket: BucketRecord, key: bytes, upload_id: str, parts: list[CompletedPart]
) -> asyncio.Task[object]:
    return asyncio.get_running_loop().create_task(
        gateway.objects.complete(bucket, key, upload_id, parts, owner=WHO.user_id)
    )


@pytest.mark.parametrize("table", [Table.UPLOAD, Table.OBJECT])
@pytest.mark.parametrize("method", ["meta.prepare", "meta.accept"])
def test_a_complete_that_slept_for_days_acknowledges_nothing_whose_pages_are_gone(table: int, method: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, parts, whole = await uploaded(cluster, bucket, b"many")
        gateway, wake = cluster.new_gateway("sleeper"), asyncio.Event()

        async def sleep(source: str, node: str, called: str, request: object) -> None:
            if source == "sleeper" and called == method and request.name.table == table:  # type: ignore[attr-defined]
                await wake.wait()

        cluster.intercept = sleep
        task = completing(gateway, bucket, b"many", upload_id, parts)
        await cluster.pass_s(0.5)
        assert not task.done()
        await cluster.leap(ORPHAN_S)
        await cluster.leap(ORPHAN_S)
        await sweep(cluster)
        assert kept(cluster)  # the upload is open
        wake.set()
        with pytest.raises(ServiceUnavailable if method == "meta.prepare" else OutcomeUnknown):
            await task
        cluster.intercept = None
        await cluster.pass_s(20)
        await complete(cluster, bucket, b"many", upload_id, parts)
        assert await cluster.get(bucket, b"many") == whole
        assert set((await version_of(cluster, bucket)).pages) <= kept(cluster)

    run(scenario)


def test_a_complete_that_is_taken_up_again_or_was_in_the_way_of_others_renews_its_pages() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, parts, whole = await pinned_and_forgotten(cluster, bucket)
        disk = replicas(cluster, bucket)[0]
        old = cluster.pages(disk)
        await cluster.leap(ORPHAN_S * 3)
        await complete(cluster, bucket, b"many", upload_id, parts)
        young = cluster.pages(disk)
        assert young.keys() == old.keys()
        assert min(young.values()) - max(old.values()) >= ORPHAN_S * 2900
        assert await cluster.get(bucket, b"many") == whole

        other_id, other_parts, _ = await uploaded(cluster, bucket, b"other")
        name = object_name(bucket.id, bucket.shard_numbers, b"other")
        settled_at, settled = 0, asyncio.Event()

        async def interfere(source: str, node: str, method: str, request: object) -> None:
            nonlocal settled_at
            if source != "g" or method != "meta.accept" or request.name != name:  # type: ignore[attr-defined]
                return
            if not settled_at:
                settled_at = cluster.clock.wall_ms()
                await cluster.pass_s(2)
                await cluster.new_gateway("h").ring.settle(name)
                settled.set()
            await settled.wait()

        cluster.intercept = interfere
        await complete(cluster, bucket, b"other", other_id, other_parts)
        assert settled_at
        ages = cluster.pages(replicas(cluster, bucket, b"other")[0])
        assert all(ages[page] > settled_at for page in (await version_of(cluster, bucket, b"other")).pages)

    run(scenario)


async def no_uploads(judge: Judge, owner: RegisterName) -> None:
    return None


async def no_round(judge: Judge, owners: Sequence[RegisterName]) -> dict[RegisterName, Proof | str]:
    return {owner: Proof(value=(await judge._context.registers.read(owner)).value) for owner in owners}


async def not_renewed(pages: Pages, near: RegisterName, hashes: Sequence[bytes]) -> None:
    return None


BUGS = {
    "": (),
    "uploads_not_looked_at": ((Judge, "_uploads_of", no_uploads),),
    "no_round": ((Judge, "prove", no_round), (Judge, "_uploads_of", no_uploads)),
    "complete_does_not_renew": ((complete_module, "renew_pages", not_renewed), (Judge, "_uploads_of", no_uploads)),
}
"""Each planted bug takes away a rule; some rules also have another one that does the same work."""


@pytest.mark.parametrize(
    ("bug", "called", "table"),
    [
        ("", "meta.prepare", Table.UPLOAD),
        ("", "meta.prepare", Table.OBJECT),
        ("", "meta.accept", Table.OBJECT),
        ("uploads_not_looked_at", "meta.prepare", Table.OBJECT),
        ("no_round", "meta.accept", Table.OBJECT),
        ("complete_does_not_renew", "meta.prepare", Table.OBJECT),
    ],
)
def test_whenever_the_sweep_comes_a_complete_makes_no_object_that_lacks_pages(
    monkeypatch: pytest.MonkeyPatch, bug: str, called: str, table: int
) -> None:
    """The Complete sleeps before one of its messages, shorter than its client waits; the sweep comes meanwhile, with
    all ages at nothing.
    """
    for owner, attribute, planted in BUGS[bug]:
        monkeypatch.setattr(owner, attribute, planted)

    sound: list[bool] = []

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, parts, whole = await uploaded(cluster, bucket, b"many")
        gateway, wake = cluster.new_gateway("sleeper"), asyncio.Event()

        async def sleep(source: str, node: str, method: str, request: object) -> None:
            if source == "sleeper" and method == called and request.name.table == table:  # type: ignore[attr-defined]
                await wake.wait()

        cluster.intercept = sleep
        task = completing(gateway, bucket, b"many", upload_id, parts)
        await cluster.pass_s(0.5)
        assert not task.done()
        assert kept(cluster)
        await sweep(cluster)
        wake.set()
        with contextlib.suppress(StoragedError):
            await task
        cluster.intercept = None
        await cluster.pass_s(20)
        name = object_name(bucket.id, bucket.shard_numbers, b"many")
        versions = decode_record((await cluster.gateway.ring.read(name)).value).versions
        sound.append(all(set(version.pages) <= kept(cluster) for version in versions))
        if versions and sound[0]:
            assert await cluster.get(bucket, b"many") == whole

    run(scenario, limits=MaintainLimits(orphan_age_ms=-1, drop_delay_s=0.01))
    assert sound == [bug in ("", "uploads_not_looked_at")]


def test_a_put_changes_the_time_of_a_page_also_when_the_clock_stands_still() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket)
        name = object_name(bucket.id, bucket.shard_numbers, b"many")
        (page, *_) = (await version_of(cluster, bucket)).pages
        disk = replicas(cluster, bucket)[0]
        before = cluster.pages(disk)[page]
        body = await cluster.gateway.ring.get_page(name, page)
        old = StoredPage(page, body, 0)
        await cluster.meta(disk).commit(StoreBatch(pages=[old]))
        assert cluster.pages(disk)[page] == before + 1
        assert cluster.meta(disk).page_owners([page]) == [name.pack()]

    run(scenario)


def test_a_page_of_an_older_version_gets_an_owner_from_the_rows_or_goes() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket)
        name = object_name(bucket.id, bucket.shard_numbers, b"many")
        disk = replicas(cluster, bucket)[0]
        store, pages = cluster.meta(disk), list(cluster.pages(disk))
        bodies = [store.get_page(page) for page in pages]
        await store.delete_pages(list(cluster.pages(disk).items()))
        lost = b"no record names this page"
        without = [StoredPage(page, body or b"", 1) for page, body in zip(pages, bodies, strict=True)]
        await store.commit(StoreBatch(pages=[*without, StoredPage(page_hash(lost), lost, 1)]))
        assert set(store.page_owners(pages)) == {b""}
        assert await sweep(cluster) == 1
        assert set(store.page_owners(pages)) == {name.pack()}
        assert set(cluster.pages(disk)) == set(pages)
        await cluster.objects.delete(bucket, b"many")
        await cluster.leap(ORPHAN_S + 60)
        await sweep(cluster)
        assert not kept(cluster)

    run(scenario)


@pytest.mark.parametrize("when", ["before", "at its last look"])
def test_pages_without_an_owner_stay_while_collection_is_paused(when: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket)
        disk = disk_in(cluster, "a", bucket)
        store, sweeper = cluster.meta(disk), cluster.nodes["na"].maintenance.page_sweep
        lost = b"no record names this page"
        await store.commit(StoreBatch(pages=[StoredPage(page_hash(lost), lost, 1)]))
        settings, looks, find = MoveSettings(), 0, sweeper._find_owners
        sweeper._context.settings = lambda: settings

        async def pause(*arguments: Any) -> None:
            nonlocal settings, looks
            await find(*arguments)
            looks += 1
            if when == "before" or looks == 2:
                settings = MoveSettings(revision=1, collection_paused=True)

        sweeper._find_owners = pause  # type: ignore[method-assign]
        task = asyncio.get_running_loop().create_task(sweeper.once())
        await cluster.pass_s(READERS_S + 100)
        assert page_hash(lost) in cluster.pages(disk)
        sweeper._find_owners = find  # type: ignore[method-assign]
        settings = MoveSettings(revision=2)
        await cluster.pass_s(READERS_S + 100)
        assert task.done()
        await sweeper.once()
        assert page_hash(lost) not in cluster.pages(disk)

    run(scenario)


# --- parts are counted once


def test_a_multipart_object_counts_once_and_parts_of_an_open_upload_are_counted_apart() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket, b"done", 3, PART)
        aborted, _, _ = await uploaded(cluster, bucket, b"aborted", 2, PART)
        await cluster.objects.abort(bucket, b"aborted", aborted)
        upload_id, parts, whole = await uploaded(cluster, bucket, b"open", 2, PART)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        assert await cluster.settled() == (1, 0)
        assert await cluster.parts_below_target() == 2
        await complete(cluster, bucket, b"open", upload_id, parts)
        cluster.start("nb")
        assert await cluster.settled() == (0, 0)
        assert await cluster.parts_below_target() == 0
        assert await cluster.get(bucket, b"open") == whole

    run(scenario)


def test_parts_of_an_open_upload_that_lack_fragments_are_repaired() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, parts, whole = await uploaded(cluster, bucket, b"open", 2, LARGE)
        before = await cluster.fragments()
        for disk, fragment in before[::9]:
            await cluster.store(disk).delete([fragment])
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        assert await cluster.parts_below_target() == 0
        assert await cluster.fragments() == before
        await complete(cluster, bucket, b"open", upload_id, parts)
        assert await cluster.get(bucket, b"open") == whole

    run(scenario)


def test_rows_of_a_finished_upload_that_say_where_its_parts_were_are_nobodys_loss() -> None:
    """The object is recoded, and its old fragments are deleted; the rows of the upload still name it."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        whole = await many(cluster, bucket, b"k", 2, LARGE)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nc")
        await cluster.pass_s(MaintainLimits().recode_delay_s + 60)
        await cluster.settled()
        await cluster.leap(MaintainLimits().drop_delay_s)
        await cluster.pass_s(60)
        rows = [
            name
            for name in map(RegisterName.unpack, cluster.rows(disk_in(cluster, "a", bucket, b"k")))
            if name.table == Table.PART
        ]
        assert len(rows) == 2
        before = await cluster.fragments()
        for row in rows:
            cluster.gateway.maintain.hint(row)
        for _ in range(40):
            await cluster.pass_s(0.1)
            assert await cluster.parts_below_target() == 0
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        assert await cluster.settled() == (1, 0)
        assert await cluster.parts_below_target() == 0
        assert await cluster.fragments() == before
        assert await cluster.get(bucket, b"k") == whole

    run(scenario)


def test_findings_about_parts_are_forgotten_when_their_upload_is_completed() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        cluster.maintain()
        await cluster.settled()
        upload_id, parts, _ = await uploaded(cluster, bucket, b"k", 2, PART)
        await cluster.kill("nb")
        await cluster.settled()
        assert await cluster.parts_below_target() == 2
        await complete(cluster, bucket, b"k", upload_id, parts)
        await cluster.pass_s(2 * MaintainLimits().retry_s)
        assert await cluster.parts_below_target() == 0

    run(scenario)
