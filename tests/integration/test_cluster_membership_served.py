"""Heartbeats, the states of nodes and disks, clocks, and how layouts spread.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from storaged.cluster.membership import Membership, OwnNode
from storaged.cluster.ports import DiskStatus
from tests.unit.test_cluster_membership import book, is_up, layout
from tests.worlds.authority import World, pooled, serving, until


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_three_nodes_over_tls_find_each_other_lose_one_and_find_it_again(world: World) -> None:
    names = ("n1", "n2", "n3")
    identities = {name: world.node(name) for name in names}
    addresses: dict[str, str] = {}
    members: dict[str, Membership] = {}

    async def run(stack: AsyncExitStack, name: str, port: int = 0) -> None:
        links = await stack.enter_async_context(pooled(identities[name], lambda node: addresses.get(node)))
        own = OwnNode(name, name.encode().ljust(8), disks=lambda: [DiskStatus(f"disk-{name}", "/", "ok")])
        found = Membership(own, links, book(world, layout()), links=links, interval_s=0.05)
        server = await stack.enter_async_context(serving(identities[name], found.methods(), port=port))
        addresses[name] = f"127.0.0.1:{server.port}"
        members[name] = found
        await found.start()
        stack.push_async_callback(found.close)

    async with AsyncExitStack() as two:
        third = AsyncExitStack()
        await run(two, "n1")
        await run(two, "n2")
        await run(third, "n3")
        await until(lambda: all(is_up(member, name) for member in members.values() for name in names))
        port = int(addresses["n3"].rpartition(":")[2])
        await third.aclose()
        await until(lambda: not is_up(members["n1"], "n3") and not members["n2"].disk_readable("disk-n3"))
        assert is_up(members["n1"], "n2")
        async with AsyncExitStack() as again:
            await run(again, "n3", port)
            await until(lambda: all(members[name].disk_writable("disk-n3") for name in ("n1", "n2")))
