"""Which disks are out, by whose votes, and where partitions should be then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from storaged.admin.sparing import (
    SparingFacts,
    details,
    document,
    may_be_the_network,
    seed_details,
    short_details,
    unspared,
    waited_for,
    with_room_judged,
)
from storaged.admin.status import Facts, judge
from storaged.cluster.identity import NodeSigner
from storaged.cluster.layout import PARTITIONS, Layout, RevokedCertificate, Sparing
from storaged.cluster.partitions import is_settled
from storaged.cluster.ports import Call, DiskStatus, PeerIdentity
from storaged.cluster.sparing import (
    ABSENT,
    NONE_OUT,
    OUT,
    UNREACHABLE,
    DisksOut,
    Opinion,
    OutDisk,
    SignedVote,
    Vote,
    VoteAsk,
    decide,
    due,
    signed_bytes,
    target,
)
from storaged.cluster.votes import check_votes, sign_vote, verify_vote
from storaged.errors import PeerUnreachable, VoteRefused
from storaged.maintain.spare_room import Shortage
from storaged.node.move_progress import count_partitions
from storaged.node.sparing import PAUSE_MAX_S, DiskTimes, NodeSparing, Voter
from storaged.node.sparing_duty import SparingDuty, SparingPorts
from storaged.units import GIB, MIB
from storaged.wire import decode, encode
from tests.doubles.layouts import KnownLayouts
from tests.worlds.authority import World
from tests.worlds.layouts import History, first


class FakeClock:
    """Time passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now

    def wall_ms(self) -> int:
        return 10**12 + int(self.now * 1000)


FOUR = ("n1", "n2", "n3", "n4")
HOUR = 3600


def four(**facts: Any) -> Layout:
    return first(FOUR, **facts)


# --- where partitions should be


def test_an_out_disk_costs_each_partition_one_replica_at_most_and_others_nothing() -> None:
    layout = four()
    for out in (("d4a",), ("d4a", "d4b")):
        wanted = target(layout, out)
        assert wanted.epoch == layout.epoch
        assert wanted.domain_by_disk == layout.domain_by_disk
        for number in range(PARTITIONS):
            before, after = set(layout.replicas_of(number)), set(wanted.replicas_of(number))
            assert not after & set(out)
            assert len({layout.domain_by_disk[disk] for disk in after}) == 3
            assert len(before - after) == (1 if before & set(out) else 0)


def test_with_three_racks_and_one_gone_nothing_moves_but_a_lone_disk_is_replaced_in_its_rack() -> None:
    layout = first()
    assert target(layout, ("d3a", "d3b")) is layout
    assert target(layout, ()) is layout
    assert target(layout, ("gone",)) is layout
    wanted = target(layout, ("d1a", "d3a", "d3b"))
    states = {disk.id: disk.state for disk in wanted.disks}
    assert [disk for disk, state in states.items() if state == OUT] == ["d1a"]
    assert all(len(wanted.replicas_of(number)) == 3 for number in range(PARTITIONS))


def test_where_partitions_are_does_not_depend_on_what_is_out() -> None:
    known = KnownLayouts(four())
    before = [known.partition(number) for number in range(PARTITIONS)]
    fresh = KnownLayouts(four())
    for layouts in (known, fresh):
        layouts.partitions.note_out(DisksOut(1, (OutDisk("d4a", 5, UNREACHABLE),), ()))
        assert [layouts.partition(number) for number in range(PARTITIONS)] == before
        wanted = layouts.partitions.target(layouts.current)
        assert layouts.partitions.target(layouts.current) is wanted
        assert not all(is_settled(state, wanted) for state in before)
        for epoch in (2, 3):  # layouts that do not come into use, since they can't be kept
            layouts.partitions.prepare(replace(four(), epoch=epoch), layouts.partitions.out)
        assert layouts.partitions.target(layouts.current) is wanted
        assert not layouts.partitions.note_out(DisksOut(1, (), ())), "an older record changes nothing"
        assert layouts.partitions.note_out(DisksOut(2, (), ()))
        assert layouts.partitions.target(layouts.current) is layouts.current


# --- what status says


def test_status_says_what_is_out_what_others_have_taken_over_and_what_is_waited_for() -> None:
    layout = four()
    states = [KnownLayouts(layout).partition(number) for number in range(PARTITIONS)]
    held = sum("d4a" in state.present for state in states)
    record = DisksOut(1, (OutDisk("d4a", 5, UNREACHABLE),), ())
    seen = {"d4a": away("d4a"), "d4b": away("d4b", 600)}

    def said(**facts: Any) -> tuple[dict[str, Any], str]:
        usual: dict[str, Any] = {"layout": layout, "record": record, "seen": seen, "states": states}
        usual |= facts
        found = SparingFacts(target=target(usual["layout"], usual["record"].disks), **usual)
        shown = document(found)
        ((subject, since, detail),) = details(found, shown)
        assert (subject, since) == ("FR/par1/n4/n4/d4a", 5)
        return shown, detail

    shown, detail = said()
    assert f"{held} partitions still have to move" in detail
    assert shown["waiting"] == [{"disk": "d4b", "state": UNREACHABLE, "away_s": 600, "out_in_s": 3000}]
    assert "seed disk" not in detail
    assert "is not known yet" in said(states=None)[1]
    assert "it is a seed disk" in said(layout=replace(layout, seeds=("d1a", "d2a", "d4a")))[1]
    assert "have taken over" in said(states=[])[1]
    assert "gets its share back in 9 min" in said(seen={"d4a": Opinion("d4a", "", 60)})[1]
    three = first(("n1", "n2", "n4"))
    rack = DisksOut(1, (OutDisk("d4a", 5, UNREACHABLE), OutDisk("d4b", 5, UNREACHABLE)), ())
    found = SparingFacts(three, target(three, rack.disks), rack, seen, states)
    for _, _, detail in details(found, document(found)):
        assert "a partition needs 3 racks, 2 are left" in detail
        assert "stop when one more rack fails" in detail


def test_status_says_what_has_no_room_on_the_disks_that_are_left_and_how_much_is_short() -> None:
    layout = four()
    record = DisksOut(1, (OutDisk("d4a", 5, UNREACHABLE),), ())
    facts = SparingFacts(layout, target(layout, record.disks), record, {"d4a": away("d4a")}, [])
    assert short_details(facts) == []
    short = facts._replace(shortage=Shortage(3 * GIB, GIB), disks_short={"d2b": 512 * MIB})
    (what, fragments), (place, partitions) = short_details(short)
    assert (what, place) == ("fragments", "FR/par1/n2/n2/d2b")
    assert "3.0 GiB that lie on disks which are away" in fragments
    assert "1.0 GiB of them have no room on the disks that are left, with at most 1 fragments" in fragments
    assert "it lacks 512.0 MiB" in partitions
    shown = document(short)
    assert (shown["needed_bytes"], shown["short_bytes"], shown["disks_short"]) == (3 * GIB, GIB, {"d2b": 512 * MIB})
    problems = judge(Facts(layout, [], "2+1", spares_short=short_details(short)), 10)["problems"]
    assert [entry["detail"] for entry in problems if entry["code"] == "SPARING_LACKS_ROOM"] == [fragments, partitions]


def test_room_is_judged_once_a_disk_is_not_waited_for_any_more() -> None:
    layout, none = four(), NONE_OUT
    delay_s = layout.sparing.fragments_s
    here = {"d1a": Opinion("d1a", "", 9 * delay_s)}
    assert waited_for(layout, none, here) == frozenset()
    assert waited_for(layout, none, here | {"d4a": away("d4a", delay_s - 1)}) == frozenset()
    some = here | {"d4a": away("d4a", delay_s), "d3a": away("d3a", 1)}
    assert waited_for(layout, none, some) == {"d4a", "d3a"}, "the other one takes nothing now"
    restarted = {"d4a": away("d4a", 1)}
    assert waited_for(layout, DisksOut(1, (OutDisk("d4a", 5, UNREACHABLE),), ()), restarted) == {"d4a"}


def test_nothing_is_replaced_while_more_racks_are_silent_for_long_than_one() -> None:
    layout = four()
    delay_s = layout.sparing.fragments_s
    two = {"d4a": away("d4a", delay_s), "d3a": away("d3a", delay_s), "d1a": Opinion("d1a", "", 9 * delay_s)}
    assert may_be_the_network(layout, two)
    assert not may_be_the_network(layout, {**two, "d3a": away("d3a", delay_s - 1)})
    assert not may_be_the_network(layout, {**two, "d3a": away("d3a", delay_s, ABSENT)}), "its node answers"
    never = replace(layout, sparing=replace(layout.sparing, domains_max=0))
    assert may_be_the_network(never, {"d4a": away("d4a", delay_s)}), "the layout replaces nothing"


class Counted(NamedTuple):
    away_bytes: int
    partition_bytes: int


def test_status_judges_room_as_repair_and_the_mover_do_and_misses_none_where_they_replace_nothing() -> None:
    layout = replace(four(), profile="2+1")
    delay_s, free = layout.sparing.fragments_s, {disk.id: 0 for disk in layout.disks if disk.id != "d4a"}
    reports = {disk.id: DiskStatus(disk.id, "", "ok", GIB) for disk in layout.disks}
    record, known = DisksOut(1, (OutDisk("d4a", 5, UNREACHABLE),), ()), KnownLayouts(layout)
    states = [known.partition(number) for number in range(PARTITIONS)]
    gone = {"d4a": away("d4a", delay_s)}
    counts = [Counted(MIB, 1000), Counted(MIB, 1000)]

    def judged(free: dict[str, int], seen: dict[str, Opinion]) -> SparingFacts:
        facts = SparingFacts(layout, target(layout, record.disks), record, seen, states)
        return with_room_judged(facts, reports, free, counts)

    found = judged(free, gone)
    assert found.shortage.needed_bytes == 2 * MIB
    assert found.shortage.short_bytes == pytest.approx(2 * MIB, rel=0.01)
    assert set(found.disks_short) == set(free)
    assert sum(found.disks_short.values()) == 1000 * sum("d4a" in state.present for state in states)
    assert judged(dict.fromkeys(free, GIB), gone)[-2:] == (Shortage(2 * MIB, 0), {})
    two = judged({**free, "d3a": 0}, {**gone, "d3a": away("d3a", delay_s)})
    assert two.shortage == Shortage()
    assert two.disks_short == found.disks_short, "partitions leave a disk that is out in any case"


def test_status_says_what_to_type_for_a_seed_disk_that_is_out() -> None:
    record = DisksOut(1, (OutDisk("d1a", 5, UNREACHABLE), OutDisk("d4a", 6, UNREACHABLE)), ())

    def said(layout: Layout, seen: dict[str, Opinion]) -> list[tuple[str, int, str]]:
        facts = SparingFacts(layout, target(layout, record.disks), record, seen, [])
        return seed_details(facts, document(facts))

    ((subject, since, detail),) = said(four(), {})
    assert (subject, since) == ("FR/par1/n1/n1/d1a", 5), "d4a is none"
    assert "2 of 3 seed disks are left, 0 more may fail" in detail
    assert "`storaged disk remove AUTHORITY n1 d1a`, `storaged cluster layout AUTHORITY`" in detail
    assert said(four(), {"d1a": Opinion("d1a", "", 60)}) == [], "it is back"
    lost = replace(four(), seeds_lost=("d1a",))
    assert said(lost, {}) == [], "it is lost for good, and counts no more"
    found = judge(Facts(four(), [], "2+1", seeds_out=said(four(), {})), 10)
    assert [entry["detail"] for entry in found["problems"] if entry["code"] == "SEED_DISK_OUT"] == [detail]


def test_status_says_which_disk_takes_the_place_of_a_seed_disk_and_where_none_may() -> None:
    record = DisksOut(1, (OutDisk("d1a", 5, UNREACHABLE),), ())

    def facts(layout: Layout, spares: dict[str, tuple[str, ...]], reason: str = "") -> SparingFacts:
        return SparingFacts(layout, target(layout, record.disks), record, {}, [], "", spares, reason)

    def said(found: SparingFacts) -> str:
        ((_, _, detail),) = seed_details(found, document(found))
        return detail

    spares = {"d1a": ("d4a", "d1b"), "d2a": ("d4a",), "d3a": ("d4a",)}
    ready = facts(four(), spares, "no majority of the storage nodes sees seed disk d1a away now")
    assert "By itself disk d4a of n4 or disk d1b of n1 takes its place (no majority" in said(ready)
    assert unspared(ready) == []
    away_too = ready._replace(seen={"d4a": away("d4a", 60)})
    assert "By itself disk d1b of n1 takes its place" in said(away_too)
    none = ready._replace(seen={"d4a": away("d4a", 60), "d1b": away("d1b", 60)})
    assert "Only a layout that an administrator signs replaces it (no majority" in said(none)
    shown = document(ready)
    assert shown["seeds"][0] == {"disk": "d1a", "node": "n1", "spares": ["d4a", "d1b"]}
    assert not shown["seed_moves"]
    joint = facts(replace(four(), seeds_next=("d4a", "d2a", "d3a"), if_out="d1a"), {}, "the seed disks differ")
    assert "Disk d4a of n4 takes its place: it gets what the others have (the seed disks differ)" in said(joint)
    assert document(joint)["seed_moves"]
    assert unspared(joint) == [], "that is not the moment"
    old = facts(four(), {"d1a": ("d4a",)})
    place = "d4b of n4 could take its place, and may not"
    assert unspared(old) == [("FR/par1/n2/n2/d2a", f"disk {place}"), ("FR/par1/n3/n3/d3a", f"disk {place}")]
    assert unspared(facts(replace(four(), sparing=Sparing(domains_max=0)), {})) == []
    alone = replace(four(), disks=tuple(disk for disk in four().disks if disk.id in four().seeds))
    assert unspared(facts(alone, {})) == [], "there is none"
    found = judge(Facts(four(), [], "2+1", seeds_unspared=unspared(old)), 10)
    assert [entry["code"] for entry in found["warnings"]] == ["SEED_NOT_SPARED"] * 2


def test_status_says_that_too_few_operators_or_racks_that_are_not_drained_are_left() -> None:
    def said(layout: Layout, disks: Iterable[str]) -> str:
        record = DisksOut(1, tuple(OutDisk(disk, 5, UNREACHABLE) for disk in disks), ())
        facts = SparingFacts(layout, target(layout, record.disks), record, {}, [])
        (detail,) = {detail for _, _, detail in details(facts, document(facts))}
        return detail

    five = first(("n1", "n2", "n3", "n4", "n5"))
    operators = zip((node.location for node in five.nodes if "storage" in node.roles), "abbcc", strict=True)
    spread = replace(five, spread="operators", operators=tuple(operators))
    assert "not replaced: an operator may have 1 of a partition's 3 replicas, and too few" in said(
        spread, ("d1a", "d1b")
    )
    drained = tuple(replace(disk, state="draining") if disk.node == "n3" else disk for disk in four().disks)
    assert "a partition needs 3 racks, 2 are left" in said(replace(four(), disks=drained), ("d4a", "d4b"))


# --- decisions


def votes_of(
    world: World, layout: Layout, said: dict[str, Iterable[Opinion]], nonce: bytes = bytes(16)
) -> dict[str, tuple[Vote, SignedVote]]:
    found = {}
    for node, opinions in said.items():
        vote = Vote("c1", node, layout.epoch, nonce, tuple(opinions))
        found[node] = vote, sign_vote(NodeSigner(History(world).identity(node)), vote)
    return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def away(disk: str, for_s: int = HOUR, state: str = UNREACHABLE) -> Opinion:
    return Opinion(disk, state, for_s)


def test_a_majority_of_all_storage_nodes_puts_a_disk_out_and_fewer_do_not(world: World) -> None:
    layout = four()
    assert due(layout, NONE_OUT, {"d4a": away("d4a", HOUR - 1)}) == ()
    assert due(layout, NONE_OUT, {"d4a": away("d4a"), "d4b": away("d4b", 5)}) == ("d4a",)
    two = votes_of(world, layout, {"n1": [away("d4a")], "n2": [away("d4a")]})
    assert decide(layout, NONE_OUT, two, 10**9) is None
    hasty = votes_of(world, layout, {name: [away("d4a", HOUR - 1)] for name in ("n1", "n2", "n3")})
    assert decide(layout, NONE_OUT, hasty, 10**9) is None
    said = {"n1": [away("d4a", 2 * HOUR)], "n2": [away("d4a", HOUR + 7)], "n3": [away("d4a", 3 * HOUR)]}
    record = decide(layout, NONE_OUT, votes_of(world, layout, said), 10**9)
    assert record is not None
    assert record.out == (OutDisk("d4a", 10**9 - 1000 * (HOUR + 7), UNREACHABLE),)
    assert (record.number, len(record.votes)) == (1, 3)


def test_an_out_disk_comes_back_after_it_has_answered_for_a_while(world: World) -> None:
    layout = four()
    known = DisksOut(4, (OutDisk("d4a", 5, UNREACHABLE), OutDisk("d4b", 5, UNREACHABLE)), ())
    assert due(layout, known, {"d4a": Opinion("d4a", "", 599)}) == ()
    assert due(layout, known, {"d4a": Opinion("d4a", "", 600)}) == ("d4a",)
    back = {name: [Opinion("d4a", "", 600)] for name in ("n1", "n2", "n4")}
    record = decide(layout, known, votes_of(world, layout, back), 10**9)
    assert record is not None
    assert (record.number, record.disks) == (5, {"d4b"})
    del back["n4"]
    assert decide(layout, known, votes_of(world, layout, back), 10**9) is None
    # Nobody has to vote for a disk that the layout names no more, or when the policy ends.
    assert decide(first(), known, {}, 10**9) == DisksOut(5, (), ())
    assert decide(replace(layout, sparing=Sparing(domains_max=0)), known, {}, 10**9) == DisksOut(5, (), ())


def test_only_so_many_silent_racks_are_replaced_but_every_broken_disk_of_a_node_that_answers(world: World) -> None:
    layout = first(("n1", "n2", "n3", "n4", "n5"))
    opinions = [
        away("d1a"),
        away("d1b"),
        away("d2a", 2 * HOUR),
        away("d2b"),
        away("d3a", state="failed"),
        away("d4a", state="foreign"),
        away("d4b", state=ABSENT),
    ]
    votes = votes_of(world, layout, dict.fromkeys(("n3", "n4", "n5"), opinions))
    record = decide(layout, NONE_OUT, votes, 10**9)
    assert record is not None
    assert record.disks == {"d2a", "d2b", "d3a", "d4a", "d4b"}, "rack n2 was away first"
    assert decide(layout, record, votes, 10**9) is None
    wider = replace(layout, sparing=Sparing(domains_max=2))
    later = decide(wider, record, votes, 10**9)
    assert later is not None
    assert {"d1a", "d1b"} <= later.disks


# --- signed votes


def test_votes_count_if_a_storage_node_of_their_layout_signed_them(world: World) -> None:
    layout, history = four(), History(world)
    known = KnownLayouts(layout)
    vote = Vote("c1", "n1", 1, bytes(16), (away("d4a"),))

    def verify(signed: SignedVote) -> Vote:
        return verify_vote(signed, known.at, world.authority.certificate, "c1")

    mine = NodeSigner(history.identity("n1"))
    assert verify(sign_vote(mine, vote)) == vote
    wrong: list[tuple[str, SignedVote]] = [
        ("signed by n1", sign_vote(mine, replace(vote, node="n2"))),
        ("no vote by layout", sign_vote(NodeSigner(history.identity("gw")), replace(vote, node="gw"))),
        ("no vote by layout", sign_vote(NodeSigner(world.node("n9")), replace(vote, node="n9"))),
        ("no vote by layout", sign_vote(NodeSigner(world.node("n2", location="FR/par1/x")), replace(vote, node="n2"))),
        ("not known here", sign_vote(mine, replace(vote, epoch=7))),
        ("signed by n1 of c1", sign_vote(mine, replace(vote, cluster="c2"))),
        ("twice", sign_vote(mine, replace(vote, opinions=(away("d4a"), away("d4a"))))),
        ("characters", sign_vote(mine, replace(vote, opinions=(away("d4a", state="x" * 33),)))),
        ("does not hold", replace(sign_vote(mine, vote), signature=sign_vote(mine, replace(vote, epoch=2)).signature)),
        ("does not count", replace(sign_vote(mine, vote), payload=b"\xc1")),
        ("bytes", replace(sign_vote(mine, vote), payload=bytes(70_000))),
    ]
    for reason, signed in wrong:
        with pytest.raises(VoteRefused, match=reason):
            verify(signed)


def test_a_certificate_has_no_vote_under_a_layout_that_revokes_it(world: World) -> None:
    stolen = History(world).identity("n1")
    revoking = replace(four(), epoch=2, revoked=(RevokedCertificate(stolen.peer.fingerprint, "n1", 10**13),))
    known = KnownLayouts(four())
    known.learn(revoking)

    def verify(epoch: int) -> Vote:
        vote = Vote("c1", "n1", epoch, bytes(16), (away("d4a"),))
        return verify_vote(sign_vote(NodeSigner(stolen), vote), known.at, world.authority.certificate, "c1")

    assert verify(1).node == "n1", "what is out stays out: it was voted before"
    with pytest.raises(VoteRefused, match="revokes the certificate of n1"):
        verify(2)


def test_a_record_has_the_votes_of_a_majority_for_each_disk(world: World) -> None:
    layout = four()
    known = KnownLayouts(layout)

    def check(record: DisksOut) -> None:
        check_votes(record, known.at, world.authority.certificate, "c1")

    votes = votes_of(world, layout, {name: [away("d4a")] for name in ("n1", "n2", "n3")})
    record = decide(layout, NONE_OUT, votes, 10**9)
    assert record is not None
    check(record)
    later = votes_of(world, layout, {name: [away("d4b")] for name in ("n1", "n2", "n3")}, b"another nonce..!")
    both = decide(layout, record, later, 10**9)
    assert both is not None
    assert both.disks == {"d4a", "d4b"}
    check(both)
    known.learn(replace(layout, epoch=2, sparing=Sparing(registers_s=9 * HOUR)))
    check(both)  # as the layout of the votes said
    stay = decide(layout, both, votes_of(world, layout, {n: [Opinion("d4a", "", 600)] for n in FOUR[1:]}), 10**9)
    assert stay is not None
    check(stay)
    for forged in (
        replace(record, votes=record.votes[:2]),
        replace(record, votes=(*record.votes[:2], record.votes[0])),
        replace(record, out=(OutDisk("d3a", 5, UNREACHABLE),)),
        # What nodes said at different times is not added up.
        replace(record, votes=(*record.votes[:2], votes_of(world, layout, {"n3": [away("d4a")]}, b"x" * 16)["n3"][1])),
        replace(record, votes=tuple(signed for _, signed in short(world, layout).values())),
    ):
        with pytest.raises(VoteRefused, match="No majority"):
            check(forged)


def short(world: World, layout: Layout) -> dict[str, tuple[Vote, SignedVote]]:
    """Of three nodes that have not waited long enough."""
    return votes_of(world, layout, {name: [away("d4a", HOUR - 1)] for name in ("n1", "n2", "n3")})


# --- what a node has seen


def test_times_begin_anew_with_each_change_and_after_a_pause_of_the_process() -> None:
    clock, states = FakeClock(), {"d4a": ""}
    times = DiskTimes(KnownLayouts(four()), lambda disk: states.get(disk, ""), clock)

    def after(seconds: float) -> Opinion:
        clock.advance(seconds)
        return times.seen()["d4a"]

    assert after(0) == Opinion("d4a", "", 0)
    assert after(20) == Opinion("d4a", "", 20)
    states["d4a"] = UNREACHABLE
    assert after(1) == Opinion("d4a", UNREACHABLE, 0)
    states["d4a"] = "failed"
    assert after(20) == Opinion("d4a", "failed", 20), "it has been away all the time"
    assert after(PAUSE_MAX_S + 1) == Opinion("d4a", "failed", 0)
    states["d4a"] = ""
    assert after(1) == Opinion("d4a", "", 0)


# --- the gateway


class Cluster:
    """Four storage nodes that vote, and the register."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clock = FakeClock()
        self.layouts = KnownLayouts(four())
        self.states: dict[str, str] = {}
        self.down: set[str] = set()
        self.body: bytes | None = None
        self.before_write: Callable[[], None] = lambda: None
        self.asked = 0
        self.key = Ed25519PrivateKey.generate()
        self.noted: list[frozenset[str]] = []
        history = History(world)
        self.times = {name: DiskTimes(self.layouts, self.why_away, self.clock) for name in (*FOUR, "gw")}
        self.voters = {
            name: Voter(lambda name=name: history.identity(name), self.layouts, self.times[name])  # type: ignore[misc]
            for name in FOUR
        }
        self.duty = SparingDuty(self.ports())

    def ports(self) -> SparingPorts:
        return SparingPorts(
            self.layouts,
            self,
            self,
            self.clock,
            lambda signed: verify_vote(signed, self.layouts.at, self.world.authority.certificate, "c1"),
            self.times["gw"].seen,
            self.read,
            lambda record: record,
            lambda count: self.asked.to_bytes(count, "big"),
            lambda before, after: self.noted.append(before.disks ^ after.disks),
        )

    def why_away(self, disk: str) -> str:
        return UNREACHABLE if f"n{disk[1]}" in self.down else self.states.get(disk, "")

    def pass_s(self, seconds: float) -> None:
        for _ in range(int(seconds / 20)):
            for times in self.times.values():
                times.seen()
            self.clock.advance(20)

    async def call(self, node: str, method: str, request: VoteAsk, _reply: Any, **_options: Any) -> Any:
        assert method == "cluster.vote"
        self.asked += 1
        if node in self.down:
            raise PeerUnreachable(node)
        peer = PeerIdentity("gw", "FR", "par1", "n1", ("gateway",))
        handler = self.voters[node].methods()[method].handler
        return await handler(request, Call(peer, memoryview(b""), 0.0)), memoryview(b"")

    async def replace(self, _path: str, choose: Callable[[bytes | None], bytes | None]) -> bytes | None:
        self.before_write()
        body = choose(self.body)
        self.body = self.body if body is None else body
        return self.body

    async def read(self) -> None:
        if self.body is not None:
            self.layouts.partitions.note_out(decode(self.body, DisksOut))

    @property
    def out(self) -> frozenset[str]:
        return self.layouts.partitions.out.disks


@pytest.fixture
def cluster(world: World) -> Cluster:
    return Cluster(world)


async def test_a_server_that_is_away_for_an_hour_is_out_and_back_ten_minutes_after_its_return(cluster: Cluster) -> None:
    cluster.pass_s(60)
    await cluster.duty.once()
    assert not cluster.asked, "nothing is away"
    cluster.down = {"n4"}
    cluster.pass_s(HOUR - 60)
    await cluster.duty.once()
    assert (cluster.out, cluster.asked) == (frozenset(), 0)
    cluster.pass_s(100)
    await cluster.duty.once()
    assert cluster.out == {"d4a", "d4b"}
    assert cluster.duty.reason == ""
    assert cluster.layouts.partitions.target(cluster.layouts.current) is not cluster.layouts.current
    check_votes(cluster.layouts.partitions.out, cluster.layouts.at, cluster.world.authority.certificate, "c1")
    cluster.down = set()
    cluster.pass_s(500)
    await cluster.duty.once()
    assert cluster.out
    cluster.down = {"n4"}  # it comes and goes: it is out all the time
    cluster.pass_s(100)
    cluster.down = set()
    cluster.pass_s(500)
    await cluster.duty.once()
    assert cluster.out
    cluster.pass_s(200)
    await cluster.duty.once()
    assert cluster.out == frozenset()
    assert cluster.layouts.partitions.target(cluster.layouts.current) is cluster.layouts.current
    assert cluster.noted == [{"d4a", "d4b"}, {"d4a", "d4b"}]


async def test_without_a_majority_of_votes_nothing_is_out(cluster: Cluster) -> None:
    cluster.down = {"n3", "n4"}
    cluster.pass_s(2 * HOUR)
    await cluster.duty.once()
    assert cluster.out == frozenset()
    assert "2 of 4 storage nodes vote, 3 have to" in cluster.duty.reason
    cluster.down = {"n4"}  # the others have seen n3 for a moment only, and its own times began with its return
    cluster.pass_s(40)
    await cluster.duty.once()
    assert cluster.out == {"d4a", "d4b"}


async def test_a_gateway_that_alone_sees_a_node_away_puts_nothing_out(cluster: Cluster) -> None:
    cluster.times["gw"] = DiskTimes(cluster.layouts, lambda disk: UNREACHABLE if disk[1] == "4" else "", cluster.clock)
    cluster.duty = SparingDuty(cluster.ports())
    cluster.pass_s(2 * HOUR)
    await cluster.duty.once()
    assert cluster.asked
    assert cluster.out == frozenset()
    assert "no majority has seen it away" in cluster.duty.reason


async def test_two_gateways_decide_once(cluster: Cluster) -> None:
    other = SparingDuty(cluster.ports())
    cluster.down = {"n4"}
    cluster.pass_s(2 * HOUR)

    def first_the_other() -> None:
        cluster.before_write = lambda: None
        record = DisksOut(1, (OutDisk("d4b", 5, UNREACHABLE),), ())
        cluster.body = encode(record)

    cluster.before_write = first_the_other
    await cluster.duty.once()
    assert cluster.out == {"d4b"}
    assert cluster.noted == []
    await other.once()
    assert cluster.out == {"d4a", "d4b"}


async def test_a_vote_of_another_question_does_not_count(cluster: Cluster) -> None:
    cluster.down = {"n4"}
    cluster.pass_s(2 * HOUR)
    call = cluster.call

    async def old(node: str, method: str, request: VoteAsk, reply: Any, **options: Any) -> Any:
        return await call(node, method, replace(request, nonce=b"x" * 16), reply, **options)

    cluster.call = old  # type: ignore[method-assign]
    await cluster.duty.once()
    assert cluster.out == frozenset()
    assert "0 of 4 storage nodes vote" in cluster.duty.reason


async def test_a_record_does_not_grow_beyond_what_is_believed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disks that go out one after the other need the votes of one question, not of as many as there are disks."""
    for module in ("storaged.cluster.sparing", "storaged.cluster.votes"):
        monkeypatch.setattr(f"{module}.VOTES_MAX", 9)
    out = set()
    for disk in ("d1a", "d2a", "d3a", "d4a", "d4b"):
        cluster.states[disk] = "failed"
        out.add(disk)
        cluster.pass_s(HOUR + 60)
        await cluster.duty.once()
        assert cluster.out == out
        record = cluster.layouts.partitions.out
        check_votes(record, cluster.layouts.at, cluster.world.authority.certificate, "c1")
        assert len(record.votes) == 4
    cluster.states["d2a"] = ""
    cluster.pass_s(660)
    await cluster.duty.once()
    assert cluster.out == out - {"d2a"}
    check_votes(cluster.layouts.partitions.out, cluster.layouts.at, cluster.world.authority.certificate, "c1")


async def test_a_record_with_more_votes_than_are_believed_is_not_written(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could write over it."""
    cluster.states["d1a"] = "failed"
    cluster.pass_s(HOUR + 60)
    monkeypatch.setattr("storaged.cluster.sparing.VOTES_MAX", 3)
    await cluster.duty.once()
    assert cluster.out == frozenset()
    monkeypatch.setattr("storaged.cluster.sparing.VOTES_MAX", 4)
    await cluster.duty.once()
    assert cluster.out == {"d1a"}


async def test_a_node_puts_nothing_into_the_record_that_it_was_not_asked_for(cluster: Cluster) -> None:
    cluster.down = {"n4"}
    cluster.pass_s(2 * HOUR)
    call = cluster.call

    async def chatty(node: str, method: str, request: VoteAsk, reply: Any, **options: Any) -> Any:
        if node == "n1":
            request = replace(request, disks=(*request.disks, "d2a", "d3a"))
        return await call(node, method, request, reply, **options)

    cluster.call = chatty  # type: ignore[method-assign]
    await cluster.duty.once()
    assert cluster.out == frozenset()
    assert "2 of 4 storage nodes vote" in cluster.duty.reason


@pytest.mark.parametrize("ask", [VoteAsk(b"", ("d1a",)), VoteAsk(bytes(16), ()), VoteAsk(bytes(16), ("d1a", "d1a"))])
async def test_a_node_answers_no_malformed_question(cluster: Cluster, ask: VoteAsk) -> None:
    with pytest.raises(VoteRefused):
        await cluster.call("n1", "cluster.vote", ask, SignedVote)


async def test_the_event_loop_ranks_no_disks_when_a_layout_comes_or_a_disk_goes_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would rank all disks for all partitions at once: 70 ms with 100 disks."""
    layout, history, key = four(), History(world, four()), Ed25519PrivateKey.generate()
    votes = votes_of(world, layout, {name: [away("d4a")] for name in ("n1", "n2", "n3")})
    record = decide(layout, NONE_OUT, votes, 10**9)
    assert record is not None
    record = replace(record, signature=key.sign(signed_bytes("c1", record)))

    async def answer(found: Any) -> Any:
        return found

    book = history.book()
    await asyncio.to_thread(book.prepare, book.current)
    node: Any = SimpleNamespace(
        layouts=book,
        membership=SimpleNamespace(why_away=lambda _disk: ""),
        clock=FakeClock(),
        paths=SimpleNamespace(read=lambda _path: answer(encode(record))),
        signers=SimpleNamespace(key=lambda _signer: answer(key.public_key())),
        own=SimpleNamespace(cluster="c1"),
        authority=world.authority.certificate,
    )
    ranked: list[int] = []
    rank = Layout._ranked

    def noted(layout: Layout, salt: bytes) -> list[str]:
        ranked.append(threading.get_ident())
        return rank(layout, salt)

    monkeypatch.setattr(Layout, "_ranked", noted)
    sparing = NodeSparing(node)
    await sparing.read()
    assert (sparing.refused, book.partitions.out.disks) == ("", {"d4a"})
    counts = count_partitions(book, book.partitions)
    assert counts is not None
    assert counts.counted.left > 0
    await book.learn(history.sign(replace(layout, epoch=2, predecessor=history.signed[0].hash)), "test")
    assert book.epoch == 2
    assert count_partitions(book, book.partitions) == counts
    assert ranked
    assert threading.get_ident() not in ranked
