"""A cluster is restarted into this version node by node, and meanwhile a seed disk is lost: what nodes of version 0.1.0
read of layouts that were signed beforehand, and why none is used before most storage nodes have this version.

With the program of 0.1.0 itself (``LayoutBook.learn``) it was seen that it takes the layout with what may follow it,
takes the joint one as one that changes nothing, refuses the one that ends the exchange (LAYOUT_REFUSED: the seed disks
change), and goes on with the joint one. Here are its messages, field by field.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from storaged.cluster.identity import NodeSigner
from storaged.cluster.layout import Layout
from storaged.cluster.presigned import layout_after, presign, step_for, step_to_end
from storaged.cluster.signed_layout import Acceptance, SignedLayout
from storaged.cluster.sparing import NONCE_BYTES, UNREACHABLE, Opinion, SignedVote, Vote
from storaged.cluster.votes import check_said_out, sign_vote
from storaged.errors import LayoutRefused, VoteRefused
from storaged.wire import Message, decode
from storaged.wire import encode as encoded
from tests.worlds.authority import World
from tests.worlds.layouts import History, first

FOUR = ("n1", "n2", "n3", "n4")


class OldNode(Message, frozen=True):
    name: str
    location: str
    address: str
    roles: tuple[str, ...]


class OldDisk(Message, frozen=True):
    id: str
    node: str
    weight: int
    state: str = "active"


class OldLayout(Message, frozen=True):
    """``cluster.layout.Layout`` of version 0.1.0: it refuses one with other disks, seeds, profile or replicas."""

    cluster: str
    epoch: int
    nodes: tuple[OldNode, ...]
    disks: tuple[OldDisk, ...]
    seeds: tuple[str, ...]
    profile: str = "4+2"
    countries: tuple[str, ...] = ()
    replicas: int = 3
    jurisdictions: tuple[str, ...] = ()


class OldSigned(Message, frozen=True):
    """``SignedLayout`` of version 0.1.0, which keeps and passes on these two fields alone."""

    payload: bytes
    signature: bytes


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(World(tmp_path), first(FOUR))


def exchange(history: History) -> tuple[SignedLayout, SignedLayout, SignedLayout]:
    """A layout, and those that follow it when seed disk d1a is lost."""
    bare = history.signed[-1]
    signed = msgspec.structs.replace(bare, following=presign(bare, history.world.authority.administration.sign))
    step = step_for(signed, "d1a", set(decode(signed.payload, Layout).disk_by_id))
    assert step is not None
    joint = layout_after(signed, step)
    end = step_to_end(joint)
    assert end is not None
    return signed, joint, layout_after(joint, end)


def seen_by_0_1_0(signed: SignedLayout) -> OldLayout:
    old = decode(encoded(signed), OldSigned)
    assert (old.payload, old.signature) == (signed.payload, signed.signature), "what the administrator has signed"
    return decode(old.payload, OldLayout)


def test_it_sees_no_move_in_the_joint_layout_and_other_seeds_in_the_one_that_ends_it(history: History) -> None:
    before, joint, settled = map(seen_by_0_1_0, exchange(history))
    assert (joint.seeds, joint.disks, joint.profile) == (before.seeds, before.disks, before.profile)
    assert joint.epoch > before.epoch
    assert settled.seeds != before.seeds, "which it refuses: it would move data"
    assert len(set(settled.seeds) & set(before.seeds)) == 2, "any two majorities have a disk in common"


def test_nodes_that_do_not_vote_count_so_nothing_is_used_before_most_have_this_version(history: History) -> None:
    """0.1.0 has no method ``cluster.vote``. Gateways come first, so by then none of them has 0.1.0."""
    layout = history.layouts[0]

    def votes(*nodes: str) -> tuple[SignedVote, ...]:
        said = (Opinion("d1a", UNREACHABLE, layout.sparing.registers_s),)
        return tuple(
            sign_vote(NodeSigner(history.identity(node)), Vote("c1", node, 1, bytes(NONCE_BYTES), said))
            for node in nodes
        )

    def check(*nodes: str) -> None:
        authority = history.world.authority.certificate
        check_said_out("d1a", votes(*nodes), 1, {1: layout}.__getitem__, authority, "c1")

    for new in ((), ("n2",), ("n2", "n3")):
        with pytest.raises((VoteRefused, ValueError)):
            check(*new)
    check("n2", "n3", "n4")


async def test_a_node_that_had_0_1_0_in_the_middle_of_an_exchange_learns_its_end_after_its_restart(
    history: History,
) -> None:
    before, joint, settled = exchange(history)
    kept = [SignedLayout(one.payload, one.signature) for one in (before, joint)]
    book = history.book(*kept)
    assert book.epoch == 1, "the joint one has no certificate here"
    for one in (joint, settled):
        layout = decode(one.payload, Layout)
        assert await book.learn(history.accepted(layout, ("n2", "n3"), one), "n2")
        assert book.current == layout
    with pytest.raises(LayoutRefused):
        history.book(kept[1])
    forged = msgspec.structs.replace(joint, certificate=(Acceptance(b"", b""),))
    with pytest.raises(LayoutRefused):
        history.book(kept[0], forged)
