"""What a storage node asks a gateway when repair has written blocks to new places, and the rules for the answer. Pure.

A storage node does not write records. It rebuilds or recodes blocks, and asks a gateway to make the record name the new
places (``relocate`` asks, ``mover`` answers). The gateway believes nothing that the asker says. From the record, which
it reads itself, the signed record of the bucket, the layout and the headers of the fragments it judges:

1. *Is it the record's?* The run is in the record as the asker saw it, and the blocks are in it (``judge_ask``).
2. *May the blocks be there?* Every disk is active and inside the countries, holds one fragment of a block, and no
   failure domain holds more of them than it may. The profile is the target of the layout in force, or the one that a
   write would get now (``judge_ask``).
3. *Are they there?* The disks have every fragment of the new places, undamaged and durable, with a header that fits the
   part (``judge_block``).
4. *Are they right?* The survivors in the old places agree on the hashes of the block: at least as many as are needed to
   read it, more than name anything else, and on two nodes or more, if the old places are on more than one. Where the
   profile stays, the new headers must name the same hashes. A disk that takes a fragment from a storage node verifies
   it against its header, so a disk that does not lie has the right bytes. Where the profile changes, the hashes are
   new: the gateway reads survivors and computes them (``mover``).
5. *Is it needed, and no weaker?* A block that is whole where it is does not move (``is_whole``). Under another profile
   than the target, the block survives at least as much as in its old places as they are now (``judge_block``).

So a single hostile node can't make a gateway name fragments that are not the block's, as long as no honest disk has
lost one, or that node alone holds the block: the survivors' hashes need the vote of another node. Where one has, the
hostile node may have written its own there. Then it needs, besides, a third node that is away, and a profile with as
many parity as data fragments. Two hostile nodes that hold all survivors of a block can.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from storaged.cluster.layout import Layout, Profile
from storaged.errors import StoragedError
from storaged.fragments.ports import FragmentHeader
from storaged.hashes import is_old
from storaged.ids import DATA_ID_BYTES
from storaged.maintain.health import BlockPlace
from storaged.meta.names import RegisterName, Table
from storaged.objects.code import place
from storaged.objects.code.geometry import FRAGMENTS_MAX, problem_of
from storaged.objects.records import PartEntry, Run
from storaged.wire import Message

MOVES_A_CALL = 256


@dataclass(frozen=True, slots=True)
class Cost:
    """What verifying moves takes. ``fragments``: in the old and the new places together. ``hashes``: in their headers;
    each header has those of all fragments of its block.
    """

    fragments: int = 0
    hashes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.fragments + other.fragments, self.hashes + other.hashes)

    def __mul__(self, count: int) -> Cost:
        return Cost(self.fragments * count, self.hashes * count)

    def within(self, bound: Cost) -> bool:
        return self.fragments <= bound.fragments and self.hashes <= bound.hashes


CALL_MAX = Cost(12_000, 600_000)
"""Of a call: 1,000 blocks of 4+2 (125 whose profile changes), or one block of the widest profile. It bounds what a
gateway has in memory while it verifies them: some 15 MB of headers.
"""
READ_COST = 8
"""What a block whose profile changes counts, relative to others: the gateway reads its survivors."""

MOVED = "moved"
"""The record names the new places."""
CHANGED = "changed"
"""The record, or the layout, is not what the asker saw: it has to look again."""
LATER = "later"
"""The gateway can't know now. The same may be asked again, of any gateway."""
REFUSED = "refused"
"""Against a rule. No honest node asks this."""


class MoveAsk(Message, frozen=True):
    """Asks that blocks ``new.first .. new.first + new.count - 1`` of part ``data_id``, which the record of register
    ``name`` (packed) has in run ``old``, be named in the places of ``new``.
    """

    name: bytes
    data_id: bytes
    old: Run
    new: Run


class MovesAsk(Message, frozen=True):
    """Up to MOVES_A_CALL moves, which together cost up to CALL_MAX. Those of one register that pass are one change."""

    moves: tuple[MoveAsk, ...]


class FragmentAsk(Message, frozen=True):
    """Asks that a fragment (packed id) on a disk be deleted: it is not what the survivors of its block say, and in the
    way of repair. ``name``: the packed register whose record has its data.
    """

    name: bytes
    fragment: bytes
    disk: str


class DiscardAsk(Message, frozen=True):
    """Up to MOVES_A_CALL fragments. The answer is a MovesAnswer; MOVED: the fragment is not there any more."""

    fragments: tuple[FragmentAsk, ...]


class MoveAnswer(Message, frozen=True):
    """``code``: MOVED, CHANGED, LATER or REFUSED. ``reason``: for the asker's log."""

    code: str
    reason: str = ""


class MovesAnswer(Message, frozen=True):
    """One answer for each move, in order; a call beyond the bounds has one."""

    answers: tuple[MoveAnswer, ...]


class Judged(NamedTuple):
    """What the rules say. ``code`` is empty where nothing is against it."""

    code: str = ""
    reason: str = ""

    @property
    def answer(self) -> MoveAnswer:
        return MoveAnswer(self.code, self.reason)


OK = Judged()


# --- the request ------------------------------------------------------------------------------------------------------


def problem_of_call(ask: MovesAsk) -> str:
    """Why the whole call is refused; empty when it is not."""
    if not 1 <= len(ask.moves) <= MOVES_A_CALL:
        return f"{len(ask.moves)} moves in one call; at most {MOVES_A_CALL}"
    if problem := next(filter(None, map(_problem_of_move, ask.moves)), ""):
        return problem
    cost = sum(map(cost_of, ask.moves), Cost())
    return "" if cost.within(CALL_MAX) else f"moves of {cost.fragments} fragments in one call"


def cost_of(move: MoveAsk) -> Cost:
    """Of verifying the move."""
    old, new = move.old.k + move.old.m, move.new.k + move.new.m
    times = READ_COST if move.old.profile != move.new.profile else 1
    return Cost((old + new) * times, old * old + new * new) * move.new.count


def _problem_of_move(move: MoveAsk) -> str:
    try:
        name = RegisterName.unpack(move.name)
    except ValueError:
        return "a move of no register"
    if name.table not in (Table.OBJECT, Table.PART) or len(move.data_id) != DATA_ID_BYTES:
        return "a move of something other than a part"
    for run in (move.old, move.new):
        if run.first < 0 or run.count < 1 or run.k < 1 or run.m < 0 or run.k + run.m > FRAGMENTS_MAX:
            return f"a run of {run.count} blocks from {run.first} on, of {run.k}+{run.m} fragments, cannot be"
        if any(not 0 <= position < run.k + run.m for position in run.moved):
            return "a run that names the disk of a fragment that it does not have"
    return ""


# --- runs -------------------------------------------------------------------------------------------------------------


def replace_blocks(runs: Sequence[Run], old: Run, new: Run) -> tuple[Run, ...] | None:
    """``runs`` with the blocks of ``new`` taken out of the run that is placed like ``old``, and neighbours that are
    placed alike joined. None when no such run has them all.
    """
    end = new.first + new.count
    found: list[Run] = []
    replaced = False
    for run in runs:
        if not (_covers(run, new) and _alike(run, old)):
            found.append(run)
            continue
        replaced = True
        if run.first < new.first:
            found.append(msgspec.structs.replace(run, count=new.first - run.first))
        found.append(new)
        if end < run.first + run.count:
            found.append(msgspec.structs.replace(run, first=end, count=run.first + run.count - end))
    if not replaced:
        return None
    joined: list[Run] = []
    for run in found:
        if joined and _alike(joined[-1], run) and joined[-1].first + joined[-1].count == run.first:
            joined[-1] = msgspec.structs.replace(joined[-1], count=joined[-1].count + run.count)
        else:
            joined.append(run)
    return tuple(joined)


def is_moved(runs: Sequence[Run], new: Run) -> bool:
    """Whether the blocks of ``new`` are in its places already."""
    return any(_covers(run, new) and _alike(run, new) for run in runs)


def apply_move(part: PartEntry, move: MoveAsk, target: Profile) -> PartEntry | None:
    """The part with the moved blocks in their new places; None when it does not have them in the old ones. Once all its
    blocks have the ``target`` of the layout in force, it names this one.
    """
    runs = replace_blocks(part.runs, move.old, move.new)
    if runs is None or part.data_id != move.data_id:
        return None
    reached = all(run.profile == target for run in runs)
    return msgspec.structs.replace(part, runs=runs, target=str(target) if reached else part.target)


def _covers(run: Run, new: Run) -> bool:
    return run.first <= new.first and new.first + new.count <= run.first + run.count


def _alike(one: Run, other: Run) -> bool:
    return (one.k, one.m, one.epoch, one.moved) == (other.k, other.m, other.epoch, other.moved)


# --- places -----------------------------------------------------------------------------------------------------------


def judge_ask(
    layout: Layout, entry: PartEntry, move: MoveAsk, countries: Sequence[str], writable: Callable[[str], bool]
) -> Judged:
    """Judges all that the layout in force, the record's ``entry`` and the bucket's ``countries`` decide: rules 1 and
    2.
    """
    new = move.new
    if new.epoch > layout.epoch:
        return Judged(LATER, f"the blocks were placed by layout {new.epoch}, and this gateway has {layout.epoch}")
    if new.epoch < layout.epoch:
        return Judged(CHANGED, f"the layout in force is {layout.epoch}, and the blocks were placed by {new.epoch}")
    if entry.small or entry.inline:
        return Judged(REFUSED, "what lies beside its record does not move")
    runs = replace_blocks(entry.runs, move.old, new)
    if runs is None:
        return Judged(CHANGED, "the record has the blocks elsewhere")
    if problem := problem_of(msgspec.structs.replace(entry, runs=runs)):
        return Judged(REFUSED, problem)
    try:
        disks = place.disks_of(new, layout, entry.data_id, countries)
    except (StoragedError, ValueError) as error:
        return Judged(REFUSED, str(error))
    return _judge_disks(layout, entry, new.profile, disks, countries, writable)


def _judge_disks(
    layout: Layout,
    entry: PartEntry,
    profile: Profile,
    disks: Sequence[str],
    countries: Sequence[str],
    writable: Callable[[str], bool],
) -> Judged:
    if len(set(disks)) < len(disks):
        return Judged(REFUSED, "a disk would hold two fragments of a block")
    for disk in disks:
        if disk not in layout.disk_by_id:
            return Judged(REFUSED, f"the layout has no disk {disk[:40]!r}")
        if not place.is_eligible(layout, disk, countries):
            return Judged(REFUSED, f"disk {disk} is not active, or outside of the countries")
    if not place.keeps_operators(layout, profile, disks):
        return Judged(REFUSED, f"one operator would hold {layout.operator_share(disks)} of {profile.n} fragments")
    try:
        now = place.choose(layout, entry.data_id, layout.target, writable, countries)
    except StoragedError as error:
        return Judged(LATER, error.message)
    if profile not in (layout.target, now.profile):
        return Judged(LATER, f"a write would be {now.profile} now, the target is {layout.target}, not {profile}")
    first = place.first_choice(layout, entry.data_id, profile, countries)
    least = [place.largest_share(layout, first), profile.m]
    if profile == now.profile:
        least.append(place.largest_share(layout, now.disks))
    share = place.largest_share(layout, disks)
    if share > max(least):
        return Judged(REFUSED, f"one {layout.domain_kind} would hold {share} of {profile.n} fragments")
    return OK


# --- fragments --------------------------------------------------------------------------------------------------------


class Agreed(NamedTuple):
    """What the survivors of a block say: its ``hashes``, the packed register ``owner``, and the ``positions`` of those
    that say so.
    """

    hashes: tuple[bytes, ...]
    owner: bytes
    positions: tuple[int, ...]


def agreed(
    layout: Layout, old: BlockPlace, found: Mapping[int, FragmentHeader], *, or_alone: bool = False
) -> Agreed | None:
    """What the survivors at the old places agree on; None when too few do. ``found``: position -> header.

    In a cluster of several nodes, survivors of one node alone count for nothing: it may lie with all of them. With
    ``or_alone`` they count where no other node has a place of the block: it was written while only that node's disks
    took writes. Then no lie replaces an honest fragment, and without this the block would stay there for ever.
    """
    votes: dict[tuple[tuple[bytes, ...], bytes], list[int]] = {}
    for position, header in found.items():
        if _fits(old, position, header):
            votes.setdefault((header.hashes, header.owner), []).append(position)
    ranked = sorted(votes.items(), key=lambda vote: -len(vote[1]))
    if not ranked or (len(ranked) > 1 and len(ranked[1][1]) == len(ranked[0][1])):
        return None
    (hashes, owner), positions = ranked[0]
    needed = [position for position in positions if _is_needed(old, position)]
    if len(needed) < _needed(old):
        return None
    known = layout.disk_by_id
    voters = {known[old.disks[position]].node for position in positions if old.disks[position] in known}
    holders = {known[disk].node if disk in known else disk for disk in old.disks}
    nodes = holders if or_alone else {disk.node for disk in layout.disks}
    if len(voters) < min(2, len(nodes)):
        return None
    return Agreed(hashes, owner, tuple(sorted(positions)))


def are_alone(where: BlockPlace, positions: Collection[int]) -> bool:
    """Whether nothing else can be the block when the fragments at these positions agree: the others are too few to
    read it from. Only then may a sound fragment that differs be replaced or deleted. A hostile node may have written
    one that agrees with its own where an honest disk had none, so that the most votes are not the block's.
    """
    others = [position for position in range(where.profile.n) if position not in positions]
    return sum(_is_needed(where, position) for position in others) < _needed(where)


def judge_block(
    layout: Layout, old: BlockPlace, new: BlockPlace, survivors: Agreed, found: Mapping[int, FragmentHeader]
) -> Judged:
    """Judges one block: rules 3 to 5, as far as headers show. ``found``: position -> header of the fragments in the new
    places. Where ``must_read`` says so, the caller has to compare the hashes in them with what it reads.
    """
    for position in range(new.profile.n):
        header = found.get(position)
        if header is None:
            return Judged(LATER, f"fragment {position} of block {new.block} is not on disk {new.disks[position]}")
        if not _fits(new, position, header) or header.owner != survivors.owner:
            return Judged(REFUSED, f"fragment {position} of block {new.block} is not one of this part")
        if header.hashes != found[0].hashes:
            return Judged(REFUSED, f"the fragments of block {new.block} do not name the same hashes")
    if new.profile == old.profile and found[0].hashes != survivors.hashes:
        return Judged(REFUSED, f"the fragments of block {new.block} are not what those in the old places say")
    if new.profile != new.target:
        before = _may_fail(layout, old, survivors.positions)
        after = _may_fail(layout, new, range(new.profile.n))
        if after[0] < before[0] or after[1] < before[1]:
            return Judged(REFUSED, f"block {new.block} would survive less than in its old places")
    return OK


def is_whole(old: BlockPlace, survivors: Agreed) -> bool:
    """Whether the block is on its target, with all fragments, where it is: then there is nothing to repair."""
    on_target = old.spread and old.placed and old.profile == old.target
    return on_target and len(survivors.positions) == old.profile.n


def must_read(old: BlockPlace, new: BlockPlace, survivors: Agreed) -> bool:
    """Whether headers alone don't show that the new fragments are right: the profile changes, so their hashes are new;
    or the hashes are of the kind for which other bytes can be found.
    """
    return old.profile != new.profile or any(map(is_old, survivors.hashes))


def _fits(where: BlockPlace, position: int, header: FragmentHeader) -> bool:
    """Whether the header is that of the block's fragment at ``position``, whatever its hashes and owner are."""
    profile, shape = where.profile, where.shape
    return (
        header.id == where.fragment(position).pack()
        and header.part_header == where.entry.header
        and header.cell_bytes == shape.cell_bytes
        and header.length == shape.fragment_length(profile, position)
        and len(header.hashes) == (1 if profile.k == 1 else profile.n)
    )


def _needed(where: BlockPlace) -> int:
    """How many fragments a block can be read from: a short block does not reach all data fragments."""
    return min(where.profile.k, where.shape.cells)


def _is_needed(where: BlockPlace, position: int) -> bool:
    return where.profile.k == 1 or where.shape.fragment_cells(where.profile, position) > 0


def _may_fail(layout: Layout, where: BlockPlace, alive: Sequence[int]) -> tuple[int, int]:
    """How many disks, and how many domains, may fail before the block can't be read."""
    holders = {position: where.disks[position] for position in alive if _is_needed(where, position)}
    return place.spare(layout, Profile(_needed(where), where.profile.m), holders)
