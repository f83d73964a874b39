"""What the S3 front asks of the object plane, and what it gets: plain values and streams, no HTTP.

The S3 front parses a request into these; ``objects`` carries it out; ``maintain`` and ``admin`` use the same calls.
Keys are bytes (UTF-8, 1..1024), as they were sent. ETags are hex without quotes, ``-N`` behind those of multipart
uploads.
Checksum algorithms are named as in ``CHECKSUM_ALGORITHMS``; their values are base64, as in the headers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from msgspec import Struct, field

from storaged.errors import StoragedError
from storaged.meta.ports import Reading as Reading
from storaged.objects.etags import Condition
from storaged.objects.records import NULL_VERSION, BucketRecord, SealedList, SealedPart, full_list
from storaged.wire import Buffer

CHECKSUM_ALGORITHMS = (
    "CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256", "SHA512", "MD5", "XXHASH64", "XXHASH3", "XXHASH128",
)  # fmt: skip
"""Those of S3's ``ChecksumAlgorithm``. https://docs.aws.amazon.com/AmazonS3/latest/API/API_Checksum.html"""
DEFAULT_ALGORITHM = "CRC64NVME"
"""Kept of what came without a checksum, as AWS does."""

OBJECT_BYTES_MAX = 5 * 1024**4
PART_BYTES_MAX = 5 * 1024**3
PART_BYTES_MIN = 5 * 1024**2
PARTS_MAX = 10_000


class Principal(Struct, frozen=True):
    """Who asks, after authentication. ``user_id`` is the canonical id; ``access_key`` empty: anonymous."""

    user_id: str
    display_name: str
    access_key: str = ""


class ReadConditions(Struct, frozen=True):
    """If-Match, If-None-Match, If-(Un)Modified-Since in milliseconds. Evaluated as RFC 9110 and AWS do."""

    if_match: Condition = None
    if_none_match: Condition = None
    if_modified_since_ms: int | None = None
    if_unmodified_since_ms: int | None = None


class WriteConditions(Struct, frozen=True):
    """If-Match (``ANY``: the object must exist) and If-None-Match (``ANY``: it must not exist; tags: it must have
    another)
    of PUT, Complete, Delete and Copy destinations; x-amz-if-match-size and x-amz-if-match-last-modified-time (ms) of
    Delete."""

    if_match: Condition = None
    if_none_match: Condition = None
    if_match_size: int | None = None
    if_match_modified_ms: int | None = None


NO_READ_CONDITIONS = ReadConditions()
NO_WRITE_CONDITIONS = WriteConditions()


class NewMeta(Struct, frozen=True):
    """What a client says about an object: see SealedMeta for the names."""

    headers: Mapping[str, str] = field(default_factory=dict)
    user: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    storage_class: str = "STANDARD"


class BodyChecks(Struct, frozen=True):
    """What the body must match. ``md5``: 16 raw bytes or None. ``checksums``: algorithm -> base64 known beforehand;
    ``trailing``: asked after the body was read whole,
    returns algorithm -> base64 from the trailer (may raise). ``algorithms``: computed and kept, also when no value
    was declared; DEFAULT_ALGORITHM when nothing is named.
    ``size`` None: unknown until the end (chunked without a decoded length). ``sha256``: hex of what the body was signed
    as, empty when nobody else checks that."""

    size: int | None = None
    md5: bytes | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)
    algorithms: tuple[str, ...] = ()
    trailing: Callable[[], Mapping[str, str]] | None = None
    sha256: str = ""


Body = AsyncIterator[Buffer]
"""Pieces of a body as they arrive. A piece is the consumer's until it asks for the next. Raises IncompleteBody (client
gone), XAmzContentSHA256Mismatch, ...
"""


class WholeBody(Protocol):
    """What a Body may be besides. ``put`` asks for the whole when its size was declared and is at most
    ``ObjectLimits.small_bytes_max``, and then for no piece: such an
    object needs no generator, no copy, and one pass."""

    async def whole(self) -> Buffer:
        """All bytes of the body, once everything that the pieces would be checked against holds: as many as were
        declared, or the caller finds them wrong. The
        memory stays as it is until the call that was given this body returns. Raises what the pieces would raise."""


class FillingBody(Protocol):
    """What a Body may be besides: one that goes straight to where its reader wants it, without a buffer between the
    socket and there.
    """

    async def fill(self, view: memoryview) -> int:
        """Bytes put into ``view``: as many as fit, fewer only at the end of the body. ``view`` belongs to the body
        until this returns or raises. Raises what the
        pieces would raise."""


class ObjectInfo(NamedTuple):
    """A version as a HEAD answers it."""

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


class PutResult(Struct, frozen=True):
    etag: str
    version_id: str = NULL_VERSION
    size: int = 0
    checksums: Mapping[str, str] = field(default_factory=dict)
    checksum_type: str = ""
    modified_ms: int = 0


class RangeSpec(Struct, frozen=True):
    """``bytes=first-last``, ``bytes=first-``, ``bytes=-suffix``, as parsed; which of them is None says which form."""

    first: int | None
    last: int | None


class ObjectStream(Protocol):
    """An opened object. ``first .. first + length - 1`` of the object's bytes will come out of ``chunks``. The first
    stripe has been read and verified already,
    so that errors up to here become proper S3 answers; a later one breaks the connection (nothing unverified is ever
    yielded)."""

    info: ObjectInfo
    first: int
    length: int
    partial: bool

    @property
    def held(self) -> bytes | None:
        """All that ``chunks`` would give, when it is small and in memory already."""

    def chunks(self) -> AsyncIterator[Buffer]: ...

    async def close(self) -> None:
        """Gives buffers back; safe to call twice, needed when ``chunks`` was not exhausted."""


class ListedVersion(Struct, frozen=True):
    key: bytes
    version_id: str
    size: int
    modified_ms: int
    etag: str
    storage_class: str
    algorithm: str
    checksum_type: str
    owner: str
    latest: bool = True
    delete_marker: bool = False


class ListedObject(NamedTuple):
    size: int
    modified_ms: int
    printed: SealedList


Show = Callable[[Sequence[int], Sequence[int], Sequence[SealedList]], Sequence[Any]]
"""Makes of objects' sizes, times and list fields what the caller of a listing wants of each. A pure function: what it
made is kept, and given again (``objects.cache.listed_rows``).
"""


def as_rows(sizes: Sequence[int], times_ms: Sequence[int], printed: Sequence[SealedList]) -> Sequence[ListedObject]:
    return list(map(ListedObject, sizes, times_ms, map(full_list, printed)))


class Listing(Struct, frozen=True):
    """Current objects in the order of their keys, as columns: the keys, and what ``show`` made of each; and common
    prefixes.
    """

    keys: Sequence[bytes] = ()
    shown: Sequence[Any] = ()
    prefixes: Sequence[bytes] = ()
    next_after: bytes | None = None


class VersionListing(Struct, frozen=True):
    versions: Sequence[ListedVersion] = ()
    prefixes: Sequence[bytes] = ()
    next_after: bytes | None = None


class UploadInfo(Struct, frozen=True):
    key: bytes
    upload_id: str
    created_ms: int
    owner: str
    storage_class: str
    algorithm: str = ""
    checksum_type: str = ""


class PartInfo(Struct, frozen=True):
    number: int
    size: int
    etag: str
    modified_ms: int
    checksum_algorithm: str = ""
    checksum: str = ""


class CompletedPart(Struct, frozen=True):
    """One line of a Complete request. ``checksums``: algorithm -> base64 when the client gave any."""

    number: int
    etag: str
    checksums: Mapping[str, str] = field(default_factory=dict)


class DeleteResult(Struct, frozen=True):
    """``existed``: something was deleted. Deleting what is not there succeeds, as on AWS."""

    version_id: str = ""
    delete_marker: bool = False
    existed: bool = False


class Buckets(Protocol):
    async def create(
        self, who: Principal, name: str, *, region: str, countries: tuple[str, ...] = (), object_lock: bool = False
    ) -> BucketRecord:
        """Raises BucketAlreadyOwnedByYou, BucketAlreadyExists, TooManyBuckets, ServiceUnavailable (countries cannot
        hold it).
        """

    async def get(self, name: str) -> BucketRecord:
        """Cached for a moment; its authenticator verified. Raises NoSuchBucket."""

    def try_get(self, name: str) -> BucketRecord | None:
        """What ``get`` would answer without waiting; None when it would wait."""

    def fences_seen(self) -> int:
        """Grows whenever a replica says that a bucket is fenced: one that is, or was, being deleted."""

    def gone(self, bucket: BucketRecord) -> bool:
        """Whether that was said of this bucket, so that what is not found in it may be in another one that has its name
        now.
        """

    async def renewed(self, name: str) -> BucketRecord:
        """As ``get``, read now. Raises NoSuchBucket."""

    async def list_buckets(
        self, who: Principal, *, prefix: str = "", after: str = "", limit: int = 1000
    ) -> tuple[list[BucketRecord], str | None]:
        """The principal's own, by name; and where the next page starts after."""

    async def delete(self, bucket: BucketRecord, *, who: Principal | None = None) -> None:
        """Fence, settle, scan; raises BucketNotEmpty (and lifts the fence). ``who`` asks for it: for the audit log."""

    async def set_tags(self, bucket: BucketRecord, tags: Mapping[str, str] | None) -> None: ...

    async def get_tags(self, bucket: BucketRecord) -> Mapping[str, str] | None: ...


class Users(Protocol):
    async def lookup(self, access_key: str) -> tuple[Principal, str]:
        """(principal, secret key), cached for a moment. Raises InvalidAccessKeyId."""

    def try_get(self, access_key: str) -> tuple[Principal, str] | None:
        """What ``lookup`` would answer without waiting; None when it would wait."""

    async def add(
        self, name: str, *, access_key: str = "", secret_key: str = "", email: str = "", user_id: str = ""
    ) -> tuple[Principal, str]:
        """Random keys unless given. ``user_id``: whose buckets it gets, a new identity when empty. Raises
        InvalidArgument when the name is taken.
        """

    async def list_users(self) -> list[Principal]: ...

    async def remove(self, name_or_access_key: str) -> Principal:
        """Who it was. Buckets stay, and belong to whoever is added with this user id. Raises InvalidArgument."""


ReadResult = ObjectStream | ObjectInfo | Reading | StoragedError | None
"""What ``Objects.try_read`` tells: the whole object, held; what is known of it, when that was enough; its record, when
there is more to be waited for than that:
to be passed to ``get`` or ``head``; what these would raise; None: nothing, and they are to be called."""


class Objects(Protocol):
    """Every call names the bucket by its record. All are linearizable per key."""

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
        then: Callable[[PutResult | Exception], None],
        *,
        owner: str,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
    ) -> bool:
        """As ``put``, of a small body that is here whole, without a task: ``then`` is told its result or what it would
        raise, once, perhaps before this returns, and must
        not raise. ``plain`` stays as it is until then. False, or an exception: nothing was begun, and ``put`` is to be
        called."""

    async def head(
        self,
        bucket: BucketRecord,
        key: bytes,
        *,
        version_id: str = "",
        conditions: ReadConditions = NO_READ_CONDITIONS,
        part_number: int | None = None,
        reading: Reading | None = None,
    ) -> ObjectInfo:
        """``reading``: what ``try_read`` told. Raises NoSuchKey, NoSuchVersion, NotModified, PreconditionFailed,
        InvalidPartNumber. ``parts`` is filled in.
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
    ) -> ObjectStream:
        """As head, and InvalidRange, DataDamaged, ServiceUnavailable."""

    def try_read(self, bucket: BucketRecord, key: bytes, want_plain: bool, then: Callable[[ReadResult], None]) -> None:
        """The current version, without a task: ``then`` is told, perhaps before this returns, and must not raise."""

    async def delete(
        self,
        bucket: BucketRecord,
        key: bytes,
        *,
        version_id: str = "",
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
    ) -> DeleteResult: ...

    async def copy(
        self,
        source_bucket: BucketRecord,
        source_key: bytes,
        bucket: BucketRecord,
        key: bytes,
        *,
        owner: str,
        version_id: str = "",
        meta: NewMeta | None,
        tags: Mapping[str, str] | None = None,
        algorithm: str = "",
        source_conditions: ReadConditions = NO_READ_CONDITIONS,
        conditions: WriteConditions = NO_WRITE_CONDITIONS,
    ) -> PutResult:
        """``meta`` None: the source's, kept; ``tags`` None: likewise. Opened and re-sealed here: data belongs to one
        register.
        """

    async def set_tags(self, bucket: BucketRecord, key: bytes, tags: Mapping[str, str], *, version_id: str = "") -> str:
        """Returns the version id."""

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
        algorithm: str = "",
        checksum_type: str = "",
    ) -> UploadInfo:
        """The upload id is text: URL-safe base64 of its 16 bytes."""

    async def put_part(
        self, bucket: BucketRecord, key: bytes, upload_id: str, number: int, body: Body, checks: BodyChecks
    ) -> PutResult:
        """Raises NoSuchUpload."""

    async def copy_part(
        self,
        source_bucket: BucketRecord,
        source_key: bytes,
        span: RangeSpec | None,
        bucket: BucketRecord,
        key: bytes,
        upload_id: str,
        number: int,
        *,
        version_id: str = "",
        source_conditions: ReadConditions = NO_READ_CONDITIONS,
    ) -> PutResult: ...

    async def list_parts(
        self, bucket: BucketRecord, key: bytes, upload_id: str, *, after: int = 0, limit: int = 1000
    ) -> tuple[UploadInfo, list[PartInfo], int | None]: ...

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
    ) -> PutResult:
        """Idempotent: a second, equal Complete answers what the first did. Raises NoSuchUpload, InvalidPart,
        InvalidPartOrder, EntityTooSmall, BadDigest.
        """

    async def abort(self, bucket: BucketRecord, key: bytes, upload_id: str) -> None: ...
