"""The verdict: is the data safe, what is wrong, what to do now. Pure: facts in, a document out.

HEALTHY    every node and disk takes part, and no object is below its target
DEGRADED   something is away or below target; everything can be read and written, and nothing is lost
AT_RISK    writes are refused, or some objects are lost, wait for disks that are away, or would not survive the
           failure of another disk
DOWN       some keys can be neither read nor written now, as most of their replicas are away; or nothing can be
           opened, as the keyring is not there
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from storaged.cluster.layout import PARTITIONS, SYSTEM_PARTITION, Layout, weaknesses
from storaged.cluster.moves import RefusedLayout
from storaged.cluster.ports import DiskStatus
from storaged.disk_states import OK, SLOW, SOUND, of
from storaged.errors import (
    AuditRefusedByWitness,
    AuditUnwritable,
    BucketKeyDamaged,
    BucketNotVerified,
    CertificateRevoked,
    ChosenFellBack,
    ClockSkewed,
    DiskBlank,
    DiskChecked,
    DiskDamaged,
    DiskDown,
    DiskFilling,
    DiskForeign,
    DiskFull,
    DiskHung,
    DiskLost,
    DiskOut,
    DiskReadOnly,
    DiskRolledBack,
    DiskSlow,
    DiskUnreadable,
    DiskWaits,
    IndexDamaged,
    KeyReleasesRefused,
    KeyringMismatch,
    LayoutRefused,
    NodeDirectoryUnwritable,
    NodeDown,
    ObjectsBelowTarget,
    ObjectsLost,
    ObjectsNotCounted,
    ObjectsUnreadable,
    QuorumLost,
    RepairWaitsForGateway,
    SeedDiskOut,
    SeedNotSpared,
    SparingLacksRoom,
    StoragedError,
    SystemRecordDamaged,
)
from storaged.meta.consensus.quorums import Quorum
from storaged.units import format_duration

SKEW_MS_MAX = 5_000
KEY_DAMAGE_SHOWN_MAX = 10
RECORDS_NAMED_MAX = 20
_DISK_PROBLEMS: dict[str, type[StoragedError]] = {
    kind.code: kind
    for kind in (
        DiskBlank,
        DiskChecked,
        DiskDamaged,
        DiskDown,
        DiskForeign,
        DiskFull,
        DiskHung,
        DiskLost,
        DiskReadOnly,
        DiskRolledBack,
        DiskSlow,
        DiskUnreadable,
        DiskWaits,
        IndexDamaged,
    )
}
"""By the codes of ``disk_states.STATES``."""


@dataclass(frozen=True)
class NodeFacts:
    """What this gateway knows of one node. ``since_ms``: when its state began (wall clock). ``pid`` is None when it is
    down.
    """

    name: str
    rack: str
    roles: tuple[str, ...]
    up: bool
    since_ms: int
    pid: int | None = None
    directory: str = ""
    skew_ms: int = 0
    disks: Sequence[DiskStatus] = ()
    reason: str = ""
    """Why it is down: it does not answer, or it is refused."""
    silent: bool = False
    """Whether this gateway can't hear of it: it is a gateway without an address, so no other node calls it."""
    refused: Sequence[RefusedLayout] = ()
    """Layouts that it was offered and refused."""

    @property
    def state(self) -> str:
        return "up" if self.up else "unknown" if self.silent else "down"


@dataclass(frozen=True)
class RepairWaits:
    """Why repair can do nothing more now. ``recode_in_s`` is None when nothing will be recoded while ``disks`` are
    away. ``gateway``: why no gateway changes records for repair. ``unrepaired``: other reasons why objects below target
    are not repaired now, and how many have each.
    """

    disks: tuple[str, ...]
    recode_in_s: float | None
    recode_delay_s: float
    gateway: str = ""
    unrepaired: tuple[tuple[str, int], ...] = ()

    @property
    def lines(self) -> list[str]:
        """All of it as sentences."""
        first = [str(self)] if str(self) else []
        return first + [f"not repaired: {_objects(count)}: {reason}" for reason, count in self.unrepaired]

    def __str__(self) -> str:
        if self.gateway:
            return f"repair waits for a gateway, which changes records: {self.gateway}"
        if not self.disks:
            return ""
        some = ", ".join(self.disks[:3]) + (f" and {len(self.disks) - 3} more" if len(self.disks) > 3 else "")
        then = (
            f"; what other disks can hold is recoded for them in {format_duration(self.recode_in_s)}"
            if self.recode_in_s is not None
            else "; nothing is recoded for other disks while they are away"
        )
        return f"repair waits for disk{'s' if len(self.disks) > 1 else ''} {some}{then}"


@dataclass(frozen=True)
class Durability:
    """The counts of repair's last walks. ``objects_unreadable`` wait for disks that are away, and are not lost.

    ``counted`` is False while a node has not looked at the disks as they are now: the numbers are lower bounds then.
    """

    objects_below_target: int = 0
    objects_at_risk: int = 0
    objects_lost: int = 0
    counted: bool = True
    objects_unreadable: int = 0
    waits: RepairWaits | None = None


class KeyDamage(NamedTuple):
    """A damaged register ``key/BUCKET_ID``: since when (ms since 1970), and whether it was repaired."""

    bucket: str
    detail: str
    since_ms: int
    mended: bool


SetsOf = Callable[[int], tuple[tuple[str, ...], ...]]
"""The sets of replicas of a partition: two while it moves; none when this node does not know where it is."""


@dataclass(frozen=True)
class Facts:
    """All facts that the verdict follows from. ``write_profile`` is the profile of a write now; None, with
    ``write_reason``, when it would be refused.
    """

    layout: Layout
    nodes: Sequence[NodeFacts]
    write_profile: str | None
    write_reason: str = ""
    keyring_problem: str = ""
    durability: Durability = Durability()
    jobs: Sequence[dict[str, Any]] = field(default_factory=tuple)
    bad_records: Sequence[tuple[str, str]] = ()
    """Names of unusable system records, each with the reason."""
    key_damage: Sequence[KeyDamage] = ()
    unverified_records: Sequence[tuple[str, str]] = ()
    """Names of bucket records that storage nodes can't verify, each with the reason."""
    key_refusal: str = ""
    """Why the policy allows this gateway no keys now."""
    revoked: str = ""
    """Why this node's own certificate is of no use."""
    audit_problem: str = ""
    """Why this node can't write its audit log."""
    unwritable: Sequence[tuple[str, str]] = ()
    """(storage node, why it can't write to its own directory, or nothing)."""
    chosen_fall: str = ""
    """Where this gateway saw a chosen value undone."""
    audit_alarms: Sequence[tuple[str, str]] = ()
    """(node, what its witnesses report about its audit log)."""
    sets_of: SetsOf | None = None
    """None: partitions are where the layout wants them."""
    disks_out: Sequence[tuple[str, int, str]] = ()
    """(subject, since, detail) of each disk that others replace."""
    filling: Mapping[str, str] = field(default_factory=dict)
    """What to tell of each disk that is nearly full."""
    seeds_out: Sequence[tuple[str, int, str]] = ()
    """The same of those that are seed disks."""
    seeds_unspared: Sequence[tuple[str, str]] = ()
    """(subject, detail) of each seed disk that another one could replace, if a layout were signed for this case."""
    spares_short: Sequence[tuple[str, str]] = ()
    """(subject, detail) of what has no room on the disks that are left."""


@dataclass(frozen=True)
class RingHealth:
    """``stopped``: partitions of the ring, the system's included, without a majority of living replicas.

    ``by_disk`` and ``by_domain``: how many more would stop with the loss of that disk or failure domain.
    """

    stopped: int
    by_disk: Mapping[str, int]
    by_domain: Mapping[str, int]


def ring_health(layout: Layout, alive: Callable[[str], bool], sets_of: SetsOf) -> RingHealth:
    """Counts partitions. A partition that moves needs a majority of both of its sets."""
    stopped = 0
    by_disk: Counter[str] = Counter()
    by_domain: Counter[str] = Counter()
    domain_of = layout.domain_by_disk
    # Each combination of disks is judged once: a small cluster has few, and people ask again and again.
    for sets, count in Counter(map(sets_of, (*range(PARTITIONS), SYSTEM_PARTITION))).items():
        if len(sets) == 1 and _spares_any(sets[0], alive, domain_of):
            continue
        quorum = Quorum(*sets) if sets else None
        living = {disk for disk in quorum.disks if alive(disk)} if quorum is not None else set()
        if quorum is None or not quorum.met(living):
            stopped += count
            continue
        for disk in living:
            by_disk[disk] += count * (not quorum.met(living - {disk}))
        for domain in {domain_of.get(disk, disk) for disk in living}:
            left = {disk for disk in living if domain_of.get(disk, disk) != domain}
            by_domain[domain] += count * (not quorum.met(left))
    return RingHealth(stopped, +by_disk, +by_domain)


def _spares_any(disks: Sequence[str], alive: Callable[[str], bool], domain_of: Mapping[str, str]) -> bool:
    """Whether the loss of any one disk or failure domain leaves a majority, as it mostly does: ``status`` judges all
    partitions at once.
    """
    domains = {domain_of.get(disk, disk) for disk in disks}
    return len(domains) == len(disks) > 2 and all(map(alive, disks))


def _next_failure(layout: Layout, ring: RingHealth) -> dict[str, Any]:
    """The disk and the failure domain whose loss would stop most partitions; empty names and 0 when no loss would stop
    one.
    """
    disk, by_disk = max(ring.by_disk.items(), key=lambda item: (item[1], item[0]), default=("", 0))
    domain, by_domain = max(ring.by_domain.items(), key=lambda item: (item[1], item[0]), default=("", 0))
    return {
        "disk": disk,
        "disk_partitions": by_disk,
        "domain": domain,
        "domain_partitions": by_domain,
        "domain_kind": layout.domain_kind,
        "partitions": PARTITIONS + 1,
    }


def judge(facts: Facts, now_ms: int) -> dict[str, Any]:
    """The document of ``storaged status --json``."""
    disk_by_id = {disk.id: disk for node in facts.nodes if node.up for disk in node.disks}

    def alive(disk_id: str) -> bool:
        return disk_id in disk_by_id and disk_by_id[disk_id].state in SOUND

    ring = ring_health(facts.layout, alive, facts.sets_of or (lambda number: (facts.layout.replicas_of(number),)))
    headless = ring.stopped
    problems = list(_problems(facts, headless, now_ms))
    durability = facts.durability
    if facts.keyring_problem or facts.key_refusal or headless:
        verdict = "DOWN"
    elif (
        facts.write_profile is None
        or durability.objects_lost
        or durability.objects_unreadable
        or durability.objects_at_risk
        or any(not damage.mended for damage in facts.key_damage)
    ):
        verdict = "AT_RISK"
    else:
        verdict = "DEGRADED" if problems or not durability.counted else "HEALTHY"
    return {
        "verdict": verdict,
        "cluster": facts.layout.cluster,
        "epoch": facts.layout.epoch,
        "time_ms": now_ms,
        "metadata": "quorum" if not headless else f"{headless} of {PARTITIONS + 1} partitions without quorum",
        "next_failure": _next_failure(facts.layout, ring),
        "weaknesses": weaknesses(facts.layout),
        "reads": _reads(facts, headless),
        "writes": facts.write_profile if not headless and not facts.keyring_problem and not facts.key_refusal else None,
        "writes_reason": facts.write_reason,
        "objects_below_target": durability.objects_below_target,
        "objects_at_risk": durability.objects_at_risk,
        "objects_lost": durability.objects_lost,
        "objects_unreadable": durability.objects_unreadable,
        "objects_counted": durability.counted,
        "nodes": [_node_document(node, facts.layout) for node in facts.nodes],
        "problems": problems,
        "warnings": list(_warnings(facts, now_ms)),
        "jobs": list(facts.jobs),
    }


def _reads(facts: Facts, headless: int) -> str:
    if facts.keyring_problem or facts.key_refusal:
        return "stopped"
    if headless:
        return "stopped for some keys"
    return "stopped for some objects" if facts.durability.objects_unreadable or facts.durability.objects_lost else "OK"


def _problems(facts: Facts, headless: int, now_ms: int) -> Iterable[dict[str, Any]]:
    if facts.keyring_problem:
        yield problem(KeyringMismatch, "keyring", now_ms, facts.keyring_problem)
    if facts.revoked:
        yield problem(CertificateRevoked, "certificate", now_ms, facts.revoked)
    if facts.audit_problem:
        yield problem(AuditUnwritable, "audit log", now_ms, facts.audit_problem)
    for node_name, reason in facts.unwritable:
        if reason:
            yield problem(NodeDirectoryUnwritable, node_name, now_ms, reason)
    for node_name, reason in facts.audit_alarms:
        yield problem(AuditRefusedByWitness, node_name, now_ms, reason)
    if facts.chosen_fall:
        yield problem(ChosenFellBack, "ring", now_ms, facts.chosen_fall)
    if facts.key_refusal:
        yield problem(KeyReleasesRefused, "keys", now_ms, facts.key_refusal)
    for damage in sorted(facts.key_damage, key=lambda damage: (damage.mended, damage.since_ms))[:KEY_DAMAGE_SHOWN_MAX]:
        state = "mended" if damage.mended else "not mended"
        yield problem(
            BucketKeyDamaged,
            f"key/{damage.bucket}",
            damage.since_ms,
            f"{damage.detail} ({state}; {len(facts.key_damage)} in all)",
        )
    if headless:
        yield problem(QuorumLost, f"{headless} partitions", now_ms)
    for node in facts.nodes:
        yield from _node_problems(node, facts.layout, now_ms)
    for subject, since_ms, detail in facts.disks_out:
        yield problem(DiskOut, subject, since_ms, detail)
    for subject, since_ms, detail in facts.seeds_out:
        yield problem(SeedDiskOut, subject, since_ms, detail)
    for subject, detail in facts.spares_short:
        yield problem(SparingLacksRoom, subject, now_ms, detail)
    yield from _object_problems(facts.durability, now_ms)
    for kind, records in ((SystemRecordDamaged, facts.bad_records), (BucketNotVerified, facts.unverified_records)):
        for name, reason in records[:RECORDS_NAMED_MAX]:
            yield problem(kind, name, now_ms, reason)
        if len(records) > RECORDS_NAMED_MAX:
            yield problem(kind, f"{len(records) - RECORDS_NAMED_MAX} more records", now_ms)
    if not facts.durability.counted:
        yield problem(ObjectsNotCounted, "objects", now_ms)


def _node_problems(node: NodeFacts, layout: Layout, now_ms: int) -> Iterable[dict[str, Any]]:
    place = f"{node.rack}/{node.name}"
    if node.state == "unknown":
        return
    if not node.up:
        yield problem(NodeDown, place, node.since_ms, node.reason)
        return
    if abs(node.skew_ms) > SKEW_MS_MAX:
        yield problem(ClockSkewed, place, now_ms, f"{node.skew_ms / 1000:+.1f} s from this gateway's clock")
    for disk in node.disks:
        if disk.state != OK and disk.state != SLOW:
            yield _disk_problem(disk, place, now_ms)
    for refused in node.refused:
        detail = f"layout {refused.epoch}, offered by {refused.source}: {refused.reason}"
        yield problem(LayoutRefused, place, now_ms, detail)
    reported = {disk.id for disk in node.disks}
    for entry in layout.disks:
        if entry.node == node.name and entry.id not in reported:
            yield problem(DiskDown, f"{place}/{entry.id}", now_ms, "the node does not have it")


def _warnings(facts: Facts, now_ms: int) -> Iterable[dict[str, Any]]:
    """What will be a problem, and is none yet: entries as ``problem`` makes them."""
    for node in facts.nodes:
        for disk in node.disks if node.up else ():
            if disk.id in facts.filling:
                yield problem(DiskFilling, f"{node.rack}/{node.name}/{disk.id}", now_ms, facts.filling[disk.id])
            if disk.state == SLOW:
                yield _disk_problem(disk, f"{node.rack}/{node.name}", now_ms)
    for subject, detail in facts.seeds_unspared:
        yield problem(SeedNotSpared, subject, now_ms, detail)


def _disk_problem(disk: DiskStatus, place: str, now_ms: int) -> dict[str, Any]:
    return problem(_DISK_PROBLEMS[of(disk.state).problem or DiskDown.code], f"{place}/{disk.id}", now_ms, disk.reason)


def _object_problems(durability: Durability, now_ms: int) -> Iterable[dict[str, Any]]:
    if durability.objects_lost:
        yield problem(ObjectsLost, _objects(durability.objects_lost), now_ms)
    if durability.objects_unreadable:
        yield problem(ObjectsUnreadable, _objects(durability.objects_unreadable), now_ms)
    if durability.waits is not None and durability.waits.gateway:
        yield problem(RepairWaitsForGateway, "repair", now_ms, durability.waits.gateway)
    if durability.objects_below_target:
        detail = "; ".join(durability.waits.lines) if durability.waits is not None else ""
        yield problem(ObjectsBelowTarget, _objects(durability.objects_below_target), now_ms, detail)


def _objects(count: int) -> str:
    return f"{count} object{'' if count == 1 else 's'}"


class FirstSeen:
    """When each problem began, as far as this process has seen. ``judge`` knows only the present."""

    def __init__(self) -> None:
        self._since_ms: dict[tuple[str, str], int] = {}

    def date(self, found: dict[str, Any]) -> dict[str, Any]:
        """Sets the times in a document of ``judge`` back to when each problem was first seen. Numbers in a subject (``7
        objects``) may change meanwhile.
        """
        known, self._since_ms = self._since_ms, {}
        for entry in (*found["problems"], *found["warnings"]):
            name = entry["code"], "" if entry["subject"][0].isdigit() else entry["subject"]
            if entry["since"] == found["time_ms"]:
                entry["since"] = known.get(name, entry["since"])
            self._since_ms[name] = entry["since"]
        return found


def problem(kind: type[StoragedError], subject: str, since_ms: int, detail: str = "") -> dict[str, Any]:
    """One entry of ``problems``: code, subject, since (ms since 1970), hint, and details beyond the code."""
    return {"code": kind.code, "subject": subject, "since": since_ms, "hint": kind.hint, "detail": detail}


def _node_document(node: NodeFacts, layout: Layout) -> dict[str, Any]:
    known = {disk.id: disk for disk in node.disks}
    disks = []
    for disk_id in [entry.id for entry in layout.disks if entry.node == node.name]:
        disk = known.get(disk_id)
        disks.append(
            {
                "id": disk_id,
                "directory": disk.directory if disk else "",
                "state": disk.state if disk and node.up else "down",
                "bytes_used": disk.bytes_used if disk else 0,
                "bytes_free": disk.bytes_free if disk else 0,
            }
        )
    return {
        "name": node.name,
        "rack": node.rack,
        "roles": list(node.roles),
        "state": node.state,
        "since": node.since_ms,
        "pid": node.pid,
        "directory": node.directory,
        "disks": disks,
    }
