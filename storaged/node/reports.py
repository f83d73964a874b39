"""What a node tells its operator: the facts behind ``status``, the checks of ``doctor``, jobs, readiness."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storaged.admin.ports import Services
from storaged.admin.status import SKEW_MS_MAX, Durability, Facts, FirstSeen, NodeFacts, RepairWaits, judge
from storaged.cluster.layout import NodeEntry, Profile
from storaged.errors import (
    BucketKeyDamaged,
    ClockSkewed,
    KeyReleasesRefused,
    KeyringMismatch,
    KeysNotBackedUp,
    ServiceUnavailable,
    StoragedError,
)
from storaged.maintain.job import JobReport
from storaged.maintain.repair import NO_RECODING_S
from storaged.maintain.service import MaintainStatus
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.names import SYSTEM_SCOPE, Table
from storaged.node.auditing import merged
from storaged.objects.code.place import choose
from storaged.units import format_duration, format_size

if TYPE_CHECKING:
    from storaged.node.gateway import Gateway
    from storaged.node.planes import Node

CERTIFICATE_DAYS_MIN = 30
ENDED_KEY_AGE_S_MAX = 86_400.0
FREE_SHARE_MIN = 0.1
WATCH_EVERY_S = 10.0
SAMPLE_GROUPS = 64
"""Placement groups tried for what a write would use now: with few disks all answer alike."""
RTT_SITE_MS_MAX = 2.0
"""Nodes that claim one site answer within this, light being what it is (100 km of fibre a
millisecond of round trip).
"""


class Reports:
    """Reads the node; changes nothing."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._seen = FirstSeen()

    def services(self) -> Services:
        node = self._node
        found = Services(self.status, self.ready, self.doctor, jobs=self, region=node.config.s3.region)
        found.checkpoints = self._checkpoints
        found.witnessed = node.auditing.witnessed
        found.trail = node.audit
        found.authority = (node.own.directory / "authority.crt").read_text()
        if node.gateway is not None:
            node.gateway.offer(found)
        return found

    # --- ready, status

    def ready(self) -> tuple[bool, str]:
        """A gateway: the keyring is open and the system partition has a majority. A storage node: at least one disk
        takes part.
        """
        node = self._node
        layout = node.layouts.current
        alive = [disk for disk in layout.seeds if node.membership.disk_readable(disk)]
        if node.config.storage and not node.disks.used:
            return False, "no disk takes part"
        if node.gateway is not None:
            if not Quorum(layout.seeds).met(alive):
                found = f"{len(alive)} of {len(layout.seeds)} replicas answer"
                return False, f"the system partition has no majority: {found}"
            if node.gateway.reason:
                return False, node.gateway.reason
        return True, ""

    async def status(self) -> dict[str, Any]:
        node = self._node
        told = await node.maintain.statuses()
        profile, reason = self._write_profile()
        problem = node.gateway.problem if node.gateway is not None else ""
        refusal = node.gateway.key_refusal if node.gateway is not None else ""
        facts = Facts(
            node.layouts.current,
            self._nodes(),
            profile,
            reason,
            problem,
            self._durability(told),
            jobs_of(told),
            key_refusal=refusal,
            key_damage=node.gateway.key_damage() if node.gateway is not None else (),
            bad_records=node.gateway.bad_records() if node.gateway is not None else (),
            audit_problem=node.auditing.problem,
            audit_alarms=merged(
                [*node.auditing.alarms(), *(alarm for status in told for alarm in status.audit_alarms)]
            ),
            unverified_records=sorted(
                {name: reason for status in told for name, reason in status.records_refused}.items()
            ),
        )
        return self._seen.date(judge(facts, node.clock.wall_ms()))

    async def watch(self) -> None:
        """Looks now and then, so that a problem that nobody asked about is dated too."""
        while True:
            with contextlib.suppress(StoragedError):  # whoever asks is told; the next look may succeed
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
                    silent=self._silent(entry),
                    refused=known.refused,
                )
            )
        return facts

    def _silent(self, entry: NodeEntry) -> bool:
        """A gateway that is never called tells storage nodes alone that it is there."""
        own = self._node
        hears = "storage" in own.own.peer.roles
        return not entry.address and "storage" not in entry.roles and entry.name != own.own.name and not hears

    def _durability(self, told: Sequence[MaintainStatus]) -> Durability:
        """Sums over all storage nodes that answer; ``counted`` only when each of them has looked at the disks as they
        are now.
        """
        layout = self._node.layouts.current
        wanted = {disk.node for disk in layout.disks if self._node.membership.disk_readable(disk.id)}
        counted = bool(told) and {status.node for status in told} >= wanted and all(status.current for status in told)
        if self._node.gateway is not None:  # it alone brings the system partition together
            counted = counted and self._node.keeper.current
        below, risk, lost, unreadable = (
            sum(getattr(status, name) for status in told) for name in ("below_target", "at_risk", "lost", "unreadable")
        )
        return Durability(below, risk, lost, counted, unreadable, _waits(told))

    def _write_profile(self) -> tuple[str | None, str]:
        """What a write would use now, the weakest of a sample of placement groups; or why it would be refused."""
        layout = self._node.layouts.current
        target = Profile.parse(layout.profile)
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
        """``busy``: something is being done, or waits to be done, that changes the counts."""
        told = await self._node.maintain.statuses()
        durability = self._durability(told)
        return {
            "busy": not durability.counted or any(status.busy for status in told),
            "objects_counted": durability.counted,
            "objects_below_target": durability.objects_below_target,
            "objects_at_risk": durability.objects_at_risk,
            "objects_lost": durability.objects_lost,
            "objects_unreadable": durability.objects_unreadable,
            "fragments_rebuilt": sum(status.fragments_rebuilt for status in told),
            "bytes_rebuilt": sum(status.bytes_rebuilt for status in told),
            "waits": waits_document(durability.waits),
            "jobs": jobs_of(told),
        }

    async def start_scrub(self) -> list[str]:
        return await self._node.maintain.start_scrub()

    async def _checkpoints(self) -> list[bytes]:
        """Of versions with protocol 2, which kept them in registers."""
        found: list[bytes] = []
        after: bytes | None = b""
        while after is not None:
            page = await self._node.scanner.list_page(Table.SYSTEM, SYSTEM_SCOPE, [0], prefix=b"audit/", after=after)
            found.extend(row.value.body for row in page.rows)
            after = page.next_after
        return found

    # --- doctor

    async def doctor(self) -> list[dict[str, str]]:
        node = self._node
        checks = [_private(self._secret_files())]
        for entry in node.layouts.current.nodes:
            known = node.membership.status(entry.name)
            if known.state != "up" and self._silent(entry):
                detail = "not known here: it has no address, so that no other gateway can call it"
                checks.append(_check(f"node {entry.name}", "ok", detail, ""))
                continue
            if known.state != "up":
                checks.append(
                    _check(
                        f"node {entry.name}",
                        "fail",
                        f"does not answer: {known.reason}",
                        "Start it; see `storaged explain NODE_DOWN`.",
                    )
                )
                continue
            checks.append(certificate_check(entry.name, known.certificate_until_ms, node.clock.wall_ms()))
            checks.append(_clock(entry.name, known.clock_skew_ms))
            checks.extend(
                _disk(entry.name, disk.id, disk.state, disk.reason, disk.bytes_used, disk.bytes_free)
                for disk in known.disks
            )
            if known.rtt_min_ms is not None and entry.name != node.own.name:
                checks.append(self._round_trip(entry.name, entry.location, known.rtt_min_ms))
        state, detail = node.auditing.check()
        checks.append(
            _check(
                "audit log",
                state,
                detail,
                "Each other node with disks witnesses it, within a minute of its start; see deploy/README.md, The audit"
                " log.",
            )
        )
        if node.gateway is not None:
            checks.append(self._keys())
            checks.extend(self._bucket_keys(node.gateway))
            refusal = node.gateway.key_refusal
            checks.append(
                _check(
                    "key release",
                    "fail" if refusal else "ok",
                    refusal or "the policy allows it",
                    KeyReleasesRefused.hint,
                )
            )
            if (workers := node.gateway.workers) is not None:
                state = "ok" if workers.serving == workers.count else "fail"
                checks.append(
                    _check(
                        "workers", state, f"{workers.serving} of {workers.count} serve", "The log says why one ended."
                    )
                )
        checks.append(await asyncio.to_thread(_fsync, node.directory))
        return checks

    def _secret_files(self) -> list[Path]:
        node = self._node
        keys = node.config.keys
        named = [Path(name) for name in (keys.keyring, keys.credential, keys.passphrase) if name]
        return [node.own.directory / "node.key", *named]

    def _round_trip(self, name: str, location: str, rtt_ms: float) -> dict[str, str]:
        """Evidence against a certified place, never proof of one."""
        own = self._node.own.peer
        country, site, _ = location.split("/")
        same_site = (country, site) == (own.country, own.site)
        far = same_site and rtt_ms > RTT_SITE_MS_MAX
        detail = f"fastest round trip {rtt_ms:.2f} ms, so at most {rtt_ms * 100:.0f} km away"
        return _check(
            f"distance of {name}",
            "warn" if far else "ok",
            detail,
            f"It is certified to stand in {site}, as this node, but answers too slowly for that.",
        )

    def _keys(self) -> dict[str, str]:
        gateway = self._node.gateway
        assert gateway is not None
        if gateway.problem or gateway.keyring is None:
            return _check("keyring", "fail", gateway.reason or "not open", KeyringMismatch.hint)
        told = gateway.keyring.statistics()
        if told.newest_epoch > told.backed_up_epoch:
            return _check(
                "key backup",
                "warn",
                f"epoch {told.newest_epoch} is in no backup ({KeysNotBackedUp.code})",
                KeysNotBackedUp.hint,
            )
        newer = gateway.copies.log.newer_than(told.backed_up_ms) if gateway.copies is not None else 0
        detail = f"covers epoch {told.backed_up_epoch}"
        if newer:
            detail += (
                f"; {newer} bucket key{'' if newer == 1 else 's'} newer than it: the ring and this gateway have them. A"
                " new backup now and then is good advice"
            )
        return _check("key backup", "ok", detail, "")

    def _bucket_keys(self, gateway: Gateway) -> list[dict[str, str]]:
        """Both homes of bucket keys: what the ring lost, and whether this gateway can write its copies."""
        if gateway.copies is None:
            return []
        copies, damaged = gateway.copies.log, gateway.key_damage()
        bad = sum(not damage.mended for damage in damaged)
        checks = []
        if damaged:
            detail = (
                f"{len(damaged)} damaged in the ring, {bad} of them not mended: key/{damaged[0].bucket}"
                f" {damaged[0].detail} ({BucketKeyDamaged.code})"
            )
            checks.append(_check("bucket keys", "fail" if bad else "warn", detail, BucketKeyDamaged.hint))
        elif copies.cut_bytes:
            detail = (
                f"the last {copies.cut_bytes} bytes of {copies.path} could not be read at the start, and were cut off"
            )
            checks.append(
                _check(
                    "bucket keys", "warn", detail, "The ring has those keys too: they are copied again within the hour."
                )
            )
        else:
            checks.append(_check("bucket keys", "ok", f"{copies.count} in {copies.path}", ""))
        if ends := gateway.key_ends.waiting:
            age_s = (self._node.clock.wall_ms() - gateway.key_ends.oldest_ms) / 1000
            late = age_s > ENDED_KEY_AGE_S_MAX
            waits = f"the oldest for {format_duration(max(0.0, age_s))}: {gateway.key_ends.reason}"
            detail = f"{ends} wait to be destroyed, {waits}"
            hint = "They go by themselves once every disk answers and nothing of the bucket is on a garbage list."
            checks.append(_check("keys of deleted buckets", "warn" if late else "ok", detail, hint))
        if copies.problem:
            checks.append(
                _check(
                    "copies of bucket keys",
                    "fail",
                    copies.problem,
                    "Until it can be written, buckets can't be created here.",
                )
            )
        return checks


def _waits(told: Sequence[MaintainStatus]) -> RepairWaits | None:
    """What all nodes together wait for; None when no disk is away."""
    disks = tuple(sorted({disk for status in told for disk in status.waits.disks_away}))
    later = [status.waits.recode_in_s for status in told if status.waits.recode_in_s != NO_RECODING_S]
    delay_s = max((status.waits.recode_delay_s for status in told), default=0.0)
    return RepairWaits(disks, min(later, default=None), delay_s) if disks else None


def waits_document(waits: RepairWaits | None) -> dict[str, Any]:
    """``recode_in_s`` null: nothing will be recoded. ``reason``: the same as a sentence, empty when no disk is away."""
    if waits is None:
        return {"disks": [], "recode_in_s": None, "reason": ""}
    return {
        "disks": list(waits.disks),
        "recode_in_s": waits.recode_in_s,
        "recode_delay_s": waits.recode_delay_s,
        "reason": str(waits),
    }


def jobs_of(told: Sequence[MaintainStatus]) -> list[dict[str, Any]]:
    """The jobs of all nodes, as documents."""
    return [_job(job) for status in told for job in status.jobs]


def _job(job: JobReport) -> dict[str, Any]:
    percent = 100.0 * min(1.0, job.done / job.total) if job.total else None
    found = {"name": job.name, "node": job.node, "state": job.state, "done": job.done, "total": job.total}
    return {**found, "percent": percent, "rate": job.rate, "eta_s": job.eta_s, "detail": job.detail}


def _check(name: str, state: str, detail: str, hint: str) -> dict[str, str]:
    return {"name": name, "state": state, "detail": detail, "hint": hint if state != "ok" else ""}


def certificate_check(node: str, until_ms: int, now_ms: int) -> dict[str, str]:
    """``until_ms``: when it expires, as the node itself says; 0: not said."""
    if not until_ms:
        return _check(f"certificate of {node}", "ok", "not known: the node does not say when it expires", "")
    days = (until_ms - now_ms) // 86_400_000
    state = "ok" if days >= CERTIFICATE_DAYS_MIN else "warn" if days > 0 else "fail"
    hint = f"Renew it: `storaged cluster renew AUTHORITY {node}`, copy its identity folder, reload the node."
    return _check(f"certificate of {node}", state, f"expires in {days} days", hint)


def _private(files: Sequence[Path]) -> dict[str, str]:
    """Nobody but the owner (and a group that the operator chose, as systemd does for its credentials) may read what
    opens everything.
    """
    shown = []
    for file in files:
        try:
            mode = file.stat().st_mode
        except OSError:
            continue  # what is missing is told elsewhere
        if mode & 0o007:
            shown.append(f"{file} has mode {mode & 0o777:04o}")
    return _check(
        "secret files",
        "fail" if shown else "ok",
        "; ".join(shown) or "private",
        "chmod o= FILE; who could log in here may have a copy.",
    )


def _clock(name: str, skew_ms: float | None) -> dict[str, str]:
    if skew_ms is None:
        return _check(f"clock of {name}", "ok", "not measured (it only calls, and is not called)", "")
    state = "warn" if abs(skew_ms) > SKEW_MS_MAX else "ok"
    return _check(f"clock of {name}", state, f"{round(skew_ms):+d} ms from this node's", ClockSkewed.hint)


def _disk(node: str, disk: str, state: str, reason: str, used: int, free: int) -> dict[str, str]:
    if state != "ok":
        return _check(f"disk {node}/{disk}", "fail", f"{state}: {reason}", "See `storaged status`.")
    scarce = free < FREE_SHARE_MIN * (used + free)
    return _check(
        f"disk {node}/{disk}",
        "warn" if scarce else "ok",
        f"{format_size(used)} used, {format_size(free)} free",
        "Delete data, or add disks.",
    )


def _fsync(directory: Path) -> dict[str, str]:
    """How long making 4 KiB durable takes in the node's own directory: the median of nine."""
    import os
    import time

    path = directory / "doctor.new"
    times_ms = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for _ in range(9):
            began = time.perf_counter()
            os.write(descriptor, bytes(4096))
            os.fdatasync(descriptor)
            times_ms.append((time.perf_counter() - began) * 1000)
    finally:
        os.close(descriptor)
        path.unlink()
    median = sorted(times_ms)[4]
    slow = median > 20
    return _check(
        "fsync",
        "warn" if slow else "ok",
        f"{median:.2f} ms for 4 KiB",
        "Every acknowledged write waits for this: use SSDs with power-loss protection.",
    )
