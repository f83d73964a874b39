"""The kinds of configuration that a bucket may have, and what is stored of each. Pure.

A new kind is a message, a ``Kind``, and a place in ``KINDS``; then a row in ``s3.ops.configuration`` parses and prints
it. Its fields are positional, as of every message.
"""

from __future__ import annotations

from typing import Any

from storaged.objects.configuration.access import ACL, OWNERSHIP, POLICY, PUBLIC_ACCESS_BLOCK
from storaged.objects.configuration.cors import CORS
from storaged.objects.configuration.document import Kind
from storaged.objects.configuration.inventory import INVENTORY
from storaged.objects.configuration.lifecycle import LIFECYCLE
from storaged.objects.configuration.logging import LOGGING
from storaged.objects.configuration.notification import NOTIFICATION
from storaged.objects.configuration.website import WEBSITE
from storaged.wire import Message


def _always(value: Any) -> bool:
    return True


class Tags(Message, frozen=True):
    tags: dict[str, str]


class Versioning(Message, frozen=True):
    """``status``: ENABLED or SUSPENDED. A bucket without an entry never had versioning."""

    status: str


class ObjectLock(Message, frozen=True):
    """The bucket has Object Lock, for ever. ``mode``, ``days`` or ``years``: the retention of new versions; an empty
    mode: they have none.
    """

    mode: str = ""
    days: int = 0
    years: int = 0


ENABLED = "Enabled"
SUSPENDED = "Suspended"


class DefaultEncryption(Message, frozen=True):
    """The encryption of new objects whose requests name none. ``algorithm``: AES256 or aws:kms. ``key_id``: of aws:kms,
    as the client named it; empty: the default key. ``bucket_key``: S3 Bucket Keys are asked for. ``blocked``: kinds of
    encryption that requests must not ask for; SSE-C is the only one.
    """

    algorithm: str
    key_id: str = ""
    bucket_key: bool = False
    blocked: tuple[str, ...] = ()


SSE_C = "SSE-C"


def _is_sse_s3(value: DefaultEncryption) -> bool:
    """What is blocked matters only for requests that ask for it; these look."""
    return value.algorithm == "AES256"


class Quota(Message, frozen=True):
    """What the operator allows a bucket to have (``objects.quotas``). 0: no limit."""

    bytes: int = 0
    objects: int = 0


class Copies(Message, frozen=True):
    """What the operator chose for a bucket: objects of up to ``bytes`` are kept as whole copies, larger ones are coded.
    It counts where it is less than the gateway's ``small_object_bytes_max``.
    """

    bytes: int


TAGGING = Kind("tagging", Tags, plain=_always, audited=False)
VERSIONING = Kind("versioning", Versioning)
LOCK = Kind("object-lock", ObjectLock)
ENCRYPTION = Kind("encryption", DefaultEncryption, plain=_is_sse_s3)
QUOTA = Kind("quota", Quota, plain=_always)
COPIES = Kind("copies", Copies)

KINDS: tuple[Kind[Any], ...] = (
    TAGGING,
    VERSIONING,
    LOCK,
    ENCRYPTION,
    QUOTA,
    COPIES,
    POLICY,
    ACL,
    PUBLIC_ACCESS_BLOCK,
    OWNERSHIP,
    CORS,
    WEBSITE,
    LOGGING,
    NOTIFICATION,
    LIFECYCLE,
    INVENTORY,
)
"""All of them. A gateway refuses to serve a bucket that has another one."""
