"""What proposers and acceptors say to each other: the requests and replies of ``meta.*`` methods. (``storage.scan``
says what those of a scan mean.)

Every request names the disk that it is for: a node has several, each its own acceptor. ``verdict`` in replies is
``register.Verdict``.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from storaged.cluster.rpc.framing import ErrorHead
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Value
from storaged.wire import Message

FENCES_A_CALL = 1_000
PAGES_A_CHECK = 256
"""Pages verified for one request: some 15 MiB of manifests, 5 ms of reading and hashing."""


class Prepare(Message, frozen=True):
    """``nonce``: of the fence, for settling rounds in a fenced scope."""

    disk: str
    name: RegisterName
    ballot: Ballot
    nonce: bytes = b""


class PrepareReply(Message, frozen=True):
    """``promised``: the lowest ballot that would not be refused, before this promise. It is a hint: when the verdict is
    PREEMPTED or DAMAGED, of what is in the way; when it is OK and above ``accepted``, that another proposer is at work.
    ``accepted`` and ``value``: what the register holds here, when the verdict is OK. ``final``: the scope's fence stays
    for ever. ``copied``: as ``Slot.copied``; rows of replicas that do not say count as accepted with their copy.
    ``lends``: the scope's fence is one that lends.
    """

    verdict: int
    promised: Ballot = ZERO_BALLOT
    accepted: Ballot = ZERO_BALLOT
    value: Value | None = None
    final: bool = False
    copied: bool = True
    lends: bool = False


class Accept(Message, frozen=True):
    """``identity``: the value was accepted before (a settling round). A settling round passes a fence with its
    ``nonce``; so does a change where the fence lends.

    ``header``: the encoded header of a fragment record whose payload is the request's bulk body, the copy of the small
    object that the value names. The replica makes it durable with the value or before it. When it can't, or when no
    copy comes along and it has none, it refuses the value (UNSTORED), also in a settling round. ``check``: of the copy,
    as in ``ports.SmallCopies``.
    """

    disk: str
    name: RegisterName
    ballot: Ballot
    value: Value
    nonce: bytes = b""
    identity: bool = False
    header: bytes = b""
    check: bytes = b""


class Create(Accept, frozen=True):
    """An Accept for which no promise was asked: an acceptor that has accepted nothing for this register takes it
    (``register``).
    """


class Accepts(Message, frozen=True):
    """Accepts at the disks of one node. ``sizes``: how many bytes of the bulk body are the copy of each. ``creates``:
    whether each is a Create.
    """

    accepts: list[Accept]
    sizes: list[int]
    creates: list[bool]


class AcceptReply(Message, frozen=True):
    """OK: the value is durable here under the ballot. ``copy_synced``: the copy that it names is durable too;
    ``copy_error``: why it is not. ``final``: the scope's fence stays for ever; when PREEMPTED: nothing was accepted
    here under this ballot, nor will be. ``floor``: of a refusal where the floor of the range counts in place of a row,
    the sequence that a create has to exceed. ``lends``: the scope's fence is one that lends.
    """

    verdict: int
    promised: Ballot = ZERO_BALLOT
    final: bool = False
    copy_synced: bool = False
    copy_error: str = ""
    floor: int = 0
    lends: bool = False


class AcceptsReply(Message, frozen=True):
    """One reply for each accept, in order. None: it has to be sent again by itself, or its error is among the
    ``errors``, by its index.
    """

    replies: list[AcceptReply | None]
    errors: dict[int, ErrorHead]


class Read(Message, frozen=True):
    """``full``: send the value, else its digest alone. ``want_payload``: send also the copy of the small object that
    the value names. ``data_id``: send the copy of this small object, whatever the value here names.
    """

    disk: str
    name: RegisterName
    epoch: int
    full: bool = True
    want_payload: bool = False
    data_id: bytes = b""


class ReadReply(Message, frozen=True):
    """``digest``: xxh3-64 (8 bytes) of the encoded value, empty when there is none; only nodes of version 0.1.0 look at
    it, others compare values. ``payload``: the data id of the
    copy in the bulk body, or empty. ``header``: the copy's encoded fragment header, when a copy was asked for by its
    data id. ``fenced``: the scope is fenced (a bucket that is, or was, being deleted). ``copied``: as in
    ``PrepareReply``. ``copy_absent``: this disk has no whole copy of what was asked for. Without a copy and without
    this, the copy may be here but can't be read now. ``final``: the scope's fence stays for ever; nodes of 0.1.0 do not
    say so. ``lends``: the scope's fence is one that lends.
    """

    verdict: int
    accepted: Ballot = ZERO_BALLOT
    digest: bytes = b""
    value: Value | None = None
    payload: bytes = b""
    header: bytes = b""
    fenced: bool = False
    copied: bool = True
    copy_absent: bool = False
    final: bool = False
    lends: bool = False


class Reads(Message, frozen=True):
    """Many registers at the disks of one node. ``asks``: for each of ``disks`` the requests, each one byte (CHECK, ROW
    or COPY of ``read_batching``) and the register's packed name. ``wait``: of a single request, that the node should
    wait where it has to.
    """

    epoch: int
    disks: list[str]
    asks: list[list[bytes]]
    wait: bool = False


class ReadsReply(Message, frozen=True):
    """``found``: for each request of each disk the row or its check as ``rowvalue`` lays them out, empty when there is
    none; None: the node can't say, or not without waiting. ``copies``: for each request for a copy whose row was found,
    in order, how many bytes of the bulk body are its copy; 0: the copy is not here.
    """

    found: list[list[bytes | None]]
    copies: list[int]


class PagePut(Message, frozen=True):
    """``page_hash`` is the name of the page ``body`` (``hashes.page_hash``); another body is refused. ``owner``: the
    packed name of the object's register; nodes of 0.1.0 do not send it.
    """

    disk: str
    page_hash: bytes
    body: bytes
    owner: bytes = b""


class PageGet(Message, frozen=True):
    disk: str
    page_hash: bytes


class PageCheck(Message, frozen=True):
    """Up to ``PAGES_A_CHECK`` hashes."""

    disk: str
    hashes: tuple[bytes, ...]


class PagesMissing(Message, frozen=True):
    """Those that this disk does not have, or has damaged."""

    hashes: tuple[bytes, ...] = ()


class PageReply(Message, frozen=True):
    """None: this disk does not have the page. After a put: the page is durable (and not sent back)."""

    body: bytes | None = None


TURN_GRANTED, TURN_QUEUED, TURN_REFUSED = range(3)


class Turn(Message, frozen=True):
    """Asks a replica for a turn at a register for which several gateway processes compete (``acceptor.turns``).

    ``process``: 8 random bytes of the process. ``number``: of the turn, growing; a request ends earlier turns of its
    process, and takes earlier requests out of the queue. ``end``: this turn is over, or is not wanted any more.
    """

    disk: str
    name: RegisterName
    process: bytes
    number: int
    end: bool = False


class TurnReply(Message, frozen=True):
    """``state``: TURN_GRANTED; TURN_QUEUED, the process has a place in the queue and asks again; or TURN_REFUSED.

    ``hold_ms``: for how long the process begins changes in this turn. ``shared``: other processes want turns too.
    ``waited_ms``: how long this request waited for the reply at the replica; what it took besides shows a slow one.
    """

    state: int
    hold_ms: int = 0
    shared: bool = False
    waited_ms: int = 0


class FenceSet(Message, frozen=True):
    """``epochs``: by partition of the scope's shards, the epoch of the state in which the disk counts for the caller. A
    disk that knows a later step does nothing (EPOCH): the fence would count where the partition is no more. ``lends``:
    from now on changes with this nonce pass it, unless it is final.
    """

    disk: str
    scope: bytes
    nonce: bytes
    final: bool = False
    epochs: dict[int, int] = msgspec.field(default_factory=dict)
    lends: bool = False


class FenceLift(Message, frozen=True):
    """``epochs``: as of FenceSet."""

    disk: str
    scope: bytes
    nonce: bytes
    epochs: dict[int, int] = msgspec.field(default_factory=dict)


class FenceReply(Message, frozen=True):
    """``done``: the disk is now as asked, durably. Not done: it has a final fence with another nonce, or the verdict is
    EPOCH. ``lends``: its fence is one that lends, durably. Nodes that know of no such fence never say so: there a fence
    that was asked to lend is done, and lets no change pass.
    """

    done: bool
    verdict: int = 0
    lends: bool = False


WHOLE_DISK = -1


class EpochFence(Message, frozen=True):
    """From now on refuse every request for this partition with an earlier step than that of ``epoch``.
    ``WHOLE_DISK``: every request of an earlier layout; no node asks that of another.
    """

    disk: str
    epoch: int
    partition: int = WHOLE_DISK


class EpochReply(Message, frozen=True):
    """The epoch in force on that disk, which may be a later one; durable. A lower one: the disk's node does not know
    the step that was asked for, and will refresh what it knows.
    """

    epoch: int


class FencesAsk(Message, frozen=True):
    """The fences of a disk and the nonces that were lifted there, by scope > ``after``."""

    disk: str
    after: bytes


class ScopeFence(Message, frozen=True):
    """What a disk has of one scope. ``nonce``: of the fence in force, empty without one; ``final``: it stays for ever.
    ``lifted``: the highest nonce whose fence was lifted, empty when none was. ``lends``: changes with the nonce pass.
    """

    scope: bytes
    nonce: bytes
    final: bool
    lifted: bytes
    lends: bool = False


class FencesReply(Message, frozen=True):
    """Up to ``FENCES_A_CALL`` scopes in order; ``more``: there are more."""

    scopes: tuple[ScopeFence, ...]
    more: bool


class FencesTake(Message, frozen=True):
    """What a majority of a partition's replicas has: the disk that comes to the partition takes it over. ``doubted``:
    scopes of which fewer say so, since some did not answer: a fence that lends stays where the disk has one.
    """

    disk: str
    scopes: tuple[ScopeFence, ...]
    doubted: tuple[bytes, ...] = ()


class FloorSet(Message, frozen=True):
    """A floor of the range ``prefix`` (table || scope || shard) of a settled partition (``consensus.floors``).

    Not ``active``: refuse ballots below ``ballot``. ``active``: from now on a missing row of the range reports it. A
    gateway asks the latter when all replicas have done the former, and were compared since.
    """

    disk: str
    prefix: bytes
    ballot: Ballot
    active: bool = False


class FloorReply(Message, frozen=True):
    """OK: the disk is as asked, durably. ``floor``: the one that is active in the range, ZERO_BALLOT without one.
    ``final``: the scope is fenced for ever, its bucket is deleted.
    """

    verdict: int
    floor: Ballot = ZERO_BALLOT
    final: bool = False


EXPUNGED_A_CALL = 256
"""Rows that are looked at in one turn of the event loop: less than a millisecond."""


class Expunge(Message, frozen=True):
    """Delete, of the next ``limit`` rows with a key > ``after``, those that may go below the active floor ``ballot``.
    ``count``: only count those that would go, without a floor.
    """

    disk: str
    prefix: bytes
    ballot: Ballot
    after: bytes = b""
    limit: int = EXPUNGED_A_CALL
    count: bool = False


class ExpungeReply(Message, frozen=True):
    """OK: ``gone`` rows are deleted, durably, of those up to ``through``. ``done``: there are no rows after these."""

    verdict: int
    gone: int = 0
    through: bytes = b""
    done: bool = False


class FloorsAsk(Message, frozen=True):
    """The floors of a partition at a disk, by prefix > ``after``."""

    disk: str
    partition: int
    after: bytes = b""


class RangeFloor(Message, frozen=True):
    prefix: bytes
    ballot: Ballot


class FloorsReply(Message, frozen=True):
    """Up to ``FENCES_A_CALL`` floors in order; ``more``: there are more."""

    floors: tuple[RangeFloor, ...]
    more: bool = False


class FloorsTake(Message, frozen=True):
    """Floors that other replicas of a partition have, for the disk that comes to it and has all rows. ``epoch`` of the
    joint state; floors are of earlier steps.
    """

    disk: str
    partition: int
    epoch: int
    floors: tuple[RangeFloor, ...]


class RangesAsk(Message, frozen=True):
    """Which shards of a partition have rows on a disk?"""

    disk: str
    partition: int


class RangesReply(Message, frozen=True):
    """table (1) || scope (16) || shard (1) of each."""

    prefixes: tuple[bytes, ...]


class ShardAsk(Message, frozen=True):
    """``after`` is exclusive. ``limit`` counts entries (visible rows, or common prefixes). ``known``, with HEADS: the
    digest of an answer that the client still has; an answer with the same digest comes without keys and heads. 0: none.
    ``epoch`` of the state of the shard's partition; 0: that of the request.
    """

    shard: int
    after: bytes
    limit: int
    want: int
    examine_max: int
    bytes_max: int
    known: int = 0
    epoch: int = 0


class ScanRequest(Message, frozen=True):
    """``visible``: rows with at least this Visibility are entries. ``epoch`` of the asker's layout. ``fence``: a nonce;
    only a replica that holds this fence of the scope answers, once everything that it judged before is on disk.
    """

    disk: str
    epoch: int
    table: int
    scope: bytes
    shards: tuple[ShardAsk, ...]
    prefix: bytes = b""
    delimiter: bytes = b""
    visible: int = 0
    fence: bytes = b""


class ScanRow(Message, frozen=True):
    """``ballot``: 18 bytes and more, comparable for equality; empty when the row is damaged here, and the value is None
    then.
    """

    key: bytes
    ballot: bytes
    visibility: int
    value: Value | None


class ShardSlice(Message, frozen=True):
    """``through``: everything up to and including this key was looked at, except what common prefixes cover. ``done``:
    so was the rest of the shard. ``rows`` is a list of ScanRow in msgpack, decoded only when it is used. ``keys`` and
    ``heads`` belong together, when heads were wanted. ``unreadable``: the shard can't be scanned here, or the reply is
    full; nothing else counts. ``hash``: 16 bytes, of what this replica would send, where that was asked for
    (``storage.scan.listing_hash``).
    """

    shard: int
    through: bytes
    done: bool
    digest: int
    rows: bytes = b""
    looked_at: int = 0
    unreadable: bool = False
    keys: Sequence[bytes] = ()
    heads: Sequence[bytes] = ()
    hash: bytes = b""


class ScanReply(Message, frozen=True):
    """``verdict`` is ``register.Verdict``; slices only when it is OK (0), one for every shard asked, in that order.
    ``fenced``: the scope is.
    """

    verdict: int = 0
    slices: tuple[ShardSlice, ...] = ()
    fenced: bool = False
