"""The port of the object plane: its calls, and the plain values and streams that they take and return. No HTTP.

The S3 front parses a request into these values, and ``ObjectService`` performs it; ``maintain`` and ``admin`` use the
same calls. Keys are bytes (UTF-8, 1..1024), as the client sent them. ETags are hex without quotes; those of multipart
uploads end with ``-N``. Checksum algorithms have the names of ``CHECKSUM_ALGORITHMS``; checksums are base64, as in
headers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from msgspec import Struct, field

from storaged.errors import ServiceUnavailable, StoragedError
from storaged.meta.ports import Reading as Reading
from storaged.objects.body_types import Body as Body
from storaged.objects.body_types import BodyChecks as BodyChecks
from storaged.objects.body_types import FillingBody as FillingBody
from storaged.objects.body_types import WholeBody as WholeBody
from storaged.objects.condition_types import NO_READ_CONDITIONS as NO_READ_CONDITIONS
from storaged.objects.condition_types import NO_WRITE_CONDITIONS as NO_WRITE_CONDITIONS
from storaged.objects.condition_types import ReadConditions as ReadConditions
from storaged.objects.condition_types import WriteConditions as WriteConditions
from storaged.objects.configuration.access import Acl
from storaged.objects.configuration.document import NOTHING, Configuration, Kind
from storaged.objects.encryption import NO_KEY, Encryption
from storaged.objects.grant_types import ABSENT as ABSENT
from storaged.objects.grant_types import AMEND as AMEND
from storaged.objects.grant_types import DELETE as DELETE
from storaged.objects.grant_types import LIST as LIST
from storaged.objects.grant_types import READ as READ
from storaged.objects.grant_types import WRITE as WRITE
from storaged.objects.grant_types import Allowed as Allowed
from storaged.objects.grant_types import Grant as Grant
from storaged.objects.grant_types import Identity as Identity
from storaged.objects.grant_types import ObjectAccess as ObjectAccess
from storaged.objects.grant_types import Principal as Principal
from storaged.objects.listing_types import Listing, Show, VersionListing, as_rows
from storaged.objects.pending_events import Origin
from storaged.objects.records import BucketRecord, Lock, SealedPart
from storaged.objects.result_types import DeleteResult as DeleteResult
from storaged.objects.result_types import PutResult as PutResult
from storaged.objects.source_types import CopySource as CopySource
from storaged.objects.source_types import RangeSpec as RangeSpec
from storaged.objects.source_types import Renaming as Renaming
from storaged.objects.upload_types import CompletedPart as CompletedPart
from storaged.objects.upload_types import PartInfo as PartInfo
from storaged.objects.upload_types import UploadInfo as UploadInfo
from storaged.objects.user_types import Accounts as Accounts
from storaged.objects.user_types import Users as Users
from storaged.wire import Buffer, Message

T = TypeVar("T", bound=Message)

CHECKSUM_ALGORITHMS = (
    "CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256", "SHA512", "MD5", "XXHASH64", "XXHASH3", "XXHASH128",
)  # fmt: skip
"""The values of S3's ``ChecksumAlgorithm``. https://docs.aws.amazon.com/AmazonS3/latest/API/API_Checksum.html"""
DEFAULT_ALGORITHM = "CRC64NVME"
"""Computed and kept for a body that came without a checksum, as on AWS."""

PART_BYTES_MAX = 5 * 1024**3
PART_BYTES_MIN = 5 * 1024**2
PARTS_MAX = 10_000
OBJECT_BYTES_MAX = PARTS_MAX * PART_BYTES_MAX
"""48.8 TiB."""


class NewMeta(Struct, frozen=True):
    """The metadata that a client gives an object; see ``SealedMeta`` for the names."""

    headers: Mapping[str, str] = field(default_factory=dict)
    user: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    storage_class: str = "STANDARD"
    encryption: Encryption | None = None
    """None: SSE-S3."""
    acl: Acl | None = None
    lock: Lock | None = None
    """None: what the bucket's configuration says."""
    origin: Origin | None = None
    """For the events of the change; None: it has none."""


class ObjectInfo(NamedTuple):
    """What a HEAD tells about a version."""

    key: bytes
    version_id: str
    size: int
    modified_ms: int
    etag: str
    headers: Mapping[str, str]
    user: Mapping[str, str]
    tags: Mapping[str, str]
    checksums: Mapping[str, str]
    checksum_type: str
    storage_class: str
    part_count: int
    """0 for an object that was not uploaded in parts."""
    parts: Sequence[SealedPart] = ()
    owner: str = ""
    delete_marker: bool = False
    encryption: Encryption | None = None
    """None: SSE-S3."""
    acl: Acl | None = None
    """None: the owner alone has access."""
    lock: Lock | None = None


class ObjectStream(Protocol):
    """An opened object. ``chunks`` yields its bytes ``first .. first + length - 1``.

    The first of them have been read and verified already, so that an error up to here becomes a proper S3 answer. A
    later error breaks the connection; nothing unverified is ever yielded.
    """

    info: ObjectInfo
    first: int
    length: int
    partial: bool

    @property
    def held(self) -> Buffer | None:
        """All that ``chunks`` would yield, when it is in memory already; after ``try_read`` until ``release``."""

    def chunks(self) -> AsyncIterator[Buffer]: ...

    async def close(self) -> None:
        """Releases buffers. Needed when ``chunks`` was not exhausted; safe to call twice."""

    def release(self) -> None:
        """As ``close``, of a stream that ``try_read`` has opened."""


ConfigurationChange = Callable[[Configuration], "T | None"]
"""From a configuration to the new value of one kind; None: it is removed. Raises S3 errors where it can't be."""


class Buckets(Protocol):
    async def create(
        self,
        who: Principal,
        name: str,
        *,
        region: str,
        countries: tuple[str, ...] = (),
        object_lock: bool = False,
        configuration: Configuration = NOTHING,
    ) -> BucketRecord:
        """Raises BucketAlreadyOwnedByYou, BucketAlreadyExists, TooManyBuckets, ServiceUnavailable (the countries can't
        hold it).
        """

    async def get(self, name: str) -> BucketRecord:
        """The verified record, cached for ``bucket_cache_s``. Raises NoSuchBucket."""

    def try_get(self, name: str) -> BucketRecord | None:
        """As ``get``, from memory; None when the record must be read."""

    def fences_seen(self) -> int:
        """A counter of answers in which a replica called a bucket fenced: its deletion is or was under way."""

    def gone(self, bucket: BucketRecord) -> bool:
        """Whether a replica called this bucket fenced. Then an object that it lacks may be in another bucket, which has
        its name now.
        """

    async def renewed(self, name: str) -> BucketRecord:
        """As ``get``, but reads the record. Raises NoSuchBucket."""

    async def list_buckets(
        self, who: Principal, *, prefix: str = "", after: str = "", limit: int = 1000
    ) -> tuple[list[BucketRecord], str | None]:
        """The principal's own buckets, by name, and the name after which the next page begins."""

    async def delete(self, bucket: BucketRecord, *, who: Principal | None = None) -> None:
        """Fences, settles and scans it. Raises BucketNotEmpty, after lifting the fence. ``who``: for the audit log."""

    def configuration_of(self, record: BucketRecord) -> Configuration:
        """The configuration in a record, from memory. Raises DataDamaged, ServiceUnavailable."""

    async def configuration(self, bucket: BucketRecord) -> Configuration:
        """The bucket's configuration as of now. Raises NoSuchBucket, DataDamaged, ServiceUnavailable."""

    async def configure(
        self, bucket: BucketRecord, kind: Kind[T], change: ConfigurationChange[T], *, who: Principal | None = None
    ) -> None:
        """Changes one kind of configuration by compare-and-set; ``change`` may run several times. ``who``: for the
        audit log. This gateway obeys the new configuration at once, others within ``bucket_cache_s``. Raises
        NoSuchBucket, InvalidRequest (too much), and what ``change`` raises; then nothing was changed.
        """

    async def known_everywhere(self) -> None:
        """Returns when every gateway obeys what was configured before this call."""


class FailedRead(NamedTuple):
    """The record of an object, and why its bytes could not be read. Both are passed to ``Objects.get``, which looks
    whether the object is another one by now, or somewhere else.
    """

    reading: Reading
    error: ServiceUnavailable


ReadResult = ObjectStream | ObjectInfo | Reading | FailedRead | StoragedError | None
"""The result of ``Objects.try_read``: the whole object, in memory (``held``); its metadata, when that was wanted; its
record, when more must be awaited, to be passed to ``get`` or ``head``; the error that these would raise; or None: call
these.
"""


class Objects(Protocol):
    """Every call names the bucket by its record. Calls are linearizable per key."""

    async def put(
        self,
        bucket: BucketRecord,
        key: bytes,
        body: Body,
        meta: NewMeta,
        checks: BodyChecks,
        *,
        owner: str,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
    ) -> PutResult: ...

    @property
    def small_bytes_max(self) -> int:
        """The largest body that ``try_put`` takes."""

    def try_put(
        self,
        bucket: BucketRecord,
        key: bytes,
        plain: Buffer,
        meta: NewMeta,
        checks: BodyChecks,
        on_done: Callable[[PutResult | Exception], None],
        *,
        owner: str,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
    ) -> bool:
        """As ``put``, of a small body that has arrived whole, without a task. Calls ``on_done`` once, perhaps before
        this returns, with the result or with what ``put`` would raise; it must not raise. ``plain`` must not change
        before that. False: nothing was begun, and ``put`` must be called. Raises S3 errors of the body.
        """

    async def head(
        self,
        bucket: BucketRecord,
        key: bytes,
        *,
        version_id: str = "",
        conditions: ReadConditions = NO_READ_CONDITIONS,
        part_number: int | None = None,
        reading: Reading | None = None,
        customer_key: bytes | None = NO_KEY,
    ) -> ObjectInfo:
        """``reading``: from ``try_read``. The result has ``parts``. ``customer_key``: of SSE-C; None for a caller who
        needs no more than is known without one (no checksums). Raises NoSuchKey, NoSuchVersion, NotModified,
        PreconditionFailed, InvalidPartNumber, InvalidRequest (the customer's key is missing, wrong or not applicable).
        """

    async def get(
        self,
        bucket: BucketRecord,
        key: bytes,
        *,
        version_id: str = "",
        conditions: ReadConditions = NO_READ_CONDITIONS,
        span: RangeSpec | None = None,
        part_number: int | None = None,
        reading: Reading | None = None,
        failed: ServiceUnavailable | None = None,
        customer_key: bytes = NO_KEY,
    ) -> ObjectStream:
        """``failed``: the error of a ``FailedRead`` with this reading. Raises as ``head``, and InvalidRange,
        DataDamaged, ServiceUnavailable.
        """

    def try_read(
        self,
        bucket: BucketRecord,
        key: bytes,
        want_plain: bool,
        on_read: Callable[[ReadResult], None],
        span: RangeSpec | None = None,
    ) -> None:
        """Reads the current version without a task, ``span`` of it. Calls ``on_read`` once, perhaps before this
        returns; it must not raise.
        """

    async def delete(
        self,
        bucket: BucketRecord,
        key: bytes,
        *,
        version_id: str = "",
        bypass_governance: bool = False,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
        origin: Origin | None = None,
    ) -> DeleteResult: ...

    async def set_retention(
        self,
        bucket: BucketRecord,
        key: bytes,
        mode: str,
        until_ms: int,
        *,
        version_id: str = "",
        bypass_governance: bool = False,
        allowed: Allowed = None,
    ) -> None: ...

    async def set_hold(
        self, bucket: BucketRecord, key: bytes, hold: bool, *, version_id: str = "", allowed: Allowed = None
    ) -> None: ...

    async def copy(
        self,
        source: CopySource,
        bucket: BucketRecord,
        key: bytes,
        *,
        owner: str,
        meta: NewMeta | None,
        tags: Mapping[str, str] | None = None,
        acl: Acl | None = None,
        algorithm: str = "",
        encryption: Encryption | None = None,
        lock: Lock | None = None,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
        origin: Origin | None = None,
    ) -> PutResult:
        """``meta``, ``tags`` None: the source's. ``encryption`` is of the copy. The data is opened and sealed anew."""

    async def rename(self, bucket: BucketRecord, asked: Renaming) -> PutResult:
        """The object keeps its metadata, time, owner and access."""

    async def set_tags(
        self,
        bucket: BucketRecord,
        key: bytes,
        tags: Mapping[str, str],
        *,
        version_id: str = "",
        allowed: Allowed = None,
    ) -> str:
        """Returns the version id."""

    async def set_encryption(
        self, bucket: BucketRecord, key: bytes, encryption: Encryption, *, version_id: str = "", allowed: Allowed = None
    ) -> str:
        """SSE-KMS for a version; its data stays. Returns the version id. Raises InvalidRequest (it has SSE-C)."""

    async def set_acl(
        self, bucket: BucketRecord, key: bytes, acl: Acl | None, *, version_id: str = "", allowed: Allowed = None
    ) -> str:
        """Returns the version id. None: the owner alone has access."""

    async def list_objects(
        self,
        bucket: BucketRecord,
        *,
        prefix: bytes = b"",
        after: bytes = b"",
        delimiter: bytes = b"",
        limit: int = 1000,
        show: Show = as_rows,
    ) -> Listing:
        """Current objects with key > ``after``."""

    async def list_versions(
        self,
        bucket: BucketRecord,
        *,
        prefix: bytes = b"",
        after: bytes = b"",
        after_version: str = "",
        delimiter: bytes = b"",
        limit: int = 1000,
    ) -> VersionListing: ...

    async def create_upload(
        self,
        bucket: BucketRecord,
        key: bytes,
        meta: NewMeta,
        *,
        owner: str,
        initiator: str = "",
        algorithm: str = "",
        checksum_type: str = "",
    ) -> UploadInfo:
        """``owner``: of the object to be. The upload id is text: URL-safe base64 of its 16 bytes."""

    async def look_upload(self, bucket: BucketRecord, key: bytes, upload_id: str) -> UploadInfo | None:
        """An upload that was not ended; None: there is none."""

    async def put_part(
        self,
        bucket: BucketRecord,
        key: bytes,
        upload_id: str,
        number: int,
        body: Body,
        checks: BodyChecks,
        *,
        customer_key: bytes = NO_KEY,
    ) -> PutResult:
        """Raises NoSuchUpload, InvalidRequest (``customer_key`` is not the one that the upload was created with)."""

    async def copy_part(
        self,
        source: CopySource,
        bucket: BucketRecord,
        key: bytes,
        upload_id: str,
        number: int,
        *,
        customer_key: bytes = NO_KEY,
    ) -> PutResult: ...

    async def list_parts(
        self,
        bucket: BucketRecord,
        key: bytes,
        upload_id: str,
        *,
        after: int = 0,
        limit: int = 1000,
        customer_key: bytes = NO_KEY,
    ) -> tuple[UploadInfo, list[PartInfo], int | None]:
        """Without the customer's key the parts of an upload with SSE-C have no checksums."""

    async def list_uploads(
        self,
        bucket: BucketRecord,
        *,
        prefix: bytes = b"",
        after_key: bytes = b"",
        after_upload: str = "",
        delimiter: bytes = b"",
        limit: int = 1000,
    ) -> tuple[list[UploadInfo], list[bytes], tuple[bytes, str] | None]:
        """Uploads in key order, common prefixes, and the next (key marker, upload id marker)."""

    async def complete(
        self,
        bucket: BucketRecord,
        key: bytes,
        upload_id: str,
        parts: Sequence[CompletedPart],
        *,
        owner: str,
        checksums: Mapping[str, str] | None = None,
        checksum_type: str = "",
        declared_size: int | None = None,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
        customer_key: bytes = NO_KEY,
        origin: Origin | None = None,
    ) -> PutResult:
        """Idempotent: a second, equal Complete answers what the first did. Raises NoSuchUpload, InvalidPart,
        InvalidPartOrder, EntityTooSmall, BadDigest. An upload with SSE-C and a checksum algorithm needs the key.
        """

    def kms_key(self) -> str:
        """The id of the keyring, which wraps the keys of all buckets, in the form of a key's id in AWS KMS. Raises
        KeyringUnavailable.
        """

    async def abort(self, bucket: BucketRecord, key: bytes, upload_id: str) -> None: ...
