"""The earlier layouts that a node lacks, asked of one peer.

Records name the layout under which they were written. A node that begins with a later one (a gateway that was added, a
server
that was built anew) can't read them before it has the earlier ones, and its issued folder has the newest alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from storaged.cluster.identity import SignedLayout
from storaged.cluster.layout import Layout
from storaged.cluster.layouts import LayoutBook
from storaged.errors import LayoutRefused
from storaged.wire import decode

LAYOUTS_PER_TURN_MAX = 64


@dataclass
class EarlierLayouts:
    """What one peer was asked for. It is asked once; and again when it restarts, or when its layout or ours changes."""

    asked: tuple[bytes, int, int] | None = None
    """The peer's process, its epoch and ours, when it had been asked for all that is lacking."""
    until: int = 0
    """It has been asked for the layouts up to this epoch."""

    async def ask(
        self,
        layouts: LayoutBook,
        after: Callable[[int], Awaitable[SignedLayout | None]],
        source: str,
        peer: tuple[bytes, int],
    ) -> None:
        """Learns at most ``LAYOUTS_PER_TURN_MAX`` of them. ``after(epoch)`` calls the peer for its next layout after
        ``epoch``.

        ``source`` names the peer to an operator; ``peer`` is its process and the epoch of its layout.
        Raises LayoutRefused for a layout that is not taken (the peer is not asked again then), PeerError when the peer
        does not answer.
        """
        now = *peer, layouts.epoch
        if self.asked == now:
            return
        for _ in range(LAYOUTS_PER_TURN_MAX):
            lacking = layouts.lacking(self.until)
            signed = await after(lacking - 1) if lacking is not None else None
            if lacking is None or signed is None:
                self.asked, self.until = now, 0
                return
            try:
                await layouts.learn(signed, source)
            except LayoutRefused:
                self.asked, self.until = now, 0
                raise
            # The peer's next one may be later than what was asked for: what lies between, it does not have.
            self.until = max(lacking, decode(signed.payload, Layout).epoch)
