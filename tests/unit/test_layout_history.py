"""Layouts have one history: which layout may follow another, and whose acceptances make it usable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.cluster.certificates import ACCEPTANCES_MAX, is_enough, verify_certificate
from storaged.cluster.layout import DiskEntry, Layout, problems_of
from storaged.cluster.layouts import LayoutBook, LayoutFiles
from storaged.cluster.moves import moves_between, places_digest
from storaged.cluster.signed_layout import Acceptance, SignedLayout, verify_layout
from storaged.cluster.succession import (
    GENERATION,
    check_successor,
    exchanged_seeds,
    is_numbered_as_moving,
    next_epoch,
)
from storaged.errors import LayoutRefused
from storaged.wire import Message, decode, encode
from tests.doubles.layouts import layout_of
from tests.worlds.authority import World
from tests.worlds.layouts import History, first, with_nodes


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(World(tmp_path))


# --- rules of succession


def test_layouts_that_move_data_have_epochs_of_their_own() -> None:
    assert [next_epoch(epoch, moving=True) for epoch in (0, 1, 99, 100, 101)] == [100, 100, 100, 200, 200]
    assert [next_epoch(epoch, moving=False) for epoch in (0, 1, 98, 99, 100)] == [1, 2, 99, 101, 101]


def test_a_node_is_added_and_taken_away_again(history: History) -> None:
    before = history.layouts[0]
    added = history.after(with_nodes(before, "n4"))
    assert check_successor(before, history.signed[0].hash, added)
    assert (added.epoch, added.base) == (100, 1)
    assert is_numbered_as_moving(added)
    history.add(added, history.sign(added))
    removed = history.after(before)
    assert check_successor(added, history.signed[1].hash, removed)
    assert (removed.epoch, removed.base) == (200, 1), "keys that never moved are where the first layout placed them"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"epoch": 1}, "must be higher"),
        ({"epoch": 101}, "multiples of 100"),
        ({"base": 0}, "by layout 100. They are where layout 1"),
        ({"base": 7}, "by layout 7. They are where layout 1"),
        ({"predecessor": b""}, "does not name layout 1"),
        ({"predecessor": bytes(32)}, "does not name layout 1"),
        ({"replicas": 1}, "from 3 to 1"),
        ({"profile": "8+1"}, "profile 8.1 needs 9 disks"),
        ({"seeds": ("d1a", "d2a", "d4a")}, "has step 0 of the seed disks"),
        ({"seeds": ("d1a", "d2a", "d4a"), "seeds_step": 1}, "change one at a time"),
        ({"seeds_next": ("d1a", "d4a", "d4b"), "seeds_step": 1}, "change one at a time"),
        ({"seeds_next": ("d1a", "d2a", "d3a"), "seeds_step": 1}, "change one at a time"),
        ({"seeds_next": ("d1a", "d2a"), "seeds_step": 1}, "change one at a time"),
        ({"seeds_next": ("d1a", "d2a", "d4a"), "seeds_step": 2}, "The next is one|the next is one"),
        ({"seeds_next": ("d1a", "d2a", "d4a")}, "has step 0 of the seed disks"),
        ({"seeds_next": ("d1a", "d1a", "d3a"), "seeds_step": 1}, "names a seed disk twice"),
        ({"seeds_next": ("d1a", "d2a", "d9a"), "seeds_step": 1}, "seed disk d9a is not in the layout"),
        ({"lost": ("d3b",)}, "gives data to disk d3b, which it calls lost for good"),
        ({"lost": ("d9a",)}, "calls disk d9a lost, which layout 1 does not have"),
    ],
)
def test_a_layout_that_breaks_a_rule_is_refused_and_the_rule_is_named(
    history: History, facts: dict[str, Any], said: str
) -> None:
    before = history.layouts[0]
    good = history.after(with_nodes(before, "n4"))
    check_successor(before, history.signed[0].hash, good)
    with pytest.raises(LayoutRefused, match=said):
        check_successor(before, history.signed[0].hash, replace(good, **facts))


def test_disks_that_are_lost_for_good_stay_lost(history: History) -> None:
    before = history.layouts[0]
    wider = with_nodes(before, "n4")
    without = tuple(disk for disk in wider.disks if disk.id != "d3b")
    lost = history.after(replace(wider, disks=without), lost=("d3b",))
    moves = check_successor(before, history.signed[0].hash, lost)
    assert "disk d3b is lost for good" in moves.disks
    history.add(lost, history.sign(lost))
    alone = replace(lost, epoch=200, predecessor=history.signed[1].hash)
    with pytest.raises(LayoutRefused, match="moves data, and moves none"):
        check_successor(lost, history.signed[1].hash, alone)
    with pytest.raises(LayoutRefused, match="no longer says that disks are lost"):
        check_successor(lost, history.signed[1].hash, replace(alone, lost=()))
    assert places_digest(lost) != places_digest(replace(lost, lost=()))


@pytest.mark.parametrize("moved", [False, True])
async def test_a_profile_that_the_disks_cannot_hold_is_refused_by_every_node(history: History, moved: bool) -> None:
    if moved:
        history.move(with_nodes(history.layouts[0], "n4"))
    book = history.book(*history.signed)
    before = history.layouts[-1]
    wide = history.sign(history.after(replace(before, profile="9+3"), moving=False))
    with pytest.raises(LayoutRefused, match=r"profile 9\+3 needs 12 disks"):
        await book.learn(wide, "a file")
    other = history.sign(history.after(replace(before, profile="1+1"), moving=False, epoch=before.epoch + 2))
    assert await book.learn(other, "a file"), "it needs no certificate: nothing moves"
    assert str(book.current.target) == book.current.target_text == "1+1"


def test_a_disk_named_twice_is_refused(history: History) -> None:
    before = history.layouts[0]
    twice = replace(before, disks=(*before.disks, DiskEntry("d1a", "n2", 1000)))
    with pytest.raises(LayoutRefused, match="twice"):
        check_successor(before, history.signed[0].hash, history.after(twice))


def test_racks_that_can_not_hold_the_replicas_any_more_are_refused(history: History) -> None:
    before = history.layouts[0]
    draining = tuple(replace(disk, state="draining") if disk.node == "n3" else disk for disk in before.disks)
    with pytest.raises(LayoutRefused, match="metadata wants 3 replicas in distinct racks; there are 2"):
        check_successor(before, history.signed[0].hash, history.after(replace(before, disks=draining)))


def test_a_draining_disk_gets_no_replica_and_no_fragment() -> None:
    layout = first(("n1", "n2", "n3", "n4"))
    draining = replace(layout, disks=tuple(replace(d, state="draining") if d.id == "d1a" else d for d in layout.disks))
    assert any("d1a" in layout.replicas_of(number) for number in range(64))
    assert not any("d1a" in draining.replicas_of(number) for number in range(1024))
    assert all(len(draining.replicas_of(number)) == 3 for number in range(1024))


def test_a_layout_that_moves_nothing_keeps_what_is_said_of_moved_partitions(history: History) -> None:
    before = history.layouts[0]
    renamed = replace(before, nodes=tuple(replace(node, address=f"{node.name}:2") for node in before.nodes))
    assert not check_successor(before, history.signed[0].hash, history.after(renamed, moving=False))
    assert not check_successor(before, history.signed[0].hash, replace(renamed, epoch=2, predecessor=b""))
    history.move(with_nodes(before, "n4"))
    moved = history.layouts[1]
    assert not check_successor(moved, history.signed[1].hash, history.after(moved, moving=False))
    with pytest.raises(LayoutRefused, match="numbered like"):
        check_successor(moved, history.signed[1].hash, history.after(moved))
    with pytest.raises(LayoutRefused):
        check_successor(moved, history.signed[1].hash, history.after(moved, moving=False, base=0))


def test_a_seed_is_exchanged_through_a_joint_layout(history: History) -> None:
    joint, settled = history.exchange("d3a", without(first(), "d3a"))
    history.move(joint)
    assert history.layouts[1].seeds_next == ("d1a", "d2a", "d3b"), "of the same rack"
    check_successor(history.layouts[0], history.signed[0].hash, history.layouts[1])
    history.move(settled)
    check_successor(history.layouts[1], history.signed[1].hash, history.layouts[2])
    assert (history.layouts[2].seeds, history.layouts[2].seeds_step) == (("d1a", "d2a", "d3b"), 2)
    for facts, said in (
        ({"seeds": ("d1a", "d2a", "d1b")}, "ends in one of the two sets"),
        ({"seeds_next": ("d1a", "d1b", "d3b")}, "ends in one of the two sets"),
        ({"seeds_step": 1}, "has step 1"),
    ):
        with pytest.raises(LayoutRefused, match=said):
            check_successor(history.layouts[1], history.signed[1].hash, replace(history.layouts[2], **facts))


def without(layout: Layout, *disks: str) -> Layout:
    return replace(layout, disks=tuple(disk for disk in layout.disks if disk.id not in disks))


def test_the_exchange_of_a_seed_may_end_where_it_began(history: History) -> None:
    joint, _ = history.exchange("d3a", without(first(), "d3a"))
    history.move(joint)
    back = replace(first(), seeds_step=2)
    assert check_successor(history.layouts[1], history.signed[1].hash, history.after(back))


def test_a_seed_without_a_rack_for_its_place_is_named() -> None:
    three = first()
    draining = replace(three, disks=tuple(replace(d, state="draining") if d.node == "n3" else d for d in three.disks))
    with pytest.raises(LayoutRefused, match="No disk can take the place of seed disk d3a: each rack with another"):
        exchanged_seeds(three, "d3a", draining)
    four = first(("n1", "n2", "n3", "n4"))
    assert exchanged_seeds(four, "d3a", without(four, "d3a")) == ("d1a", "d2a", "d3b"), "of the same rack"
    assert exchanged_seeds(four, "d3a", without(four, "d3a", "d3b"))[2] in ("d4a", "d4b")


# --- certificates


def test_a_majority_is_of_the_seed_disks_of_both_sets() -> None:
    layout = first()
    assert is_enough(layout, layout, {"n1", "n2"})
    assert not is_enough(layout, layout, {"n1"})
    assert not is_enough(layout, layout, {"n1", "n4", "n5"})
    joint = replace(first(("n1", "n2", "n3", "n4")), seeds_next=("d1a", "d2a", "d4a"), seeds_step=1)
    assert is_enough(joint, joint, {"n1", "n2"})
    assert not is_enough(joint, joint, {"n1", "n3"})
    assert not is_enough(joint, joint, {"n1", "n4"})
    assert is_enough(joint, joint, {"n1", "n3", "n4"})
    assert not is_enough(replace(layout, seeds=()), layout, {"n1", "n2", "n3"})


class Case:
    """A layout with the certificate that a case makes of it."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.before = history.layouts[0]
        self.layout = history.after(with_nodes(self.before, "n4"))
        self.signed = history.sign(self.layout)

    def check_refused(self, signed: SignedLayout, said: str) -> None:
        with pytest.raises(LayoutRefused, match=said):
            verify_certificate(signed, self.layout, self.before, self.history.world.authority.certificate)


def test_a_certificate_of_a_majority_holds(history: History) -> None:
    case = Case(history)
    for names in (("n1", "n2"), ("n3", "n1"), ("n1", "n2", "n3")):
        signed = history.accepted(case.layout, names)
        verify_certificate(signed, case.layout, case.before, history.world.authority.certificate)
        assert decode(encode(signed), SignedLayout) == signed


def test_no_other_certificate_holds(history: History, tmp_path: Path) -> None:
    case = Case(history)
    case.check_refused(case.signed, "has no certificate: the nodes of layout 1")
    case.check_refused(history.accepted(case.layout, ("n2",)), "accepted by n2 alone")
    case.check_refused(history.accepted(case.layout, ("n1", "n1")), "two acceptances of one node")
    case.check_refused(history.accepted(case.layout, ("n1", "n4")), "n4 is no storage node of layout 1")
    case.check_refused(history.accepted(case.layout, ("n1", "gw")), "gw is no storage node")
    other = replace(case.layout, profile="1+1")
    case.check_refused(history.accepted(case.layout, signed=history.sign(other)), "signature does not hold")
    strangers = History(World(tmp_path / "strangers"))
    stolen = replace(case.signed, certificate=strangers.accepted(case.layout, signed=case.signed).certificate)
    case.check_refused(stolen, "an acceptance does not count")
    acceptance = history.accepted(case.layout).certificate[0]
    case.check_refused(replace(case.signed, certificate=(acceptance,) * (ACCEPTANCES_MAX + 1)), "more than 32")
    case.check_refused(replace(case.signed, certificate=(Acceptance(bytes(9000), b""),)), "more than 8192 bytes")
    case.check_refused(replace(case.signed, certificate=(Acceptance(b"x", b"y"),)), "is not of this cluster")


def test_a_node_that_was_moved_or_removed_by_the_predecessor_has_no_vote(history: History) -> None:
    before = history.layouts[0]
    moved = replace(
        before, nodes=tuple(replace(n, location="FR/par9/z") if n.name == "n2" else n for n in before.nodes)
    )
    history = History(history.world, moved)
    case = Case(history)
    case.check_refused(history.accepted(case.layout), "n2 is no storage node of layout 1")
    removed = History(history.world, first(("n1", "n3", "n4")))
    case = Case(removed)
    case.layout = removed.after(with_nodes(case.before, "n5"))
    case.check_refused(removed.accepted(case.layout), "n2 is no storage node of layout 1")
    case.check_refused(removed.accepted(case.layout, ("n1", "n3", "n2")), "n2 is no storage node of layout 1")


def test_while_seeds_move_both_sets_certify(history: History) -> None:
    four = History(history.world, first(("n1", "n2", "n3", "n4")))
    wanted = without(four.layouts[0], "d3a", "d3b")
    joint, settled = four.exchange("d3a", wanted)
    four.move(joint, ("n2", "n3"))
    last = four.after(settled)
    for names in (("n1", "n3"), ("n1", "n4"), ("n3", "n4")):
        with pytest.raises(LayoutRefused, match="no majority"):
            verify_certificate(four.accepted(last, names), last, four.layouts[1], four.world.authority.certificate)
    verify_certificate(four.accepted(last, ("n1", "n3", "n4")), last, four.layouts[1], four.world.authority.certificate)


# --- the book


def chain(history: History) -> None:
    """1, then 100 with n4, then 101 at another address, then 200 without n3, one seed at a time."""
    history.move(with_nodes(history.layouts[0], "n4"))
    last = history.layouts[-1]
    elsewhere = replace(last, nodes=tuple(replace(node, address=f"{node.name}:2") for node in last.nodes))
    renamed = history.after(elsewhere, moving=False)
    history.add(renamed, history.sign(renamed))
    joint, settled = history.exchange("d3a", without(renamed, "d3a", "d3b"))
    history.move(joint)
    history.move(settled)


async def test_a_node_follows_the_history_step_by_step(history: History, tmp_path: Path) -> None:
    chain(history)
    files = LayoutFiles(tmp_path / "layouts")
    book = history.book(persist=files.save)
    await files.save(1, history.signed[0])
    heard: list[int] = []
    book.watch(lambda layout: heard.append(layout.epoch))
    for signed in history.signed[1:]:
        assert await book.learn(signed, "a test")
    assert heard == [100, 101, 200, 300]
    assert (book.generation, book.at(100).base) == (300, 1)
    again = history.book(*files.load())
    assert again.current == history.layouts[-1]
    assert [again.signed(layout.epoch) for layout in history.layouts] == history.signed


async def test_the_certificate_is_verified_again_at_the_next_start(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(history)
    stripped = [*history.signed[:3], replace(history.signed[3], certificate=()), *history.signed[4:]]
    with pytest.raises(LayoutRefused, match="Layout 200 moves data, and has no certificate"):
        history.book(*stripped)
    with pytest.raises(LayoutRefused, match="Layout 100 follows layouts that this node does not know"):
        history.book(*history.signed[1:])


async def test_a_layout_without_its_certificate_changes_nothing_and_is_taken_once_it_has_it(history: History) -> None:
    book = history.book()
    signed = history.move(with_nodes(history.layouts[0], "n4"))
    with pytest.raises(LayoutRefused, match="has no certificate"):
        await book.learn(replace(signed, certificate=()), "a file")
    assert [refused.epoch for refused in book.refusals()] == [100]
    assert (book.epoch, book.knows(100)) == (1, False)
    with pytest.raises(LayoutRefused, match="accepted by n1 alone"):
        await book.learn(replace(signed, certificate=signed.certificate[:1]), "node n2")
    assert await book.learn(signed, "node n2"), "the same sender, with the certificate"
    assert book.refusals() == ()


async def test_of_two_layouts_after_one_the_other_is_never_used(history: History) -> None:
    before = history.layouts[0]
    other = history.after(with_nodes(before, "n5"))
    later = replace(other, epoch=200)
    history.move(with_nodes(before, "n4"))
    book = history.book(*history.signed)
    with pytest.raises(LayoutRefused, match="Another layout is known under epoch 100"):
        await book.learn(history.accepted(other), "a test")
    with pytest.raises(LayoutRefused, match="Layout 100 came first, and moved data: disk d4a"):
        await book.learn(history.accepted(later), "a test")


async def test_a_decided_layout_outranks_one_that_moved_nothing(history: History) -> None:
    """Two administrators: one changed an address, the other one's layout with another node was decided."""
    before = history.layouts[0]
    elsewhere = replace(before, nodes=tuple(replace(node, address=f"{node.name}:2") for node in before.nodes))
    renamed = history.sign(history.after(elsewhere, moving=False))
    signed = history.move(with_nodes(before, "n4"))
    for order in ((renamed, signed), (signed, renamed)):
        book = history.book()
        for each in order:
            await book.learn(each, "a test")
        assert (book.epoch, book.at(2).node_by_name["n1"].address) == (100, "n1:2")
        assert history.book(history.signed[0], renamed, signed).epoch == 100


async def test_a_later_layout_is_taken_once_the_one_before_it_is_known(history: History) -> None:
    chain(history)
    book = history.book()
    for signed in history.signed[2:]:
        with pytest.raises(LayoutRefused):
            await book.learn(signed, "node n2")
    assert await book.learn(history.signed[1], "node n3")
    assert await book.learn(history.signed[2], "node n2"), "a refusal is not remembered for ever"


async def test_a_new_node_begins_with_a_layout_that_no_other_had_to_place(history: History) -> None:
    chain(history)
    empty = LayoutBook(
        history.world.authority.administration.public_key(), "c1", authority=history.world.authority.certificate
    )
    for signed in history.signed[1:]:
        with pytest.raises(LayoutRefused, match="follows layouts that this node does not know"):
            await empty.learn(signed, "a file")
    await empty.propose(history.signed[-1])
    assert empty.epoch == 0
    for signed in history.signed:
        await empty.learn(signed, "node n1")
    assert empty.epoch == 300


async def test_a_proposed_layout_says_where_nodes_are_and_nothing_else(history: History) -> None:
    chain(history)
    book = history.book()
    await book.propose(history.signed[-1])
    contact = book.contact("n4")
    assert contact is not None
    assert contact.address == "n4:2"
    assert book.contact("n9") is None
    assert (book.epoch, book.knows(300)) == (1, False)
    for signed in history.signed[1:]:
        await book.learn(signed, "node n1")
    assert book.contact("n3") is not None, "n3 has no disks any more, and is still a member"


async def test_a_certificate_needs_the_authority_that_this_node_trusts(history: History) -> None:
    blind = LayoutBook(history.world.authority.administration.public_key(), "c1", known=history.signed)
    with pytest.raises(LayoutRefused, match="nothing here verifies"):
        await blind.learn(history.move(with_nodes(history.layouts[0], "n4")), "a test")


class OldSignedLayout(Message, frozen=True):
    """As version 0.1.0 has it."""

    payload: bytes
    signature: bytes


def test_old_programs_and_old_files_stay_readable(history: History) -> None:
    signed = history.move(with_nodes(history.layouts[0], "n4"))
    old = decode(encode(signed), OldSignedLayout)
    assert (old.payload, old.signature) == (signed.payload, signed.signature)
    assert decode(encode(old), SignedLayout) == replace(signed, certificate=())
    public = history.world.authority.administration.public_key()
    assert verify_layout(signed, public, "c1") == history.layouts[1]
    assert moves_between(history.layouts[0], history.layouts[1])
    assert history.layouts[1].epoch % GENERATION == 0


async def test_a_history_is_verified_without_ranking_disks_for_each_of_its_layouts(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes 0.2 s a layout with 100 disks, at each start, and for each refused layout that a peer offers."""
    for name in ("n4", "n5"):
        history.move(with_nodes(history.layouts[-1], name), ("n1", "n2"))

    def ranked(_layout: Layout, _salt: bytes) -> list[str]:
        raise AssertionError

    monkeypatch.setattr(Layout, "_ranked", ranked)
    assert history.book(*history.signed).epoch == 200
    with pytest.raises(LayoutRefused, match="has no certificate"):
        await history.book(*history.signed[:2]).learn(replace(history.signed[2], certificate=()), "a peer")


async def test_a_damaged_layout_is_replaced_by_the_file_of_another_node(history: History, tmp_path: Path) -> None:
    """Removed, it would stop the node: those after it follow a layout that the node does not know then."""
    for name in ("n4", "n5"):
        history.move(with_nodes(history.layouts[-1], name), ("n1", "n2"))
    own, others = LayoutFiles(tmp_path / "own"), LayoutFiles(tmp_path / "others")
    for files in (own, others):
        for layout, signed in zip(history.layouts, history.signed, strict=True):
            await files.save(layout.epoch, signed)
    damaged = own.directory / "layout-000000000100.signed"
    damaged.write_bytes(b"\xc1")
    with pytest.raises(LayoutRefused, match=r"layout-000000000100.* another node has"):
        own.load()
    damaged.unlink()
    with pytest.raises(LayoutRefused, match="does not know"):
        history.book(*own.load())
    damaged.write_bytes((others.directory / damaged.name).read_bytes())
    assert history.book(*own.load()).epoch == 200


def test_layouts_without_ranks_keep_the_digest_that_ledgers_have_and_a_rank_changes_it() -> None:
    layout = layout_of((1, 1, 1))
    digest = places_digest(layout)
    assert digest.hex() == "1d6be0893b58ec67d90ca61bbb8234717d5b03f682362d1db7150f1c859b315e"
    first, *others = layout.disks
    ranked = replace(layout, disks=(replace(first, rank="old"), *others))
    assert places_digest(ranked) != digest
    assert moves_between(layout, ranked)
    twice = replace(layout, disks=(first, replace(others[0], rank=first.id), *others[1:]))
    assert "two disks have the rank of disk a0" in problems_of(twice)
