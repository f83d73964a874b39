"""What the calls about multipart uploads take and return, as plain values."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from storaged.objects.encryption import Encryption


class UploadInfo(Struct, frozen=True):
    """``owner``: of the object to be. ``initiator``: who created the upload."""

    key: bytes
    upload_id: str
    created_ms: int
    owner: str
    storage_class: str
    algorithm: str = ""
    checksum_type: str = ""
    encryption: Encryption | None = None
    initiator: str = ""


class PartInfo(Struct, frozen=True):
    number: int
    size: int
    etag: str
    modified_ms: int
    checksum_algorithm: str = ""
    checksum: str = ""


class CompletedPart(Struct, frozen=True):
    """One line of a Complete request. ``checksums``: algorithm -> base64, when the client gave any."""

    number: int
    etag: str
    checksums: Mapping[str, str] = field(default_factory=dict)
