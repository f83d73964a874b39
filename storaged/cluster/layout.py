"""The layout: which nodes, disks and racks exist, and which disks hold what. Pure.

A layout is a value, numbered by its epoch, kept in the system register ``layout`` and signed by the cluster's
administration key. Everything that depends on a layout carries its epoch. Pure functions of it are:

* the failure domain of a disk (rack where there are three or more, else node, else disk);
* the ring: partition number -> metadata replicas, an ordered list of disks in distinct domains;
* a preference list of disks per placement group (``objects.code.place`` applies rack limits to it).

Weighted rendezvous hashing: the score of disk d for key x is -w / ln(h(d, x)), h uniform in (0, 1); the highest wins
(Thaler and Ravishankar, 1998; weights after Schindelhauer and Schomaker, 2005). A disk added or removed moves only its
share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import NamedTuple

import xxhash

from storaged.cluster import spread as spreading
from storaged.cluster.spread import OPERATORS, SpreadFacts, minority_of, share_of
from storaged.wire import Message, encode

PARTITIONS = 1024
"""Ring partitions of user data: the top 10 bits of xxh3-64(bucket id || shard)."""

SYSTEM_PARTITION = PARTITIONS
"""One more partition holds buckets, users, keys and the layout; its replicas are the layout's seed disks."""

SHARDS_DEFAULT = 16


class Profile(NamedTuple):
    """k data + m parity fragments. ``k == 1`` means whole copies."""

    k: int
    m: int

    @property
    def n(self) -> int:
        return self.k + self.m

    def __str__(self) -> str:
        return f"{self.k}+{self.m}"

    @classmethod
    @lru_cache(maxsize=256)
    def parse(cls, text: str) -> Profile:
        k, _, m = text.partition("+")
        return cls(int(k), int(m))

    @property
    def operator_max(self) -> int:
        """How many fragments of a block one operator may hold where no operator is trusted alone: fewer than suffice to
        read the block, and no more than it can do without.
        """
        return min(self.k - 1, self.m)


class Location(NamedTuple):
    """``FR/par1/a``: country (ISO 3166-1 alpha-2), site, rack."""

    country: str
    site: str
    rack: str

    def __str__(self) -> str:
        return f"{self.country}/{self.site}/{self.rack}"

    @classmethod
    def parse(cls, text: str) -> Location:
        country, site, rack = text.split("/")
        return cls(country, site, rack)


class NodeEntry(Message, frozen=True):
    """A member: ``name``, ``location`` as text, and ``address``, host:port of its RPC server (empty for a gateway
    without one).

    ``certified``: the location that the node's certificates say, where its rack was renamed since; empty: ``location``.
    """

    name: str
    location: str
    address: str
    roles: tuple[str, ...]
    certified: str = ""

    @property
    def certified_location(self) -> str:
        return self.certified or self.location


class DiskEntry(Message, frozen=True):
    """A disk and its node. ``state``: ``active``, or ``draining`` (gets nothing new, and gives up what it has).

    ``rank``: what is hashed for its place in the rankings, if that is not its id. A disk that replaces another has the
    rank of that one: it gets what the other one had, and nothing else moves.
    """

    id: str
    node: str
    weight: int
    state: str = "active"
    rank: str = ""


class RevokedCertificate(Message, frozen=True):
    """A certificate that no node accepts any more. ``fingerprint``: SHA-256 of its DER. ``until_ms``: when it expires
    (ms since 1970); later layouts need not name it.
    """

    fingerprint: bytes
    node: str
    until_ms: int


class Sparing(Message, frozen=True):
    """When the cluster replaces a disk by the others, by itself (``cluster.sparing``).

    ``fragments_s``: seconds without a disk until its fragments are rebuilt on others; also how long a disk that was
    replaced has to answer before it comes back. ``registers_s``: seconds until its registers move to others.
    ``domains_max``: how many failure domains with disks whose node does not answer are replaced at the same time; 0:
    none.
    """

    fragments_s: int = 600
    registers_s: int = 3600
    domains_max: int = 1


class Layout(Message, frozen=True, dict=True):
    """``profile`` is the target of all data, as text; ``seeds`` are the disk ids of the system partition (3 to 7, odd).

    ``countries``: where nodes may be and data may be stored; ``jurisdictions``: under whose law their operators may be.
    Empty: everywhere where EU law applies. See ``cluster.policy``.
    """

    cluster: str
    epoch: int
    nodes: tuple[NodeEntry, ...]
    disks: tuple[DiskEntry, ...]
    seeds: tuple[str, ...]
    profile: str = "4+2"
    countries: tuple[str, ...] = ()
    replicas: int = 3
    jurisdictions: tuple[str, ...] = ()
    predecessor: bytes = b""
    """SHA-256 of the encoded layout that this one follows (``SignedLayout.hash``); empty for the first, and for those
    of version 0.1.0.
    """
    base: int = 0
    """The epoch of the layout by which partitions that never moved are placed; 0: this one (``cluster.partitions``)."""
    seeds_next: tuple[str, ...] = ()
    """The seeds that the system partition is moving to; empty while it does not move."""
    seeds_step: int = 0
    """How often the seeds have changed (``cluster.partitions``)."""
    revoked: tuple[RevokedCertificate, ...] = ()
    """Certificates that no node accepts any more. What one layout revokes stays revoked, also if a later one does not
    name it (``LayoutBook.is_revoked``).
    """
    sparing: Sparing = Sparing()
    lost: tuple[str, ...] = ()
    """Disks that are lost for good: the administrator has said so (``storaged cluster recover``), and they are powered
    off. Partitions that lost a majority go on from those that are left (``cluster.partitions``).
    """
    operators: tuple[tuple[str, str], ...] = ()
    """(location of a rack, who operates it), sorted. Racks of one operator may fail, or lie, together."""
    spread: str = ""
    """OPERATORS: no operator is trusted alone. None may hold as many fragments of a block as it can be read from, nor
    so many that the others can't read it, nor a majority of a partition's replicas; and nothing is written as whole
    copies. Empty: operators decide nothing.
    """
    seeds_lost: tuple[str, ...] = ()
    """Those of the seed disks that are lost for good and count in no quorum of the system partition, until they are
    exchanged. ``disks`` need not have them.
    """
    seeds_recovered: int = 0
    """The epoch of the newest layout by which the system partition went on without a quorum; 0: it never did."""
    if_out: str = ""
    """The layout was signed beforehand, for the case that this seed disk is out (``cluster.presigned``): it needs votes
    that say so. Empty: an administrator has it applied when he wants.
    """

    @cached_property
    def target(self) -> Profile:
        """The profile that all data should have, whatever it was written with."""
        return Profile.parse(self.profile)

    @cached_property
    def target_text(self) -> str:
        """``target`` as a PartEntry names it."""
        return str(self.target)

    @cached_property
    def node_by_name(self) -> dict[str, NodeEntry]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def disk_by_id(self) -> dict[str, DiskEntry]:
        return {disk.id: disk for disk in self.disks}

    @cached_property
    def domain_kind(self) -> str:
        """What a failure domain is in this layout: ``rack``, ``node`` or ``disk``."""
        nodes = {disk.node for disk in self.disks}
        if len({self.node_by_name[name].location for name in nodes}) >= 3:
            return "rack"
        return "node" if len(nodes) >= 3 else "disk"

    @cached_property
    def domain_by_disk(self) -> dict[str, str]:
        """Disk id -> its failure domain."""
        kind = self.domain_kind
        return {
            disk.id: self.node_by_name[disk.node].location
            if kind == "rack"
            else disk.node
            if kind == "node"
            else disk.id
            for disk in self.disks
        }

    @cached_property
    def operator_by_rack(self) -> dict[str, str]:
        return dict(self.operators)

    @cached_property
    def operator_by_disk(self) -> dict[str, str]:
        """Disk id -> the operator of its rack. Without a named one the rack is an operator of its own."""
        named = self.operator_by_rack
        locations = ((disk.id, self.node_by_name[disk.node].location) for disk in self.disks)
        return {disk: named.get(location, location) for disk, location in locations}

    def revokes(self, fingerprint: bytes) -> bool:
        """Whether it names the certificate as revoked. ``LayoutBook.is_revoked`` knows all layouts."""
        return any(fingerprint == each.fingerprint for each in self.revoked)

    @property
    def spreads(self) -> bool:
        """No operator is trusted alone."""
        return self.spread == OPERATORS

    def operator_share(self, disks: Iterable[str]) -> int:
        """How many of the disks the operator has that has the most. A disk that the layout does not have counts for
        itself.
        """
        return share_of(self.operator_by_disk.get(disk, disk) for disk in disks)

    @property
    def spread_facts(self) -> SpreadFacts:
        profile, named = self.target, self.operator_by_rack
        racks = {self.node_by_name[disk.node].location for disk in self.disks}
        return SpreadFacts(
            tuple(sorted(rack for rack in racks if rack not in named)),
            tuple(
                (self.operator_by_disk[disk.id], self.domain_by_disk[disk.id])
                for disk in self.disks
                if disk.state == "active"
            ),
            self.profile,
            profile.n,
            profile.m,
            profile.operator_max,
            self.replicas,
            tuple(self.operator_by_disk.get(seed, seed) for seed in self.seeds_next or self.seeds),
        )

    def node_of(self, disk_id: str) -> str:
        return self.disk_by_id[disk_id].node

    @cached_property
    def country_by_disk(self) -> dict[str, str]:
        return {disk.id: Location.parse(self.node_by_name[disk.node].location).country for disk in self.disks}

    def country_of(self, disk_id: str) -> str:
        return self.country_by_disk[disk_id]

    def allows(self, country: str) -> bool:
        """Whether this layout lets data be stored in a country."""
        return not self.countries or country in self.countries

    @cached_property
    def placing(self) -> bytes:
        """A digest of what decides where fragments go: layouts with the same one place them alike."""
        nodes = [(node.name, node.location, node.roles) for node in self.nodes]
        operators = self.operators if self.spread else ()
        return xxhash.xxh3_128_digest(encode((self.disks, nodes, self.countries, self.spread, operators)))

    @cached_property
    def _rings(self) -> dict[int, tuple[str, ...]]:
        return {}

    def replicas_of(self, partition: int) -> tuple[str, ...]:
        """The disks that hold a partition's registers, first choice first: active ones in distinct failure domains, and
        no majority of them at one operator where ``spread`` asks for that.
        """
        if partition == SYSTEM_PARTITION:
            return self.seeds
        found = self._rings.get(partition)
        if found is None:
            chosen: list[str] = []
            domains: set[str] = set()
            for disk_id in self._ranked(b"ring" + partition.to_bytes(2, "big")):
                if self.domain_by_disk[disk_id] in domains or self.disk_by_id[disk_id].state != "active":
                    continue
                if self.spreads and self.operator_share((*chosen, disk_id)) > minority_of(self.replicas):
                    continue
                domains.add(self.domain_by_disk[disk_id])
                chosen.append(disk_id)
                if len(chosen) == self.replicas:
                    break
            found = self._rings[partition] = tuple(chosen)
        return found

    def rank_all(self) -> None:
        """Ranks the disks for all partitions: later calls of ``replicas_of`` only look them up. For a thread: it takes
        70 ms with 100 disks.
        """
        for number in range(PARTITIONS):
            self.replicas_of(number)

    @cached_property
    def _preferences(self) -> dict[int, tuple[str, ...]]:
        return {}

    def preference(self, group: int) -> tuple[str, ...]:
        """All disks, best first, for a placement group. Rack limits are applied by ``objects.code.place``."""
        found = self._preferences.get(group)
        if found is None:
            found = self._preferences[group] = tuple(self._ranked(b"data" + group.to_bytes(2, "big")))
        return found

    @cached_property
    def first_choices(self) -> dict[tuple[int, Profile, tuple[str, ...]], tuple[tuple[str, ...], bool]]:
        """The cache of ``objects.code.place``, which bounds it: (group, profile, countries) -> disks, and whether they
        hold the profile under its limits.
        """
        return {}

    @cached_property
    def _candidates(self) -> list[tuple[bytes, int, str]]:
        return [((disk.rank or disk.id).encode(), -max(disk.weight, 1), disk.id) for disk in self.disks]

    def _ranked(self, salt: bytes) -> list[str]:
        digest, log = xxhash.xxh3_64_intdigest, math.log
        # The id breaks ties, so that the order of the layout's list never decides.
        scores = [
            (weight / log((digest(encoded + salt) + 1) / (2**64 + 2)), disk_id)
            for encoded, weight, disk_id in self._candidates
        ]
        return [disk_id for _, disk_id in sorted(scores, reverse=True)]


def confirmed_roles(layout: Layout, name: str, location: str, roles: Iterable[str]) -> frozenset[str]:
    """The roles that both a node's certificate and the layout give it.

    Empty for a node that the layout does not name, or names at another location: what is placed by racks and countries
    must be stored where the node is certified to be. A rack that was renamed is the same place in the same country.
    """
    entry = layout.node_by_name.get(name)
    if entry is None or entry.certified_location != location:
        return frozenset()
    if Location.parse(entry.location).country != Location.parse(location).country:
        return frozenset()
    return frozenset(roles).intersection(entry.roles)


def rack_labels(layout: Layout) -> dict[str, str]:
    """Location of each rack with disks -> a name that stays when the rack is renamed: what its certificates say.

    Two layouts whose disks agree in these have the same disks in the same racks, whatever the racks are called. A rack
    that was divided has other labels, and so have two racks that were put together, or one in another country.
    """
    firsts: dict[str, str] = {}
    for name in {disk.node for disk in layout.disks}:
        entry = layout.node_by_name.get(name)
        if entry is not None:
            first = entry.certified_location
            firsts[entry.location] = min(firsts.get(entry.location, first), first)
    shared = Counter(firsts.values())
    return {
        location: first
        if shared[first] == 1 and location.split("/")[0] == first.split("/")[0]
        else f"{first} as {location}"
        for location, first in firsts.items()
    }


def placement_group(data_id: bytes) -> int:
    """The first 12 bits of a data id."""
    return int.from_bytes(data_id[:2], "big") >> 4


def partition_of(scope: bytes, shard: int) -> int:
    """The ring partition of one index shard of a bucket (``scope`` is its id of 16 bytes)."""
    return xxhash.xxh3_64_intdigest(scope + bytes([shard])) >> (64 - 10)


def problems_of(layout: Layout) -> list[str]:
    """The reasons why this layout cannot work, with the numbers; empty when it can."""
    found: list[str] = []
    profile = layout.target
    per_domain: dict[str, int] = {}
    active = [disk.id for disk in layout.disks if disk.state == "active"]
    for disk_id in active:
        domain = layout.domain_by_disk[disk_id]
        per_domain[domain] = per_domain.get(domain, 0) + 1
    usable = sum(min(count, profile.m) for count in per_domain.values())
    if usable < profile.n:
        found.append(
            f"profile {profile} needs {profile.n} disks with at most {profile.m} in one {layout.domain_kind}: "
            f"{len(active)} disks in {len(per_domain)} {layout.domain_kind}s give {usable}"
        )
    if len(per_domain) < layout.replicas:
        found.append(
            f"metadata wants {layout.replicas} replicas in distinct {layout.domain_kind}s; there are {len(per_domain)}"
        )
    if layout.spreads:
        found += spreading.problems(layout.spread_facts)
    elif layout.spread:
        found.append(f"this version can't spread data over {layout.spread!r}")
    if len(layout.seeds) < 3 or len(layout.seeds) % 2 == 0 or len(layout.seeds) > 7:
        found.append(f"the system partition wants 3, 5 or 7 seed disks; {len(layout.seeds)} are named")
    ranks = Counter(disk.rank or disk.id for disk in layout.disks if disk.state == "active")
    found.extend(f"two disks have the rank of disk {rank}" for rank, count in ranks.items() if count > 1)
    found.extend(
        f"seed disk {seed} is not in the layout"
        for seed in dict.fromkeys((*layout.seeds, *layout.seeds_next))
        if seed not in layout.disk_by_id and seed not in layout.seeds_lost
    )
    if layout.sparing.fragments_s < 1 or layout.sparing.registers_s < 1 or layout.sparing.domains_max < 0:
        found.append("a disk is replaced after one second at the soonest, and no fewer than 0 failure domains")
    found.extend(
        f"node {node.name} is in {node.location}; the cluster's countries are {', '.join(layout.countries)}"
        for node in layout.nodes
        if not layout.allows(Location.parse(node.location).country)
    )
    return found


def weaknesses(layout: Layout) -> list[str]:
    """What a layout that works can't survive, a sentence each; empty when it survives the loss of any one rack."""
    found: list[str] = []
    kind = layout.domain_kind
    if kind != "rack":
        larger = "rack" if kind == "node" else "node or rack"
        fewer = "racks with disks" if kind == "node" else "nodes with disks"
        found.append(f"there are fewer than three {fewer}: the loss of a whole {larger} may stop keys or lose data")
    if layout.seeds_lost:
        found.append(
            f"seed disk {', '.join(layout.seeds_lost)} is lost, and not exchanged yet: apply the layouts that follow"
        )
    seeds: dict[str, list[str]] = {}
    for seed in layout.seeds:
        seeds.setdefault(layout.domain_by_disk.get(seed, seed), []).append(seed)
    for domain, some in seeds.items():
        if 2 * len(some) > len(layout.seeds):
            found.append(
                f"{len(some)} of {len(layout.seeds)} seed disks are in one {kind}, {domain}: its loss stops the system"
                " partition"
            )
    return found + (spreading.weaknesses(layout.spread_facts) if layout.spreads else [])
