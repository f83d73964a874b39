"""The suite of the port on every body: the local disk, the same over RPC, and memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storaged.fragments.memory import MemoryFragmentStore
from storaged.fragments.ports import FragmentId
from storaged.fragments.remote import FragmentHost, RemoteFragmentStore
from storaged.fragments.store import LocalFragmentStore
from tests.unit.fragment_store_suite import Damage, FragmentStoreSuite
from tests.unit.fragment_world import DISK, Loopback, Made, flip_on_disk


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
