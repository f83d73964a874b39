"""Messages of the ``cluster.*`` methods: pings between nodes, and the exchange of layouts."""

from __future__ import annotations

from storaged.cluster.moves import RefusedLayout
from storaged.cluster.ports import LedgerReport
from storaged.cluster.signed_layout import Acceptance, SignedLayout
from storaged.wire import Message


class DiskReport(Message, frozen=True):
    """A ``ports.DiskStatus`` on the wire."""

    id: str
    directory: str
    state: str
    bytes_used: int = 0
    bytes_free: int = 0
    reason: str = ""
    few: bool = False
    ample: bool = False
    latency_ms: int = 0


class Ping(Message, frozen=True):
    """What the sender reports of itself: its process, its clock, and the epoch of its layout."""

    node: str
    incarnation: bytes
    pid: int
    wall_ms: int
    epoch: int
    digest: bytes = b""
    """The digest of that layout; empty when not reported."""
    certificate_until_ms: int = 0
    """When the sender's certificate expires, in milliseconds since 1970; 0 when not reported."""
    steps: int = 0
    """The sum of the steps of partitions that the sender knows (``partition_map``)."""


class Pong(Message, frozen=True):
    """The reply to a Ping: the same facts about the replying node, its disks, and the layouts that it refuses."""

    node: str
    incarnation: bytes
    pid: int
    wall_ms: int
    epoch: int
    disks: tuple[DiskReport, ...] = ()
    digest: bytes = b""
    refused: tuple[RefusedLayout, ...] = ()
    certificate_until_ms: int = 0
    ledger: LedgerReport | None = None
    """Not written any more: version 0.1.0 reported here what ``cluster.claims`` answers now."""
    steps: int = 0


class LayoutAfter(Message, frozen=True):
    """Asks for the next layout after ``epoch``."""

    epoch: int


class LayoutAnswer(Message, frozen=True):
    """The layout asked for; None when there is none."""

    signed: SignedLayout | None


class OfferAnswer(Message, frozen=True):
    """The epoch in force after an offer."""

    epoch: int


class AcceptAnswer(Message, frozen=True):
    """The reply to ``cluster.accept``: this node's acceptance of the layout."""

    acceptance: Acceptance
