"""Spreads layouts between nodes.

Theory of operation. Each ping and its reply carry the epoch and a digest of the layout in force. The node that knows a
newer layout passes it on, epoch by epoch, so that a node that was away gets the history too. A node that begins with a
later layout (a gateway that was added, a server that was rebuilt) asks each peer once for the earlier ones that it
lacks: records name the layout under which they were written, and the folder that was issued to the node has only the
newest. The digest shows two nodes that they use different layouts of one epoch.

A certified node that the layout in force does not name may call these methods too (``cluster.rpc.authority``): so a
node that has just been added can bring the layout that names it, and a removed node learns of its removal.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from storaged.cluster.layout import Layout
from storaged.cluster.layouts import PEER, LayoutBook
from storaged.cluster.messages import LayoutAfter, LayoutAnswer, OfferAnswer
from storaged.cluster.ports import Call, Caller
from storaged.cluster.signed_layout import SignedLayout
from storaged.errors import LayoutRefused, PeerError
from storaged.wire import decode

log = structlog.get_logger(__name__)

LAYOUTS_PER_PING_MAX = 64


@dataclass
class PeerLayouts:
    """What this node knows about the layouts of one peer.

    The peer is asked for earlier layouts once, and again when it restarts or when its layout or ours changes.
    """

    asked: tuple[bytes, int, int] | None = None
    """The peer's incarnation, its epoch and ours, at the time when it had been asked for all that this node lacks."""
    asked_until: int = 0
    """The peer has been asked for the layouts up to this epoch."""
    complaint: str = ""
    """Why the last exchange failed, so that it is logged once."""


class LayoutExchange:
    """Serves ``cluster.layout`` and ``cluster.offer``, and calls them on peers."""

    def __init__(self, caller: Caller, layouts: LayoutBook) -> None:
        self._caller = caller
        self._layouts = layouts

    async def on_layout(self, request: LayoutAfter, _call: Call) -> LayoutAnswer:
        return LayoutAnswer(self._layouts.signed_after(request.epoch))

    async def on_offer(self, signed: SignedLayout, call: Call) -> OfferAnswer:
        await self._layouts.learn(signed, PEER + call.peer.name)
        return OfferAnswer(self._layouts.epoch)

    def compare(self, node: str, epoch: int, digest: bytes) -> None:
        """Notes whether a peer uses another layout of our epoch; if so, one of the two was signed by mistake.

        A newer layout is judged in ``synchronise``.
        """
        if epoch == self._layouts.epoch and digest and digest != self._layouts.digest:
            self._layouts.refuse(
                epoch,
                PEER + node,
                f"Two layouts were signed under epoch {epoch}; {node} uses the other one.",
                digest,
            )
        elif epoch <= self._layouts.epoch:
            self._layouts.agrees(PEER + node)

    async def synchronise(self, peer: PeerLayouts, node: str, incarnation: bytes, epoch: int) -> None:
        """Brings newer layouts to the node that lacks them, then asks for earlier ones. Logs what fails.

        ``node``, ``incarnation`` and ``epoch`` are the peer's.
        """
        try:
            await self._exchange_newer(node, epoch)
        except (LayoutRefused, PeerError) as error:
            _complain(peer, node, error)
        try:
            await self._ask_earlier(peer, node, incarnation, epoch)
        except (LayoutRefused, PeerError) as error:
            _complain(peer, node, error)

    async def _exchange_newer(self, node: str, epoch: int) -> None:
        """Passes at most ``LAYOUTS_PER_PING_MAX`` layouts from the side that has them to the other."""
        if epoch == self._layouts.epoch:
            return
        for _ in range(LAYOUTS_PER_PING_MAX):
            if epoch > self._layouts.epoch:
                signed = await self._ask(node, self._layouts.epoch)
                if signed is None or not await self._layouts.learn(signed, PEER + node):
                    return
            else:
                following = self._layouts.signed_after(epoch)
                if following is None:
                    return
                answer, _body = await self._caller.call(node, "cluster.offer", following, OfferAnswer)
                if answer.epoch <= epoch:
                    return
                epoch = answer.epoch

    async def _ask_earlier(self, peer: PeerLayouts, node: str, incarnation: bytes, epoch: int) -> None:
        """Learns at most ``LAYOUTS_PER_PING_MAX`` earlier layouts.

        Raises LayoutRefused for a layout that is not accepted (then it does not ask the peer again), PeerError when the
        peer does not answer.
        """
        now = incarnation, epoch, self._layouts.epoch
        if peer.asked == now:
            return
        for _ in range(LAYOUTS_PER_PING_MAX):
            lacking = self._layouts.lacking(peer.asked_until)
            signed = await self._ask(node, lacking - 1) if lacking is not None else None
            if lacking is None or signed is None:
                peer.asked, peer.asked_until = now, 0
                return
            try:
                await self._layouts.learn(signed, PEER + node)
            except LayoutRefused:
                peer.asked, peer.asked_until = now, 0
                raise
            # The answer may be a later epoch than the one asked for: the peer lacks those between.
            peer.asked_until = max(lacking, decode(signed.payload, Layout).epoch)

    async def _ask(self, node: str, epoch: int) -> SignedLayout | None:
        answer, _body = await self._caller.call(node, "cluster.layout", LayoutAfter(epoch), LayoutAnswer)
        return answer.signed


def _complain(peer: PeerLayouts, node: str, error: LayoutRefused | PeerError) -> None:
    if error.message != peer.complaint:
        log.warning("layouts could not be exchanged", peer=node, reason=error.message)
    peer.complaint = error.message
