"""Layouts that are signed beforehand for the loss of a seed disk: what is signed, what is kept, and what is used."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from storaged.cli.planning import seed_spares
from storaged.cluster.layout import DiskEntry, Layout, Sparing
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.partition_map import PartitionMap
from storaged.cluster.presigned import (
    FOLLOWING_BYTES_MAX,
    STEPS_MAX,
    genuine,
    layout_after,
    payload_after,
    presign,
    spares_for,
    spares_of,
    step_for,
    step_to_end,
)
from storaged.cluster.signed_layout import Presigned, SignedLayout, verify_layout
from storaged.cluster.sparing import UNREACHABLE, DisksOut, Opinion, OutDisk, SignedVote, Vote
from storaged.cluster.succession import check_successor
from storaged.errors import LayoutRefused
from storaged.maintain.health import blocks_of
from storaged.node.system_sparing import REGISTER_LOOKS, SystemSparing, SystemSparingPorts
from storaged.objects.code.place import first_choice
from storaged.objects.records import PartEntry, Run
from storaged.sov1 import HEADER_BYTES, MAGIC, SUITE
from storaged.wire import decode, encode
from tests.doubles.layouts import KnownLayouts
from tests.worlds.authority import World
from tests.worlds.layouts import History, first

HEADER = (MAGIC + bytes((SUITE, 16))).ljust(HEADER_BYTES, b"\0")
FIVE = ("n1", "n2", "n3", "n4", "n5")


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(World(tmp_path), first(FIVE))


def following(history: History, signed: SignedLayout | None = None) -> SignedLayout:
    """``signed`` with what may follow it."""
    signed = signed or history.signed[-1]
    return replace(signed, following=presign(signed, history.world.authority.administration.sign))


def layout_of(signed: SignedLayout) -> Layout:
    return decode(signed.payload, Layout)


def used(history: History, seed: str) -> tuple[SignedLayout, SignedLayout, SignedLayout]:
    """A layout, and the joint and settled one that follow it when ``seed`` is lost."""
    signed = following(history)
    step = step_for(signed, seed, set(layout_of(signed).disk_by_id))
    assert step is not None
    joint = layout_after(signed, step)
    end = step_to_end(joint)
    assert end is not None
    return signed, joint, layout_after(joint, end)


# --- what is signed


def test_what_follows_exchanges_one_seed_disk_and_keeps_all_rules(history: History) -> None:
    signed, joint, settled = used(history, "d1a")
    before, middle, after = map(layout_of, (signed, joint, settled))
    for each, last, last_signed in ((middle, before, signed), (after, middle, joint)):
        assert check_successor(last, last_signed.hash, each)
    own = history.world.authority
    for each in (joint, settled):
        assert verify_layout(each, own.administration.public_key(), "c1")
    assert (middle.epoch, after.epoch, middle.base) == (100, 200, 1)
    assert (middle.if_out, after.if_out) == ("d1a", "")
    assert middle.seeds == before.seeds
    assert after.seeds == middle.seeds_next
    assert set(before.seeds) - set(after.seeds) == {"d1a"}
    assert replace(after, epoch=1, predecessor=b"", base=0, seeds=before.seeds, seeds_step=0) == before
    assert after.seeds_step == 2


def test_a_second_loss_is_provided_for_and_a_third_is_not(history: History) -> None:
    _, _, once = used(history, "d1a")
    assert set(spares_of(once)) == set(layout_of(once).seeds)
    step = step_for(once, "d2a", set(layout_of(once).disk_by_id))
    assert step is not None
    again = layout_after(once, step)
    end = step_to_end(again)
    assert end is not None
    assert layout_after(again, end).following == ()
    assert layout_of(again).epoch == 300


def test_spares_are_of_the_same_rack_first_and_of_the_same_node_last(history: History) -> None:
    layout = layout_of(history.signed[0])
    assert spares_for(layout, "d1a")[-1] == "d1b", "it helps where the disk alone is lost"
    assert {layout.node_of(disk) for disk in spares_for(layout, "d1a")[:-1]} == {"n4", "n5"}
    nodes = tuple(replace(node, location="FR/par1/n1") if node.name == "n4" else node for node in layout.nodes)
    near = replace(layout, nodes=nodes)
    assert near.node_of(spares_for(near, "d1a")[0]) == "n4"
    three = first()
    assert [spares_for(three, seed) for seed in three.seeds] == [("d1b",), ("d2b",), ("d3b",)]
    assert seed_spares(three) == {"d1a": ["d1b"], "d2a": ["d2b"], "d3a": ["d3b"]}
    assert seed_spares(replace(three, sparing=Sparing(domains_max=0))) == {}


def test_nothing_follows_while_an_administrator_is_at_work(history: History) -> None:
    layout = layout_of(history.signed[0])
    for changed in (
        replace(layout, seeds_next=("d4a", "d2a", "d3a"), seeds_step=1),
        replace(layout, seeds_lost=("d1a",)),
        replace(layout, sparing=Sparing(domains_max=0)),
    ):
        assert following(history, history.sign(changed)).following == ()


def test_what_follows_a_large_layout_fits(history: History) -> None:
    names = tuple(f"n{number}" for number in range(1, 101))
    large = first(names)
    large = replace(large, seeds=tuple(f"d{number}a" for number in range(1, 8)), sparing=Sparing())
    signed = following(history, history.sign(large))
    assert set(spares_of(signed)) == set(large.seeds)
    assert 0 < len(encode(signed.following)) <= FOLLOWING_BYTES_MAX
    assert len(signed.following) <= STEPS_MAX


def test_what_was_signed_does_not_depend_on_the_fields_that_a_version_knows(history: History) -> None:
    """A layout of version 0.1.0 ends before fields that this version has; one of a later version has more."""
    payload = history.signed[0].payload
    fields = msgspec.msgpack.decode(payload)
    step = Presigned("d1a", "d4a", b"")
    short = decode(payload_after(encode(fields[:9]), step), Layout)
    assert (short.if_out, short.seeds_next[0], short.sparing) == ("d1a", "d4a", Sparing())
    later = encode([*fields, "a field of a later version", [1]])
    found = msgspec.msgpack.decode(payload_after(later, step))
    assert found[len(fields) :] == ["a field of a later version", [1]]
    assert decode(payload_after(later, step), Layout).predecessor == hashlib.sha256(later).digest()


# --- the rule


def test_a_layout_that_was_signed_beforehand_changes_nothing_else(history: History) -> None:
    signed, joint, _ = used(history, "d1a")
    before, good = layout_of(signed), layout_of(joint)
    for more, said in (
        ({"profile": "1+1"}, "changes more than that"),
        ({"nodes": (replace(good.nodes[0], address="h:9"), *good.nodes[1:])}, "changes more than that"),
        ({"disks": (*good.disks, DiskEntry("d9", "n1", 1))}, "changes more than that"),
        ({"if_out": "d2a"}, "does not exchange it"),
        ({"seeds_next": ("d1a", "d2a", "d3a")}, "does not exchange it"),
    ):
        with pytest.raises(LayoutRefused, match=said):
            check_successor(before, signed.hash, replace(good, **more))  # type: ignore[arg-type]
    harmless = replace(before, epoch=2, predecessor=signed.hash, if_out="d1a")
    with pytest.raises(LayoutRefused, match="does not exchange it"):
        check_successor(before, signed.hash, harmless)


# --- what is kept


async def test_a_node_keeps_what_the_administration_key_signed(history: History) -> None:
    signed = following(history)
    one = signed.following[0]
    end = one.following[0]
    other_end = replace(one, following=(replace(end, signature=bytes(64)),))
    forged = replace(signed, following=(replace(one, signature=bytes(64)), other_end, replace(one, comes="d2b")))
    public = history.world.authority.administration.public_key()
    assert genuine(forged, public) == (replace(one, following=()),)
    assert genuine(signed, public) == signed.following
    deep = one
    for _ in range(60):
        deep = replace(one, following=(deep,))
    assert genuine(replace(signed, following=(deep,)), public) == (replace(one, following=()),)
    huge = replace(signed, following=(replace(one, comes="x" * FOLLOWING_BYTES_MAX), one))
    assert genuine(huge, public) == (), "more than is ever signed"
    assert genuine(replace(signed, following=(one, one, end, one)), public) == (one,), "each once"
    many = (*(replace(one, comes=f"x{number}") for number in range(STEPS_MAX)), one)
    assert genuine(replace(signed, following=many), public) == (), "they would cost a node seconds"
    vote = SignedVote(b"", b"", b"")
    saved: list[SignedLayout] = []

    async def persist(_epoch: int, each: SignedLayout) -> None:
        saved.append(each)

    book = book_of(history, persist=persist)
    book_signed = history.sign(history.after(layout_of(history.signed[0]), moving=False))
    fresh = following(history, book_signed)
    assert await book.learn(replace(fresh, votes=(vote,), following=(*fresh.following, replace(one))), "a peer")
    assert book.signed(2) == fresh == saved[-1], "without votes, and without what does not follow it"


async def test_what_a_peer_of_an_earlier_version_left_out_is_added(history: History) -> None:
    saved: list[SignedLayout] = []

    async def persist(_epoch: int, each: SignedLayout) -> None:
        saved.append(each)

    book = book_of(history, persist=persist)
    full = following(history)
    assert not book.signed(1).following
    assert not await book.learn(full, "the register layout")
    assert book.signed(1) == full == saved[-1]
    assert not await book.learn(replace(full, following=()), "a peer"), "and stays"
    assert book.signed(1) == full
    assert len(saved) == 1


def book_of(history: History, **facts: Any) -> LayoutBook:
    return history.book(history.signed[0], **facts)


def test_layouts_of_earlier_versions_decode(history: History) -> None:
    fields = msgspec.msgpack.decode(encode(following(history)))
    assert decode(encode(fields[:3]), SignedLayout) == history.signed[0]
    layout = msgspec.msgpack.decode(history.signed[0].payload)
    assert decode(encode(layout[:-1]), Layout).if_out == ""


# --- what a gateway does


class Book:
    """As far as the duty asks for it."""

    def __init__(self, signed: SignedLayout) -> None:
        self.newest = signed
        self.partitions = PartitionMap()

    @property
    def current(self) -> Layout:
        return layout_of(self.newest)

    def signed(self, _epoch: int) -> SignedLayout:
        return self.newest


class Duty:
    """Of a gateway whose register decides at once. ``away``: disks that do not answer."""

    def __init__(self, signed: SignedLayout, away: set[str]) -> None:
        self.book = Book(signed)
        self.away = away
        self.votes_say = UNREACHABLE
        self.reached: set[str] = set()
        """Disks that the storage nodes reach, and this gateway does not."""
        self.settles = ""
        self.decided: SignedLayout | None = None
        self.applied: list[SignedLayout] = []
        self.duty = SystemSparing(
            SystemSparingPorts(
                self.book,  # type: ignore[arg-type]
                self,  # type: ignore[arg-type]
                self.ask,
                lambda disk: disk not in self.away,
                self.may_settle,
                lambda _signed: None,
            )
        )

    def out(self, *disks: str) -> None:
        entries = tuple(OutDisk(disk, 1, UNREACHABLE) for disk in disks)
        self.book.partitions.note_out(DisksOut(self.book.partitions.out.number + 1, entries, ()))

    @property
    def current(self) -> Layout:
        return self.book.current

    async def ask(self, layout: Layout, disks: tuple[str, ...]) -> dict[str, tuple[Vote, SignedVote]]:
        found = {}
        for name in ("n2", "n3", "n4"):
            said = {disk: "" if disk in self.reached else self.votes_say for disk in disks}
            opinions = tuple(Opinion(disk, state, 3600) for disk, state in said.items())
            vote = Vote("c1", name, layout.epoch, bytes(16), opinions)
            found[name] = vote, SignedVote(encode(vote), b"", b"")
        return found

    async def may_settle(self, _layout: Layout) -> str:
        return self.settles

    async def newest(self) -> tuple[SignedLayout, bool]:
        return self.decided or self.book.newest, self.decided is None

    async def apply(self, signed: SignedLayout) -> dict[str, Any]:
        self.applied.append(signed)
        self.book.newest, self.decided = signed, None
        return {"epoch": layout_of(signed).epoch, "accepted": ["n2"]}

    async def once(self) -> str:
        await self.duty.once()
        return self.duty.reason


async def test_a_gateway_exchanges_a_seed_disk_that_is_out_and_ends_it_when_all_is_there(history: History) -> None:
    duty = Duty(following(history), {"d1a", "d1b"})
    assert await duty.once() == ""
    assert duty.applied == [], "it is away, and not out"
    duty.out("d1a", "d1b")
    duty.votes_say = ""
    assert "no majority of the storage nodes sees seed disk d1a away now" in await duty.once()
    duty.votes_say = UNREACHABLE
    await duty.once()
    (joint,) = duty.applied
    assert [decode(vote.payload, Vote).node for vote in joint.votes] == ["n2", "n3", "n4"]
    assert duty.current.if_out == "d1a"
    duty.settles = "the seed disks differ"
    assert await duty.once() == "the seed disks differ"
    assert len(duty.applied) == 1, "the end is not decided before it can be accepted"
    duty.settles = ""
    assert await duty.once() == ""
    assert "d1a" not in duty.current.seeds
    assert await duty.once() == ""
    assert len(duty.applied) == 2, "the disk that is out is no seed disk any more"


async def test_a_seed_disk_that_this_gateway_alone_does_not_reach_keeps_no_other_one_from_being_replaced(
    history: History,
) -> None:
    duty = Duty(following(history), {"d1a", "d2a"})
    duty.out("d1a", "d2a")
    duty.reached.add("d1a")
    assert await duty.once() == ""
    assert duty.current.if_out == "d2a"


async def test_a_gateway_takes_a_disk_that_answers_and_is_not_out(history: History) -> None:
    signed = following(history)
    wanted = spares_of(signed)["d1a"]
    assert len(wanted) == 3
    duty = Duty(signed, {"d1a", wanted[0]})
    duty.out("d1a")
    await duty.once()
    assert wanted[1] in duty.current.seeds_next
    duty = Duty(signed, {"d1a", *wanted})
    duty.out("d1a")
    assert "gives the place of d1a to a disk that answers" in await duty.once()
    duty.away -= {wanted[2], "d1a"}
    assert await duty.once() == "", "it is back"
    duty.away.add("d1a")
    duty.out("d1a", wanted[2])
    assert "to a disk that answers" in await duty.once(), "it is out itself"


async def test_a_gateway_finishes_what_another_one_has_decided(history: History) -> None:
    signed, joint, _ = used(history, "d2a")
    duty = Duty(signed, {"d1a"})
    duty.out("d1a")
    duty.decided = joint
    await duty.once()
    assert duty.applied == [joint]
    duty = Duty(signed, set())
    duty.decided = joint
    for _ in range(REGISTER_LOOKS):
        await duty.once()
    assert duty.applied == [joint], "the disk is back, and the layout would stand in the way of others"
    duty = Duty(signed, set())
    duty.decided = history.sign(history.after(replace(layout_of(signed), seeds_next=("d4a", "d2a", "d3a"))))
    for _ in range(REGISTER_LOOKS):
        await duty.once()
    assert duty.applied == [], "an administrator's is finished by him"
    duty = Duty(replace(joint, following=()), {"d1a"})
    assert "an administrator has to sign it" in await duty.once()


# --- what follows for fragments


def test_what_repair_placed_under_the_layout_before_stays_where_it_is(history: History) -> None:
    """Another seed disk places fragments as before. What is elsewhere, since a disk was away, is not moved for it."""
    signed, joint, settled = used(history, "d1a")
    before, after = layout_of(signed), layout_of(settled)
    layouts = KnownLayouts(before)
    group = bytes(16)
    elsewhere = next(disk.id for disk in before.disks if disk.id not in first_choice(before, group, before.target))
    run = Run(0, 1, before.target.k, before.target.m, before.epoch, {0: elsewhere})
    entry = PartEntry(1, group, 100_000, HEADER, 4, before.profile, (run,))
    layouts.learn(layout_of(joint))
    layouts.learn(after)
    assert before.placing == after.placing
    assert [place.placed for place in blocks_of(entry, 0, layouts, ())] == [True]
    drained = tuple(replace(disk, state="draining") if disk.id == elsewhere else disk for disk in after.disks)
    layouts.learn(replace(after, epoch=300, disks=drained))
    assert [place.placed for place in blocks_of(entry, 0, layouts, ())] == [False]
