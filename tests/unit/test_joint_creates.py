"""While a partition has two sets of replicas, nothing is created unasked (rule 30)."""

from __future__ import annotations

from typing import Any

import pytest

from storaged.cluster.partitions import PartitionRecord
from storaged.meta.messages import Create
from storaged.meta.names import Change, RegisterName, Table, Visibility
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.worlds.ring_client import MemoryReplicas, ring_client

pytestmark = pytest.mark.virtual_time

NAME = RegisterName(Table.OBJECT, b"b" * 16, 3, b"key")


class Watched(MemoryReplicas):
    """Notes the disks that are asked to take a create."""

    def __init__(self, layouts: KnownLayouts) -> None:
        super().__init__(disk.id for disk in layouts.current.disks)
        self.asked: list[str] = []
        for disk, replica in self.replicas.items():
            self._watch(disk, replica)

    def _watch(self, disk: str, replica: Any) -> None:
        """Whichever way a request takes."""

        def noting(method: Any) -> Any:
            def noted(request: Any, *rest: Any, **named: Any) -> Any:
                if isinstance(request, Create):
                    self.asked.append(disk)
                return method(request, *rest, **named)

            return noted

        for name in ("accept", "try_call", "try_call_shared"):
            setattr(replica, name, noting(getattr(replica, name)))


async def test_nothing_is_created_unasked_while_a_partition_has_two_sets() -> None:
    layouts = KnownLayouts(layout_of())
    replicas = Watched(layouts)
    client = ring_client(layouts, replicas, node="gateway", jitter=lambda: 0.5)

    async def put(key: bytes) -> None:
        change = Change(b"a body", Visibility.LIVE)
        await client.change(NAME._replace(key=key), lambda _before: change, regardless=True)

    await put(b"before")
    assert sorted(set(replicas.asked)) == sorted(layouts.partition(NAME.partition).present)
    replicas.asked.clear()
    a, b, c = layouts.partition(NAME.partition).present
    new = next(disk.id for disk in layouts.current.disks if disk.id not in (a, b, c))
    layouts.partitions.learn(PartitionRecord(NAME.partition, 1, (a, b, c), (a, new, c), 1))
    await put(b"while")
    assert replicas.asked == []
    layouts.partitions.learn(PartitionRecord(NAME.partition, 2, (a, new, c), (), 1))
    await put(b"after")
    assert sorted(set(replicas.asked)) == sorted((a, new, c))
    for key in (b"before", b"while", b"after"):
        found = (await client.read(NAME._replace(key=key))).value
        assert found is not None
        assert found.body == b"a body"
