"""Results of writes and deletes: part of the port of the object plane (``api``)."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from storaged.objects.encryption import Encryption


class PutResult(Struct, frozen=True):
    """``version_id``: empty for the null version (a PUT names none where versioning is suspended), and of a part."""

    etag: str
    version_id: str = ""
    size: int = 0
    checksums: Mapping[str, str] = field(default_factory=dict)
    checksum_type: str = ""
    modified_ms: int = 0
    encryption: Encryption | None = None
    """None: SSE-S3."""
    tags: Mapping[str, str] = field(default_factory=dict)


class DeleteResult(Struct, frozen=True):
    """``version_id``: of the version that was deleted, or of the delete marker that was made; empty in a bucket that
    never had versioning. ``delete_marker``: that version is one. ``existed``: something was deleted. To delete what
    does not exist succeeds, as on AWS.
    """

    version_id: str = ""
    delete_marker: bool = False
    existed: bool = False
