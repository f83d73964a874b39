"""Where the replicas of a partition are, and how they move to where a layout wants them. Pure.

A layout says where the replicas of a partition *should* be (``Layout.replicas_of``, the target). Where they *are* is
the state of the partition. While nothing moves the two are the same. When a layout with other disks comes into force,
each partition moves by itself, and exchanges one replica at a time::

    settled (S)  ->  joint (S, T)  ->  settled (T)        T is S with one replica exchanged

In a joint state an operation needs a majority of S and a majority of T (``meta.consensus.quorums``). The rows are
copied meanwhile. There are never more than two sets. This is the joint consensus of Raft (Ongaro and Ousterhout, 2014,
section 6) for one replica; the sequence of configurations is agreed outside of the partition, as in Vertical Paxos
(Lamport, Malkhi, Zhou, 2009): by compare-and-set of one register of the system partition for each partition that ever
moved. When the replica that comes is lost before it is whole, the joint state ends in S again.

*Steps* number the states of a partition: 0 for one that never moved, odd numbers for joint states, even ones for
settled states. The epoch of a ballot has the step in its upper half and the layout's epoch in its lower half. So every
ballot of a later step is higher than all ballots of earlier ones, and ballots from before partitions could move are
those of step 0.

Theory of operation: no operation of one step misses what another step has done
    Operations of neighbouring steps share a set, and so a replica; their ballots say which is later. Operations two
    steps apart may share none. So before a joint state (S, T) ends, a majority of S and a majority of T refuse earlier
    steps, durably: an operation of a step before needs one of these majorities, and gets the verdict EPOCH. That is one
    fence for each exchange. A fence of the settled step, after its record, is not needed for this.

    The majority of S that refuses earlier steps (Q) is also the one that is asked what there is:

    * Q is fenced first, and asked then. Each disk of Q answers the fence when all values and bucket fences that it has
      taken before can be read. So some disk of Q reports everything that was chosen or fenced with S alone. A disk that
      is not fenced is not asked: it may still take a value or a bucket fence of the step before, which then has a
      majority of S together with a disk that has not answered.
    * Rows: what Q has is settled by rounds of both sets. They are new ballots of the joint step; rows are not copied
      under their own ballots, which the new disk refuses. What is chosen in the joint step has a majority of T anyway.
    * Bucket fences, and the highest nonces that were lifted: the new disk gets what Q has, at any time before the joint
      state ends. Until then every operation meets a fence at its majority of S. For each bucket the lifted nonce comes
      first, then a fence with a higher one, or a final one. A disk sets and lifts fences only for a caller that knows
      the step; else a fence of the step before could be set at a disk of Q after that was asked.
    * A fence that lends (``meta.acceptor.fences``) is handed over as one that lends. Its bucket has rows; these are
      settled by rounds with its nonce, since others pass no replica of S. Its end, or its lifting, is a request for all
      sets, as every fence is. It may be in force for years. So it stays where fewer than a majority say that it was
      lifted: it refuses writes without the nonce, whatever else it does, and who lifts a fence goes on until all
      replicas have lifted it.
    * Floors of expunged keys (``meta.consensus.floors``): the new disk gets them when it has all rows, before the joint
      state ends. No floor is set while there are two sets.
    * A disk that comes back has rows from before. They are compared too, also where the others have no row left: the
      rows of a key that was deleted meanwhile may be gone, and two disks that come back could be a quorum for it.
    * Lifted nonces matter for a disk that comes back: it may have a fence that was lifted while it was away.

    While there are two sets, what a majority of S alone holds may be chosen, since it was a quorum before. What a
    majority of T alone holds counts for readers that know the settled state already. Where the consensus concludes that
    something was *not* chosen it asks for both (``Quorum.may_have_chosen``).

    An acceptor raises its step with the first ballot of a later step, too, before it promises. Without this a promise
    would be lost with its process: after a restart the common promise of a step says nothing about earlier steps.

Recovery: a majority of a set is lost for good
    A layout, which the administration key has signed, names disks that are lost for good; they are powered off for
    ever. A partition of which no quorum is left then goes on from the disks of one set that are left: the *voters* of
    a settled state whose other disks are ``lost``, and count in no quorum. Where the disk that comes and the one that
    goes are both left it stays joint: either may have what the other one missed. From there it exchanges one replica
    at a time as ever, until the set is whole again. This step is the only one in which no quorum of the step before
    takes part:

    * What was chosen at lost disks alone is lost. What a surviving disk has counts, also where it was not chosen: it
      may have been acknowledged, and no disk is left that could say that it was not.
    * A disk that left the set before may have what the disks of the set have lost. When it comes back its rows count
      again: so a write that was lost may be read later.
    * The new state begins with the disks that are left, not with a set that has blank disks beside them. A majority of
      such a set could be blank, and would say that nothing was ever written.
    * No operation of an earlier step ends any more: each needs a disk that is off. What such a disk has accepted
      before, and a surviving disk accepts late, is a value like another; the survivors refuse it from their first
      ballot of the new step on. A lost disk may never return: with another one, and a gateway that knows the old step
      alone, it would be a quorum of that.
    * A process believes a record with lost disks only if it knows a layout that calls all of them lost. Gateways sign
      records, but not layouts: no gateway recovers a partition by itself.

Recovery of the system partition
    The layouts have its state, so a layout takes this step: it names the lost seed disks (``Layout.seeds_lost``), and
    its certificate has the acceptances of all seed disks that are left (``cluster.succession``).

A replica has a *position*: its index in the set. The replica that comes takes the position of the one that goes. The
copies of a small object are numbered by position.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from storaged.cluster.layout import PARTITIONS, SYSTEM_PARTITION, Layout
from storaged.cluster.spread import minority_of
from storaged.cluster.voters import lacks_quorum, left_of, voting_sets
from storaged.errors import LayoutRefused
from storaged.wire import Message, encode

STEP_SHIFT = 32
STEP_MAX = (1 << 29) - 1
"""So that every epoch stays below the bound of ballots, 2^62."""

PATH_PREFIX = "partition/"
PARTITION_LABEL = b"sov.partition.v1\0"


class PartitionRecord(Message, frozen=True):
    """The register ``partition/NNNN`` of the system table: the state of a partition that has moved at least once.

    ``present`` and ``coming``: disk ids by position; ``coming`` is empty in settled states. ``layout``: the epoch of
    the layout towards which this step went. ``signature`` (Ed25519) is by the signing key ``signer`` of the cluster's
    gateways (``cluster.signers``) over ``signed_bytes``.
    """

    partition: int
    step: int
    present: tuple[str, ...]
    coming: tuple[str, ...]
    layout: int
    signer: bytes = b""
    signature: bytes = b""
    lost: tuple[str, ...] = ()
    """Disks of the sets that count in no quorum any more."""


class SignedPartition(Message, frozen=True):
    """What the signature covers, after the label: the fields of the record, and the cluster."""

    cluster: str
    partition: int
    step: int
    present: tuple[str, ...]
    coming: tuple[str, ...]
    layout: int


class SignedRecovery(SignedPartition, frozen=True):
    """The same of a record with lost disks."""

    lost: tuple[str, ...]


def signed_bytes(cluster: str, record: PartitionRecord) -> bytes:
    """The bytes that a record's signature covers."""
    facts = cluster, record.partition, record.step, record.present, record.coming, record.layout
    signed = SignedRecovery(*facts, record.lost) if record.lost else SignedPartition(*facts)
    return PARTITION_LABEL + encode(signed)


class PartitionState(NamedTuple):
    """Where the replicas of one partition are. ``coming`` is empty in a settled state."""

    partition: int
    step: int
    epoch: int
    """Of the ballots of this state."""
    present: tuple[str, ...]
    coming: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    """Disks of the sets that count in no quorum, since they are lost for good."""

    @property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        """By position, with lost disks."""
        return (self.present, self.coming) if self.coming else (self.present,)

    @property
    def voters(self) -> tuple[tuple[str, ...], ...]:
        """The sets without lost disks: their disks alone can be of a quorum."""
        return left_of(self.sets, self.lost) if self.lost else self.sets

    @property
    def voting(self) -> tuple[tuple[str, ...], ...]:
        """The sets of which a quorum has a majority each (``cluster.voters``)."""
        return voting_sets(self.sets, self.lost)

    @property
    def disks(self) -> tuple[str, ...]:
        """The disks of all sets, each once, by position; the one that comes is last."""
        return tuple(dict.fromkeys(self.present + self.coming))

    def position_of(self, disk: str) -> int:
        """Raises ValueError for a disk of neither set."""
        return self.present.index(disk) if disk in self.present else self.coming.index(disk)

    @property
    def goes(self) -> str:
        """The disk that gives up its rows in a joint state; empty in a settled one."""
        return next((old for old, new in zip(self.present, self.coming, strict=False) if old != new), "")

    @property
    def comes(self) -> str:
        """The disk that takes its place; empty in a settled state."""
        return next((new for old, new in zip(self.present, self.coming, strict=False) if old != new), "")


def epoch_of(step: int, layout_epoch: int) -> int:
    """The epoch of ballots: the step in the upper half, the layout's epoch in the lower."""
    return step << STEP_SHIFT | layout_epoch


def step_of(epoch: int) -> int:
    return epoch >> STEP_SHIFT


def layout_epoch_of(epoch: int) -> int:
    return epoch & ((1 << STEP_SHIFT) - 1)


def path_of(partition: int) -> str:
    """``partition/0012``: the key of its record in the system table."""
    return f"{PATH_PREFIX}{partition:04d}"


def state_of(partition: int, record: PartitionRecord | None, current: Layout, base: Layout) -> PartitionState:
    """``record``: of its register, None when it never moved. ``base``: the layout that placed those which never moved
    (``Layout.base``).
    """
    if partition == SYSTEM_PARTITION:
        epoch = epoch_of(current.seeds_step, current.epoch)
        seeds, coming, lost = current.seeds, current.seeds_next, current.seeds_lost
        return PartitionState(partition, current.seeds_step, epoch, seeds, coming, lost)
    if record is None:
        return PartitionState(partition, 0, epoch_of(0, current.epoch), base.replicas_of(partition))
    epoch = epoch_of(record.step, current.epoch)
    return PartitionState(partition, record.step, epoch, record.present, record.coming, record.lost)


def recovery_of(state: PartitionState, layout: Layout) -> PartitionRecord | None:
    """The step that a partition takes when so many disks of its present set are lost for good that it has no quorum;
    None while it has one, and where no disk of it is left: then there is nothing to go on from. A coming set that lost
    its quorum is given up as ever: the disk that comes is among the lost ones then. Not so in the system partition: it
    needs quorums of both sets to give one up.

    It goes on from the set that has all disks that are left. Where each of the two has one that the other lacks, it
    stays joint: either may have what the other one missed.
    """
    gone = set(layout.lost)
    left = [[disk for disk in disks if disk not in gone] for disks in state.voters]
    needed = state.sets if state.partition == SYSTEM_PARTITION else state.sets[:1]
    if not lacks_quorum(needed, state.lost, gone):
        return None
    number = max(range(len(left)), key=lambda index: len(left[index]))
    if not left[number]:
        return None
    stays = any(set(disks) - set(left[number]) for disks in left)
    present, coming = (state.present, state.coming) if stays else (state.sets[number], tuple[str, ...]())
    step = state.step + (1 if state.coming and not stays else 2)
    lost = tuple(disk for disk in dict.fromkeys(present + coming) if disk in gone or disk in state.lost)
    return PartitionRecord(state.partition, step, present, coming, layout.epoch, lost=lost)


def next_step(
    state: PartitionState, layout: Layout, *, whole: bool = False, lost: Container[str] = ()
) -> PartitionRecord | None:
    """The record of the step after ``state`` on its way to the places of ``layout``; None when there is none to make
    now.

    ``whole``: the coming set has all that was chosen; only then a joint state ends in it. ``lost``: disks that do not
    answer: they go first, and none of them comes. A joint state whose new disk is lost, or wanted no more, ends in the
    set that it had. A partition that has no quorum any more is recovered (``recovery_of``).
    """
    if layout.lost and (recovered := recovery_of(state, layout)) is not None:
        return recovered
    if state.coming:
        ends = state.present
        if state.comes not in lost and state.comes in layout.replicas_of(state.partition):
            if not whole:
                return None
            ends = state.coming
        return PartitionRecord(state.partition, state.step + 1, ends, (), layout.epoch, lost=_among(state.lost, ends))
    target = layout.replicas_of(state.partition)
    going = [disk for disk in state.present if disk not in target]
    free = [disk for disk in target if disk not in state.present and disk not in lost]
    if not going or not free:
        return None
    pairs = [(old, new) for old in going for new in free if _keeps_operators(state, layout, old, new)]
    if not pairs:
        return None
    old, new = min(pairs, key=lambda pair: _badness(state, layout, lost, *pair))
    coming = tuple(new if disk == old else disk for disk in state.present)
    return PartitionRecord(state.partition, state.step + 1, state.present, coming, layout.epoch, lost=state.lost)


def _among(lost: tuple[str, ...], disks: Container[str]) -> tuple[str, ...]:
    return tuple(disk for disk in lost if disk in disks)


def _keeps_operators(state: PartitionState, layout: Layout, old: str, new: str) -> bool:
    """Whether an exchange leaves every operator with a minority, where the layout trusts none alone. Where one has more
    already, since the layout was another one, it may not get more still. Disks that the layout does not have answer
    no call, so they give no operator a vote.
    """
    if not layout.spreads:
        return True
    share = layout.operator_share(new if disk == old else disk for disk in state.present)
    return share <= max(minority_of(len(state.present)), layout.operator_share(state.present))


def _badness(
    state: PartitionState, layout: Layout, lost: Container[str], old: str, new: str
) -> tuple[bool, bool, bool, int]:
    """Of an exchange, for the choice of the first: two replicas in one failure domain are worst; then disks that are
    lost or not in the layout go before others; then it is best to stay in the domain.
    """
    domains = layout.domain_by_disk
    others = [domains.get(disk, disk) for disk in state.present if disk not in (old, *state.lost)]
    gone = old in lost or old in state.lost or old not in layout.disk_by_id
    return domains[new] in others, not gone, domains.get(old) != domains[new], state.present.index(old)


def is_settled(state: PartitionState, layout: Layout) -> bool:
    """Whether the replicas are where the layout wants them. Their order does not matter."""
    return not state.coming and set(state.present) == set(layout.replicas_of(state.partition))


def check_step(before: PartitionState, after: PartitionRecord, layout: Layout | None = None) -> None:
    """Raises LayoutRefused, with the reason, for a record that does not follow the state ``before``. ``layout``: the
    one in force, which names lost disks.
    """
    name = f"Partition {after.partition}, step {after.step}"
    if after.partition != before.partition or not 0 <= after.partition < PARTITIONS:
        raise LayoutRefused(f"{name}: there is no such partition, or it is another one.")
    if layout is not None and set(after.lost) - set(before.lost):
        wanted = recovery_of(before, layout)
        if wanted is None or (after.step, *_facts(after)) != (wanted.step, *_facts(wanted)):
            raise LayoutRefused(f"{name}: the partition has a quorum, or it is not recovered like this.")
        return
    if after.step != before.step + 1 or after.step > STEP_MAX:
        raise LayoutRefused(f"{name}: the partition is at step {before.step}; the next one is {before.step + 1}.")
    kept = (*after.present, *after.coming)
    if after.lost != tuple(disk for disk in before.lost if disk in kept):
        raise LayoutRefused(f"{name}: lost disks of the partition are those of the step before.")
    if before.coming:
        if after.present not in before.sets or after.coming:
            raise LayoutRefused(f"{name}: a joint state ends in one of its two sets.")
        return
    exchanged = [(old, new) for old, new in zip(before.present, after.coming, strict=False) if old != new]
    if after.present != before.present or len(after.coming) != len(before.present) or len(exchanged) != 1:
        raise LayoutRefused(f"{name}: exactly one replica is exchanged at a time.")
    if len(set(after.coming)) != len(after.coming):
        raise LayoutRefused(f"{name}: a disk is named twice.")
    if exchanged[0][1] in before.lost:
        raise LayoutRefused(f"{name}: a lost disk does not come back.")


def _facts(record: PartitionRecord) -> tuple[tuple[str, ...], ...]:
    return record.present, record.coming, record.lost


def is_sound(record: PartitionRecord) -> bool:
    """Whether a state can be made of it: it names a partition and a step, no disk of a set twice, and in each set disks
    that count.
    """
    sets = (record.present, record.coming) if record.coming else (record.present,)
    numbered = 0 <= record.partition < PARTITIONS and 1 <= record.step <= STEP_MAX
    return numbered and all(len(set(disks)) == len(disks) and set(disks) - set(record.lost) for disks in sets)
