"""What a witness remembers of the audit log of one other node, and which further checkpoints it accepts. Pure.

A witness sees no entries. It sees checkpoints ``(chain, sequence, hash, link)``, signed by the node, and the hashes of
the entries in between. So it knows that each checkpoint extends the one before, entry by entry. It never goes back:

==============================  ========================================================================================
checkpoint                      judged
==============================  ========================================================================================
extends the last one            accepted
is the last one                 accepted already
begins at another entry         ``Behind``: the node must begin after the last entry that the witness has
leads to another hash or link   ``Refused`` for ever: entries were changed or removed since
a new chain                     accepted with its ``start`` entry, which names the head of the chain before. Where that
                                is not the last entry that the witness saw, the chain is accepted with its ``problem``:
                                a refusal would end the witness's use after a log was lost. What was seen of the lost
                                log is kept
==============================  ========================================================================================
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

import msgspec

from storaged.cluster.audit.format import (
    ENTRY_BYTES_MAX,
    HASH_BYTES,
    Checkpoint,
    Entry,
    Predecessor,
    first_link,
    next_link,
    parse_line,
    predecessor_of,
)
from storaged.cluster.rpc import faults
from storaged.wire import decode, encode

CHAINS_MAX: Final = 16_384
"""Chains of one node, 50 MiB: a process that restarts every ten minutes reaches this in four months. Further chains are
refused: dropping old ones would let a flood of new ones erase them."""

START_BYTES_MAX: Final = 2048
"""The size of a chain's first entry. It names the node and one chain, and needs a third of this."""

MARKS_MAX: Final = 256
"""Earlier checkpoints kept of a chain, as (sequence, hash), so that the verifier can say where a rewritten chain begins
to differ."""

CHAINS_MARKED_MAX: Final = 64
"""The number of newest chains that keep MARKS_MAX marks; older ones keep OLD_MARKS_MAX."""

OLD_MARKS_MAX: Final = 16

_CHAIN = re.compile(r"[0-9a-f]{1,64}")


class Mark(NamedTuple):
    """An earlier checkpoint: the hash and time of the entry ``sequence``."""

    sequence: int
    hash: bytes
    time_ms: int


@dataclass
class SeenChain:
    """One chain. ``start``: its entry 0 as it is in the file. ``problem``: why it does not follow from the chain
    before; empty when it does.
    """

    checkpoint: Checkpoint
    start: bytes
    problem: str = ""
    marks: list[Mark] = field(default_factory=list)

    @property
    def predecessor(self) -> Predecessor | None:
        return predecessor_of(parse_line(self.start))


@dataclass
class SeenNode:
    """All chains of one node, in the order in which the witness learned of them."""

    chains: dict[str, SeenChain] = field(default_factory=dict)
    followed: dict[str, str] = field(default_factory=dict)
    """Chain -> the chain that names it as its predecessor."""
    damaged_lines: int = 0

    @property
    def newest(self) -> str:
        return next(reversed(self.chains), "")


@dataclass(frozen=True)
class Accepted:
    """The checkpoint is accepted. ``seen``: the new state of the chain; None when nothing changes."""

    seen: SeenChain | None
    problem: str = ""


@dataclass(frozen=True)
class Behind:
    """The witness has the entries up to ``sequence`` (-1 for none); the node must continue there."""

    sequence: int


@dataclass(frozen=True)
class Refused:
    reason: str


def judge(
    node: SeenNode, checkpoint: Checkpoint, after: int, start: bytes, hashes: Sequence[bytes]
) -> Accepted | Behind | Refused:
    """Judges a checkpoint by the table above.

    The caller has verified that the node signed it. ``hashes`` are those of the entries ``after + 1`` up to the
    checkpoint's.
    """
    if not _CHAIN.fullmatch(checkpoint.chain) or checkpoint.sequence < 0 or len(checkpoint.hash) != HASH_BYTES:
        return Refused("the checkpoint is malformed")
    known = node.chains.get(checkpoint.chain)
    if known is not None and checkpoint.sequence == known.checkpoint.sequence:
        if (checkpoint.hash, checkpoint.link) == (known.checkpoint.hash, known.checkpoint.link):
            return Accepted(None, known.problem)
        return Refused(
            f"entry {checkpoint.sequence} of chain {checkpoint.chain} is known here with another hash: the log was"
            " rewritten"
        )
    have = known.checkpoint.sequence if known is not None else -1
    if after != have or checkpoint.sequence < have:
        return Behind(have)
    if len(hashes) != checkpoint.sequence - after or hashes[-1] != checkpoint.hash:
        return Refused("the hashes are not those between the two checkpoints")
    link = known.checkpoint.link if known is not None else first_link(checkpoint.chain)
    for entry_hash in hashes:
        if len(entry_hash) != HASH_BYTES:
            return Refused("a hash has 32 bytes")
        link = next_link(link, entry_hash)
    if link != checkpoint.link:
        return Refused(
            f"the entries {after + 1} to {checkpoint.sequence} of chain {checkpoint.chain} do not extend what is known"
            " here"
        )
    if known is not None:
        before = known.checkpoint
        marks = thinned([*known.marks, Mark(before.sequence, before.hash, before.time_ms)])
        return Accepted(SeenChain(checkpoint, known.start, known.problem, marks), known.problem)
    if len(node.chains) >= CHAINS_MAX:
        return Refused(f"{CHAINS_MAX} chains of this node are known here; no further one is accepted")
    return _begin(node, checkpoint, start, hashes[0])


def _begin(node: SeenNode, checkpoint: Checkpoint, start: bytes, first_hash: bytes) -> Accepted | Refused:
    if len(start) > START_BYTES_MAX:
        return Refused(f"the first entry has more than {START_BYTES_MAX} bytes")
    try:
        entry = parse_line(start)
        predecessor = predecessor_of(entry)
    except ValueError as error:
        return Refused(f"the first entry does not hold: {error}")
    if (entry.chain, entry.sequence, entry.kind, entry.fields.get("node")) != (
        checkpoint.chain,
        0,
        "start",
        checkpoint.node,
    ):
        return Refused("the first entry is not the start of this chain")
    if bytes.fromhex(entry.hash) != first_hash:
        return Refused("the first entry is not the one whose hash was sent")
    if predecessor is not None and entry.previous != predecessor.hash:
        return Refused("the first entry names one head and follows another")
    problem = _broken_link(node, entry, predecessor)
    return Accepted(SeenChain(checkpoint, start, problem), problem)


def _broken_link(node: SeenNode, entry: Entry, predecessor: Predecessor | None) -> str:
    """Why a new chain does not follow from what is known; empty when it does."""
    if not node.chains:
        return ""
    if predecessor is None:
        return f"chain {entry.chain} names no predecessor, although chain {node.newest} came before"
    known = node.chains.get(predecessor.chain)
    if known is None:
        return f"chain {entry.chain} follows chain {predecessor.chain}, which was never shown; chain {node.newest} was"
    if (follower := node.followed.get(predecessor.chain)) is not None:
        return f"chain {entry.chain} follows chain {predecessor.chain}, which chain {follower} followed already"
    seen = known.checkpoint
    if (predecessor.sequence, predecessor.hash) != (seen.sequence, seen.hash.hex()):
        return (
            f"chain {entry.chain} follows chain {predecessor.chain} at entry {predecessor.sequence}"
            f" ({predecessor.hash[:16]}...), of which entry {seen.sequence} ({seen.hash.hex()[:16]}...) was seen"
        )
    return ""


def adopt(node: SeenNode, seen: SeenChain) -> None:
    """Applies what ``judge`` accepted, once it is durable."""
    chain = seen.checkpoint.chain
    new = chain not in node.chains
    node.chains[chain] = seen
    if not new:
        return
    if (predecessor := seen.predecessor) is not None:
        node.followed.setdefault(predecessor.chain, chain)
    if len(node.chains) > CHAINS_MARKED_MAX:
        old = node.chains[next(islice(reversed(node.chains), CHAINS_MARKED_MAX, None))]
        old.marks = old.marks[:: -(-len(old.marks) // OLD_MARKS_MAX)] if len(old.marks) > OLD_MARKS_MAX else old.marks


def thinned(marks: list[Mark]) -> list[Mark]:
    """At most MARKS_MAX marks: when there are more, every second one is dropped, so they are further apart the longer a
    chain is.
    """
    return marks if len(marks) <= MARKS_MAX else marks[::2]


TEXT_CHARS_MAX: Final = 512


def plain(text: str) -> str:
    """Makes another node's text safe for logs and terminals."""
    return faults.plain(text, TEXT_CHARS_MAX)


# Lines of the file.


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A checkpoint (or, without ``checkpoint``, a mark). The plain fields repeat what ``checkpoint`` has: for readers,
    and against flipped bits.
    """

    chain: str
    sequence: int
    hash: str
    time_ms: int
    checkpoint: str = ""
    start: str = ""
    problem: str = ""


_decode_line = msgspec.json.Decoder(_Line).decode  # made here: see ``wire._Decoders``


def render(seen: SeenChain) -> bytes:
    """The line that is appended for a checkpoint. It is enough to restore the chain should every other line of it be
    damaged.
    """
    found = seen.checkpoint
    text = base64.b64encode(encode(found)).decode()
    return (
        msgspec.json.encode(
            _Line(found.chain, found.sequence, found.hash.hex(), found.time_ms, text, seen.start.decode(), seen.problem)
        )
        + b"\n"
    )


def render_whole(chain: str, seen: SeenChain) -> Iterator[bytes]:
    """All lines of a chain: its marks, then its last checkpoint."""
    for mark in seen.marks:
        yield msgspec.json.encode(_Line(chain, mark.sequence, mark.hash.hex(), mark.time_ms)) + b"\n"
    yield render(seen)


def read(lines: Iterable[bytes]) -> SeenNode:
    """Reads the lines of ``render`` and ``render_whole``. Invalid lines are counted and skipped."""
    node = SeenNode()
    marks: dict[str, list[Mark]] = {}
    for raw in lines:
        try:
            line = _decode_line(raw)
            mark = Mark(line.sequence, bytes.fromhex(line.hash), line.time_ms)
            if not line.checkpoint:
                marks.setdefault(line.chain, []).append(mark)
                continue
            checkpoint = decode(base64.b64decode(line.checkpoint, validate=True), Checkpoint)
            if (checkpoint.chain, checkpoint.sequence, checkpoint.hash, checkpoint.time_ms) != (line.chain, *mark):
                raise ValueError("the line contradicts its checkpoint")
            start = line.start.encode()
            if parse_line(start).chain != line.chain:
                raise ValueError("the start is another chain's")
            known = node.chains.get(line.chain)
            if known is None:
                adopt(node, SeenChain(checkpoint, start, plain(line.problem), marks.pop(line.chain, [])))
            elif checkpoint.sequence > known.checkpoint.sequence:
                before = known.checkpoint
                kept = thinned([*known.marks, Mark(before.sequence, before.hash, before.time_ms)])
                adopt(node, SeenChain(checkpoint, start, known.problem or plain(line.problem), kept))
        except (msgspec.MsgspecError, ValueError, binascii.Error):
            node.damaged_lines += 1
    return node


LINE_BYTES_MAX: Final = 4 * ENTRY_BYTES_MAX
