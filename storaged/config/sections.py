"""The sections of a node's configuration and their options."""

from __future__ import annotations

import msgspec

from storaged.units import GIB, KIB, MIB

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("auto", "journal", "json", "console", "logfmt")
ROLES = ("storage", "gateway")
NEW_BUCKETS = ("aws", "legacy")
KEEP_DAYS_MIN = 180
"""Days that files of the audit log are kept at least: six months."""
SMALL_OBJECT_BYTES_MAX = 256 * KIB
"""No object of more bytes is kept as whole copies: the highest border that a gateway or a bucket may have."""


class NodeSection(msgspec.Struct, frozen=True):
    """``directory`` has the node's own files: lock, admin socket, known layouts, and which store each disk had."""

    name: str
    directory: str
    roles: list[str]


class ClusterSection(msgspec.Struct, frozen=True):
    """``identity``: the folder with the node's certificate, the cluster's authority and the layout."""

    identity: str


class DiskSection(msgspec.Struct, frozen=True):
    """``id`` is the disk's id in the layout, 16 hex digits."""

    id: str
    directory: str


class RpcSection(msgspec.Struct, frozen=True):
    """The address where other nodes reach this one. Empty for a gateway that no node calls."""

    listen: str = ""


class S3Section(msgspec.Struct, frozen=True):
    """The S3 front.

    ``domains``: names under which buckets appear as the first label of the host (virtual-host style).
    ``website_domain``: the name under which buckets appear as websites, in the same way; empty: none do. ``workers``:
    processes that share the port. ``region``: the region that this endpoint reports. ``strict_region``: refuse
    signatures and new buckets of any other region; without it, every region is accepted. ``new_buckets``: ``aws`` (the
    bucket's owner owns all objects, public access and SSE-C are blocked, as on AWS) or ``legacy`` (access control
    lists, and nothing blocked, as on AWS before 2023). ``unauthenticated_*_max``: how many connections, requests and
    bytes one address (a /64 of IPv6) may have before they have authenticated; beyond that, the oldest is closed.
    ``proxies``: addresses and networks without these limits, since all clients come through
    them. ``access_log_interval_s``: how often lines of access logs are put into their target buckets;
    ``access_log_bytes_max``: how many bytes of lines all workers together keep until then.
    ``break_glass``: this gateway carries out signed orders to end the lock of a version.
    """

    listen: str = "127.0.0.1:8333"
    workers: int = 1
    region: str = "eu-fr-1"
    strict_region: bool = False
    new_buckets: str = "aws"
    domains: list[str] = []
    website_domain: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    unauthenticated_connections_max: int = 2048
    unauthenticated_requests_max: int = 256
    unauthenticated_bytes_max: int = 64 * MIB
    proxies: list[str] = []
    access_log_interval_s: float = 300.0
    access_log_bytes_max: int = 8 * MIB
    break_glass: bool = False


class NotificationSection(msgspec.Struct, frozen=True):
    """A destination of notifications. ``name``: in its ARN, ``arn:storaged:sqs::NAME:webhook`` (or ``nats``). ``url``:
    ``https://...`` or ``http://...`` of a webhook; ``nats://host:port/subject`` or ``tls://host:port/subject`` of NATS.
    ``secret``: a file whose first line a webhook gets as ``Authorization: Bearer ...``, and NATS as its token.
    ``authority``: a file with the certificates that the server's certificate is verified by; empty: the system's.
    ``timeout_s``: of one attempt.
    """

    name: str
    url: str
    secret: str = ""
    authority: str = ""
    timeout_s: float = 10.0


class AdminSection(msgspec.Struct, frozen=True):
    """``listen``: health and metrics over HTTP, empty for none. Administration is only on the Unix socket in the node's
    directory.
    """

    listen: str = ""


class KeysSection(msgspec.Struct, frozen=True):
    """What opens the keyring. ``credential`` names a file of 32 random bytes, ``passphrase`` a file whose first line is
    the passphrase.
    """

    keyring: str = ""
    credential: str = ""
    passphrase: str = ""


class AuditSection(msgspec.Struct, frozen=True):
    """The audit log. ``directory`` empty: ``audit`` in the node's directory. A chain's file ends, and a new one begins,
    at ``file_bytes_max``. A file whose last entry is older than ``keep_days`` is removed, never before six months (180
    days); 0: no file is ever removed.
    """

    directory: str = ""
    file_bytes_max: int = 64 * MIB
    keep_days: int = 190


class LimitsSection(msgspec.Struct, frozen=True):
    """Bounds of one node; a gateway's workers share those of S3.

    ``small_object_bytes_max``: objects of up to this size are kept as three whole copies, larger ones are coded: copies
    need less work, and more space. ``recode_delay_s``: how long a disk may be away before repair recodes blocks for the
    other disks; 0: as the layout says, which all nodes should do. ``drop_delay_s``: how long fragments that moved, or
    were coded again, stay in their old places for readers. ``retire_delay_s``: how long the data of what was deleted or
    replaced stays, for reads that are under way. ``read_hold_s``: how much longer it stays at most while a download of
    it lasts; 0: not at all. ``upload_expire_s``: how long an open multipart upload stays to which nothing is added,
    before it is aborted; 0: for ever. ``lifecycle_day_s``: how long a day of lifecycle rules and of inventories lasts,
    the same in all gateways; shorter ones are for tests alone, since objects expire early. ``lifecycle_per_s``: how
    many keys lifecycle looks at in a second, at most. ``meta_map_bytes`` is address space for a disk's LMDB; disk space
    is used only as rows are written. ``reserve_bytes`` stays free on every disk for deletes, repair and the ring; 0: a
    twentieth of the file system. ``expunge_delay_s``: how long the row of a deleted key stays at least; longer than any
    client's retry, and than a gateway may be suspended.
    """

    s3_requests_max: int = 1024
    rpc_inflight_bytes_max: int = 64 * MIB
    meta_map_bytes: int = 64 * GIB
    segment_bytes: int = 256 * MIB
    reserve_bytes: int = 0
    drain_s: float = 25.0
    small_object_bytes_max: int = 256 * KIB
    recode_delay_s: float = 0.0
    drop_delay_s: float = 3600.0
    retire_delay_s: float = 3600.0
    read_hold_s: float = 86_400.0
    upload_expire_s: float = 30 * 86_400.0
    lifecycle_day_s: float = 86_400.0
    lifecycle_per_s: int = 100
    expunge_delay_s: float = 86_400.0


class LogSection(msgspec.Struct, frozen=True):
    """``format`` ``auto``: journal under systemd, console on a terminal, else logfmt.

    ``access``: log a line at level info for every S3 request. ``slow_ms``: warn of a request that takes longer than
    this plus the time that its bytes may take; 0: never.
    """

    level: str = "info"
    format: str = "auto"
    access: bool = False
    slow_ms: int = 10_000


class Config(msgspec.Struct, frozen=True):
    """A checked configuration; every path in it is absolute."""

    node: NodeSection
    cluster: ClusterSection
    disks: list[DiskSection] = []
    rpc: RpcSection = RpcSection()
    s3: S3Section = S3Section()
    admin: AdminSection = AdminSection()
    keys: KeysSection = KeysSection()
    audit: AuditSection = AuditSection()
    notifications: list[NotificationSection] = []
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()
    path: str = ""

    @property
    def gateway(self) -> bool:
        return "gateway" in self.node.roles

    @property
    def storage(self) -> bool:
        return "storage" in self.node.roles


SECTIONS: dict[str, type[msgspec.Struct]] = {
    "node": NodeSection,
    "cluster": ClusterSection,
    "disks": DiskSection,
    "rpc": RpcSection,
    "s3": S3Section,
    "admin": AdminSection,
    "keys": KeysSection,
    "audit": AuditSection,
    "notifications": NotificationSection,
    "limits": LimitsSection,
    "log": LogSection,
}
