"""A recovery of the system partition is brought into force: gateways and storage nodes without sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from storaged.cluster.layout import Layout
from storaged.cluster.messages import AcceptAnswer
from storaged.cluster.signed_layout import SignedLayout
from storaged.errors import LayoutNotAccepted, LayoutOvertaken, LayoutRefused, RecoverRefused, StoragedError
from storaged.node.recovering import SystemRecovery
from storaged.node.system import exchange_layout, is_pending
from storaged.wire import encode
from tests.doubles.layouts import KnownLayouts
from tests.integration.test_layout_apply import Cluster
from tests.unit.test_system_recovery import without
from tests.worlds.layouts import History, first, with_nodes

FOREVER = 10_000
"""Calls of the system partition that fail."""


async def may(_layout: Layout) -> str:
    return ""


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """Nodes n1 to n4 with seed disks at n1 to n3, of which n1 and n2 are off. All know ``n4``."""
    found = Cluster(tmp_path)
    found.history = History(found.history.world, with_nodes(first(), "n4", "n5"))
    found.books = {name: found.history.book(persist=files.save) for name, files in found.files.items()}
    for name in found.acceptors:
        found.boot(name)
        found.acceptors[name].may_recover = may
    found.away.update(("n1", "n2"))
    found.registers.away = FOREVER
    return found


def recovery(cluster: Cluster, *lost: str, address: str = "") -> SignedLayout:
    wanted = without(cluster.history.layouts[0], *(lost or ("d1a", "d1b", "d2a", "d2b")))
    nodes = tuple(replace(node, address=address or node.address) for node in wanted.nodes)
    return cluster.history.sign(cluster.history.after(replace(wanted, nodes=nodes)))


async def test_the_nodes_that_are_left_accept_it_and_it_replaces_what_the_register_has(cluster: Cluster) -> None:
    signed = recovery(cluster)
    done = await cluster.gateway().apply(signed)
    assert (done["epoch"], done["accepted"]) == (100, ["n3"])
    assert "the system partition goes on without seed disks d1a, d2a" in done["moves"]
    cluster.registers.away = 0
    await exchange_layout(cluster.paths, cluster.books["gw"])
    assert cluster.register == cluster.books["gw"].signed(100)
    await cluster.spread()
    assert {book.epoch for book in cluster.books.values()} == {100}


@pytest.mark.parametrize("later", [False, True])
async def test_a_layout_that_was_decided_and_promised_before_is_dead(cluster: Cluster, later: bool) -> None:
    cluster.registers.away = 0
    pending = cluster.moving("n6", **({"epoch": 300} if later else {}))[1]
    await cluster.paths.write("layout", encode(pending))
    await cluster.call("n3", "cluster.accept", pending, AcceptAnswer)
    cluster.registers.away = FOREVER
    assert (await cluster.gateway().apply(recovery(cluster)))["accepted"] == ["n3"]
    cluster.registers.away = 0
    assert not is_pending(pending, cluster.books["gw"])
    assert (await cluster.gateway().newest())[1], "nobody is told to apply it"
    await exchange_layout(cluster.paths, cluster.books["gw"])
    assert cluster.register == cluster.books["gw"].signed(100)
    for name in ("n3", "gw2"):
        await cluster.books[name].learn(cluster.register, "a peer")
    with pytest.raises(StoragedError, match=r"came first|another layout|Another layout"):
        await cluster.call("n3", "cluster.accept", pending, AcceptAnswer)
    with pytest.raises((LayoutOvertaken, LayoutRefused)):
        await cluster.gateway("gw2").apply(pending)


async def test_of_two_administrators_one_recovers(cluster: Cluster) -> None:
    one, other = recovery(cluster, address="h:1"), recovery(cluster, address="h:2")
    done = await asyncio.gather(
        cluster.gateway("gw", collect_s=0.3).apply(one),
        cluster.gateway("gw2", collect_s=0.3).apply(other),
        return_exceptions=True,
    )
    assert sum(isinstance(each, dict) for each in done) == 1
    (refused,) = [each for each in done if isinstance(each, LayoutNotAccepted)]
    assert "n3 has accepted another layout 100" in refused.message


async def test_a_second_loss_while_it_recovers(tmp_path: Path, cluster: Cluster) -> None:
    """Of five seed disks n4 and n5 are left; n4 accepts, and is lost, too."""
    cluster.history = History(cluster.history.world, replace(cluster.history.layouts[0], seeds=SEEDS))
    cluster.books = {name: cluster.history.book(persist=files.save) for name, files in cluster.files.items()}
    for name in (*cluster.acceptors, "n5"):
        cluster.files.setdefault(name, type(cluster.files["n1"])(tmp_path / "n5 layouts"))
        cluster.books.setdefault(name, cluster.history.book())
        cluster.boot(name)
        cluster.acceptors[name].may_recover = may
    before, lost = cluster.history.layouts[0], ("d1a", "d2a", "d3a")
    few = cluster.history.sign(cluster.history.after(without(before, *lost)))
    more = cluster.history.after(without(before, *lost, "d4a", seeds_recovered=200), epoch=200)
    cluster.away.add("n5")
    with pytest.raises(LayoutNotAccepted, match="n5 does not"):
        await cluster.gateway(collect_s=0.1).apply(few)
    cluster.away -= {"n5"}
    await cluster.call("n5", "cluster.accept", few, AcceptAnswer)
    cluster.away.add("n4")
    done = await cluster.gateway("gw2").apply(cluster.history.sign(more))
    assert done["accepted"] == ["n5"]
    with pytest.raises(StoragedError, match="n5 has accepted another layout 200"):
        await cluster.call("n5", "cluster.accept", few, AcceptAnswer)
    certified = cluster.history.accepted(cluster.history.after(without(before, *lost)), ("n4", "n5"))
    await cluster.books["gw"].learn(certified, "a peer")
    assert await cluster.books["gw"].learn(cluster.books["gw2"].signed(200), "a peer"), "it follows the other one"


SEEDS = ("d1a", "d2a", "d3a", "d4a", "d5a")


async def test_a_majority_that_lives_is_not_given_up(cluster: Cluster) -> None:
    signed = recovery(cluster)
    gateway = cluster.gateway(collect_s=0.1)
    gateway._answers = lambda disk: disk == "d2a"
    with pytest.raises(RecoverRefused, match="calls disk d2a lost for good, and it answers"):
        await gateway.apply(signed)
    cluster.registers.away = 0
    with pytest.raises(RecoverRefused, match="the system partition has one"):
        await cluster.gateway().apply(signed)
    cluster.registers.away = FOREVER

    async def lives(_layout: Layout) -> str:
        return "disk d1a, which it calls lost, answers here"

    cluster.acceptors["n3"].may_recover = lives
    with pytest.raises(LayoutNotAccepted, match=r"n3 does not accept layout 100: disk d1a"):
        await cluster.gateway(collect_s=0.1).apply(signed)
    cluster.boot("n3")
    with pytest.raises(StoragedError, match="this node can't tell whether the majority"):
        await cluster.call("n3", "cluster.accept", signed, AcceptAnswer)


class Sees:
    """A disk of node ``n3`` and what it sees of others."""

    def __init__(self) -> None:
        self.state, self.answering, self.quorum = "ok", set[str](), False

    def disk_readable(self, disk: str) -> bool:
        return disk in self.answering

    disk_prompt = disk_readable

    def disk_writable(self, disk: str) -> bool:
        return disk in self.answering

    def statistics(self) -> Sees:
        return self

    async def read(self, _path: str) -> bytes | None:
        if not self.quorum:
            await asyncio.Event().wait()
        return None


async def test_a_node_looks_for_itself_before_it_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storaged.node.recovering.READ_S", 0.01)
    layout, sees = with_nodes(first(), "n4", "n5"), Sees()
    replicas = {"d3a": sees}
    found = SystemRecovery(KnownLayouts(layout), "n3", replicas, sees, sees.read)  # type: ignore[arg-type]
    after = without(layout, "d1a", "d2a")
    assert await found.may_recover(after) == ""
    sees.answering = {"d2a", "d3a"}
    assert await found.may_recover(after) == "disk d2a, which it calls lost, answers here"
    sees.answering, sees.quorum = set(), True
    assert "still has a quorum" in await found.may_recover(after)
    sees.quorum, sees.state = False, "failed"
    assert await found.may_recover(after) == "its seed disk d3a is not in use"
    replicas.clear()
    assert await found.may_recover(after) == "its seed disk d3a is not in use"
