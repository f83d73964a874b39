"""Tracks which nodes are up by heartbeats, and with them the state of their disks and their clocks.

Theory of operation. Each node pings every node of the layout that has an address, by ``cluster.ping`` twice a second,
over the connection that all its calls use. The result is a hint: placement and reads use it to avoid the dead, and
safety never depends on it.

=========  =====================================================================================================
state      means
=========  =====================================================================================================
unknown    not reached since this process started; counts as away
up         answered its last ping, or at least sent something while it was busy
down       missed three pings in a row; or its connection broke and the attempt to make a new one was refused
=========  =====================================================================================================

A ping that is late while other bytes arrive does not count as missed: it waits in a queue after a long body, it is not
lost. A gateway without an address of its own is known by the pings that it sends.

Pings also spread layouts (``layout_exchange``). A Pong names the layouts that its sender refuses, so that ``status``
can show them.

The shortest round trip ever seen bounds how far away a peer can be (light in fibre: about 100 km per millisecond). It
is kept as evidence against a certified location, never as proof of one. The peer's clock is compared at the middle of
the fastest recent round trip.
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
from storaged.cluster.disk_view import DiskView
from storaged.cluster.disks_seen import DisksSeen
from storaged.cluster.layout import Layout
from storaged.cluster.layout_exchange import LayoutExchange, PeerLayouts
from storaged.cluster.layouts import REASON_CHARS_MAX, REFUSALS_MAX, LayoutBook
from storaged.cluster.messages import DiskReport, LayoutAfter, Ping, Pong
from storaged.cluster.moves import RefusedLayout
from storaged.cluster.ports import Call, Caller, DiskStatus, Method, Methods
from storaged.cluster.rpc.authority import grant
from storaged.cluster.rpc.faults import plain
from storaged.cluster.signed_layout import SignedLayout
from storaged.disk_states import SLOW_MS
from storaged.errors import PeerError, PeerTimeout, PeerUnreachable

log = structlog.get_logger(__name__)

PING_INTERVAL_S = 0.5
MISSED_MAX = 3
SAMPLES = 16
"""Recent round trips among which the fastest measures the clock: eight seconds."""

DISKS_PER_NODE_MAX = 1024
"""Reports of further disks of one node are ignored."""

DISK_BYTES_MAX = 2**60
LATENCY_MS_MAX = 3_600_000


@dataclass(frozen=True)
class NodeStatus:
    """One node as this one sees it.

    ``since_ms`` is when it entered its state (wall clock), ``disks`` what it last reported of them. ``rtt_min_ms`` and
    ``clock_skew_ms`` (its clock minus ours) are None until measured.
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
    """Layouts that it refuses."""
    certificate_until_ms: int = 0
    """When its certificate expires, in milliseconds since 1970; 0 when not reported."""


@dataclass(frozen=True)
class OwnNode:
    """What this node reports about itself.

    ``disks()`` gives the state of its disks; it is called at each ping, so it must be quick and not block.
    ``certificate_until_ms()``: when its certificate expires, in milliseconds since 1970.
    """

    name: str
    incarnation: bytes
    pid: int = field(default_factory=os.getpid)
    disks: Callable[[], Sequence[DiskStatus]] = tuple
    certificate_until_ms: Callable[[], int] = lambda: 0


class Links(Protocol):
    """What the RPC pool knows without a call: when a node was last heard, and which connections were made or
    refused.
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
    layouts: PeerLayouts = field(default_factory=PeerLayouts)
    rtt_min_ms: float | None = None
    samples: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    """(round trip, skew) in milliseconds."""
    ping_now: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    """Its heartbeat; None for a node without an address."""
    last_inbound: float | None = None
    certificate_until_ms: int = 0


class Membership:
    """Implements ``Liveness``. Use: register :meth:`methods`, ``await start()`` ... ``await close()``.

    ``links`` is the RPC pool, when there is one.
    """

    def __init__(
        self,
        own: OwnNode,
        caller: Caller,
        layouts: LayoutBook,
        *,
        links: Links | None = None,
        clock: Clock | None = None,
        interval_s: float = PING_INTERVAL_S,
        seen: DisksSeen | None = None,
    ) -> None:
        """``seen``: what this process sees of disks; its ring client reports there too."""
        self._own = own
        self._caller = caller
        self._layouts = layouts
        self._exchange = LayoutExchange(caller, layouts)
        self._links = links
        self._clock = clock or SystemClock()
        self._interval_s = interval_s
        self._began_ms = self._clock.wall_ms()
        self._peers: dict[str, _Peer] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self.view = view = DiskView(own.name, own.disks, layouts, seen or DisksSeen(self._clock))
        self.disk_writable, self.disk_readable, self.disk_prompt = (
            view.disk_writable,
            view.disk_readable,
            view.disk_prompt,
        )
        self.disk_late, self.disk_answered = view.disk_late, view.disk_answered
        self.disks_full, self.disk_takes_rows = view.disks_full, view.disk_takes_rows
        self._watchers: list[Callable[[NodeStatus], None]] = []
        self._running = False

    def methods(self) -> Methods:
        methods = {
            "cluster.ping": Method(Ping, self._on_ping),
            "cluster.layout": Method(LayoutAfter, self._exchange.on_layout),
            "cluster.offer": Method(SignedLayout, self._exchange.on_offer),
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
        tasks = [peer.task for peer in self._peers.values() if peer.task is not None] + list(self._stopping)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # States.

    def watch(self, watcher: Callable[[NodeStatus], None]) -> None:
        """``watcher(status)`` is called when a node changes its state, and when it comes back as a new process."""
        self._watchers.append(watcher)

    def statuses(self) -> tuple[NodeStatus, ...]:
        """Every node of the layout in force, this one included, by name."""
        names = {entry.name for entry in self._layouts.current.nodes} if self._layouts.epoch else set()
        return tuple(self.status(name) for name in sorted(names | {self._own.name}))

    def status(self, node: str) -> NodeStatus:
        """Raises KeyError for a node that is not in the layout."""
        if node == self._own.name:
            return self._own_status()
        peer = self._peers[node]
        self._check_inbound(peer)
        return NodeStatus(
            name=node,
            state=peer.state,
            since_ms=peer.since_ms,
            reason=peer.reason,
            incarnation=peer.incarnation,
            pid=peer.pid,
            epoch=peer.epoch,
            rtt_min_ms=peer.rtt_min_ms,
            clock_skew_ms=min(peer.samples)[1] if peer.samples else None,
            disks=self.view.shown(peer.disks),
            refused=peer.refused,
            certificate_until_ms=peer.certificate_until_ms,
        )

    def _own_status(self) -> NodeStatus:
        return NodeStatus(
            name=self._own.name,
            state="up",
            since_ms=self._began_ms,
            incarnation=self._own.incarnation,
            pid=self._own.pid,
            epoch=self._layouts.epoch,
            rtt_min_ms=0.0,
            clock_skew_ms=0.0,
            disks=self.view.shown(self._own.disks()),
            refused=self._layouts.refusals(),
            certificate_until_ms=self._own.certificate_until_ms(),
        )

    # Disks.

    def why_away(self, disk_id: str) -> str:
        return self.view.why_away(disk_id, lambda node: self.status(node).state == "up")

    def reports(self) -> dict[str, DiskStatus]:
        """What each node last said of the disks that the layout gives it, also one that does not answer now."""
        homes = self._layouts.current.disk_by_id
        said = ((peer.name, peer.disks) for peer in self._peers.values())
        return {
            disk.id: disk
            for node, disks in (*said, (self._own.name, self._own.disks()))
            for disk in disks
            if disk.id in homes and homes[disk.id].node == node
        }

    def look_at_disks(self) -> None:
        """Compares the disks again; to be called twice a second."""
        self.view.seen.expire()
        if self._layouts.epoch:
            self._index_disks()

    # Heartbeats.

    def _follow(self, layout: Layout) -> None:
        """Pings exactly the nodes of this layout from now on."""
        wanted = {entry.name: entry.address for entry in layout.nodes if entry.name != self._own.name}
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
        self.view.take((peer.name, peer.state == "up", peer.disks) for peer in self._peers.values())

    def _stop(self, peer: _Peer) -> None:
        if peer.task is not None:
            task, peer.task = peer.task, None
            task.cancel()
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)

    async def _heartbeat(self, peer: _Peer) -> None:
        while True:
            peer.ping_now.clear()
            began = self._clock.monotonic()
            try:
                await self._ping_with_retry(peer)
            except PeerError as error:
                self._count_missed(peer, error)
            except Exception:
                log.exception("heartbeat failed", peer=peer.name)
            rest_s = max(self._interval_s - (self._clock.monotonic() - began), 0.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s):
                    await peer.ping_now.wait()

    async def _ping_with_retry(self, peer: _Peer) -> None:
        """Repeats a ping whose connection broke once; the second one waits for the outcome of the reconnect."""
        try:
            await self._ping(peer)
        except PeerUnreachable as error:
            if isinstance(error, PeerTimeout):
                raise
            await self._ping(peer)

    async def _ping(self, peer: _Peer) -> None:
        began, wall_before = self._clock.monotonic(), self._clock.wall_ms()
        ping = Ping(
            node=self._own.name,
            incarnation=self._own.incarnation,
            pid=self._own.pid,
            wall_ms=self._clock.wall_ms(),
            epoch=self._layouts.epoch,
            digest=self._layouts.digest,
            certificate_until_ms=self._own.certificate_until_ms(),
            steps=self._layouts.partitions.steps,
        )
        pong, _ = await self._caller.call(peer.name, "cluster.ping", ping, Pong, timeout_s=self._interval_s)
        rtt_ms = (self._clock.monotonic() - began) * 1000
        peer.rtt_min_ms = rtt_ms if peer.rtt_min_ms is None else min(peer.rtt_min_ms, rtt_ms)
        peer.samples.append((rtt_ms, pong.wall_ms - (wall_before + rtt_ms / 2)))
        disks = tuple(map(_checked_status, pong.disks[:DISKS_PER_NODE_MAX]))
        known, peer.disks = peer.disks, disks
        if list(map(_matters, disks)) != list(map(_matters, known)):
            self._index_disks()
        peer.refused = tuple(
            RefusedLayout(entry.epoch, plain(entry.source, REASON_CHARS_MAX), plain(entry.reason, REASON_CHARS_MAX))
            for entry in pong.refused[:REFUSALS_MAX]
        )
        peer.certificate_until_ms = pong.certificate_until_ms
        self._set_up(peer, pong.incarnation, pong.pid, pong.epoch)
        self._exchange.compare(peer.name, pong.epoch, pong.digest)
        self._layouts.partitions.hear(peer.name, pong.steps)
        await self._exchange.synchronise(peer.layouts, peer.name, peer.incarnation, peer.epoch)

    async def _on_ping(self, ping: Ping, call: Call) -> Pong:
        peer = self._peers.get(call.peer.name)
        if peer is not None and peer.task is None:
            peer.last_inbound = self._clock.monotonic()
            peer.certificate_until_ms = ping.certificate_until_ms
            self._set_up(peer, ping.incarnation, ping.pid, ping.epoch)
        self._exchange.compare(call.peer.name, ping.epoch, ping.digest)
        if peer is not None:  # a node that was removed may ping, and makes this one read nothing
            self._layouts.partitions.hear(call.peer.name, ping.steps)
        return Pong(
            node=self._own.name,
            incarnation=self._own.incarnation,
            pid=self._own.pid,
            wall_ms=self._clock.wall_ms(),
            epoch=self._layouts.epoch,
            disks=tuple(
                DiskReport(
                    d.id, d.directory, d.state, d.bytes_used, d.bytes_free, d.reason, d.few, d.ample, d.latency_ms
                )
                for d in self._own.disks()
            ),
            digest=self._layouts.digest,
            refused=self._layouts.refusals(),
            certificate_until_ms=self._own.certificate_until_ms(),
            steps=self._layouts.partitions.steps,
        )

    # Changes of state.

    def _set_up(self, peer: _Peer, incarnation: bytes, pid: int, epoch: int) -> None:
        restarted = bool(peer.incarnation) and peer.incarnation != incarnation
        peer.missed = 0
        peer.incarnation, peer.pid, peer.epoch = incarnation, pid, epoch
        self._enter(peer, "up", "", restarted=restarted)

    def _count_missed(self, peer: _Peer, error: PeerError) -> None:
        if not isinstance(error, PeerTimeout):
            peer.missed = MISSED_MAX
            self._enter(peer, "down", error.message)
            return
        last_read_at = self._links.last_read_at(peer.name) if self._links is not None else None
        if last_read_at is not None and asyncio.get_running_loop().time() - last_read_at < self._interval_s:
            return
        peer.missed += 1
        if peer.missed >= MISSED_MAX:
            self._enter(peer, "down", f"no answer to {peer.missed} pings")

    def _enter(self, peer: _Peer, state: str, reason: str, *, restarted: bool = False) -> None:
        changed = peer.state != state
        peer.state, peer.reason = state, reason
        if not changed and not restarted:
            return
        peer.since_ms = self._clock.wall_ms()
        if changed:
            self._index_disks()
        level = log.info if state == "up" else log.warning
        level("node is " + state, peer=peer.name, reason=reason, restarted=restarted)
        for watcher in self._watchers:
            watcher(self.status(peer.name))

    def _on_link(self, node: str, reached: bool) -> None:
        peer = self._peers.get(node)
        if peer is None:
            return
        if reached:
            peer.ping_now.set()
        elif peer.state == "up" and peer.task is not None:
            peer.missed = MISSED_MAX
            self._enter(peer, "down", "its connection broke and a new one was refused")

    def _check_inbound(self, peer: _Peer) -> None:
        """A node that only sends pings is down when it has stopped sending them."""
        if peer.task is None and peer.last_inbound is not None and peer.state == "up":
            silence_s = self._clock.monotonic() - peer.last_inbound
            if silence_s > MISSED_MAX * self._interval_s + self._interval_s:
                self._enter(peer, "down", "it has stopped sending pings")


def _checked_status(disk: DiskReport) -> DiskStatus:
    """A disk as its node reports it, checked: only texts that a terminal can show, and sizes that a disk can have."""
    used, free = (min(max(size, 0), DISK_BYTES_MAX) for size in (disk.bytes_used, disk.bytes_free))
    identity, directory, state, reason = (
        plain(text, REASON_CHARS_MAX) for text in (disk.id, disk.directory, disk.state, disk.reason)
    )
    latency_ms = min(max(disk.latency_ms, 0), LATENCY_MS_MAX)
    return DiskStatus(identity, directory, state, used, free, reason, disk.few, disk.ample, latency_ms)


def _matters(disk: DiskStatus) -> tuple[str, str, bool, bool, bool]:
    """What of a report can't wait for the next ``look_at_disks``."""
    return disk.id, disk.state, disk.few, disk.ample, disk.latency_ms >= SLOW_MS
