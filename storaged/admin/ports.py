"""The services that a node gives to its admin API. A storage node has the first part only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from storaged.cluster.audit.trail import Trail
from storaged.cluster.move_settings import MoveSettings
from storaged.cluster.signed_layout import SignedLayout
from storaged.cluster.unlock import UnlockOrder
from storaged.objects.api import Buckets, Principal, Users
from storaged.objects.records import BucketRecord
from storaged.objects.usage import Usage
from storaged.observe import Samples


class Jobs(Protocol):
    """Repair, scrub and other long work of the cluster, and its counts."""

    async def jobs(self) -> dict[str, Any]:
        """``busy``, the counts of objects, and ``jobs``: each ``name, node, state, percent (or None), rate, eta_s (or
        None), detail``.
        """

    async def start_scrub(self) -> list[str]:
        """Starts to read and verify everything. Returns the nodes that began."""


class LayoutDesk(Protocol):
    """Brings layouts into force (``node.applying``)."""

    async def apply(self, signed: SignedLayout) -> dict[str, Any]:
        """Raises LayoutRefused, LayoutOvertaken, LayoutNotAccepted, NoQuorum."""

    async def newest(self) -> tuple[SignedLayout, bool]:
        """The layout that was decided last, and whether it is in force."""


class SetMoves(Protocol):
    async def __call__(self, job: str, *, paused: bool | None, pace: int | None) -> MoveSettings:
        """In the whole cluster, for good. None leaves it as it is. Raises InvalidArgument, ServiceUnavailable, and
        KeyringUnavailable.
        """


@dataclass
class Services:
    """``status`` returns the document of ``storaged status``; a storage node reports on itself.

    ``ready`` returns whether this node can do its work, and why not.
    """

    status: Callable[[], Awaitable[dict[str, Any]]]
    ready: Callable[[], tuple[bool, str]]
    doctor: Callable[[], Awaitable[list[dict[str, str]]]]
    users: Users | None = None
    iam: Callable[[Principal, str, dict[str, str]], Awaitable[dict[str, Any]]] | None = None
    """(an account's own user, action, parameters): performs an action of IAM for the operator."""
    buckets: Buckets | None = None
    every_bucket: Callable[[], Awaitable[list[BucketRecord]]] | None = None
    """All buckets of the cluster that are not deleted."""
    set_owner: Callable[[BucketRecord, str], Awaitable[None]] | None = None
    """(bucket, user id): hands a bucket over."""
    verify_unlock: Callable[[str], UnlockOrder] | None = None
    """Checks a signed order to end the lock of a version. Raises UnlockRefused."""
    unlock: Callable[[BucketRecord, bytes, str], Awaitable[None]] | None = None
    """(bucket, key, version id): ends the lock of a version."""
    lost_versions: Callable[[BucketRecord, bytes], Awaitable[int]] | None = None
    """(bucket, key): how many versions of a key are lost with their pages."""
    forget_lost: Callable[[BucketRecord, bytes, int], Awaitable[None]] | None = None
    """(bucket, key, count): removes these versions."""
    usage: Callable[[BucketRecord, str], Awaitable[Usage]] | None = None
    """(bucket, key): counts a bounded piece of a bucket, of keys greater than that."""
    set_bucket_quota: Callable[[BucketRecord, int, int], Awaitable[None]] | None = None
    """(bucket, bytes, objects); 0: no limit."""
    set_bucket_copies: Callable[[BucketRecord, int | None], Awaitable[None]] | None = None
    """(bucket, bytes): up to which size its objects are kept as whole copies; None: as the gateways are configured."""
    set_account_quota: Callable[[str, int, int], Awaitable[None]] | None = None
    """(user id, bytes, objects); 0: no limit."""
    lifecycle: Callable[[BucketRecord], Awaitable[dict[str, Any]]] | None = None
    """The lifecycle of a bucket: its rules, and how far they are carried out."""
    inventories: Callable[[BucketRecord], Awaitable[dict[str, Any]]] | None = None
    """The inventories of a bucket, and how far they are."""
    racks: Callable[[tuple[str, ...]], list[str]] | None = None
    """The failure domains with disks in these countries (empty: in all), by the layout in force."""
    region: str = ""
    where: Callable[[str, bytes], Awaitable[dict[str, Any]]] | None = None
    jobs: Jobs | None = None
    layouts: LayoutDesk | None = None
    set_moves: SetMoves | None = None
    """Pauses or resumes a job of moves, or sets its pace."""
    losses: Callable[[Sequence[str]], Awaitable[dict[str, Any]]] | None = None
    """(disks): what would be lost if they were lost for good."""
    key_backup: Callable[[str], Awaitable[tuple[str, bytes]]] | None = None
    """passphrase -> the keyring's id and its backup, sealed under the passphrase."""
    trail: Trail | None = None
    """The node's audit log. It records a request before the request is carried out."""
    checkpoints: Callable[[], Awaitable[list[bytes]]] | None = None
    """Signed checkpoints of audit logs that versions with protocol 2 kept in registers, encoded."""
    witnessed: Callable[[str], Awaitable[list[dict[str, Any]]]] | None = None
    """What each witness has of a node's audit log: ``name``, ``reachable``, ``reason``, ``lines``
    (``cluster.audit.witness_record``).
    """
    other_samples: Callable[[], Awaitable[Sequence[Samples]]] | None = None
    """The metrics of this node's further processes, which are added to this one's."""
    authority: str = ""
    """The cluster's authority certificate, PEM."""
