"""Stores by disk id, and small copies as a register's replica stores and loads them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.ports import Methods
from storaged.errors import DiskUnusable, FragmentDamaged, FragmentMissing, PeerRefused
from storaged.fragments.messages import ReadReply
from storaged.fragments.payloads import Payloads
from storaged.fragments.remote import FragmentHost, StoreDirectory
from storaged.fragments.store import LocalFragmentStore
from storaged.meta.transport.replicas import ReplicaDirectory
from storaged.wire import decode, encode
from tests.doubles.caller import Loopback
from tests.doubles.fragments import MemoryFragmentStore
from tests.doubles.layouts import Places
from tests.worlds.fragments import ANY_SPACE, DISK, make


def layout(epoch: int, **disks: str) -> Layout:
    nodes = tuple(NodeEntry(name, "FR/par1/a", "127.0.0.1:1", ("storage",)) for name in sorted(set(disks.values())))
    return Layout("test", epoch, nodes, tuple(DiskEntry(disk, node, 1) for disk, node in disks.items()), ())


class FakeLayouts(Places):
    def __init__(self, *known: Layout) -> None:
        self._known = {one.epoch: one for one in known}

    @property
    def current(self) -> Layout:
        return self._known[max(self._known)]

    def at(self, epoch: int) -> Layout:
        return self._known[epoch]

    def earlier(self) -> list[Layout]:
        return [self._known[epoch] for epoch in sorted(self._known, reverse=True)[1:]]


@pytest.mark.parametrize("epochs", [(3, 5), (100, 200)])
async def test_stores_are_found_by_disk_local_or_remote_and_by_earlier_layouts(epochs: tuple[int, int]) -> None:
    """Layouts that move data have numbers far apart."""
    rng = random.Random(2)
    disks = {"d1": MemoryFragmentStore(), "d2": MemoryFragmentStore(), "d3": MemoryFragmentStore()}
    asked: list[str] = []

    def methods(node: str) -> Methods:
        asked.append(node)
        return FragmentHost(disks).methods()

    layouts = FakeLayouts(layout(epochs[0], d1="n1", d2="n2", d3="n9"), layout(epochs[1], d1="n1", d2="n2"))
    directory = StoreDirectory(layouts, Loopback(methods), {"d1": disks["d1"]})
    made = make(rng)
    for disk_id in ("d1", "d2", "d3"):
        await directory.store(disk_id).write(made.header, [made.payload], sync=True)
        assert (await directory.store(disk_id).read(made.id, 0, 1)).cells[0] == made.cells[0]
        assert (await disks[disk_id].usage()).fragments == 1
    assert set(asked) == {"n2", "n9"}
    assert directory.store("d2") is directory.store("d2")
    with pytest.raises(DiskUnusable):
        directory.store("d4")


def test_replicas_are_found_by_the_newest_layout_that_names_their_disk() -> None:
    """A disk that came after the base may leave again before its partitions have moved."""
    between = replace(layout(100, d1="n1", d2="n2", d3="n9"), base=1)
    layouts = FakeLayouts(layout(1, d1="n1", d2="n2"), between, replace(layout(200, d1="n1", d2="n2"), base=1))
    directory = ReplicaDirectory(layouts, Loopback(lambda _node: {}))
    directory.replica("d3")
    with pytest.raises(DiskUnusable):
        directory.replica("d4")


async def test_a_host_refuses_disks_it_has_not_and_ids_that_are_none() -> None:
    host = FragmentHost({"d1": MemoryFragmentStore()})
    directory = StoreDirectory(FakeLayouts(layout(1, d1="n1", d2="n1")), Loopback(lambda _node: host.methods()), {})
    with pytest.raises(DiskUnusable):
        await directory.store("d2").usage()
    with pytest.raises(PeerRefused):
        await directory.store("d1").stat([make(random.Random(1)).id._replace(data_id=b"short")])


async def test_a_remote_sync_notices_that_the_node_restarted_and_lost_the_write(tmp_path: Path) -> None:
    store = MemoryFragmentStore()
    host = FragmentHost({"d1": store})
    remote = StoreDirectory(FakeLayouts(layout(1, d1="n1")), Loopback(lambda _node: host.methods()), {}).store("d1")
    made = make(random.Random(3))
    await remote.write(made.header, [made.payload])
    store.crash()
    with pytest.raises(FragmentMissing):
        await remote.sync([made.id])


@pytest.mark.parametrize("unread", [False, True])
async def test_a_remote_read_says_whether_the_drive_could_not_read(unread: bool) -> None:
    store = MemoryFragmentStore()
    host = FragmentHost({"d1": store})
    remote = StoreDirectory(FakeLayouts(layout(1, d1="n1")), Loopback(lambda _node: host.methods()), {}).store("d1")
    made = make(random.Random(12), 9000)
    await remote.write(made.header, [made.payload], sync=True)
    store.damage(made.id, 1, unread=unread)
    found = await remote.read(made.id, 0, 3)
    assert ([cell is None for cell in found.cells], found.unread) == ([False, True, False], unread)
    assert not (await remote.read(made.id, 0, 1)).unread
    store.damage(made.id, -1, unread=unread)
    with pytest.raises(FragmentDamaged) as caught:
        await remote.read(made.id, 0, 3)
    assert caught.value.unread == unread


def test_an_answer_of_a_node_that_does_not_say_whether_it_could_read_is_taken() -> None:
    before = encode([make(random.Random(13)).header, (4,)])
    assert not decode(before, ReadReply).unread


class TestPayloads:
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[LocalFragmentStore]:
        store = await LocalFragmentStore.open(tmp_path, DISK, limits=ANY_SPACE)
        yield store
        await store.close()

    async def test_a_copy_is_found_by_its_data_id_alone(self, store: LocalFragmentStore) -> None:
        rng = random.Random(4)
        payloads = Payloads(store)
        for m, position in ((2, 0), (2, 2), (1, 1), (4, 3)):
            made = make(rng, 9000, k=1, m=m, position=position)
            await payloads.store_payload(encode(made.header), [made.payload[:100], made.payload[100:]])
            found = await payloads.load_payload(made.id.data_id)
            assert found is not None
            assert bytes(found.payload) == made.payload
        assert await payloads.load_payload(b"\0" * 16) is None

    async def test_a_copy_is_found_after_a_restart_and_gone_after_its_deletion(self, tmp_path: Path) -> None:
        made = make(random.Random(5), k=1, m=2, position=1)
        store = await LocalFragmentStore.open(tmp_path / "d", DISK, limits=ANY_SPACE)
        await Payloads(store).store_payload(encode(made.header), made.payload)
        await store.close()
        store = await LocalFragmentStore.open(tmp_path / "d", DISK, limits=ANY_SPACE)
        found = await Payloads(store).load_payload(made.id.data_id)
        assert found is not None
        assert bytes(found.payload) == made.payload
        assert found.header == encode(made.header)
        await store.delete([made.id])
        assert await Payloads(store).load_payload(made.id.data_id) is None
        await store.close()

    @pytest.mark.usefixtures("cached_reads")
    async def test_a_copy_in_memory_is_told_at_once_while_it_is_whole_and_there(self, tmp_path: Path) -> None:
        rng = random.Random(11)
        kept = [make(rng, size, k=1, m=2, position=2) for size in (1, 4112, 9000)]
        store = await LocalFragmentStore.open(tmp_path / "d", DISK, limits=ANY_SPACE)
        for _ in range(2):  # from the overlay, then from the index
            for made in kept:
                await Payloads(store).store_payload(encode(made.header), made.payload)
            for made in kept:
                found = Payloads(store).try_load_payload(made.id.data_id)
                assert found is not None
                assert bytes(found) == made.payload
            await store.close()
            store = await LocalFragmentStore.open(tmp_path / "d", DISK, limits=ANY_SPACE)
            assert [bytes(Payloads(store).try_load_payload(made.id.data_id) or b"") for made in kept] == [
                made.payload for made in kept
            ]
        assert Payloads(store).try_load_payload(b"\0" * 16) is None
        await store.delete([kept[0].id])
        assert Payloads(store).try_load_payload(kept[0].id.data_id) is None
        entry = store._engine.index.lookup(kept[2].id.pack())
        assert entry is not None
        file = store._engine.log.segments[entry.segment]
        for at in (entry.payload_start + 8999, 4, 60, 100):
            byte = file.read(entry.offset + at, 1)
            file.write([bytes([byte[0] ^ 1])], entry.offset + at)
            assert Payloads(store).try_load_payload(kept[2].id.data_id) is None, at
            file.write([byte], entry.offset + at)
        assert Payloads(store).try_load_payload(kept[2].id.data_id) is not None
        await store.close()

    async def test_fragments_of_coded_blocks_are_no_copies(self, store: LocalFragmentStore) -> None:
        made = make(random.Random(6), k=2, m=1)
        await store.write(made.header, [made.payload], sync=True)
        assert await Payloads(store).load_payload(made.id.data_id) is None

    async def test_bad_input_is_refused_and_changes_nothing(self, store: LocalFragmentStore) -> None:
        made = make(random.Random(7), k=1, m=2)
        payloads = Payloads(store)
        with pytest.raises(PeerRefused):
            await payloads.store_payload(b"junk", [made.payload])
        with pytest.raises(FragmentDamaged):
            await payloads.store_payload(encode(made.header), [bytes(len(made.payload))])
        assert (await store.usage()).fragments == 0

    async def test_a_damaged_copy_is_not_loaded(self) -> None:
        store = MemoryFragmentStore()
        made = make(random.Random(8), 9000, k=1, m=2)
        payloads = Payloads(store)
        await payloads.store_payload(encode(made.header), made.payload)
        store.damage(made.id, 1)
        assert await payloads.load_payload(made.id.data_id) is None

    @pytest.mark.parametrize("cell", [-1, 1])
    async def test_a_copy_that_the_drive_cannot_read_is_not_called_absent(self, cell: int) -> None:
        store = MemoryFragmentStore()
        made = make(random.Random(8), 9000, k=1, m=2)
        payloads = Payloads(store)
        await payloads.store_payload(encode(made.header), made.payload)
        store.damage(made.id, cell, unread=True)
        with pytest.raises(DiskUnusable):
            await payloads.load_payload(made.id.data_id)
