"""What becomes of the refusal of a peer: a line in the log, and an entry in the audit log. Both are limited."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from storaged.clock import Clock
from storaged.cluster.audit.format import actor_of_peer
from storaged.cluster.audit.trail import Trail
from storaged.cluster.refusal_lines import RefusalLines
from storaged.errors import PeerRefused, StoragedError

log = structlog.get_logger("node")


class Refusals:
    """An ``OnRefusal``."""

    def __init__(self, clock: Clock, trail: Callable[[], Trail]) -> None:
        """``trail``: it may be made later than this."""
        self._lines = RefusalLines(log.warning, clock.monotonic)
        self._trail = trail

    def __call__(self, peer: str, error: StoragedError) -> None:
        code = error.remote_code or error.code if isinstance(error, PeerRefused) else error.code
        self._lines.note("a peer is refused", peer, code, error.message)
        self._trail().refused("peer.refused", code, actor=actor_of_peer(peer), reason=error.message)
