"""The calls that move a partition: fences of its epoch, the bucket fences for the replica that comes, its ranges.

``maintain.partition_mover`` puts them into their order. Each asks a quorum of the state's sets, and trusts no single
replica.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar, cast

import structlog
from msgspec import MsgspecError

from storaged.cluster.partitions import PartitionState, layout_epoch_of, step_of
from storaged.errors import InvalidRequest, ServiceUnavailable, StoragedError
from storaged.meta.consensus.bounds import NONCE_BYTES_MAX, check_floor
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.consensus.register import Verdict
from storaged.meta.messages import (
    FENCES_A_CALL,
    EpochFence,
    EpochReply,
    FencesAsk,
    FencesReply,
    FencesTake,
    FloorsAsk,
    FloorsReply,
    FloorsTake,
    RangeFloor,
    RangesAsk,
    RangesReply,
    ScanRequest,
    ScopeFence,
    ShardAsk,
)
from storaged.meta.names import SYSTEM_SCOPE, Ballot, RegisterName, Table, Visibility
from storaged.meta.ports import Handover, HandoverReplica, Replica
from storaged.meta.storage.rowvalue import NAME_PREFIX_BYTES
from storaged.meta.storage.scan import Want, decode_rows
from storaged.meta.transport.calls import Answers, Calls
from storaged.units import MIB

T = TypeVar("T")

COUNTED_A_CALL, EXAMINED_A_CALL = 500, 5_000

log = structlog.get_logger(__name__)

NO_SCOPE = b""
_TABLES = frozenset(map(int, Table))
FENCES_TIMEOUT_S = 5.0
RANGES_TIMEOUT_S = 30.0
"""A disk reads the names of all its shards: a few hundred thousand in a second, from memory."""


class Closed(NamedTuple):
    """Buckets that are deleted: ``surely``, since a majority of the present set says so; ``perhaps``, with the nonce of
    the fence, where only some disks do, and where the fence lends: such a bucket has rows. Settling rounds with that
    nonce pass the fence, and change no value.
    """

    surely: frozenset[bytes]
    perhaps: dict[bytes, bytes]


class PartitionMoves:
    """Each call raises ServiceUnavailable where no quorum answers."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def fence(self, state: PartitionState) -> frozenset[str]:
        """Has the replicas of all sets refuse earlier steps of this partition, durably: a quorum of each set, and all
        others that answer. Returns which do.
        """
        quorum = Quorum(*state.voting)

        def call(disk: str, timeout_s: float) -> Callable[[Replica], Awaitable[EpochReply]]:
            request = EpochFence(disk, state.epoch, state.partition)
            return lambda replica: replica.fence_epoch(request, timeout_s=timeout_s)

        done = await self._calls.gather(
            [quorum], call, lambda reply: reply.epoch >= state.epoch, self._calls.deadline(), linger=True
        )
        _check(quorum, done, state, "refuse the steps before")
        return frozenset(done)

    async def copy_fences(self, state: PartitionState, fenced: Container[str]) -> Closed:
        """Gives the replica that comes the bucket fences of a majority of the present set, and the nonces that were
        lifted. Returns the scopes of buckets that are deleted for good. One replica alone may lie, and then the rows of
        its bucket would not be copied. But when a disk of the present set is lost, it may be one of two that had the
        fence, and the other one refuses settling rounds for ever. A fence of which fewer than a majority say that it
        stays for ever is given on as one that may be lifted. One that lends goes on to lend: a replica that refuses
        what the others take would leave no majority when one of them is away.

        ``fenced``: as ``fence`` returned it. Only these disks are asked: another one may still take a fence, or a
        value, of the step before, after it has answered.
        """
        closed = Closed(frozenset(), {})
        async for scopes, doubted, final in self._scopes(state, [disk for disk in state.present if disk in fenced]):
            for first in range(0, len(scopes), FENCES_A_CALL):
                some = tuple(scopes[first : first + FENCES_A_CALL])
                request = FencesTake(state.comes, some, tuple(its.scope for its in some if its.scope in doubted))
                replica = self._handover(state.comes)
                await replica.take_fences(request, timeout_s=self._calls.call_timeout_s)
            closed.perhaps.update(final.perhaps)
            closed = Closed(closed.surely | final.surely, closed.perhaps)
        return closed

    async def close_everywhere(self, state: PartitionState, scope: bytes) -> bool:
        """Gives every replica of a settled partition the fence of a deleted bucket. The deletion needed only a
        majority, so a replica that was away has no fence. Returns whether a majority had it, and all have it now.
        """
        before = max(0, int.from_bytes(scope, "big") - 1).to_bytes(len(scope), "big")
        found = await self._ask(state.present, partial(_fences_after, before), partial(_goes_on, before))
        held = {disk: its for disk, reply in found.items() for its in reply.scopes if its.scope == scope and its.final}
        if len(found) < len(state.present) or not Quorum(state.voters[0]).met(held):
            return False
        agreed = merged(list(found.values()), scope, Quorum(state.voters[0]).fewest)[0]
        for disk in (disk for disk in state.present if disk not in held):
            await self._handover(disk).take_fences(FencesTake(disk, (agreed,)), timeout_s=self._calls.call_timeout_s)
        return True

    async def _scopes(
        self, state: PartitionState, disks: Sequence[str]
    ) -> AsyncIterator[tuple[list[ScopeFence], set[bytes], Closed]]:
        """Page by page; the scopes of which fewer than a majority say this; and those of it that are final. A reply
        that has more counts only up to its last scope.
        """
        quorum, after = Quorum(state.voters[0]), NO_SCOPE
        while True:
            found = await self._ask(disks, partial(_fences_after, after), partial(_goes_on, after))
            _check(quorum, found, state, "say which buckets are fenced")
            ends = [reply.scopes[-1].scope for reply in found.values() if reply.more]
            through = min(ends) if ends else None
            replies = list(found.values())
            agreed = merged(replies, through, quorum.fewest)
            surely = frozenset(its.scope for its in agreed if its.final)
            perhaps = {
                its.scope: its.nonce for its in merged(replies, through) if its.final and its.scope not in surely
            }
            said = merged(replies, through, quorum.fewest - len(quorum.disks) + len(found))
            # The nonce that a majority has, not the one that another replica makes up: only with it rows settle.
            perhaps |= {its.scope: its.nonce for its in said if its.lends}
            doubted = {its.scope for its in set(said).difference(agreed)}
            yield [_only_surely(its, surely) for its in said], doubted, Closed(surely, perhaps)
            if through is None:
                return
            after = through

    async def ranges(self, state: PartitionState, fenced: Container[str]) -> list[tuple[int, bytes, int]]:
        """(table, scope, shard) of the rows that a majority of the present set has; of chosen ones at least. And of
        those that the disk that comes has from an earlier time: where the others' rows were expunged since, these would
        count again when a second such disk comes. ``fenced``: as for ``copy_fences``.
        """
        disks = [disk for disk in (*state.present, state.comes) if disk in fenced]
        found = await self._ask(disks, partial(_ranges_of, state.partition), partial(_are_ranges, state.partition))
        _check(Quorum(state.voters[0]), found, state, "say which shards they have")
        if state.comes in fenced and state.comes not in found:
            raise ServiceUnavailable(f"disk {state.comes}, which comes to it, does not say which shards it has")
        prefixes = {prefix for reply in found.values() for prefix in reply.prefixes}
        return [(prefix[0], prefix[1:17], prefix[17]) for prefix in sorted(prefixes)]

    async def copy_floors(self, state: PartitionState, fenced: Container[str]) -> None:
        """Gives the replica that comes the floors of the present set, when it has all rows (``consensus.floors``).
        ``fenced``: as for ``copy_fences``. A floor was active at all of these disks before a row went, so those of them
        count that so many have as a majority and the replies must have in common (``merged``). One disk may lie: it
        could name ranges without end. After a recovery each disk counts alone: one of those left may have come just
        before, and not have the floors yet.
        """
        quorum, after = Quorum(state.voters[0]), b""
        disks = [disk for disk in state.present if disk in fenced]
        while True:
            ask, sound = partial(_floors_after, state.partition, after), partial(_are_floors, state.partition, after)
            found = await self._ask(disks, ask, sound)
            _check(quorum, found, state, "say which floors they have")
            at_least = 1 if state.lost else max(1, quorum.fewest - len(quorum.disks) + len(found))
            replies = list(found.values())
            ends = [reply.floors[-1].prefix for reply in replies if reply.more]
            through = min(ends) if ends else None
            await self._give_floors(state, merged_floors(replies, through, state.step, at_least))
            if through is None or _that_go_on(replies, through) < at_least:
                return
            after = through

    async def _give_floors(self, state: PartitionState, floors: Sequence[RangeFloor]) -> None:
        replica = self._replica(state.comes).floors
        for first in range(0, len(floors), FENCES_A_CALL):
            some = tuple(floors[first : first + FENCES_A_CALL])
            request = FloorsTake(state.comes, state.partition, state.epoch, some)
            reply = await replica.take_floors(request, timeout_s=self._calls.call_timeout_s)
            if reply.verdict != Verdict.OK:
                raise ServiceUnavailable(f"Partition {state.partition}: disk {state.comes} knows a later step.")

    async def count_keys(self, state: PartitionState, disk: str, at_most: int) -> int:
        """How many keys of objects one disk has of this partition; ``at_most`` are counted. For people: nothing may be
        decided by what a single disk says.
        """
        replies = await self._ask([disk], partial(_ranges_of, state.partition), partial(_are_ranges, state.partition))
        if disk not in replies:
            raise ServiceUnavailable(f"disk {disk} does not say what it has of partition {state.partition}")
        found = 0
        for prefix in replies[disk].prefixes:
            if prefix[0] == Table.OBJECT and found < at_most:
                shard = Table.OBJECT, prefix[1:17], prefix[17]
                found += len(await self._keys_of_shard(state, disk, shard, at_most - found))
        return found

    async def system_keys(self, state: PartitionState, disk: str, at_most: int) -> list[bytes]:
        """The keys of system registers that one disk has. For people, as ``count_keys``."""
        return await self._keys_of_shard(state, disk, (Table.SYSTEM, SYSTEM_SCOPE, 0), at_most)

    async def _keys_of_shard(
        self, state: PartitionState, disk: str, its: tuple[Table, bytes, int], at_most: int
    ) -> list[bytes]:
        (table, scope, shard), found, after = its, list[bytes](), b""
        while len(found) < at_most:
            limit = min(COUNTED_A_CALL, at_most - len(found))
            ask = ShardAsk(shard, after, limit, Want.VISIBLE, EXAMINED_A_CALL, MIB, 0, state.epoch)
            epoch = layout_epoch_of(state.epoch)
            request = ScanRequest(disk, epoch, table, scope, (ask,), visible=Visibility.LIVE)
            reply = await self._calls.replicas.replica(disk).scan(request, timeout_s=FENCES_TIMEOUT_S)
            if reply.verdict or not reply.slices or reply.slices[0].unreadable:
                raise ServiceUnavailable(f"disk {disk} does not say which keys it has of partition {state.partition}")
            part = reply.slices[0]
            try:
                found += [row.key for row in decode_rows(part.rows) if row.value is not None]
            except MsgspecError:
                raise ServiceUnavailable(f"disk {disk} sends rows that can't be read") from None
            if part.done or part.through <= after:
                break
            after = part.through
        return found

    def _handover(self, disk: str) -> Handover:
        return self._replica(disk).handover

    def _replica(self, disk: str) -> HandoverReplica:
        replica = self._calls.replicas.replica(disk)
        assert isinstance(replica, HandoverReplica)
        return replica

    async def _ask(
        self, disks: Sequence[str], call: Callable[[HandoverReplica, str], Awaitable[T]], is_sound: Callable[[T], bool]
    ) -> dict[str, T]:
        """The answers of those that give a sound one, in time."""
        answers: Answers[T] = self._calls.answers()
        deadline = self._calls.clock.monotonic() + self._calls.deadline_s * 3
        for disk in disks:

            async def ask(replica: Replica, disk: str = disk) -> T:
                return await call(cast(HandoverReplica, replica), disk)

            answers.ask(disk, ask)
        found: dict[str, T] = {}
        while (answer := await answers.next(self._calls.remaining_s(deadline))) is not None:
            disk, reply = answer
            if isinstance(reply, StoragedError):
                continue
            if is_sound(reply):
                found[disk] = reply
            else:
                log.error("what a disk says of a partition that moves is none", disk=disk)
        return found


async def _fences_after(after: bytes, replica: HandoverReplica, disk: str) -> FencesReply:
    return await replica.handover.fences(FencesAsk(disk, after), timeout_s=FENCES_TIMEOUT_S)


async def _ranges_of(partition: int, replica: HandoverReplica, disk: str) -> RangesReply:
    return await replica.handover.ranges(RangesAsk(disk, partition), timeout_s=RANGES_TIMEOUT_S)


async def _floors_after(partition: int, after: bytes, replica: HandoverReplica, disk: str) -> FloorsReply:
    return await replica.floors.floors(FloorsAsk(disk, partition, after), timeout_s=FENCES_TIMEOUT_S)


def _are_floors(partition: int, after: bytes, reply: FloorsReply) -> bool:
    """Whether these are floors of ranges of the partition that follow ``after``."""
    prefixes = [after, *(its.prefix for its in reply.floors)]
    if any(earlier >= later for earlier, later in pairwise(prefixes)) or (reply.more and not reply.floors):
        return False
    try:
        for floor in reply.floors:
            check_floor(floor.prefix, floor.ballot)
    except InvalidRequest:
        return False
    names = (RegisterName(its.prefix[0], its.prefix[1:17], its.prefix[17], b"") for its in reply.floors)
    return all(name.partition == partition for name in names)


def _goes_on(after: bytes, reply: FencesReply) -> bool:
    """Whether these are fences of scopes that follow ``after``."""
    scopes = [after, *(its.scope for its in reply.scopes)]
    return (
        all(earlier < later and len(later) == 16 for earlier, later in pairwise(scopes))
        and all(max(len(its.nonce), len(its.lifted)) <= NONCE_BYTES_MAX for its in reply.scopes)
        and not (reply.more and not reply.scopes)
    )


def _are_ranges(partition: int, reply: RangesReply) -> bool:
    """Whether these are shards of this partition."""
    return all(
        len(prefix) == NAME_PREFIX_BYTES
        and prefix[0] in _TABLES
        and RegisterName(prefix[0], prefix[1:17], prefix[17], b"").partition == partition
        for prefix in reply.prefixes
    )


def merged_floors(replies: Sequence[FloorsReply], through: bytes | None, step: int, at_least: int) -> list[RangeFloor]:
    """Of the ranges up to ``through`` (None: all) the highest floor of an earlier step that ``at_least`` of the replies
    name or exceed.
    """
    by_range: dict[bytes, list[Ballot]] = {}
    for floor in (floor for reply in replies for floor in reply.floors):
        if (through is None or floor.prefix <= through) and step_of(floor.ballot.epoch) < step:
            by_range.setdefault(floor.prefix, []).append(floor.ballot)
    found = sorted((prefix, ballots) for prefix, ballots in by_range.items() if len(ballots) >= at_least)
    return [RangeFloor(prefix, sorted(ballots)[-at_least]) for prefix, ballots in found]


def _that_go_on(replies: Sequence[FloorsReply], after: bytes) -> int:
    return sum(reply.more or bool(reply.floors and reply.floors[-1].prefix > after) for reply in replies)


def merged(replies: Sequence[FencesReply], through: bytes | None, at_least: int = 1) -> list[ScopeFence]:
    """Of the scopes up to ``through`` (None: all) what ``at_least`` of the replies say. A final fence wins; else the
    highest nonce that was lifted, and a fence with a higher one.

    A fence that lends wins over all that others say of other nonces. It may be there for years, and while one of three
    does not answer, another one alone could say that it was lifted: then the two would take writes of a bucket that is
    deleted. It refuses what they refuse, too. Where it was lifted, or another one was set, while its disk was away, the
    setter goes on until all replicas have that (``ports.Fences``).

    What a majority of the present set has, so many of its members say as a majority and the replies must have in
    common. Fewer may lie, or have a fence that is not confirmed yet: its setter learns of the step, and begins again.
    """
    by_scope: dict[bytes, list[ScopeFence]] = {}
    for reply in replies:
        for scope in reply.scopes:
            if through is None or scope.scope <= through:
                by_scope.setdefault(scope.scope, []).append(scope)
    return [_merged_one(by_scope[scope], at_least) for scope in sorted(by_scope)]


def _only_surely(fence: ScopeFence, surely: Container[bytes]) -> ScopeFence:
    """The fence, which stays for ever only where a majority says so. While one of three does not answer, another one
    alone can say it of a living bucket: then the two would be a majority that proves its end (``maintain.disuse``).
    """
    if not fence.final or fence.scope in surely:
        return fence
    return ScopeFence(fence.scope, fence.nonce, False, b"")


def _merged_one(held: Sequence[ScopeFence], at_least: int) -> ScopeFence:
    scope, lifted = held[0].scope, _said([its.lifted for its in held], at_least)
    final = _said([its.nonce for its in held if its.final], at_least)
    lends = _said([its.nonce for its in held if its.lends], at_least)
    if final and lends in (b"", final):
        return ScopeFence(scope, final, True, lifted)
    if lends:
        return ScopeFence(scope, lends, False, lifted if lifted < lends else b"", True)
    nonce = _said([its.nonce for its in held], at_least)
    return ScopeFence(scope, nonce if nonce > lifted else b"", False, lifted)


def _said(nonces: Sequence[bytes], at_least: int) -> bytes:
    """The highest nonce that so many name or exceed; empty when there is none."""
    return sorted(nonces, reverse=True)[at_least - 1] if len(nonces) >= at_least else b""


def _check(quorum: Quorum, disks: Sequence[str] | set[str] | dict[str, T], state: PartitionState, what: str) -> None:
    if not quorum.met(disks):
        raise ServiceUnavailable(
            f"Partition {state.partition}: {len(disks)} of {len(quorum.disks)} replicas {what}; a majority is needed."
            " It goes on when more are back."
        )
