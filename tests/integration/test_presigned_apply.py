"""Layouts that were signed beforehand come into force: with votes alone, once, and not against another layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from storaged.cluster.identity import NodeSigner
from storaged.cluster.layout import Layout
from storaged.cluster.messages import AcceptAnswer
from storaged.cluster.presigned import layout_after, presign, step_for, step_to_end
from storaged.cluster.signed_layout import SignedLayout
from storaged.cluster.sparing import UNREACHABLE, Opinion, SignedVote, Vote
from storaged.cluster.votes import sign_vote
from storaged.errors import LayoutOvertaken, LayoutRefused, StoragedError
from storaged.wire import decode, encode
from tests.integration.test_layout_apply import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def votes(
    cluster: Cluster, *names: str, disk: str = "d1a", epoch: int = 1, for_s: int = 3600
) -> tuple[SignedVote, ...]:
    opinions = (Opinion(disk, UNREACHABLE, for_s),)
    return tuple(
        sign_vote(NodeSigner(cluster.history.identity(name)), Vote("c1", name, epoch, bytes(16), opinions))
        for name in names
    )


def after_loss(cluster: Cluster, signed: SignedLayout, seed: str = "d1a") -> SignedLayout:
    """The joint layout without votes."""
    known = replace(signed, following=presign(signed, cluster.history.world.authority.administration.sign))
    step = step_for(known, seed, set(decode(signed.payload, Layout).disk_by_id))
    assert step is not None
    return layout_after(known, step)


async def test_it_comes_into_force_with_votes_of_a_majority_alone(cluster: Cluster) -> None:
    joint = after_loss(cluster, cluster.history.signed[0])
    cluster.away.add("n1")
    wrong = {
        "no votes": (),
        "of one node": votes(cluster, "n2"),
        "of one node, twice": votes(cluster, "n2", "n2"),
        "of another disk": votes(cluster, "n2", "n3", disk="d2a"),
        "not long enough": votes(cluster, "n2", "n3", for_s=3599),
        "of a layout that nobody knows": votes(cluster, "n2", "n3", epoch=7),
    }
    for said, some in wrong.items():
        given = replace(joint, votes=some)
        with pytest.raises(LayoutRefused, match="d1a"):
            await cluster.gateway().apply(given)
        assert cluster.register == cluster.history.signed[0], f"{said}: it is not even decided"
    await cluster.paths.write("layout", encode(joint))
    for said, some in wrong.items():  # by a gateway that lies
        given = replace(joint, votes=some)
        with pytest.raises(StoragedError, match="signed for the loss of seed disk d1a"):
            await cluster.call("n2", "cluster.accept", given, AcceptAnswer)
        assert not (cluster.files["n2"].directory / "accepted").exists(), said
    await cluster.paths.write("layout", encode(cluster.history.signed[0]))
    done = await cluster.gateway().apply(replace(joint, votes=votes(cluster, "n2", "n3")))
    assert (done["epoch"], done["accepted"]) == (100, ["n2", "n3"])
    held = cluster.register
    assert held == cluster.books["gw"].signed(100)
    assert (len(held.certificate), held.votes) == (2, ()), "votes have done their work"
    assert step_to_end(held) is not None


async def test_votes_of_an_earlier_loss_do_not_count(cluster: Cluster) -> None:
    _, moving = cluster.moving()
    await cluster.gateway().apply(moving)
    await cluster.spread()
    joint = after_loss(cluster, cluster.register)
    with pytest.raises(LayoutRefused, match="A vote is of layout 1, from before the last layout that moved data"):
        await cluster.gateway().apply(replace(joint, votes=votes(cluster, "n2", "n3")))
    fresh = votes(cluster, "n2", "n3", "n4", epoch=100)
    assert (await cluster.gateway().apply(replace(joint, votes=fresh)))["epoch"] == 200


async def test_a_layout_that_moves_nothing_came_first(cluster: Cluster) -> None:
    """A gateway that knows it refuses what follows the one before. A node that knows it does not stand in the way of
    what was decided: that can't be withdrawn.
    """
    before = cluster.history.layouts[0]
    joint = replace(after_loss(cluster, cluster.history.signed[0]), votes=votes(cluster, "n2", "n3"))
    nodes = tuple(replace(node, address="h:2") for node in before.nodes)
    harmless = cluster.history.sign(cluster.history.after(replace(before, nodes=nodes), moving=False))
    await cluster.books["gw"].learn(harmless, "a peer")
    with pytest.raises(LayoutOvertaken, match=r"follows layout 1\. Layout 2 came first"):
        await cluster.gateway().apply(joint)
    await cluster.books["n2"].learn(harmless, "a peer")
    cluster.away.add("n1")
    await cluster.paths.write("layout", encode(cluster.history.signed[0]))
    assert (await cluster.gateway("gw2").apply(joint))["accepted"] == ["n2", "n3"]
    await cluster.spread()
    assert {book.epoch for book in cluster.books.values()} == {100}


async def test_an_administrators_layout_and_one_that_was_signed_beforehand(cluster: Cluster) -> None:
    joint = replace(after_loss(cluster, cluster.history.signed[0]), votes=votes(cluster, "n2", "n3"))
    _, moving = cluster.moving()
    cluster.away.update(("n1", "n2"))
    with pytest.raises(StoragedError):
        await cluster.gateway(collect_s=0.2).apply(moving)
    with pytest.raises(LayoutOvertaken, match="another layout 100 is decided"):
        await cluster.gateway("gw2").apply(joint)
    cluster.away.clear()
    assert (await cluster.gateway("gw2").apply(moving))["epoch"] == 100
    with pytest.raises(LayoutOvertaken, match="follows layout 1"):
        await cluster.gateway("gw2").apply(joint)


async def test_it_is_used_once_and_the_administrator_is_told_what_changed(cluster: Cluster) -> None:
    joint = replace(after_loss(cluster, cluster.history.signed[0]), votes=votes(cluster, "n2", "n3"))
    _, moving = cluster.moving()
    await cluster.gateway().apply(joint)
    with pytest.raises(LayoutOvertaken, match="the system partition moves to d1b, d2a, d3a"):
        await cluster.gateway().apply(moving)
    step = step_to_end(cluster.register)
    assert step is not None
    for acceptor in cluster.acceptors.values():
        acceptor.may_settle = whole
    await cluster.spread()
    await cluster.gateway().apply(layout_after(cluster.register, step))
    await cluster.spread()
    assert cluster.books["n2"].current.seeds == ("d1b", "d2a", "d3a")
    with pytest.raises(LayoutOvertaken, match=r"Layout 100 was in force\. Layout 200 followed it"):
        await cluster.gateway().apply(joint)


async def whole(_layout: Layout) -> str:
    return ""
