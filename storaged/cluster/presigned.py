"""Layouts that are signed beforehand, for the case that a seed disk is lost while no administrator is there. Pure.

Theory of operation. The system partition moves by layouts alone, and only the administration key signs layouts. So each
layout comes with signatures of layouts that may follow it (``SignedLayout.following``). For each seed disk and each of
a few disks that could take its place there is one that makes the system partition joint, after it one that ends the
exchange, and after that again the same for the next loss. A gateway uses them when the seed disk is *out*
(``cluster.sparing``; ``node.system_sparing``).

Only signatures are kept. What is signed follows from the bytes of the layout before, and from which disk goes and which
comes (``payload_after``). It does not depend on the fields that a version knows, so a later version finds the same
bytes.

Nothing in the history of layouts depends on when one was signed (``cluster.succession``). These are the further rules:

1. *It exchanges one seed disk, names it* (``Layout.if_out``), *and changes nothing else.* So it brings nothing back
   that another layout has changed, and it has the numbers that each successor of its predecessor has.
2. *It follows one layout, by hash.* Once another successor that moves data is decided, it is dead. Where a layout that
   moves nothing came first, gateways take what follows that one. A node does not refuse it for this reason: what is
   decided can't be withdrawn, and would stand in the way of all later layouts.
3. *Nodes accept it only with votes*: a majority of the storage nodes has seen the disk away for as long as the layout
   of the votes says. The votes travel with the layout (``SignedLayout.votes``), and are of the generation that it ends.
   A node does not look at the register ``disks-out`` instead: the disk may be back meanwhile, and a layout that is
   decided must stay one that can be accepted.
4. *The exchange ends by the ordinary rule*: when the seed disks that answer have everything (``node.system_move``). The
   disk that comes has to answer, unless it is out, too. Then the next layout exchanges it. A gateway lets the end be
   decided only when it has seen this itself.

A wrong verdict moves rows, and loses none: the disk that goes still counts in the joint state. When it comes back later
its rows are of an earlier step and count no more; it keeps its fragments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519
from msgspec import MsgspecError

from storaged.cluster.layout import Layout
from storaged.cluster.signed_layout import LAYOUT_LABEL, Presigned, SignedLayout
from storaged.cluster.succession import base_after, check_successor, next_epoch, seed_candidates
from storaged.errors import LayoutRefused
from storaged.wire import decode, encode

WIDTHS = ((3, 2), (3,), (1,))
"""How many disks there are for each seed disk, at the first loss and at the next. The first of these that fits into
``FOLLOWING_BYTES_MAX`` is used.
"""
FOLLOWING_BYTES_MAX = 256 * 1024
STEPS_MAX = 64
"""Of the layouts that follow one layout: more than are ever signed. Nodes verify no more than these, whatever a peer
sends."""

_FIELDS = {name: index for index, name in enumerate(Layout.__struct_fields__)}


def payload_after(payload: bytes, step: Presigned) -> bytes:
    """The bytes that ``step`` signs. ``payload``: of the layout before it. Raises MsgspecError for bytes that are no
    layout.
    """
    before = decode(payload, Layout)
    seeds, coming = before.seeds, tuple(step.comes if seed == step.out else seed for seed in before.seeds)
    if before.seeds_next:
        seeds, coming = before.seeds_next, ()
    changed = {
        "epoch": next_epoch(before.epoch, moving=True),
        "predecessor": hashlib.sha256(payload).digest(),
        "base": base_after(before),
        "seeds": seeds,
        "seeds_next": coming,
        "seeds_step": before.seeds_step + 1,
        "if_out": step.out,
    }
    fields = msgspec.msgpack.decode(payload)
    known = msgspec.msgpack.decode(encode(before))
    fields += known[len(fields) : _FIELDS["if_out"] + 1]
    for name, value in changed.items():
        fields[_FIELDS[name]] = value
    return encode(fields)


def layout_after(before: SignedLayout, step: Presigned) -> SignedLayout:
    """The signed layout of ``step``, which follows ``before``. It is not verified here."""
    return SignedLayout(payload_after(before.payload, step), step.signature, following=step.following)


def spares_for(layout: Layout, seed: str) -> tuple[str, ...]:
    """The disks that may take the place of a seed disk, best first, no two of one node, and one of each other failure
    domain. One of its own node is last: it helps only where the disk alone is lost.
    """
    home, domains = layout.node_of(seed), layout.domain_by_disk
    found: dict[tuple[str, bool], str] = {}
    for disk in seed_candidates(layout, seed, layout):
        found.setdefault((domains[disk], layout.node_of(disk) == home), disk)
    return tuple(sorted(found.values(), key=lambda disk: layout.node_of(disk) == home))


def presign(signed: SignedLayout, sign: Callable[[bytes], bytes]) -> tuple[Presigned, ...]:
    """What may follow ``signed``. ``sign``: with the administration key. Nothing follows while the system partition
    moves or has lost seed disks: an administrator is at work then.
    """
    for widths in WIDTHS:
        found = _tree(signed.payload, decode(signed.payload, Layout), widths, sign)
        if len(encode(found)) <= FOLLOWING_BYTES_MAX:
            return found
    return ()


def _tree(
    payload: bytes, layout: Layout, widths: Sequence[int], sign: Callable[[bytes], bytes]
) -> tuple[Presigned, ...]:
    if not widths or layout.seeds_next or layout.seeds_lost or not layout.sparing.domains_max:
        return ()
    found = []
    for seed in layout.seeds:
        for disk in spares_for(layout, seed)[: widths[0]]:
            goes, ends = Presigned(seed, disk, b""), Presigned("", disk, b"")
            joint = payload_after(payload, goes)
            settled = payload_after(joint, ends)
            after = decode(settled, Layout)
            try:
                check_successor(layout, hashlib.sha256(payload).digest(), decode(joint, Layout))
            except LayoutRefused:
                continue
            following = _tree(settled, after, widths[1:], sign)
            last = Presigned("", disk, sign(LAYOUT_LABEL + settled), following)
            found.append(Presigned(seed, disk, sign(LAYOUT_LABEL + joint), (last,)))
    return tuple(found)


def genuine(signed: SignedLayout, administration: ed25519.Ed25519PublicKey, *, depth: int = 2) -> tuple[Presigned, ...]:
    """Those of ``signed.following`` that the administration key signed, ``depth`` layouts on, each once."""
    if not depth:
        return signed.following
    if len(encode(signed.following)) > FOLLOWING_BYTES_MAX:
        return ()
    found: dict[tuple[str, str], Presigned] = {}
    for step in signed.following[:STEPS_MAX]:
        if (step.out, step.comes) in found:
            continue
        try:
            after = layout_after(signed, step)
            administration.verify(step.signature, LAYOUT_LABEL + after.payload)
        except (InvalidSignature, MsgspecError):
            continue
        following = genuine(after, administration, depth=depth - 1)
        found[step.out, step.comes] = Presigned(step.out, step.comes, step.signature, following)
    return tuple(found.values())


def spares_of(signed: SignedLayout) -> dict[str, tuple[str, ...]]:
    """Seed disk -> the disks for which layouts were signed beforehand to follow ``signed``."""
    found: dict[str, tuple[str, ...]] = {}
    for step in signed.following:
        if step.out:
            found[step.out] = (*found.get(step.out, ()), step.comes)
    return found


def step_for(signed: SignedLayout, seed: str, usable: Collection[str]) -> Presigned | None:
    """The first one that exchanges ``seed`` for a usable disk."""
    return next((step for step in signed.following if step.out == seed and step.comes in usable), None)


def step_to_end(signed: SignedLayout) -> Presigned | None:
    """The one that ends the exchange that ``signed`` began."""
    return next((step for step in signed.following if not step.out), None)
