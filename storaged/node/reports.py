"""What a node reports to its operator: the facts for ``status``, jobs, readiness, and ``doctor``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from storaged.admin import sparing
from storaged.admin.ports import Services
from storaged.admin.status import Durability, Facts, FirstSeen, NodeFacts, RepairWaits, judge
from storaged.cluster.layout import PARTITIONS, SYSTEM_PARTITION, Profile
from storaged.cluster.move_settings import document
from storaged.cluster.partitions import PartitionState
from storaged.cluster.presigned import spares_of
from storaged.cluster.rpc.faults import plain
from storaged.errors import (
    ServiceUnavailable,
    StoragedError,
)
from storaged.maintain.job import JobReport
from storaged.maintain.repair import NO_RECODING_S
from storaged.maintain.repair_queue import REASON_CHARS_MAX
from storaged.maintain.spare_room import free_for_spares
from storaged.maintain.status import MaintainStatus
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.names import SYSTEM_SCOPE, Table
from storaged.meta.ports import PageQuery
from storaged.node.applying import LayoutApplication
from storaged.node.auditing import merged
from storaged.node.doctor import Doctor, silent
from storaged.node.filling import Filling
from storaged.node.losses import Losses
from storaged.node.move_progress import (
    MoveProgress,
    PartitionCounts,
    count_objects,
    count_partitions,
    sum_of,
    what_is_left,
)
from storaged.node.planes import NodePlanes
from storaged.objects.code.place import choose

if TYPE_CHECKING:  # a storage node imports neither the key plane nor S3
    from storaged.node.gateway import Gateway

WATCH_EVERY_S = 10.0
REASONS_SHOWN_MAX = 3
"""Reasons why objects below target are not repaired, the most frequent ones."""

SAMPLE_GROUPS = 64
"""How many placement groups are tried for the profile of a write. With few disks all give the same."""


class Reports:
    """Reads the node; changes nothing."""

    def __init__(self, node: NodePlanes, gateway: Gateway | None) -> None:
        self._node, self._gateway = node, gateway
        self._doctor = Doctor(node, gateway)
        self._seen = FirstSeen()
        self._progress = MoveProgress(node.clock)
        self._filling = Filling()

    def services(self) -> Services:
        node = self._node
        found = Services(self.status, self.ready, self._doctor.checks, jobs=self, region=node.config.s3.region)
        found.checkpoints = self._checkpoints
        found.witnessed = node.auditing.witnessed
        found.trail = node.audit
        found.authority = (node.own.directory / "authority.crt").read_text()
        if self._gateway is not None:
            self._gateway.offer(found)
            found.set_moves = self._gateway.partitions.set_moves
            answers = node.membership.disk_readable
            found.layouts = LayoutApplication(
                node.own, node.authority, node.layouts, node.paths, node.pool, answers=answers
            )
            found.losses = Losses(node.layouts, node.ring.moves, answers).of
        return found

    # --- ready, status

    def ready(self) -> tuple[bool, str]:
        """Whether the node works, and why not.

        A gateway needs an open keyring and a majority of the system partition; a storage node needs one disk.
        """
        node = self._node
        system = Quorum(*node.layouts.partition(SYSTEM_PARTITION).voting)
        alive = [disk for disk in system.disks if node.membership.disk_readable(disk)]
        if node.config.storage and not node.disks.used:
            return False, "no disk takes part"
        if self._gateway is not None:
            if not system.met(alive):
                found = f"{len(alive)} of {len(system.disks)} replicas answer"
                return False, f"the system partition has no majority: {found}"
            if self._gateway.reason:
                return False, self._gateway.reason
        return True, ""

    async def status(self) -> dict[str, Any]:
        node = self._node
        statuses = await node.maintain.statuses()
        profile, reason = self._write_profile()
        problem = self._gateway.problem if self._gateway is not None else ""
        refusal = self._gateway.key_refusal if self._gateway is not None else ""
        spared, counts = await self._sparing(statuses), self._partitions()
        spares = sparing.document(spared)
        nodes = self._nodes()
        disks = [disk for known in nodes if known.up for disk in known.disks]
        facts = Facts(
            node.layouts.current,
            nodes,
            profile,
            reason,
            problem,
            self._durability(statuses),
            self._jobs(statuses, counts),
            key_refusal=refusal,
            key_damage=self._gateway.key_damage() if self._gateway is not None else (),
            bad_records=self._gateway.bad_records() if self._gateway is not None else (),
            revoked=node.peers.own_revocation(),
            audit_problem=node.auditing.problem,
            unwritable=[(status.node, plain(status.unwritable, REASON_CHARS_MAX)) for status in statuses],
            chosen_fall=node.ring.chosen_falls[1],
            sets_of=self._sets_of,
            disks_out=sparing.details(spared, spares),
            filling=self._filling.warnings(disks, node.clock.monotonic()),
            seeds_out=sparing.seed_details(spared, spares),
            seeds_unspared=sparing.unspared(spared),
            spares_short=sparing.short_details(spared),
            audit_alarms=merged(
                [*node.auditing.alarms(), *(alarm for status in statuses for alarm in status.audit_alarms)]
            ),
            unverified_records=sorted(
                {name: reason for status in statuses for name, reason in status.records_refused}.items()
            ),
        )
        found = self._seen.date(judge(facts, node.clock.wall_ms()))
        lifecycle = self._gateway.lifecycle.worker.document() if self._gateway is not None else []
        inventories = self._gateway.inventories.document() if self._gateway is not None else []
        more = {"sparing": spares, "lifecycle": lifecycle, "inventories": inventories}
        return {**found, "moving": self._moving(statuses, counts), **more}

    def _states(self) -> list[PartitionState] | None:
        """None while this node has not read where partitions are."""
        try:
            return [self._node.layouts.partition(number) for number in range(PARTITIONS)]
        except ServiceUnavailable:
            return None

    async def _sparing(self, statuses: Sequence[MaintainStatus]) -> sparing.SparingFacts:
        layouts = self._node.layouts
        layout, record = layouts.current, layouts.partitions.out
        states = self._states() if record.out else []
        duty = self._gateway.partitions if self._gateway is not None else None
        reason = (duty.sparing.reason if duty is not None else "") or self._node.sparing.refused
        target, seen = layouts.partitions.target(layout), self._node.sparing.times.seen()
        spares = spares_of(layouts.signed(layout.epoch))
        seed_reason = duty.system_sparing.reason if duty is not None else ""
        found = sparing.SparingFacts(layout, target, record, seen, states, reason, spares, seed_reason)
        if not sparing.waited_for(layout, record, seen):
            return found
        reports = self._node.membership.reports()
        free = free_for_spares(reports, self._node.membership.disk_writable)
        return await asyncio.to_thread(sparing.with_room_judged, found, reports, free, statuses)

    def _moving(self, statuses: Sequence[MaintainStatus], counts: PartitionCounts | None) -> dict[str, Any]:
        """What is not yet where the layout in force wants it. ``partitions`` and ``joint`` are None while this node has
        not read where partitions are, ``objects`` and ``recoding`` while a node has not looked at all objects since it
        learnt the layout.
        """
        layout = self._node.layouts.current
        counted = self._are_counted(statuses) and all(status.layout >= layout.epoch for status in statuses)
        return {
            "partitions": None if counts is None else counts.counted.left,
            "joint": None if counts is None else counts.joint,
            "of": PARTITIONS,
            "system": bool(layout.seeds_next),
            "objects": count_objects(statuses).left if counted else None,
            "recoding": sum(status.outdated for status in statuses) if counted else None,
            "profile": layout.profile,
            "reason": self._reason(),
            "settings": document(self._node.follower.settings.current),
        }

    def _partitions(self) -> PartitionCounts | None:
        return count_partitions(self._node.layouts, self._node.layouts.partitions)

    def _reason(self) -> str:
        """Why some partition can't move now, as this gateway's mover knows; empty when all can."""
        return self._gateway.partitions.mover.progress.reason if self._gateway is not None else ""

    def _jobs(self, statuses: Sequence[MaintainStatus], counts: PartitionCounts | None) -> list[dict[str, Any]]:
        """The jobs of all nodes, and those of the whole cluster."""
        settings = self._node.follower.settings.current
        left = what_is_left(statuses, self._node.layouts.current.profile)
        moves = self._progress.jobs(counts, count_objects(statuses), settings, self._reason(), left)
        name, gateway = self._node.own.name, self._gateway
        own = (
            gateway.partitions.expunger.report(name)
            + gateway.lifecycle.worker.report(name)
            + gateway.inventories.report(name)
            if gateway is not None
            else []
        )
        return jobs_of(statuses) + [_job(job) for job in [*moves, *own]]

    def _sets_of(self, partition: int) -> tuple[tuple[str, ...], ...]:
        try:
            return self._node.layouts.partition(partition).voters
        except ServiceUnavailable:
            return ()

    async def watch(self) -> None:
        """Judges the state now and then, so that a problem has a date though no operator asked."""
        while True:
            with contextlib.suppress(StoragedError):  # who asks gets the error; the next look may succeed
                await self.status()
            await asyncio.sleep(WATCH_EVERY_S)

    def _nodes(self) -> list[NodeFacts]:
        node = self._node
        facts = []
        for entry in node.layouts.current.nodes:
            known = node.membership.status(entry.name)
            up = known.state == "up"
            directory = str(node.directory) if entry.name == node.own.name else ""
            skew_ms = int(known.clock_skew_ms or 0)
            facts.append(
                NodeFacts(
                    entry.name,
                    entry.location,
                    tuple(entry.roles),
                    up,
                    known.since_ms,
                    known.pid if up else None,
                    directory,
                    skew_ms,
                    known.disks,
                    known.reason,
                    silent=silent(node, entry),
                    refused=known.refused,
                )
            )
        return facts

    def _are_counted(self, statuses: Sequence[MaintainStatus]) -> bool:
        """Whether each storage node that can be read has looked at the disks as they are now."""
        disks, membership = self._node.layouts.current.disks, self._node.membership
        wanted = {disk.node for disk in disks if membership.disk_readable(disk.id)}
        answered = {status.node for status in statuses}
        return bool(statuses) and answered >= wanted and all(status.current for status in statuses)

    def _durability(self, statuses: Sequence[MaintainStatus]) -> Durability:
        """Sums over all storage nodes that answer. It is ``counted`` when each has looked at the
        disks as they are now.
        """
        counted = self._are_counted(statuses)
        if self._gateway is not None:  # only gateways bring the system partition together
            counted = counted and self._node.keeper.current
        below, risk, lost, unreadable = (
            sum(getattr(status, name) for status in statuses)
            for name in ("below_target", "at_risk", "lost", "unreadable")
        )
        return Durability(below, risk, lost, counted, unreadable, _waits(statuses))

    def _write_profile(self) -> tuple[str | None, str]:
        """The weakest profile that a write would get now, over a sample of placement groups; or why it would be
        refused.
        """
        layout = self._node.layouts.current
        target = layout.target
        found: set[Profile] = set()
        for group in range(SAMPLE_GROUPS):
            data_id = (group * 0x10000 // SAMPLE_GROUPS).to_bytes(2, "big") + bytes(14)
            try:
                found.add(choose(layout, data_id, target, self._node.membership.disk_writable).profile)
            except ServiceUnavailable as error:
                return None, error.message
        return str(min(found, key=lambda profile: (profile.k, profile.n))), ""

    # --- jobs

    async def jobs(self) -> dict[str, Any]:
        """The document of jobs. ``busy``: something runs or waits that changes the counts."""
        statuses = await self._node.maintain.statuses()
        durability = self._durability(statuses)
        return {
            "busy": not durability.counted or any(status.busy for status in statuses),
            "objects_counted": durability.counted,
            "objects_below_target": durability.objects_below_target,
            "objects_at_risk": durability.objects_at_risk,
            "objects_lost": durability.objects_lost,
            "objects_unreadable": durability.objects_unreadable,
            "objects_misplaced": sum(status.misplaced for status in statuses),
            "objects_outdated": sum(status.outdated for status in statuses),
            "fragments_rebuilt": sum(status.fragments_rebuilt for status in statuses),
            "bytes_rebuilt": sum(status.bytes_rebuilt for status in statuses),
            "waits": waits_document(durability.waits),
            "jobs": self._jobs(statuses, self._partitions()),
            "settings": document(self._node.follower.settings.current),
        }

    async def start_scrub(self) -> list[str]:
        return await self._node.maintain.start_scrub()

    async def _checkpoints(self) -> list[bytes]:
        """Checkpoints of versions with protocol 2, which kept them in registers."""
        found: list[bytes] = []
        after: bytes | None = b""
        while after is not None:
            page = await self._node.scanner.list_page(
                PageQuery(Table.SYSTEM, SYSTEM_SCOPE, [0], prefix=b"audit/", after=after)
            )
            found.extend(row.value.body for row in page.rows)
            after = page.next_after
        return found


def _waits(statuses: Sequence[MaintainStatus]) -> RepairWaits | None:
    """What all nodes together wait for; None when that is nothing."""
    disks = tuple(sorted({disk for status in statuses for disk in status.waits.disks_away}))
    later = [status.waits.recode_in_s for status in statuses if status.waits.recode_in_s != NO_RECODING_S]
    delay_s = max((status.waits.recode_delay_s for status in statuses), default=0.0)
    gateway = next((status.waits.gateway for status in statuses if status.waits.gateway), "")
    unrepaired = sum_of(status.unrepaired for status in statuses)
    if not (disks or gateway or unrepaired):
        return None
    return RepairWaits(
        disks, min(later, default=None), delay_s, gateway, tuple(unrepaired.most_common(REASONS_SHOWN_MAX))
    )


def waits_document(waits: RepairWaits | None) -> dict[str, Any]:
    """``recode_in_s`` null: nothing will be recoded. ``reason`` says the same in a sentence; empty when repair waits
    for nothing. ``unrepaired``: other reasons why objects and parts below target are not repaired now.
    """
    if waits is None:
        return {"disks": [], "recode_in_s": None, "gateway": "", "reason": "", "unrepaired": []}
    return {
        "disks": list(waits.disks),
        "recode_in_s": waits.recode_in_s,
        "recode_delay_s": waits.recode_delay_s,
        "gateway": waits.gateway,
        "reason": str(waits),
        "unrepaired": [{"reason": reason, "objects": count} for reason, count in waits.unrepaired],
    }


def jobs_of(statuses: Sequence[MaintainStatus]) -> list[dict[str, Any]]:
    """The jobs of all nodes, as JSON documents."""
    return [_job(job) for status in statuses for job in status.jobs]


def _job(job: JobReport) -> dict[str, Any]:
    percent = 100.0 * min(1.0, job.done / job.total) if job.total else None
    found = {"name": job.name, "node": job.node, "state": job.state, "done": job.done, "total": job.total}
    return {**found, "percent": percent, "rate": job.rate, "eta_s": job.eta_s, "detail": job.detail}
