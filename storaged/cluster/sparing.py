"""Replaces disks that are away by the others: which disks are *out*, and what follows for placement. Pure.

The administration key is offline, so no layout is signed when a disk dies. The signed layout holds the policy
(``layout.Sparing``), and the register ``disks-out`` of the system partition names the disks that are out. A gateway
changes it by compare-and-set, and only with the signed votes of a majority of the storage nodes: each says how long it
has seen a disk away, or answering. So a node or a minority that is cut off declares nothing.

Theory of operation: a wrong verdict moves data, and loses none
    What is out decides only where data *should* be: ``target`` is the layout without those disks. Where data is follows
    from the records of partitions and of objects, and from the layout under which a block was written. None of these
    asks what is out. A partition still needs majorities of its present replicas for each step, also to leave a disk
    that is out. Two gateways that know different disks out want different steps, and the compare-and-set of the
    partition's record takes one.

    A disk that comes back keeps its fragments where records still name them. It may have lost its place in partitions:
    then its rows are of an earlier step and count no more, and it comes again like a new disk, in a joint step. Where
    it was not replaced yet, it catches up.

Limits
    ``Sparing.domains_max`` bounds the failure domains with disks that are out because their node does not answer: half
    of a cluster may be cut off, and moving its data would be a storm. A disk that is broken or refused, while its node
    answers, does not count. A disk that is out comes back after it has answered for ``Sparing.fragments_s``, so one
    that comes and goes does not move data to and fro: it has to be away for ``Sparing.registers_s`` without a break
    before it goes again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from storaged.cluster.layout import Layout
from storaged.wire import Message, decode, encode

PATH = "disks-out"
OUT_LABEL = b"sov.out.v1\0"
NONCE_BYTES = 16
DISKS_MAX = 256
"""Of one question, and out at the same time."""

VOTES_MAX = 512
"""Of a record."""

UNREACHABLE = "unreachable"
"""The state of a disk whose node does not answer. Other states are as in ``ports.DiskStatus``."""
ABSENT = "absent"
"""Of a disk that its node does not have."""
OUT = "out"
"""``DiskEntry.state`` of a disk that is out, in ``target``. No signed layout has it."""


class Opinion(Message, frozen=True):
    """What one node says of a disk: for so many seconds it has been away, for the reason ``state``; or it has answered,
    if that is empty.
    """

    disk: str
    state: str
    for_s: int

    def says_away(self, for_s: int) -> bool:
        return bool(self.state) and self.for_s >= for_s

    def says_back(self, for_s: int) -> bool:
        return not self.state and self.for_s >= for_s


class VoteAsk(Message, frozen=True):
    """Asks a storage node for its vote on some disks. ``nonce`` is new for each question."""

    nonce: bytes
    disks: tuple[str, ...]


class Vote(Message, frozen=True):
    """What ``node`` says, under the layout of ``epoch``."""

    cluster: str
    node: str
    epoch: int
    nonce: bytes
    opinions: tuple[Opinion, ...]


class SignedVote(Message, frozen=True):
    """An encoded Vote, and its node's certificate (DER) and signature (ECDSA, P-256, SHA-256) over the label and it."""

    payload: bytes
    certificate: bytes
    signature: bytes


class OutDisk(Message, frozen=True):
    """``since_ms``: since when a majority has seen it away (ms since 1970). ``state``: why, by most votes."""

    disk: str
    since_ms: int
    state: str


class DisksOut(Message, frozen=True):
    """The register ``disks-out``. ``number`` counts its changes. ``votes``: for each disk those of a majority.

    ``signature`` (Ed25519) is by the signing key ``signer`` of the cluster's gateways over ``signed_bytes``.
    """

    number: int
    out: tuple[OutDisk, ...]
    votes: tuple[SignedVote, ...]
    signer: bytes = b""
    signature: bytes = b""

    @property
    def disks(self) -> frozenset[str]:
        return frozenset(entry.disk for entry in self.out)


NONE_OUT = DisksOut(0, (), ())


class SignedOut(Message, frozen=True):
    """What the signature covers, after the label."""

    cluster: str
    number: int
    out: tuple[OutDisk, ...]
    votes: tuple[SignedVote, ...]


def signed_bytes(cluster: str, record: DisksOut) -> bytes:
    return OUT_LABEL + encode(SignedOut(cluster, record.number, record.out, record.votes))


# --- what follows from disks that are out


def target(layout: Layout, out: Collection[str]) -> Layout:
    """Where data should be while these disks are out: ``layout`` without them, for everything that is placed from now
    on. It has the same epoch and the same failure domains.

    Where too few domains would be left for the replicas of a partition, domains of which nothing is left keep their
    disks: then nothing moves away from these. Where no operator is trusted alone, and too few would be left for that,
    all disks stay where they are.
    """
    domain_of = layout.domain_by_disk
    active = [disk.id for disk in layout.disks if disk.state == "active"]
    left = {domain_of[disk] for disk in active if disk not in out}
    gone = {disk for disk in active if disk in out and (len(left) >= layout.replicas or domain_of[disk] in left)}
    if not gone:
        return layout
    disks = tuple(replace(disk, state=OUT) if disk.id in gone else disk for disk in layout.disks)
    found = replace(layout, disks=disks)
    return layout if layout.spreads and found.spread_facts.replicas_room < layout.replicas else found


def voters_of(layout: Layout) -> frozenset[str]:
    """The storage nodes that have a disk: a majority of them decides."""
    nodes = {disk.node for disk in layout.disks}
    return frozenset(name for name in nodes if "storage" in layout.node_by_name[name].roles)


def majority_of(layout: Layout) -> int:
    return len(voters_of(layout)) // 2 + 1


# --- decisions


class Verdict(NamedTuple):
    """Of a majority. ``for_s``: so long at least, by each of them."""

    state: str
    for_s: int


def verdict_on(disk: str, votes: Iterable[Vote], layout: Layout, agrees: Callable[[Opinion], bool]) -> Verdict | None:
    """What a majority of the nodes that have a vote says of a disk; None when fewer than that agree. ``votes``: of
    different nodes.
    """
    said = [opinion for vote in votes for opinion in vote.opinions if opinion.disk == disk and agrees(opinion)]
    majority = majority_of(layout)
    if len(said) < majority:
        return None
    states = [opinion.state for opinion in said]
    return Verdict(
        max(sorted(set(states)), key=states.count), sorted((one.for_s for one in said), reverse=True)[majority - 1]
    )


def due(layout: Layout, known: DisksOut, seen: Mapping[str, Opinion]) -> tuple[str, ...]:
    """The disks to ask votes for, as far as one node has ``seen`` them: they should go out, or come back."""
    policy, out = layout.sparing, known.disks
    found = [disk for disk in out if disk not in layout.disk_by_id or not policy.domains_max]
    for disk, opinion in seen.items():
        goes = disk not in out and policy.domains_max > 0 and opinion.says_away(policy.registers_s)
        if goes or (disk in out and opinion.says_back(policy.fragments_s)):
            found.append(disk)
    return tuple(sorted(set(found)))[:DISKS_MAX]


def decide(
    layout: Layout, known: DisksOut, votes: Mapping[str, tuple[Vote, SignedVote]], now_ms: int
) -> DisksOut | None:
    """The next record, without a signature; None where nothing changes. ``votes``: by node, verified, all under
    ``layout``. Disks that stay keep the votes that put them out, unless a majority votes so again: without that the
    record would grow with each disk, until it had more votes than a node believes.
    """
    policy = layout.sparing
    heard = [vote for vote, _ in votes.values()]

    def says_away(opinion: Opinion) -> bool:
        return opinion.says_away(policy.registers_s)

    back = {
        disk
        for disk in known.disks
        if disk not in layout.disk_by_id
        or not policy.domains_max
        or verdict_on(disk, heard, layout, lambda opinion: opinion.says_back(policy.fragments_s))
    }
    stay = [entry for entry in known.out if entry.disk not in back]
    come = []
    for disk in sorted({opinion.disk for vote in heard for opinion in vote.opinions} - known.disks):
        if disk in layout.disk_by_id and policy.domains_max:
            verdict = verdict_on(disk, heard, layout, says_away)
            if verdict is not None:
                come.append(OutDisk(disk, now_ms - 1000 * verdict.for_s, verdict.state))
    new = _within(layout, stay, come)
    if not new and not back:
        return None
    again = {entry.disk for entry in stay if verdict_on(entry.disk, heard, layout, says_away)}
    kept = _votes_for([entry for entry in stay if entry.disk not in again], known.votes)
    fresh = [signed for _, signed in votes.values()] if new or again else []
    record = DisksOut(known.number + 1, (*stay, *new), (*kept, *fresh))
    return record if len(record.votes) <= VOTES_MAX else None


def _within(layout: Layout, stay: Sequence[OutDisk], come: Sequence[OutDisk]) -> list[OutDisk]:
    """Those of ``come`` that the limits of the policy let go out, the longest away first."""
    domains = {layout.domain_by_disk[entry.disk] for entry in stay if entry.state == UNREACHABLE}
    found: list[OutDisk] = []
    for entry in sorted(come, key=lambda entry: (entry.since_ms, entry.disk)):
        if len(stay) + len(found) >= DISKS_MAX:
            break
        if entry.state == UNREACHABLE:
            more = domains | {layout.domain_by_disk[entry.disk]}
            if len(more) > layout.sparing.domains_max:
                continue
            domains = more
        found.append(entry)
    return found


def _votes_for(entries: Sequence[OutDisk], votes: Sequence[SignedVote]) -> list[SignedVote]:
    """The votes that say something of one of these disks."""
    disks = {entry.disk for entry in entries}
    return [
        signed
        for signed in votes
        if any(opinion.disk in disks and opinion.state for opinion in decode(signed.payload, Vote).opinions)
    ]
