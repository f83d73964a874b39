"""Claims: what the ledgers of all nodes remember of a disk, so that a disk that forgot its promises is noticed. Pure.

Theory of operation. An acceptor's promises are on its disk alone. A disk that is exchanged, wiped, or put back from a
snapshot looks sound, and answers as if it had never promised what it forgot. It can't notice that itself, so the others
remember: for each disk its metadata store's random id, how often that store was started, and a position of its redo log
that is durable. During a store's life the id stays the same, and the other two only grow. A store that shows less than
it once claimed has lost something that it may have acknowledged.

A node signs the claims of its disks, all in one *statement*, with the key of its certificate. A ledger believes a
statement only if the certificate is that of the node that the layout in force names as the owner of every disk in it.
Of a disk that it does not name, an earlier layout may: what was claimed of a disk outlives the disk. So a node can at
worst make its own disks look older than they are claimed, and no other's.

``ClaimBook`` keeps the statements of a ledger. Statements can't be merged, as they are signed. A book keeps each one
that is the newest for some disk: mostly one for each node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cryptography import x509
from msgspec import MsgspecError

from storaged.cluster.identity import NodeSigner, signed_by_node
from storaged.cluster.layout import Layout
from storaged.cluster.ports import LedgerReport
from storaged.errors import CertificateRefused, ClaimRefused, JurisdictionRefused
from storaged.units import KIB
from storaged.wire import Message, decode, encode

CLAIMS_LABEL = b"sov.claims.v1\0"
STORE_ID_BYTES = 16
DISKS_A_STATEMENT_MAX = 1024
STATEMENT_BYTES_MAX = 256 * KIB
"""A claim has about 60 bytes, and a certificate about 700."""

STATEMENTS_A_NODE_MAX = 16
"""Statements of one node that a book keeps. It has more than one only after its ledger was lost or it disagreed with
itself. A further one is refused.
"""

COUNT_MAX = 2**63 - 1
"""Starts and positions fit 63 bits."""


class DiskClaim(Message, frozen=True):
    """What a node claims of one of its disks: the id of its metadata store (16 bytes), how often it was started, and a
    number of a group in its redo log that is durable. ``failed``: that store failed for good.
    """

    disk: str
    store: bytes
    starts: int
    position: int
    failed: bool = False


class NodeClaims(Message, frozen=True):
    """All that a node claims of its disks, by disk id."""

    cluster: str
    node: str
    disks: tuple[DiskClaim, ...]


class SignedClaims(Message, frozen=True):
    """``payload`` is an encoded NodeClaims. ``signature`` (ECDSA, P-256, SHA-256) is by the key of ``certificate``
    (DER) over CLAIMS_LABEL and the payload.
    """

    payload: bytes
    certificate: bytes
    signature: bytes


class ClaimsOffer(Message, frozen=True):
    """The request ``cluster.claims``: the caller's own statement, None when it has none yet. ``everything``: the reply
    has all statements that the ledger holds.
    """

    statement: SignedClaims | None
    everything: bool = False


class ClaimsAnswer(Message, frozen=True):
    """The reply. ``stored``: the statement offered is in the ledger, its stores and starts durably.

    The bulk bytes are an encoded list of SignedClaims: all that the ledger holds, or those of the caller when its own
    was not stored.
    """

    ledger: LedgerReport
    stored: bool


def state_claims(signer: NodeSigner, cluster: str, node: str, disks: Iterable[DiskClaim]) -> SignedClaims:
    payload = encode(NodeClaims(cluster, node, tuple(sorted(disks, key=lambda claim: claim.disk))))
    return SignedClaims(payload, signer.certificate, signer.sign(CLAIMS_LABEL + payload))


def verify_claims(
    signed: SignedClaims, authority: x509.Certificate, layout: Layout, earlier: Iterable[Layout] = ()
) -> NodeClaims:
    """Returns what a statement claims. ``layout``: the one in force; ``earlier``: layouts before it. Raises
    ClaimRefused, with the reason, for one that is not by the owner of all its disks, or that holds what no node writes.
    """
    if len(signed.payload) + len(signed.certificate) + len(signed.signature) > STATEMENT_BYTES_MAX:
        raise ClaimRefused(f"A statement about disks has more than {STATEMENT_BYTES_MAX} bytes.")
    try:
        claims = decode(signed.payload, NodeClaims)
    except MsgspecError as error:
        raise ClaimRefused(f"A statement about disks cannot be read: {error}") from None
    if claims.cluster != layout.cluster:
        raise ClaimRefused(f"A statement about disks is of cluster {claims.cluster[:64]!r}, not {layout.cluster!r}.")
    if problem := _problem_of(claims, layout, earlier):
        raise ClaimRefused(f"A statement of {claims.node[:64]!r} about disks is refused: {problem}.")
    try:
        peer = signed_by_node(authority, signed.certificate, CLAIMS_LABEL + signed.payload, signed.signature)
    except (CertificateRefused, JurisdictionRefused) as error:
        raise ClaimRefused(f"A statement of {claims.node!r} about disks is refused: {error.message}") from None
    if (peer.name, peer.cluster) != (claims.node, layout.cluster) or "storage" not in peer.roles:
        raise ClaimRefused(
            f"A statement of {claims.node!r} about disks is signed by {peer.name!r} of {peer.cluster!r}"
            f" ({', '.join(peer.roles)})."
        )
    return claims


def check_not_lost(claims: NodeClaims, layout: Layout) -> None:
    """Raises ClaimRefused for a statement about a disk that the layout in force calls lost for good: its node does not
    know that layout yet, or lies. Without a majority of the ledgers such a disk takes no part.
    """
    if lost := [claim.disk for claim in claims.disks if claim.disk in layout.lost]:
        raise ClaimRefused(f"A statement of {claims.node} claims disk {lost[0]}, which is lost for good.")


def _problem_of(claims: NodeClaims, layout: Layout, earlier: Iterable[Layout]) -> str:
    if not 0 < len(claims.disks) <= DISKS_A_STATEMENT_MAX:
        return f"it is about {len(claims.disks)} disks"
    if len({claim.disk for claim in claims.disks}) != len(claims.disks):
        return "it names a disk twice"
    for claim in claims.disks:
        entry = layout.disk_by_id.get(claim.disk)
        if entry is None:
            entry = next((old.disk_by_id[claim.disk] for old in earlier if claim.disk in old.disk_by_id), None)
        if entry is None or entry.node != claims.node:
            return f"the layout in force does not give it disk {claim.disk[:64]!r}"
        if len(claim.store) != STORE_ID_BYTES:
            return f"the store of disk {claim.disk} has an id of {len(claim.store)} bytes"
        if not (0 < claim.starts <= COUNT_MAX and 0 <= claim.position <= COUNT_MAX):
            return f"disk {claim.disk} has {claim.starts} starts and position {claim.position}"
    return ""


class Claimed(NamedTuple):
    """What a book knows of a disk: the ``stores`` that were claimed for it, each with the newest of what was claimed.
    A sound disk has one.
    """

    stores: tuple[DiskClaim, ...]

    @property
    def only(self) -> DiskClaim | None:
        """None when there is none, or when two stores are claimed."""
        return self.stores[0] if len(self.stores) == 1 else None


def newest(one: DiskClaim, other: DiskClaim) -> DiskClaim:
    """The claim that both claims of one store make together."""
    return DiskClaim(
        one.disk,
        one.store,
        max(one.starts, other.starts),
        max(one.position, other.position),
        one.failed or other.failed,
    )


def outdates(known: DiskClaim, claim: DiskClaim) -> bool:
    """Whether ``known`` shows that ``claim`` is of another store, or of one that has lost something since."""
    return (
        known.store != claim.store
        or known.starts > claim.starts
        or known.position > claim.position
        or (known.failed and not claim.failed)
    )


class ClaimBook:
    """The statements of one ledger, verified before they come here."""

    def __init__(self) -> None:
        self._statements: dict[str, list[tuple[SignedClaims, NodeClaims]]] = {}
        self._known: dict[str, dict[bytes, DiskClaim]] = {}

    def __contains__(self, signed: SignedClaims) -> bool:
        return any(signed == held for statements in self._statements.values() for held, _ in statements)

    def statements(self, node: str = "") -> tuple[SignedClaims, ...]:
        """Of one node, or of all."""
        nodes = [node] if node else sorted(self._statements)
        return tuple(signed for name in nodes for signed, _ in self._statements.get(name, ()))

    def of(self, disk: str) -> Claimed:
        return Claimed(tuple(self._known.get(disk, {}).values()))

    def objections(self, claims: NodeClaims) -> list[str]:
        """The disks of which this book knows another store, or something newer."""
        return [
            claim.disk
            for claim in claims.disks
            if any(outdates(known, claim) for known in self._known.get(claim.disk, {}).values())
        ]

    def starts_in(self, claims: NodeClaims) -> bool:
        """Whether the statement has more than newer positions: a store, start or failure that is new here."""
        for claim in claims.disks:
            known = self._known.get(claim.disk, {}).get(claim.store)
            if known is None or known.starts < claim.starts or (claim.failed and not known.failed):
                return True
        return False

    def add(self, signed: SignedClaims, claims: NodeClaims) -> bool:
        """Takes a statement in if it has something new. Returns whether it did."""
        if not any(self._is_new(claim) for claim in claims.disks):
            return False
        kept = self._needed([*self._statements.get(claims.node, ()), (signed, claims)])
        if len(kept) > STATEMENTS_A_NODE_MAX:
            return False
        self._statements[claims.node] = kept
        for claim in claims.disks:
            stores = self._known.setdefault(claim.disk, {})
            known = stores.get(claim.store)
            stores[claim.store] = claim if known is None else newest(known, claim)
        return True

    def _is_new(self, claim: DiskClaim) -> bool:
        known = self._known.get(claim.disk, {}).get(claim.store)
        return known is None or newest(known, claim) != known

    def _needed(self, kept: list[tuple[SignedClaims, NodeClaims]]) -> list[tuple[SignedClaims, NodeClaims]]:
        """The newest of the statements that together say all that is known."""
        needed: list[tuple[SignedClaims, NodeClaims]] = []
        said: dict[tuple[str, bytes], DiskClaim] = {}
        for signed, claims in reversed(kept):
            found = {(claim.disk, claim.store): claim for claim in claims.disks}
            if any(place not in said or newest(said[place], claim) != said[place] for place, claim in found.items()):
                needed.append((signed, claims))
                for place, claim in found.items():
                    said[place] = newest(said[place], claim) if place in said else claim
        return needed[::-1]


# --- majorities -------------------------------------------------------------------------------------------------------


class Ledgers(NamedTuple):
    """The ledgers of all storage nodes as one node sees them. ``whole``: its own counts. ``others``: the reports of the
    other nodes, None for one that does not answer.
    """

    whole: bool
    others: Mapping[str, LedgerReport | None]

    @property
    def majority(self) -> int:
        return (len(self.others) + 1) // 2 + 1

    @property
    def counting(self) -> int:
        """Ledgers that answer and count. A blank one does not: it may have forgotten what it was asked to keep."""
        return self.whole + sum(report is not None and report.whole for report in self.others.values())

    @property
    def enough(self) -> bool:
        return self.whole and self.counting >= self.majority

    @property
    def silent(self) -> list[str]:
        return sorted(name for name, report in self.others.items() if report is None)

    @property
    def blank(self) -> list[str]:
        return sorted(name for name, report in self.others.items() if report is not None and not report.whole)

    @property
    def may_rebuild(self) -> bool:
        """Whether a blank ledger has heard enough to count again: a majority of the others that count, as every claim
        at a majority of all is at one of them; or all others, as nothing is left to be heard.
        """
        whole = sum(report is not None and report.whole for report in self.others.values())
        return not self.silent or whole >= len(self.others) // 2 + 1

    def waits_for(self) -> str:
        """What is missing, in words for an operator; empty when nothing is."""
        if self.enough:
            return ""
        away = f"no answer yet from {', '.join(self.silent)}" if self.silent else ""
        blank = f"blank: that of {', '.join(self.blank)}" if self.blank else ""
        found = "; ".join(part for part in (away, blank) if part) or "they are being read"
        if not self.whole:
            others = len(self.others)
            return (
                f"the ledger of this node is blank, and counts when {others // 2 + 1} of the {others} others that are"
                f" not blank have been read, or all of them ({found})"
            )
        return (
            f"{self.majority} of {len(self.others) + 1} nodes' ledgers are needed, {self.counting} count now ({found})"
        )
