"""The suite of the port on every body: the local disk, the same over RPC, and memory."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from storaged.errors import FragmentDamaged
from storaged.fragments.ports import FragmentId
from storaged.fragments.remote import FragmentHost, RemoteFragmentStore
from storaged.fragments.store import LocalFragmentStore
from storaged.hashes import transfer_checksum
from tests.doubles.fragments import MemoryFragmentStore
from tests.suites.fragment_store import Damage, FragmentStoreSuite
from tests.worlds.fragments import DISK, Loopback, Made, flip_on_disk, make


class TestLocal(FragmentStoreSuite):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[LocalFragmentStore]:
        store = await LocalFragmentStore.open(tmp_path, DISK)
        yield store
        await store.close()

    @pytest.fixture
    def damage(self, tmp_path: Path) -> Damage:
        async def flip(made: Made, cell: int) -> None:
            flip_on_disk(tmp_path, made, cell)

        return flip


class TestRemote(TestLocal):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[RemoteFragmentStore]:  # type: ignore[override]
        local = await LocalFragmentStore.open(tmp_path, DISK)
        host = FragmentHost({DISK: local})
        yield RemoteFragmentStore(Loopback(lambda _node: host.methods()), "n1", DISK)
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
        lost = await self.put(store)
        store._durable.pop(lost.id.pack())
        store.crash()
        assert [stat.health for stat in await store.stat([kept.id, lost.id])] == [0, 1]
