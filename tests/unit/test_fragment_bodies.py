"""The suite of the port on every body: the local disk, the same over RPC, and memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from storaged.errors import FragmentDamaged, FragmentOther, PeerError, PeerUnreachable
from storaged.fragments.ports import REPLACED, FragmentId, Health, NearStore, Retirement
from storaged.fragments.remote import FragmentHost, RemoteFragmentStore
from storaged.fragments.store import LocalFragmentStore
from storaged.hashes import transfer_checksum
from tests.doubles.caller import Loopback
from tests.doubles.disks import FaultyDisk
from tests.doubles.fragments import MemoryFragmentStore
from tests.second_preimage import second_preimage
from tests.suites.fragment_store import Damage, FragmentStoreSuite
from tests.suites.near_store import NearStoreSuite
from tests.worlds.fragments import ANY_SPACE, DISK, Made, flip_on_disk, make


class TestLocal(FragmentStoreSuite):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[LocalFragmentStore]:
        store = await LocalFragmentStore.open(tmp_path, DISK, limits=ANY_SPACE)
        yield store
        await store.close()

    @pytest.fixture
    def damage(self, tmp_path: Path) -> Damage:
        async def flip(made: Made, cell: int) -> None:
            flip_on_disk(tmp_path, made, cell)

        return flip


class TestLocalNear(NearStoreSuite):
    @pytest.fixture
    async def near(self, tmp_path: Path) -> AsyncIterator[LocalFragmentStore]:
        store = await LocalFragmentStore.open(tmp_path, DISK, limits=ANY_SPACE)
        yield store
        await store.close()


class TestMemoryNear(NearStoreSuite):
    @pytest.fixture
    def near(self) -> MemoryFragmentStore:
        return MemoryFragmentStore()


async def test_garbage_keeps_its_origin_over_rpc_and_a_restart(tmp_path: Path) -> None:
    entries = [Retirement(bytes([n]) * 16, b"owner", n, (REPLACED, b"")[n % 2]) for n in range(4)]
    local = await LocalFragmentStore.open(tmp_path, DISK, limits=ANY_SPACE)
    host = FragmentHost({DISK: local})
    await RemoteFragmentStore(Loopback(lambda _node: host.methods()), "n1", DISK).retire(entries)
    assert await local.due(9, (0, b""), 9) == entries
    await local.close()
    local = await LocalFragmentStore.open(tmp_path, DISK, limits=ANY_SPACE)
    assert await local.due(9, (0, b""), 9) == entries
    await local.close()


class TestRemote(TestLocal):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[RemoteFragmentStore]:  # type: ignore[override]
        local = await LocalFragmentStore.open(tmp_path, DISK, limits=ANY_SPACE)
        host = FragmentHost({DISK: local})
        yield RemoteFragmentStore(Loopback(lambda _node: host.methods()), "n1", DISK)
        await local.close()


class Begun(Loopback):
    """A caller that begins calls without a task of the one who asks."""

    def begin_call(self, node: str, method: str, request: Any, reply: Any, on_reply: Any, **options: Any) -> Any:
        async def run() -> None:
            try:
                on_reply(*(await self.call(node, method, request, reply, **options)))
            except PeerError as error:
                on_reply(error, memoryview(b""))

        return asyncio.create_task(run()).cancel


async def test_a_write_without_a_task_stores_the_fragment_or_brings_the_error(tmp_path: Path) -> None:
    local = await LocalFragmentStore.open(tmp_path, DISK, limits=ANY_SPACE)
    host = FragmentHost({DISK: local})
    remote = RemoteFragmentStore(Begun(lambda _node: host.methods()), "n1", DISK)
    made = make(random.Random(5))
    answers: asyncio.Queue[PeerError | None] = asyncio.Queue()
    assert remote.try_write(made.header, [made.payload], answers.put_nowait, sync=True) is not None
    assert await answers.get() is None
    assert [stat.health for stat in await local.stat([made.id])] == [Health.OK]
    assert remote.try_write(made.header, [bytes(len(made.payload))], answers.put_nowait, sync=True) is not None
    assert isinstance(await answers.get(), FragmentDamaged)
    without = RemoteFragmentStore(Loopback(lambda _node: host.methods()), "n1", DISK)
    assert without.try_write(made.header, [made.payload], answers.put_nowait) is None
    await local.close()


async def test_a_check_counts_for_the_hash_of_a_gateway_alone() -> None:
    """Repair, on a storage node, did not hash what it writes from the beginning: its fragments are compared with the
    hashes themselves.
    """
    made = make(random.Random(5))
    lie = made.header.hashes
    payload = bytes(len(made.payload))
    for roles in (("storage",), ("gateway",)):
        host = FragmentHost({DISK: MemoryFragmentStore()})
        remote = RemoteFragmentStore(Loopback(lambda _node, host=host: host.methods(), roles), "n1", DISK)  # type: ignore[misc]
        write = remote.write(
            msgspec.structs.replace(made.header, hashes=lie), [payload], check=transfer_checksum([payload])
        )
        if roles == ("gateway",):
            await write
        else:
            with pytest.raises(FragmentDamaged):
                await write


@pytest.fixture(params=["local", "memory"])
async def body(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[NearStore]:
    if request.param == "memory":
        yield MemoryFragmentStore()
        return
    store = await LocalFragmentStore.open(tmp_path, DISK, limits=ANY_SPACE)
    yield store
    await store.close()


def as_role(store: NearStore, role: str) -> RemoteFragmentStore:
    host = FragmentHost({DISK: store})
    return RemoteFragmentStore(Loopback(lambda _node: host.methods(), (role,)), "n1", DISK)


async def payload_of(store: NearStore, fragment: FragmentId) -> bytes:
    return b"".join(cell for cell in (await store.read(fragment, 0, 99)).cells if cell is not None)


async def test_a_storage_node_never_replaces_a_sound_fragment_by_another(body: NearStore) -> None:
    rng = random.Random(6)
    old = make(rng, 5000)
    other = make(rng, 5000, fragment=old.id)
    storage, gateway = as_role(body, "storage"), as_role(body, "gateway")
    await storage.write(old.header, [old.payload])  # not synced: it counts all the same
    lies = (
        (other.header, other.payload),
        (msgspec.structs.replace(old.header, owner=b"another register"), old.payload),
        (msgspec.structs.replace(old.header, part_header=b"x" * 64), old.payload),
        (msgspec.structs.replace(other.header, hashes=()), other.payload),
    )
    for header, payload in lies:
        with pytest.raises(FragmentOther):
            await storage.write(header, [payload], sync=True)
        assert await payload_of(body, old.id) == old.payload
    await storage.write(msgspec.structs.replace(old.header, created_ms=2000), [old.payload], sync=True)
    await gateway.write(other.header, [other.payload], sync=True)
    assert await payload_of(body, old.id) == other.payload


async def test_a_storage_node_replaces_what_is_not_what_it_says(body: NearStore) -> None:
    rng = random.Random(7)
    old = make(rng, 5000)
    good = make(rng, 5000, fragment=old.id)
    storage, gateway = as_role(body, "storage"), as_role(body, "gateway")
    await gateway.write(old.header, [good.payload], check=transfer_checksum([good.payload]))  # its hashes are a lie
    await storage.write(good.header, [good.payload])
    assert await payload_of(body, old.id) == good.payload
    bare = msgspec.structs.replace(make(rng, 100, fragment=old.id).header, hashes=())
    await gateway.write(bare, [bytes(100)])
    await storage.write(good.header, [good.payload])
    assert await payload_of(body, old.id) == good.payload


async def test_other_bytes_with_the_same_hash_of_the_old_kind_replace_nothing(body: NearStore) -> None:
    old = make(random.Random(8), 5000)
    forged = second_preimage(old.payload, random.Random(3))
    header = msgspec.structs.replace(old.header, hashes=(xxhash.xxh3_128_digest(old.payload),) * 6)
    storage = as_role(body, "storage")
    await storage.write(header, [old.payload])
    with pytest.raises(FragmentOther):
        await storage.write(header, [forged])
    await storage.write(header, [old.payload])
    assert await payload_of(body, old.id) == old.payload


class TestMemory(FragmentStoreSuite):
    reports: list[tuple[FragmentId, int]]

    @pytest.fixture
    def store(self) -> MemoryFragmentStore:
        self.reports = []
        return MemoryFragmentStore(on_damage=lambda fragment, cell: self.reports.append((fragment, cell)))

    @pytest.fixture
    def damage(self, store: MemoryFragmentStore) -> Damage:
        async def mark(made: Made, cell: int) -> None:
            store.damage(made.id, cell)

        return mark

    async def test_a_crash_forgets_what_was_not_synced(self, store: MemoryFragmentStore) -> None:
        kept = await self.put(store)
        lost = make(self.rng)
        await store.write(lost.header, [lost.payload])
        assert store.unsynced == [lost.id]
        store.crash()
        assert [stat.health for stat in await store.stat([kept.id, lost.id])] == [0, 1]


class TestFaulty(FragmentStoreSuite):
    """While it has no fault it is a store like any other."""

    @pytest.fixture(params=[False, True], ids=["far", "near"])
    def store(self, request: pytest.FixtureRequest) -> FaultyDisk:
        return FaultyDisk(near=request.param)

    @pytest.fixture
    def damage(self, store: FaultyDisk) -> Damage:
        async def flip(made: Made, cell: int) -> None:
            store.flip(made.id, cell)

        return flip

    async def test_a_disk_that_is_away_answers_nothing_and_keeps_what_it_has(self, store: FaultyDisk) -> None:
        made = await self.put(store)
        store.down = True
        calls = [store.read(made.id, 0, 1), store.sync([made.id]), store.stat([made.id]), store.touch([made.id], 5000)]
        for call in (*calls, store.delete([made.id]), store.retire([]), store.write(made.header, [made.payload])):
            with pytest.raises(PeerUnreachable):
                await call
        store.down = False
        assert (await store.read(made.id, 0, 1)).cells == (made.payload[: made.header.cell_bytes],)
        assert (await store.stat([made.id]))[0].created_ms == made.header.created_ms

    async def test_a_disk_that_lies_gives_other_bytes_without_a_word(self, store: FaultyDisk) -> None:
        made = await self.put(store)
        store.flip(made.id, 0, lie=True)
        [cell] = (await store.read(made.id, 0, 1)).cells
        assert cell is not None
        assert bytes(cell) != made.cells[0]
        assert (await store.verify(made.id)).health == Health.OK
        assert not store.is_whole(made.id)

    async def test_only_a_disk_of_this_node_answers_without_a_wait_and_only_what_is_whole(
        self, store: FaultyDisk
    ) -> None:
        made = await self.put(store)
        found = store.try_read(made.id, 0, 1)
        assert (found is not None) == store.near
        store.flip(made.id, 0)
        assert store.try_read(made.id, 0, 1) is None
