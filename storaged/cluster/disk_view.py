"""Which disks this process uses for what: what their nodes report, what it has seen itself, and what it compares.

Theory of operation
    Each disk has a state of ``disk_states``. Nodes report those of their disks with each heartbeat; a disk whose node
    does not answer is ``AWAY``. Nodes also report how long their disks take (``DiskStatus.latency_ms``), and which ones
    are *slow* follows from comparison. A disk that is slow, or that this process doubts (``disks_seen``), is *left
    out*: it gets no new fragments and is asked last, as long as few enough are (``disk_states.left_out``).

    Everything else asks here, by ``ports.Liveness``. The answers are sets that are made again when a report, a doubt or
    the layout changes; a question is one look into a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import structlog

from storaged.cluster.disks_seen import DisksSeen
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.ports import DiskStatus
from storaged.cluster.sparing import ABSENT, UNREACHABLE
from storaged.disk_states import FAILED, NO, OK, SLOW, STATES, YES, left_out, of, outliers

log = structlog.get_logger(__name__)


class DiskView:
    """Implements ``ports.Liveness``. ``own()``: the disks of this node; ``node``: its name."""

    def __init__(
        self, node: str, own: Callable[[], Sequence[DiskStatus]], layouts: LayoutBook, seen: DisksSeen
    ) -> None:
        self.seen = seen
        seen.on_change = self._judge
        self._node = node
        self._own = own
        self._layouts = layouts
        self._own_known: Sequence[DiskStatus] = ()
        self._reported: Mapping[str, DiskStatus] = {}
        """Of other nodes that are up, by disk."""
        self._silent: frozenset[str] = frozenset()
        """Disks of nodes that are not up, which these nodes named before."""
        self._known: dict[str, DiskStatus] = {}
        """All of the above but the silent ones."""
        self._slow: frozenset[str] = frozenset()
        self._left_out: frozenset[str] = frozenset()
        self._readable: frozenset[str] = frozenset()
        self._writable: frozenset[str] = frozenset()
        self._full: frozenset[str] = frozenset()
        self._without_rows: frozenset[str] = frozenset()
        self._ample: frozenset[str] = frozenset()

    # --- what is known

    def take(self, reports: Iterable[tuple[str, bool, Sequence[DiskStatus]]]) -> None:
        """What other nodes report: (node, whether it is up, its disks). A node is believed about the disks that the
        layout gives it, and about no others.
        """
        homes = self._layouts.current.disk_by_id
        found, silent = {}, set()
        for node, up, disks in reports:
            for disk in disks:
                if disk.id not in homes or homes[disk.id].node != node:
                    continue
                if up:
                    found[disk.id] = disk
                else:
                    silent.add(disk.id)
        self._reported, self._silent = found, frozenset(silent)
        self._judge()

    def _judge(self) -> None:
        own = self._own()
        self._own_known = own
        known = self._known = {**{disk.id: disk for disk in own if disk.id not in self._silent}, **self._reported}
        rights = {disk.id: of(disk.state).rights for disk in known.values()}
        readable = {disk for disk, allowed in rights.items() if allowed.reads is not NO}
        slow = outliers({disk: known[disk].latency_ms for disk in readable}, self._slow)
        for disk in slow - self._slow:
            log.warning("a disk is slow; the others go on", disk=disk, latency_ms=known[disk].latency_ms)
        for disk in self._slow - slow:
            log.info("a disk is not slow any more", disk=disk)
        self._slow = slow
        self._left_out = left_out((slow | self.seen.doubted.keys()) & readable, len(readable))
        silent = {disk for disk, allowed in rights.items() if allowed.votes is NO}
        self.seen.ask_last(self._left_out | silent)
        self._readable = frozenset(readable)
        self._writable = frozenset(disk for disk, allowed in rights.items() if allowed.writes is YES)
        full = frozenset(disk.id for disk in known.values() if is_full(disk))
        if full != self._full:  # the same object while nothing changes (``Liveness.disks_full``)
            self._full = full
        self._without_rows = frozenset(disk for disk in full if known[disk].few)
        self._ample = frozenset(disk for disk in full if known[disk].ample)

    def _follow(self) -> None:
        if self._own() is not self._own_known:
            self._judge()

    # --- ``Liveness``

    def disk_writable(self, disk_id: str) -> bool:
        if self._own() is not self._own_known:  # ``_follow``, which a PUT would call thirty times
            self._judge()
        return disk_id in self._writable

    def disk_readable(self, disk_id: str) -> bool:
        if self._own() is not self._own_known:
            self._judge()
        return disk_id in self._readable

    def disk_prompt(self, disk_id: str) -> bool:
        if self._own() is not self._own_known:
            self._judge()
        return disk_id in self._readable and disk_id not in self._left_out

    def disk_late(self, disk_id: str, for_s: float) -> None:
        self.seen.late(disk_id, for_s)

    def disk_answered(self, disk_id: str) -> None:
        self.seen.answered(disk_id)

    def disks_full(self) -> frozenset[str]:
        self._follow()
        return self._full

    def disk_takes_rows(self, disk_id: str, *, outside_reserve: bool = False) -> bool:
        self._follow()
        return disk_id in self._ample if outside_reserve else disk_id not in self._without_rows

    # --- for operators and votes

    def why_away(self, disk_id: str, node_up: Callable[[str], bool]) -> str:
        """Why a disk of the layout can't be read now (``sparing.Opinion``); empty when it can.

        A state that no node of this version reports is FAILED: votes repeat what is returned here, and have a bound.
        """
        self._follow()
        disk = self._known.get(disk_id)
        if disk is not None:
            return "" if disk_id in self._readable else disk.state if disk.state in STATES else FAILED
        node = self._layouts.current.node_of(disk_id)
        return ABSENT if node == self._node or node_up(node) else UNREACHABLE

    def shown(self, disks: Sequence[DiskStatus]) -> tuple[DiskStatus, ...]:
        """The disks of a node as ``status`` shows them: with the state SLOW where they are left out for that."""
        return tuple(self._shown(disk) for disk in disks)

    def _shown(self, disk: DiskStatus) -> DiskStatus:
        if disk.state != OK or disk.id not in self._slow | self._left_out:
            return disk
        took = f"operations take {disk.latency_ms} ms"
        reason = took if disk.id in self._slow else "calls of this node to it are late"
        return replace(disk, state=SLOW, reason=reason)


def is_full(disk: DiskStatus) -> bool:
    """See ``Liveness.disks_full``."""
    return disk.state == "full" or (disk.few and of(disk.state).rights.reads is not NO)
