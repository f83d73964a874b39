"""The rules for moves of blocks (``maintain.moves``) and what asks for them, without I/O."""

from __future__ import annotations

import msgspec
import pytest

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry, Profile
from storaged.cluster.spread import OPERATORS
from storaged.fragments.ports import FragmentHeader
from storaged.maintain.health import BlockPlace, blocks_of
from storaged.maintain.mover import (
    FRAGMENTS_BURST,
    FRAGMENTS_PER_S,
    REFUSED_PAUSE_S,
    REFUSED_PAUSE_S_MAX,
    Allowance,
)
from storaged.maintain.moves import (
    CALL_MAX,
    LATER,
    OK,
    REFUSED,
    Agreed,
    MoveAsk,
    MovesAsk,
    agreed,
    apply_move,
    cost_of,
    is_moved,
    is_whole,
    judge_ask,
    judge_block,
    must_read,
    problem_of_call,
)
from storaged.maintain.relocate import split
from storaged.meta.names import object_name
from storaged.objects.records import PartEntry, Run
from storaged.sov1 import HEADER_BYTES, MAGIC, SUITE
from tests.doubles.layouts import KnownLayouts

RACKS = {"a": "FR/par1/a", "b": "FR/par2/b", "c": "FR/lyo1/c"}
LAYOUT = Layout(
    "test",
    1,
    tuple(NodeEntry(f"n{rack}", where, "", ("storage",)) for rack, where in RACKS.items()),
    tuple(DiskEntry(f"{rack}{index}", f"n{rack}", 1) for rack in RACKS for index in range(3)),
    ("a0", "b0", "c0"),
)
ALONE = Layout("test", 1, LAYOUT.nodes[:1], LAYOUT.disks[:3], ("a0", "a1", "a2"))
NAME = object_name(b"B" * 16, range(16), b"key").pack()
HEADER = (MAGIC + bytes((SUITE, 16))).ljust(HEADER_BYTES, b"\0")
TRUE, FALSE = b"t" * 20, b"f" * 20
OLD_DISKS = ("a0", "b0", "c0", "a1", "b1", "c1")
NEW_DISKS = ("a0", "b0", "c0", "a1", "b1", "c2")


def entry(size: int = 1_000_000, target: str = "4+2") -> PartEntry:
    return PartEntry(1, b"D" * 16, size, HEADER, 12, target, ())


def block(disks: tuple[str, ...], k: int = 4, part: PartEntry | None = None, target: str = "4+2") -> BlockPlace:
    return BlockPlace(part or entry(), 0, Run(0, 1, k, len(disks) - k, 1), disks, Profile.parse(target))


def header(where: BlockPlace, position: int, hash_: bytes = TRUE, owner: bytes = NAME) -> FragmentHeader:
    profile, shape = where.profile, where.shape
    hashes = (hash_,) * (1 if profile.k == 1 else profile.n)
    length = shape.fragment_length(profile, position)
    part_header = where.entry.header
    return FragmentHeader(where.fragment(position).pack(), owner, part_header, hashes, shape.cell_bytes, length, 0)


def headers(where: BlockPlace, positions: str, hash_: bytes = TRUE) -> dict[int, FragmentHeader]:
    return {int(position): header(where, int(position), hash_) for position in positions}


OLD, NEW = block(OLD_DISKS), block(NEW_DISKS)
SURVIVORS = Agreed((TRUE,) * 6, NAME, (0, 1, 2, 3, 4))


@pytest.mark.parametrize(
    ("true", "false", "believed"),
    [
        ("012345", "", "012345"),
        ("0123", "", "0123"),
        ("012", "", ""),
        ("0134", "25", "0134"),
        ("013", "25", ""),
        ("01", "2345", "2345"),
        ("0145", "", "0145"),
    ],
)
def test_survivors_agree_when_enough_to_read_the_block_say_the_same(true: str, false: str, believed: str) -> None:
    found = agreed(LAYOUT, OLD, headers(OLD, true) | headers(OLD, false, FALSE))
    assert "".join(map(str, found.positions if found is not None else ())) == believed


def test_a_tie_of_copies_is_decided_for_nobody() -> None:
    copies = block(("a0", "a1", "b0", "b1"), k=2, part=entry(target="2+2"))
    assert agreed(LAYOUT, copies, headers(copies, "01") | headers(copies, "23", FALSE)) is None


def test_survivors_of_one_node_count_only_where_there_is_one_node() -> None:
    """A node of three copies has two: it would decide alone what the third, which is away, has to be."""
    copies = block(("a0", "a1", "b0"), k=1, part=entry(target="1+2"))
    assert agreed(LAYOUT, copies, headers(copies, "01", FALSE)) is None
    assert agreed(LAYOUT, copies, headers(copies, "02")) is not None
    assert agreed(ALONE, copies._replace(disks=("a0", "a1", "a2")), headers(copies, "01")) is not None


def test_a_block_that_one_node_holds_alone_may_leave_it() -> None:
    """It was written while the disks of that node alone took writes. Nothing is deleted on its word."""
    copies = block(("a0", "a1"), k=1)
    assert agreed(LAYOUT, copies, headers(copies, "01"), or_alone=True) is not None
    assert agreed(LAYOUT, copies, headers(copies, "1"), or_alone=True) is not None
    assert agreed(LAYOUT, copies, headers(copies, "01")) is None
    for disks in (("a0", "a1", "b0"), ("a0", "a1", "of an earlier layout")):
        spread = block(disks, k=1)
        assert agreed(LAYOUT, spread, headers(spread, "01"), or_alone=True) is None


def test_a_header_of_another_part_has_no_vote() -> None:
    found = headers(OLD, "0123")
    for lie in (
        msgspec.structs.replace(found[0], part_header=b""),
        msgspec.structs.replace(found[0], length=found[0].length - 1),
        msgspec.structs.replace(found[0], cell_bytes=4096),
        msgspec.structs.replace(found[0], hashes=(TRUE,)),
        msgspec.structs.replace(found[0], id=found[1].id),
    ):
        assert agreed(LAYOUT, OLD, found | {0: lie}) is None


def test_a_short_block_needs_only_the_fragments_that_it_reaches() -> None:
    short = block(OLD_DISKS, part=entry(size=10))
    assert agreed(LAYOUT, short, headers(short, "04")) is not None
    assert agreed(LAYOUT, short, headers(short, "123")) is None, "these are empty"


def test_a_block_is_moved_when_all_its_fragments_are_there_and_right() -> None:
    assert judge_block(LAYOUT, OLD, NEW, SURVIVORS, headers(NEW, "012345")) == OK
    assert judge_block(LAYOUT, OLD, NEW, SURVIVORS, headers(NEW, "01234")).code == LATER
    assert judge_block(LAYOUT, OLD, NEW, SURVIVORS, headers(NEW, "012345", FALSE)).code == REFUSED
    mixed = headers(NEW, "01234") | headers(NEW, "5", FALSE)
    assert judge_block(LAYOUT, OLD, NEW, SURVIVORS, mixed).code == REFUSED
    foreign = headers(NEW, "01234") | {5: header(NEW, 5, owner=NAME + b"x")}
    assert judge_block(LAYOUT, OLD, NEW, SURVIVORS, foreign).code == REFUSED


def test_under_a_fallback_a_block_survives_at_least_as_much_as_before() -> None:
    fallback = block(("a0", "b0", "a1", "b1"), k=2)
    few = SURVIVORS._replace(positions=(0, 1, 3, 4))
    assert judge_block(LAYOUT, OLD, fallback, few, headers(fallback, "0123", FALSE)) == OK
    assert judge_block(LAYOUT, OLD, fallback, SURVIVORS, headers(fallback, "0123", FALSE)) == OK
    weaker = block(("a0", "b0", "a1"), k=2)
    whole = SURVIVORS._replace(positions=tuple(range(6)))
    assert judge_block(LAYOUT, OLD, weaker, whole, headers(weaker, "012", FALSE)).code == REFUSED
    one_rack = block(("a0", "a1", "a2"), k=2)
    assert judge_block(LAYOUT, OLD, one_rack, whole, headers(one_rack, "012", FALSE)).code == REFUSED


def test_only_a_change_of_profile_and_old_hashes_need_a_look_at_the_bytes() -> None:
    assert not must_read(OLD, NEW, SURVIVORS)
    assert must_read(OLD, block(("a0", "b0", "a1", "b1"), k=2), SURVIVORS)
    assert must_read(OLD, NEW, SURVIVORS._replace(hashes=(b"o" * 16,) * 6))


def test_a_block_with_all_fragments_on_target_is_whole() -> None:
    whole = SURVIVORS._replace(positions=tuple(range(6)))
    assert is_whole(OLD, whole)
    assert not is_whole(OLD, SURVIVORS)
    assert not is_whole(OLD._replace(spread=False), whole)
    assert not is_whole(block(OLD_DISKS, target="2+2"), whole), "the layout in force wants another profile"


def test_a_block_may_survive_less_under_the_profile_that_the_layout_in_force_wants() -> None:
    whole = SURVIVORS._replace(positions=tuple(range(6)))
    wanted = block(("a0", "b0", "c0"), k=2, target="2+1")
    assert judge_block(LAYOUT, block(OLD_DISKS, target="2+1"), wanted, whole, headers(wanted, "012", FALSE)) == OK


def test_a_part_names_the_new_target_once_all_its_blocks_have_it() -> None:
    part = msgspec.structs.replace(entry(), runs=(Run(0, 5, 4, 2, 1),))
    first = MoveAsk(NAME, part.data_id, part.runs[0], Run(0, 3, 2, 1, 2))
    half = apply_move(part, first, Profile(2, 1))
    assert half is not None
    assert (half.target, [run.count for run in half.runs]) == ("4+2", [3, 2])
    last = msgspec.structs.replace(first, new=Run(3, 2, 2, 1, 2))
    done = apply_move(half, last, Profile(2, 1))
    assert done is not None
    assert (done.target, [run.count for run in done.runs]) == ("2+1", [5])
    assert apply_move(done, last, Profile(2, 1)) is None


def ask(count: int = 1, k: int = 4, m: int = 2, new_k: int = 4, new_m: int = 2) -> MoveAsk:
    return MoveAsk(NAME, b"D" * 16, Run(0, count, k, m, 1), Run(0, count, new_k, new_m, 1))


@pytest.mark.parametrize(
    "move",
    [ask(64), ask(2_000), ask(64, new_k=2), ask(1000, new_k=2), ask(64, 200, 55, 200, 55), ask(1, 200, 55, 55, 200)],
)
def test_what_repair_asks_fits_into_calls(move: MoveAsk) -> None:
    parts = split(move)
    assert all(not problem_of_call(MovesAsk((part,))) for part in parts)
    assert [part.new.first for part in parts] == sorted({part.new.first for part in parts})
    assert sum(part.new.count for part in parts) == move.new.count
    assert is_moved([move.new], parts[-1].new)


def test_a_block_whose_survivors_are_read_counts_as_several() -> None:
    assert cost_of(ask(new_k=2)).fragments > 5 * cost_of(ask()).fragments
    assert not cost_of(ask(10**9)).within(CALL_MAX)


def test_an_asker_waits_for_what_it_asked_too_fast() -> None:
    allowance = Allowance()
    assert allowance.spend("n", FRAGMENTS_BURST, 100.0) == 0.0
    assert allowance.spend("n", FRAGMENTS_PER_S, 100.0) == pytest.approx(1.0)
    assert allowance.spend("other", FRAGMENTS_PER_S, 100.0) == 0.0
    assert allowance.spend("n", 0, 102.0) == 0.0


def test_an_asker_of_what_is_refused_rests_longer_each_time() -> None:
    allowance, now, pauses = Allowance(), 0.0, []
    for _ in range(12):
        allowance.note("n", refused=True, now=now)
        began = now
        while allowance.problem("n", now):
            now += REFUSED_PAUSE_S / 4
        pauses.append(now - began)
    assert pauses[0] == pytest.approx(REFUSED_PAUSE_S, abs=0.3)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(REFUSED_PAUSE_S_MAX, abs=0.3)
    assert not allowance.problem("other", now)
    allowance.note("n", refused=False, now=now)
    allowance.note("n", refused=True, now=now)
    assert not allowance.problem("n", now + REFUSED_PAUSE_S)


FOUR = {**RACKS, "d": "FR/lyo2/d"}
SPREAD = Layout(
    "test",
    1,
    tuple(NodeEntry(f"n{rack}", where, "", ("storage",)) for rack, where in FOUR.items()),
    tuple(DiskEntry(f"{rack}{index}", f"n{rack}", 1) for rack in FOUR for index in range(3)),
    ("a0", "b0", "c0"),
    operators=tuple(sorted((where, "x" if rack in "ad" else rack) for rack, where in FOUR.items())),
    spread=OPERATORS,
)
"""Racks a and d have one operator."""


@pytest.mark.parametrize(
    ("disks", "said"),
    [
        (("a0", "d0", "b0", "b1", "c0", "c1"), ""),
        (("a0", "a1", "d0", "b0", "b1", "c0"), "one operator would hold 3 of 6 fragments"),
    ],
)
def test_no_operator_gets_more_fragments_than_the_layout_allows(disks: tuple[str, ...], said: str) -> None:
    old = Run(0, 1, 4, 2, 1, dict(enumerate(OLD_DISKS)))
    new = msgspec.structs.replace(old, moved=dict(enumerate(disks)))
    part = msgspec.structs.replace(entry(), runs=(old,))
    ask = MoveAsk(NAME, part.data_id, old, new)
    assert judge_ask(SPREAD, part, ask, (), lambda _disk: True).reason == said
    plain = msgspec.structs.replace(SPREAD, spread="")
    assert judge_ask(plain, part, ask, (), lambda _disk: True) == OK
    (where,) = blocks_of(msgspec.structs.replace(part, runs=(new,)), 0, KnownLayouts(SPREAD), ())
    assert where.spread == (not said)
