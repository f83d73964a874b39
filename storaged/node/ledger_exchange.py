"""Exchanges what the nodes' ledgers know of disks: the method ``cluster.claims``, and a task for each other storage
node that calls it.

Theory of operation. At its start a node asks every other storage node for the statements that its ledger holds, before
it opens a disk: its own ledger may be new, or put back from a copy. A ledger that was lost counts again when it is
rebuilt (``Ledgers.may_rebuild``). When a disk is open, its new start goes into this node's ledger and, in a new
statement of this node, into those of the others. The disk answers when a majority has it synced. All nodes are asked,
not only a majority, so that they all know soon.

Every PUBLISH_S seconds new positions of redo logs follow. Positions are in the file at the next flush, at most
PUBLISH_S later. So a disk that is put back to a state of the last 2 * PUBLISH_S seconds of one start is not noticed.

An answer may show that a disk of this node was put back, although its own ledger agreed with it: a whole machine was
put back, and the majority that was asked first did not know better. Such a disk falls silent (``on_outdated``). The
proof is a statement under this node's own signature, so no other node can silence a sound disk.

A layout that moves data may name other storage nodes. They count from then on, and those that are gone no more
(``follow``), nor those whose disks are all lost for good (``cluster.succession``). Statements about disks that are gone
are kept. A node that claims a lost disk anew is refused, so that such a disk never gets the majority that it needs.

A node of version 0.1.0 has no such method. It counts like a ledger that agrees, so that nodes can be restarted into
this version one after the other; it gets the statements when it has the method.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import structlog
from cryptography import x509
from msgspec import MsgspecError

from storaged.cluster.claims import (
    STATEMENTS_A_NODE_MAX,
    ClaimsAnswer,
    ClaimsOffer,
    DiskClaim,
    Ledgers,
    NodeClaims,
    SignedClaims,
    check_not_lost,
    outdates,
    state_claims,
    verify_claims,
)
from storaged.cluster.identity import Identity, NodeSigner
from storaged.cluster.layout import Layout
from storaged.cluster.ports import Call, Caller, Layouts, LedgerReport, Method, Methods, OnRefusal, Reply
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.authority import grant
from storaged.errors import ClaimRefused, DiskForeign, DiskUnusable, PeerError, PeerRefused
from storaged.node.admission import outdated_error
from storaged.node.ledger import LEDGER_ID_BYTES, Ledger
from storaged.wire import Buffer, decode, encode

log = structlog.get_logger("disks")

PUBLISH_S = 5.0
CALL_S = 2.0
AGAIN_S, AGAIN_S_MAX = 0.1, 1.0
"""Pauses between calls to a node that does not answer, or does not have what it must."""

CALL_EVERY_S = 0.03
"""The shortest time between calls of two nodes that each lack something of the other."""

RECHECK_S = 60.0
"""How often a node that has everything is asked again."""

FIRST_S = 2.0
"""How long the start of a node that took part waits for a majority, before it says that its disks wait."""

LATE_S = 0.3
"""How long a start waits for the other nodes when a majority has answered: any
ledger that knows better notices a node that was put back as a whole.
"""

REFUSED_MAX = 16
"""Of the statements of one answer, those that are refused before the rest is dropped. Of the others no more are
verified than a sound ledger can hold.
"""

BEFORE_CLAIMS = LedgerReport(b"", True, b"", True)
"""What a node of version 0.1.0 counts as."""


class ExchangePorts(Protocol):
    """What the exchange asks of the disks of this node (``node.opener``)."""

    def formed(self) -> bool | None:
        """Whether this node took part in the cluster, or has disks that did; None while its disks are not known."""

    def positions(self) -> Mapping[str, int]:
        """Of the redo logs of disks that are open, as far as they are durable."""

    def on_outdated(self, disk_id: str, error: DiskForeign) -> None:
        """A disk that is in use is older than was claimed for it, or another one. Called once for a disk."""


class LayoutHistory(Layouts, Protocol):
    """``Layouts`` that can be enumerated."""

    def earlier(self) -> Sequence[Layout]:
        """All but the one in force, newest first."""


class LoneLedger:
    """What the opener asks of the ledgers, in a cluster with one storage node."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def view(self) -> Ledgers:
        return Ledgers(self.ledger.whole, {})

    async def rebuild(self) -> bool:
        """Makes a blank ledger count again when enough others have been read. Returns whether it did. Raises
        OSError.
        """
        if self.ledger.whole or not self.view().may_rebuild:
            return False
        await asyncio.to_thread(self.ledger.count_again, fresh=True)
        log.info("the ledger of this node counts from now on")
        return True

    async def heard_first(self) -> None:
        """Returns when all others have answered, or have had their time."""

    async def changed(self) -> None:
        """Returns when something new is known of the ledgers."""
        await asyncio.get_running_loop().create_future()

    async def publish(self, claim: DiskClaim) -> None:
        """Returns when a majority of the ledgers has the start of a disk of this node. Raises DiskForeign when one
        knows better, OSError when this node's ledger can't be written.
        """
        await asyncio.to_thread(self.ledger.record, claim)


@dataclass
class _Peer:
    """``report``: its last answer; None while it does not answer. ``stored``: what its ledger has of this node's disks,
    as far as it said so.
    """

    report: LedgerReport | None = None
    asked: bool = False
    """Whether a call to it has ended, however."""
    incarnation: bytes = b""
    heard_all: bool = False
    stored: dict[str, DiskClaim] = field(default_factory=dict)
    poke: asyncio.Event = field(default_factory=asyncio.Event)
    keeping: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a statement of it is written: a node that sends many takes one thread."""
    task: asyncio.Task[None] | None = None
    """Talks to it, once ``run`` has begun."""


class Statement(NamedTuple):
    signed: SignedClaims
    claims: NodeClaims


class LedgerExchange(LoneLedger):
    """``LoneLedger`` in a cluster with several storage nodes. ``run`` is its task; it needs the network."""

    def __init__(
        self,
        ledger: Ledger,
        own: Identity,
        authority: x509.Certificate,
        layouts: LayoutHistory,
        ports: ExchangePorts,
        on_refusal: OnRefusal = lambda _peer, _error: None,
    ) -> None:
        super().__init__(ledger)
        self._own = own
        self._authority = authority
        self._layouts = layouts
        self._ports = ports
        self._on_refusal = on_refusal
        self._signer = NodeSigner(own)
        self._peers: dict[str, _Peer] = {}
        self._begin: Callable[[str, _Peer], asyncio.Task[None]] | None = None
        """Begins to talk to a node, while ``run`` runs."""
        self._offer: Statement | None = None
        self._opened: dict[str, DiskClaim] = {}
        """The disks that this process has opened, as they were then."""
        self._outdated: dict[str, DiskForeign] = {}
        self._stating = asyncio.Lock()
        self._news = asyncio.Event()
        self.follow(layouts.current)

    def follow(self, layout: Layout) -> None:
        """The ledgers that count are those of this layout's storage nodes from now on."""
        names = {disk.node for disk in layout.disks if disk.id not in layout.lost} - {self._own.name}
        for name in sorted(self._peers.keys() - names):
            task = self._peers.pop(name).task
            if task is not None:
                task.cancel()
        for name in sorted(names - self._peers.keys()):
            peer = self._peers[name] = _Peer()
            if self._begin is not None:
                peer.task = self._begin(name, peer)
        self._tell()

    def methods(self) -> Methods:
        return grant({"cluster.claims": Method(ClaimsOffer, self._on_claims)})

    def renew(self, own: Identity) -> None:
        """Signs with the identity's certificate from now on. Raises CertificateRefused."""
        self._signer = NodeSigner(own)

    # --- the opener's side

    def view(self) -> Ledgers:
        return Ledgers(self.ledger.whole, {name: peer.report for name, peer in self._peers.items()})

    async def heard_first(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_S):
                while not self.view().enough and (self.ledger.formed or not self._all_asked()):
                    await self.changed()
            async with asyncio.timeout(LATE_S):
                while not self._all_asked():
                    await self.changed()

    def _all_asked(self) -> bool:
        return all(peer.asked for peer in self._peers.values())

    async def rebuild(self) -> bool:
        rebuilt = await super().rebuild()
        if rebuilt:  # the others, when called, look here again
            for peer in self._peers.values():
                peer.poke.set()
        return rebuilt

    async def changed(self) -> None:
        await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def publish(self, claim: DiskClaim) -> None:
        if not self._answers_for(claim.disk):  # the ring has no replica there, and no ledger believes it
            await super().publish(claim)
            return
        async with self._stating:
            statement = self._state({claim.disk: claim})
            await asyncio.to_thread(self.ledger.record, claim, statement)
            self._opened[claim.disk] = claim
            self._offer_to_all(statement)
        while True:
            self._check_opened()
            if (error := self._outdated.get(claim.disk)) is not None:
                raise error
            if self._stored(claim) >= self.view().majority:
                return
            await self.changed()

    def _answers_for(self, disk: str) -> bool:
        """Whether a disk may have replicas, and is this node's: by the layout in force or, for one that it does not
        name any more, by the last that did. Partitions move away from such a disk, and ask it meanwhile. Those of a
        node that was removed are not asked, and the others don't listen to it.
        """
        current, own = self._layouts.current, self._own.name
        if own not in current.node_by_name:
            return False
        named = (layout.disk_by_id.get(disk) for layout in (current, *self._layouts.earlier()))
        entry = next((entry for entry in named if entry is not None), None)
        return entry is not None and entry.node == own and disk not in current.lost

    def stored_by(self, claim: DiskClaim) -> list[str]:
        """The other nodes whose ledgers have a start of a disk of this node."""
        found = []
        for name, peer in self._peers.items():
            held = peer.stored.get(claim.disk)
            if peer.report is BEFORE_CLAIMS or (
                peer.report is not None
                and peer.report.whole
                and held is not None
                and held.store == claim.store
                and held.starts >= claim.starts
            ):
                found.append(name)
        return found

    def _stored(self, claim: DiskClaim) -> int:
        return self.ledger.whole + len(self.stored_by(claim))

    def _state(self, opened: Mapping[str, DiskClaim]) -> Statement | None:
        """A new statement of all that is known of the disks that the layout gives to this node, and of those that are
        in use, or that they ``opened`` as. None when this is what the last one says, or nothing.
        """
        claims: dict[str, DiskClaim] = {}
        named = [disk.id for disk in self._layouts.current.disks if disk.node == self._own.name]
        for disk in dict.fromkeys((*named, *filter(self._answers_for, (*self._opened, *opened)))):
            if (claim := opened.get(disk, self.ledger.claimed(disk).only)) is not None:
                claims[disk] = claim
        stated = {claim.disk: claim for claim in self._offer.claims.disks} if self._offer is not None else {}
        if not claims or claims == stated:
            return None
        signed = state_claims(self._signer, self._own.cluster, self._own.name, claims.values())
        return Statement(signed, decode(signed.payload, NodeClaims))

    def _offer_to_all(self, statement: Statement | None) -> None:
        if statement is not None:
            self._offer = statement
            for peer in self._peers.values():
                peer.poke.set()

    def _check_opened(self) -> None:
        """Notices disks of which a claim shows that they are not what they were."""
        positions = self._ports.positions()
        for disk, opened in self._opened.items():
            shown = DiskClaim(disk, opened.store, opened.starts, max(opened.position, positions.get(disk, 0)))
            better = [known for known in self.ledger.claimed(disk).stores if outdates(known, shown)]
            if better and not better[0].failed and disk not in self._outdated:
                self._outdated[disk] = error = outdated_error(better[0], shown)
                self._ports.on_outdated(disk, error)

    # --- calls to the other nodes

    async def run(self, caller: Caller) -> None:
        """Talks to the other nodes until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            self._begin = lambda name, peer: group.create_task(self._talk(caller, name, peer))
            try:
                for name, peer in self._peers.items():
                    peer.task = self._begin(name, peer)
                await self._publish_positions()
            finally:
                self._begin = None

    def on_node(self, name: str, up: bool, incarnation: bytes) -> None:
        """A node has come back, or has gone."""
        peer = self._peers.get(name)
        if peer is not None and up:
            if peer.incarnation != incarnation:
                peer.stored, peer.incarnation = {}, incarnation
            peer.poke.set()

    async def _talk(self, caller: Caller, name: str, peer: _Peer) -> None:
        pause_s = AGAIN_S
        while True:
            poked = peer.poke.is_set()
            peer.poke.clear()
            offer = self._offer
            everything = not peer.heard_all or not self.ledger.whole
            request = ClaimsOffer(offer.signed if offer is not None else None, everything)
            try:
                answer, body = await caller.call(name, "cluster.claims", request, ClaimsAnswer, timeout_s=CALL_S)
                await self._hear(name, peer, offer, answer, body)
            except PeerRefused as error:
                known = error.remote_code == faults.UNKNOWN_METHOD
                peer.report, peer.heard_all = (BEFORE_CLAIMS, True) if known else (None, False)
                if not known:
                    log.warning("a node's ledger does not answer", peer=name, reason=error.message)
            except PeerError:
                peer.report = None
            except Exception:  # a defect of storaged must not end the node
                log.exception("a node's ledger can't be heard", peer=name)
                peer.report = None
            peer.asked = True
            self._tell()
            pause_s = AGAIN_S if poked else min(pause_s * 1.5, AGAIN_S_MAX)
            if not self._done(peer):
                await asyncio.sleep(CALL_EVERY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_S if self._done(peer) else pause_s):
                    await peer.poke.wait()

    def _done(self, peer: _Peer) -> bool:
        """Whether there is nothing to hear from a node, and nothing to tell it, before something changes."""
        return peer.report is not None and self.ledger.whole and peer.report.whole and self._has_offer(peer)

    def _has_offer(self, peer: _Peer) -> bool:
        """Whether a node's ledger has all that this node states, or can't have it."""
        return (
            self._offer is None
            or peer.report is BEFORE_CLAIMS
            or all(peer.stored.get(claim.disk) == claim for claim in self._offer.claims.disks)
        )

    async def _hear(self, name: str, peer: _Peer, offer: Statement | None, answer: ClaimsAnswer, body: Buffer) -> None:
        report = answer.ledger
        if len(report.id) != LEDGER_ID_BYTES or len(report.yours) not in (0, LEDGER_ID_BYTES):
            log.warning("a node's ledger has no id", peer=name)
            peer.report = None
            return
        if body:
            layouts = (self._layouts.current, *self._layouts.earlier())
            found = await asyncio.to_thread(self._verified, name, bytes(body), layouts)
            if self.ledger.merge(found):
                self._check_opened()
                await self._restate()
        peer.report, peer.heard_all = report, True
        if offer is not None and answer.stored:
            peer.stored = {claim.disk: claim for claim in offer.claims.disks}
        await self.rebuild()

    def _verified(self, name: str, body: bytes, layouts: Sequence[Layout]) -> list[Statement]:
        """The statements of an answer that are new here and can be believed. ``layouts``: newest first. In a thread."""
        try:
            held = decode(body, list[SignedClaims])
        except MsgspecError as error:
            log.warning("a node's ledger sends what is no list of statements", peer=name, reason=str(error))
            return []
        found: list[Statement] = []
        refused = 0
        held_max = STATEMENTS_A_NODE_MAX * len({disk.node for layout in layouts for disk in layout.disks})
        for signed in held[:held_max]:
            if self.ledger.has(signed):
                continue
            try:
                found.append(Statement(signed, verify_claims(signed, self._authority, layouts[0], layouts[1:])))
            except ClaimRefused as error:
                refused += 1
                log.warning("a statement about disks is refused", peer=name, reason=faults.plain(error.message))
                if refused >= REFUSED_MAX:
                    break
        return found

    async def _restate(self) -> None:
        """States again what is known of this node's disks, with what another ledger knew better."""
        async with self._stating:
            statement = self._state({}) if self._opened else None
            if statement is not None and await asyncio.to_thread(self.ledger.keep, *statement):
                self._offer_to_all(statement)

    async def _publish_positions(self) -> None:
        while True:
            await asyncio.sleep(PUBLISH_S)
            try:
                await self.publish_positions()
            except OSError as error:
                log.error("the ledger of this node can't be written", reason=str(error))

    async def publish_positions(self) -> None:
        """Offers newer positions, and failures, to all. Makes durable what came since the last time. Raises
        OSError.
        """
        async with self._stating:
            self.ledger.note_positions(self._ports.positions())
            statement = self._state({}) if self._opened else None
            if statement is not None and await asyncio.to_thread(self.ledger.keep, *statement):
                self._offer_to_all(statement)
            await asyncio.to_thread(self.ledger.flush)

    # --- calls of other nodes

    async def _on_claims(self, offer: ClaimsOffer, call: Call) -> Reply:
        formed = self._ports.formed()
        if formed is None:
            raise DiskUnusable(f"{self._own.name} does not know yet what its disks have.")
        ledger, name, stored = self.ledger, call.peer.name, False
        peer = self._peers.get(name)
        if peer is not None and not self._done(peer):
            peer.poke.set()
        if offer.statement is not None:
            claims = self._verified_offer(offer.statement, name)
            try:
                async with peer.keeping if peer is not None else contextlib.nullcontext():
                    stored = await asyncio.to_thread(ledger.keep, offer.statement, claims)
            except OSError as error:
                log.error("the ledger of this node can't be written", reason=str(error))
                raise DiskUnusable(f"The ledger of {self._own.name} can't be written.") from None
        report = LedgerReport(ledger.id, formed, ledger.node(name), ledger.whole)
        held: Sequence[SignedClaims] = ()
        if offer.everything:
            held = ledger.statements()
        elif offer.statement is not None and not stored:
            held = ledger.statements(name)
        return Reply(ClaimsAnswer(report, stored), [encode(held)] if held else ())

    def _verified_offer(self, statement: SignedClaims, name: str) -> NodeClaims:
        try:
            claims = verify_claims(statement, self._authority, self._layouts.current, self._layouts.earlier())
            if claims.node != name:
                raise ClaimRefused(f"{name} offers a statement of {claims.node} about disks.")
            check_not_lost(claims, self._layouts.current)
        except ClaimRefused as error:
            self._on_refusal(name, error)
            raise
        return claims
