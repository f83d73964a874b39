"""Who is there: heartbeats between nodes, the state of their disks, their clocks, and the spreading of layouts.

Theory of operation. Each node pings every node of the layout that has an address, by ``cluster.ping`` twice a second,
over the connection that
all its calls use. What that shows is a hint: placement and reads use it to avoid the dead, nothing's safety rests on
it.

=========  =====================================================================================================
state      means
=========  =====================================================================================================
unknown    not reached since this process started; counts as away
up         answered its last ping, or at least sent something while it was busy
down       missed three pings in a row; or its connection broke and the attempt to make a new one was refused
=========  =====================================================================================================

A ping that is late while other bytes do arrive is not counted as missed: behind a long body it is queued, not lost.

Each ping carries the epoch of the layout in force. Whoever knows a newer one passes it on, epoch by epoch, so that a
node that was away gets the
history too. A node that begins with a later layout (a gateway that was added, a server that was built anew) asks each
peer once for the
earlier ones that it lacks: records name the layout under which they were written. A gateway without an address of its
own is known by the pings that it sends. Layouts that a node refuses (``cluster.layouts``) go with its answers, so that
``status`` names them; so does a digest of the one in force, which shows two nodes that they go by different ones of one
epoch.

These three methods are all that a certified node gets which the layout in force does not name: so a node that has just
been added can bring the layout
that names it, and one that was removed learns that it was.

The shortest round trip ever seen bounds how far away a peer can be (light in fibre: about 100 km per millisecond). It
is kept as evidence against a certified
location, never as proof of one. The peer's clock is compared at the middle of the fastest recent round trip.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from storaged.clock import Clock, SystemClock
from storaged.cluster.history import EarlierLayouts
from storaged.cluster.identity import SignedLayout
from storaged.cluster.layout import Layout
from storaged.cluster.layouts import PEER, REASON_CHARS_MAX, REFUSALS_MAX, LayoutBook
from storaged.cluster.moves import RefusedLayout
from storaged.cluster.ports import Call, Caller, DiskStatus, LedgerReport, Method, Methods
from storaged.cluster.rpc.authority import grant
from storaged.cluster.rpc.faults import plain
from storaged.errors import LayoutRefused, PeerError, PeerTimeout, PeerUnreachable
from storaged.wire import Message

log = structlog.get_logger(__name__)

PING_INTERVAL_S = 0.5
MISSED_MAX = 3
SAMPLES = 16
"""Recent round trips among which the fastest measures the clock: eight seconds."""

LAYOUTS_PER_PING_MAX = 64

DISKS_TOLD_MAX = 1024
"""Of one node: more it may not tell of."""
DISK_BYTES_MAX = 2**60

WRITABLE = frozenset({"ok"})
READABLE = frozenset({"ok", "full", "read-only"})


class DiskReport(Message, frozen=True):
    """A DiskStatus on the wire."""

    id: str
    directory: str
    state: str
    bytes_used: int = 0
    bytes_free: int = 0
    reason: str = ""


class Ping(Message, frozen=True):
    """Of the sender: its process, its clock, and the epoch of the layout that it goes by."""

    node: str
    incarnation: bytes
    pid: int
    wall_ms: int
    epoch: int
    digest: bytes = b""
    """Of that layout; empty: not said."""
    certificate_until_ms: int = 0
    """When the certificate of the sender expires, milliseconds since 1970; 0: not said."""


class Pong(Message, frozen=True):
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


def _told(disk: DiskReport) -> DiskStatus:
    """A disk as its node tells of it: of texts that may be anything, what a terminal can show; sizes that a disk can
    have."""
    used, free = (min(max(size, 0), DISK_BYTES_MAX) for size in (disk.bytes_used, disk.bytes_free))
    identity, directory, state, reason = (
        plain(text, REASON_CHARS_MAX) for text in (disk.id, disk.directory, disk.state, disk.reason)
    )
    return DiskStatus(identity, directory, state, used, free, reason)


class LayoutAfter(Message, frozen=True):
    """Asks for the next layout after ``epoch``."""

    epoch: int


class LayoutAnswer(Message, frozen=True):
    signed: SignedLayout | None


class Taken(Message, frozen=True):
    """The epoch in force after an offer."""

    epoch: int


@dataclass(frozen=True)
class NodeStatus:
    """One node as this one sees it. ``since_ms`` is when it entered its state (wall clock), ``disks`` what it last said
    of them.

    ``rtt_min_ms`` and ``clock_skew_ms`` (its clock minus ours) are None until measured.
    """

    name: str
    state: str
    since_ms: int
    reason: str = ""
    incarnation: bytes = b""
    pid: int = 0
    epoch: int = 0
    rtt_min_ms: float | None = None
    clock_skew_ms: float | None = None
    disks: tuple[DiskStatus, ...] = ()
    refused: tuple[RefusedLayout, ...] = ()
    """Layouts that it does not take."""
    certificate_until_ms: int = 0
    """When its certificate expires, milliseconds since 1970; 0 when it has not said."""
    ledger: LedgerReport | None = None
    """What it says of its disks' ledger; None for one without disks."""


class Links(Protocol):
    """What the pool knows without asking: when it last heard from a node; and it tells of
    connections made and refused.
    """

    def last_read_at(self, node: str) -> float | None: ...

    def watch(self, watcher: Callable[[str, bool], None]) -> None: ...


@dataclass
class _Peer:
    name: str
    since_ms: int
    state: str = "unknown"
    reason: str = "not reached yet"
    missed: int = 0
    incarnation: bytes = b""
    pid: int = 0
    epoch: int = 0
    disks: tuple[DiskStatus, ...] = ()
    refused: tuple[RefusedLayout, ...] = ()
    ledger: LedgerReport | None = None
    history: EarlierLayouts = field(default_factory=EarlierLayouts)
    complaint: str = ""
    """Why layouts could not be exchanged with it when that was last tried; logged once."""
    rtt_min_ms: float | None = None
    samples: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    """(round trip, skew) in milliseconds."""
    soon: asyncio.Event = field(default_factory=asyncio.Event)
    """Ping again now."""
    task: asyncio.Task[None] | None = None
    last_inbound: float | None = None
    certificate_until_ms: int = 0


class Membership:
    """Implements ``Liveness``. Use: register :meth:`methods`, ``await start()`` ... ``await close()``.

    ``disks`` says how this node's own disks are (called at each ping: it must be quick and not block); ``ledger(node)``
    is what this node says of its disks' ledger to another one; ``links`` is the RPC pool, when there is one.
    """

    def __init__(
        self,
        node: str,
        incarnation: bytes,
        caller: Caller,
        layouts: LayoutBook,
        *,
        disks: Callable[[], Sequence[DiskStatus]] = tuple,
        ledger: Callable[[str], LedgerReport | None] = lambda _node: None,
        links: Links | None = None,
        clock: Clock | None = None,
        interval_s: float = PING_INTERVAL_S,
        pid: int | None = None,
        certificate_until_ms: Callable[[], int] = lambda: 0,
    ) -> None:
        self._node = node
        self._incarnation = incarnation
        self._caller = caller
        self._layouts = layouts
        self._own_disks = disks
        self._ledger = ledger
        self._links = links
        self._clock = clock or SystemClock()
        self._interval_s = interval_s
        self._pid = os.getpid() if pid is None else pid
        self._certificate_until_ms = certificate_until_ms
        self._began_ms = self._clock.wall_ms()
        self._peers: dict[str, _Peer] = {}
        self._gone: set[asyncio.Task[None]] = set()
        self._disk_states: dict[str, str] = {}
        """Of the disks of other nodes, as these report them; the empty string while a disk's node is away."""
        self._writable: frozenset[str] = frozenset()
        """Those among them that take new fragments."""
        self._watchers: list[Callable[[NodeStatus], None]] = []
        self._running = False

    def methods(self) -> Methods:
        methods = {
            "cluster.ping": Method(Ping, self._on_ping),
            "cluster.layout": Method(LayoutAfter, self._on_layout),
            "cluster.offer": Method(SignedLayout, self._on_offer),
        }
        return grant(methods)

    async def start(self) -> None:
        self._running = True
        if self._links is not None:
            self._links.watch(self._on_link)
        self._layouts.watch(self._follow)
        if self._layouts.epoch:
            self._follow(self._layouts.current)

    async def close(self) -> None:
        self._running = False
        tasks = [peer.task for peer in self._peers.values() if peer.task is not None] + list(self._gone)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # What is known.

    def watch(self, watcher: Callable[[NodeStatus], None]) -> None:
        """``watcher(status)`` is called when a node changes its state, and when it comes back as a new process."""
        self._watchers.append(watcher)

    def statuses(self) -> tuple[NodeStatus, ...]:
        """Every node of the layout in force, this one included, by name."""
        names = {entry.name for entry in self._layouts.current.nodes} if self._layouts.epoch else set()
        return tuple(self.status(name) for name in sorted(names | {self._node}))

    def status(self, node: str) -> NodeStatus:
        """Raises KeyError for a node that is in no layout."""
        if node == self._node:
            epoch, disks, refused = self._layouts.epoch, tuple(self._own_disks()), self._layouts.refusals()
            until_ms = self._certificate_until_ms()
            return NodeStatus(
                node, "up", self._began_ms, "", self._incarnation, self._pid, epoch, 0.0, 0.0, disks, refused, until_ms
            )
        peer = self._peers[node]
        self._age_inbound(peer)
        skew = min(peer.samples)[1] if peer.samples else None
        return NodeStatus(
            node,
            peer.state,
            peer.since_ms,
            peer.reason,
            peer.incarnation,
            peer.pid,
            peer.epoch,
            peer.rtt_min_ms,
            skew,
            peer.disks,
            peer.refused,
            peer.certificate_until_ms,
            peer.ledger,
        )

    def node_up(self, node: str) -> bool:
        if node == self._node:
            return True
        peer = self._peers.get(node)
        if peer is None:
            return False
        self._age_inbound(peer)
        return peer.state == "up"

    def disk_writable(self, disk_id: str) -> bool:
        return disk_id in self._writable or self._disk_state(disk_id) in WRITABLE

    def disk_readable(self, disk_id: str) -> bool:
        return self._disk_state(disk_id) in READABLE

    def _disk_state(self, disk_id: str) -> str:
        """The state that a disk's node reports; empty when the node is away or never named the disk."""
        known = self._disk_states.get(disk_id)
        if known is not None:
            return known
        for disk in self._own_disks():
            if disk.id == disk_id:
                return disk.state
        return ""

    # Heartbeats.

    def _follow(self, layout: Layout) -> None:
        """Pings exactly the nodes of this layout from now on."""
        wanted = {entry.name: entry.address for entry in layout.nodes if entry.name != self._node}
        for name in [name for name in self._peers if name not in wanted]:
            self._stop(self._peers.pop(name))
        for name, address in wanted.items():
            peer = self._peers.setdefault(name, _Peer(name, self._clock.wall_ms()))
            if address and peer.task is None and self._running:
                peer.task = asyncio.get_running_loop().create_task(self._heartbeat(peer))
            elif not address:
                self._stop(peer)
        self._index_disks()

    def _index_disks(self) -> None:
        """A node speaks for the disks that the layout gives it, and for no others."""
        homes = self._layouts.current.disk_by_id
        self._disk_states = {
            disk.id: disk.state if peer.state == "up" else ""
            for peer in self._peers.values()
            for disk in peer.disks
            if disk.id in homes and homes[disk.id].node == peer.name
        }
        self._writable = frozenset(disk_id for disk_id, state in self._disk_states.items() if state in WRITABLE)

    def _stop(self, peer: _Peer) -> None:
        if peer.task is not None:
            task, peer.task = peer.task, None
            task.cancel()
            self._gone.add(task)
            task.add_done_callback(self._gone.discard)

    async def _heartbeat(self, peer: _Peer) -> None:
        while True:
            peer.soon.clear()
            began = self._clock.monotonic()
            try:
                await self._ping_or_again(peer)
            except PeerError as error:
                self._missed(peer, error)
            except Exception:
                log.exception("heartbeat failed", peer=peer.name)
            rest_s = max(self._interval_s - (self._clock.monotonic() - began), 0.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s):
                    await peer.soon.wait()

    async def _ping_or_again(self, peer: _Peer) -> None:
        """A ping whose connection broke under it is sent once more, and so waits for the outcome of the reconnect."""
        try:
            await self._ping(peer)
        except PeerUnreachable as error:
            if isinstance(error, PeerTimeout):
                raise
            await self._ping(peer)

    async def _ping(self, peer: _Peer) -> None:
        began, wall_before = self._clock.monotonic(), self._clock.wall_ms()
        pong, _ = await self._caller.call(
            peer.name, "cluster.ping", self._introduction(), Pong, timeout_s=self._interval_s
        )
        rtt_ms = (self._clock.monotonic() - began) * 1000
        peer.rtt_min_ms = rtt_ms if peer.rtt_min_ms is None else min(peer.rtt_min_ms, rtt_ms)
        peer.samples.append((rtt_ms, pong.wall_ms - (wall_before + rtt_ms / 2)))
        disks = tuple(map(_told, pong.disks[:DISKS_TOLD_MAX]))
        if disks != peer.disks:
            peer.disks = disks
            self._index_disks()
        peer.refused = tuple(
            RefusedLayout(entry.epoch, plain(entry.source, REASON_CHARS_MAX), plain(entry.reason, REASON_CHARS_MAX))
            for entry in pong.refused[:REFUSALS_MAX]
        )
        peer.ledger = pong.ledger
        peer.certificate_until_ms = pong.certificate_until_ms
        self._heard_of(peer, pong.incarnation, pong.pid, pong.epoch)
        self._compare(peer.name, pong.epoch, pong.digest)
        if pong.epoch != self._layouts.epoch:
            await self._exchange(peer, pong.epoch)
        await self._ask_history(peer)

    def _heard_of(self, peer: _Peer, incarnation: bytes, pid: int, epoch: int) -> None:
        returned = bool(peer.incarnation) and peer.incarnation != incarnation
        peer.missed = 0
        peer.incarnation, peer.pid, peer.epoch = incarnation, pid, epoch
        self._enter(peer, "up", "", anew=returned)

    def _missed(self, peer: _Peer, error: PeerError) -> None:
        if not isinstance(error, PeerTimeout):
            peer.missed = MISSED_MAX
            self._enter(peer, "down", error.message)
            return
        heard = self._links.last_read_at(peer.name) if self._links is not None else None
        if heard is not None and asyncio.get_running_loop().time() - heard < self._interval_s:
            return
        peer.missed += 1
        if peer.missed >= MISSED_MAX:
            self._enter(peer, "down", f"no answer to {peer.missed} pings")

    def _enter(self, peer: _Peer, state: str, reason: str, *, anew: bool = False) -> None:
        if peer.state == state and not anew:
            peer.reason = reason
            return
        changed = peer.state != state
        peer.state, peer.reason = state, reason
        if changed or anew:
            peer.since_ms = self._clock.wall_ms()
        if changed:
            self._index_disks()
        (log.info if state == "up" else log.warning)("node is " + state, peer=peer.name, reason=reason, restarted=anew)
        for watcher in self._watchers:
            watcher(self.status(peer.name))

    def _on_link(self, node: str, reached: bool) -> None:
        peer = self._peers.get(node)
        if peer is None:
            return
        if reached:
            peer.soon.set()
        elif peer.state == "up" and peer.task is not None:
            peer.missed = MISSED_MAX
            self._enter(peer, "down", "its connection broke and a new one was refused")

    # Answers.

    def _introduction(self) -> Ping:
        return Ping(
            self._node,
            self._incarnation,
            self._pid,
            self._clock.wall_ms(),
            self._layouts.epoch,
            self._layouts.digest,
            self._certificate_until_ms(),
        )

    def _compare(self, node: str, epoch: int, digest: bytes) -> None:
        """A peer that goes by another layout of our epoch is reported: one of the two was signed by mistake. A newer
        one is for ``_exchange`` to judge.
        """
        if epoch == self._layouts.epoch and digest and digest != self._layouts.digest:
            self._layouts.refuse(
                epoch,
                PEER + node,
                f"Two layouts were signed under epoch {epoch}; {node} goes by the other one.",
                digest,
            )
        elif epoch <= self._layouts.epoch:
            self._layouts.agrees(PEER + node)

    async def _on_ping(self, ping: Ping, call: Call) -> Pong:
        peer = self._peers.get(call.peer.name)
        if peer is not None and peer.task is None:
            peer.last_inbound = self._clock.monotonic()
            peer.certificate_until_ms = ping.certificate_until_ms
            self._heard_of(peer, ping.incarnation, ping.pid, ping.epoch)
        self._compare(call.peer.name, ping.epoch, ping.digest)
        reports = tuple(
            DiskReport(d.id, d.directory, d.state, d.bytes_used, d.bytes_free, d.reason) for d in self._own_disks()
        )
        return Pong(
            self._node,
            self._incarnation,
            self._pid,
            self._clock.wall_ms(),
            self._layouts.epoch,
            reports,
            self._layouts.digest,
            self._layouts.refusals(),
            self._certificate_until_ms(),
            self._ledger(call.peer.name),
        )

    async def _on_layout(self, request: LayoutAfter, call: Call) -> LayoutAnswer:
        return LayoutAnswer(self._layouts.signed_after(request.epoch))

    async def _on_offer(self, signed: SignedLayout, call: Call) -> Taken:
        await self._layouts.learn(signed, PEER + call.peer.name)
        return Taken(self._layouts.epoch)

    def _age_inbound(self, peer: _Peer) -> None:
        """A node that only sends pings is down when it has stopped."""
        if peer.task is None and peer.last_inbound is not None and peer.state == "up":
            silence_s = self._clock.monotonic() - peer.last_inbound
            if silence_s > MISSED_MAX * self._interval_s + self._interval_s:
                self._enter(peer, "down", "it has stopped sending pings")

    async def _exchange(self, peer: _Peer, epoch: int) -> None:
        """Whoever is behind is told the next layouts, at most ``LAYOUTS_PER_PING_MAX`` of them."""
        try:
            for _ in range(LAYOUTS_PER_PING_MAX):
                if epoch > self._layouts.epoch:
                    answer, _body = await self._caller.call(
                        peer.name, "cluster.layout", LayoutAfter(self._layouts.epoch), LayoutAnswer
                    )
                    if answer.signed is None or not await self._layouts.learn(answer.signed, PEER + peer.name):
                        return
                else:
                    following = self._layouts.signed_after(epoch)
                    if following is None:
                        return
                    taken, _body = await self._caller.call(peer.name, "cluster.offer", following, Taken)
                    if taken.epoch <= epoch:
                        return
                    epoch = taken.epoch
        except (LayoutRefused, PeerError) as error:
            self._complain(peer, error)

    async def _ask_history(self, peer: _Peer) -> None:
        async def after(epoch: int) -> SignedLayout | None:
            answer, _body = await self._caller.call(peer.name, "cluster.layout", LayoutAfter(epoch), LayoutAnswer)
            return answer.signed

        try:
            await peer.history.ask(self._layouts, after, PEER + peer.name, (peer.incarnation, peer.epoch))
        except (LayoutRefused, PeerError) as error:
            self._complain(peer, error)

    def _complain(self, peer: _Peer, error: LayoutRefused | PeerError) -> None:
        if error.message != peer.complaint:
            log.warning("layouts could not be exchanged", peer=peer.name, reason=error.message)
        peer.complaint = error.message
