"""The object plane in memory, for tests of the S3 front: conditions, checksums, ranges, listings and multipart as they
should be; no durability.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import xxhash
from awscrt import checksums as crt
from msgspec.structs import replace

from storaged import errors
from storaged.objects import api
from storaged.objects.api import (
    Body,
    BodyChecks,
    CompletedPart,
    DeleteResult,
    ListedVersion,
    Listing,
    NewMeta,
    ObjectInfo,
    PartInfo,
    Principal,
    PutResult,
    RangeSpec,
    ReadConditions,
    Reading,
    ReadResult,
    Show,
    UploadInfo,
    VersionListing,
    WriteConditions,
    as_rows,
)
from storaged.objects.etags import ANY, Tags
from storaged.objects.read.get import HeldStream, Span
from storaged.objects.records import NULL_VERSION, BucketRecord, SealedList, SealedPart
from storaged.wire import Buffer

PIECE_BYTES = 64 * 1024
ANY_READ = ReadConditions()
ANY_WRITE = WriteConditions()

DIGESTS: dict[str, Callable[[bytes], bytes]] = {
    "CRC32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
    "CRC32C": lambda data: crt.crc32c(data).to_bytes(4, "big"),
    "CRC64NVME": lambda data: crt.crc64nvme(data).to_bytes(8, "big"),
    "SHA1": lambda data: hashlib.sha1(data).digest(),
    "SHA256": lambda data: hashlib.sha256(data).digest(),
    "SHA512": lambda data: hashlib.sha512(data).digest(),
    "MD5": lambda data: hashlib.md5(data).digest(),
    "XXHASH64": xxhash.xxh64_digest,
    "XXHASH3": xxhash.xxh3_64_digest,
    "XXHASH128": xxhash.xxh3_128_digest,
}


def checksum(algorithm: str, data: bytes) -> str:
    return base64.b64encode(DIGESTS[algorithm](data)).decode()


@dataclass
class Stored:
    info: ObjectInfo
    data: bytes


@dataclass
class Upload:
    info: UploadInfo
    meta: NewMeta
    parts: dict[int, tuple[PartInfo, bytes]] = field(default_factory=dict)
    done: tuple[list[CompletedPart], PutResult] | None = None


HELD_BYTES_MAX = 16 * 1024


async def pieces_of(data: bytes) -> AsyncIterator[Buffer]:
    yield data


class FakeStream:
    held = None

    def __init__(self, stored: Stored, first: int, length: int, partial: bool) -> None:
        self.info = stored.info
        self.first = first
        self.length = length
        self.partial = partial
        self.closed = False
        self._data = stored.data
        self.fail_after: int | None = None

    async def chunks(self) -> AsyncIterator[bytes]:
        end = self.first + self.length
        for position in range(self.first, end, PIECE_BYTES):
            if self.fail_after is not None and position - self.first >= self.fail_after:
                raise errors.DataDamaged()
            yield self._data[position : min(position + PIECE_BYTES, end)]

    async def close(self) -> None:
        self.closed = True


class FakeUsers:
    def __init__(self) -> None:
        self.by_key: dict[str, tuple[Principal, str]] = {}

    def try_get(self, access_key: str) -> tuple[Principal, str] | None:
        return self.by_key.get(access_key)

    async def lookup(self, access_key: str) -> tuple[Principal, str]:
        if access_key not in self.by_key:
            raise errors.InvalidAccessKeyId()
        return self.by_key[access_key]

    async def add(
        self, name: str, *, access_key: str = "", secret_key: str = "", email: str = "", user_id: str = ""
    ) -> tuple[Principal, str]:
        who = Principal(user_id or hashlib.sha256(name.encode()).hexdigest(), name, access_key or f"AK{name}")
        self.by_key[who.access_key] = (who, secret_key or f"secret-of-{name}")
        return self.by_key[who.access_key]

    async def list_users(self) -> list[Principal]:
        return [who for who, _ in self.by_key.values()]

    async def remove(self, name_or_access_key: str) -> Principal:
        who = next(who for who, _ in self.by_key.values() if name_or_access_key in (who.access_key, who.display_name))
        self.by_key = {
            key: value for key, value in self.by_key.items() if name_or_access_key not in (key, value[0].display_name)
        }
        return who


class FakeBuckets:
    def __init__(self, objects: FakeObjects) -> None:
        self.objects = objects
        self.by_name: dict[str, BucketRecord] = {}
        self.tags: dict[str, Mapping[str, str]] = {}

    async def create(
        self, who: Principal, name: str, *, region: str, countries: tuple[str, ...] = (), object_lock: bool = False
    ) -> BucketRecord:
        if name in self.by_name:
            raise (
                errors.BucketAlreadyOwnedByYou()
                if self.by_name[name].owner == who.user_id
                else errors.BucketAlreadyExists()
            )
        bucket = BucketRecord(
            name,
            hashlib.md5(name.encode()).digest(),
            who.user_id,
            self.objects.now_ms(),
            "active",
            16,
            region,
            countries=countries,
        )
        self.by_name[name] = bucket
        return bucket

    def try_get(self, name: str) -> BucketRecord | None:
        return self.by_name.get(name)

    def fences_seen(self) -> int:
        return 0

    def gone(self, bucket: BucketRecord) -> bool:
        return False

    async def renewed(self, name: str) -> BucketRecord:
        return await self.get(name)

    async def get(self, name: str) -> BucketRecord:
        if name not in self.by_name:
            raise errors.NoSuchBucket(BucketName=name)
        return self.by_name[name]

    async def list_buckets(
        self, who: Principal, *, prefix: str = "", after: str = "", limit: int = 1000
    ) -> tuple[list[BucketRecord], str | None]:
        names = sorted(
            n for n, b in self.by_name.items() if b.owner == who.user_id and n.startswith(prefix) and n > after
        )
        page = names[:limit]
        return [self.by_name[name] for name in page], page[-1] if len(names) > limit else None

    async def delete(self, bucket: BucketRecord, *, who: Principal | None = None) -> None:
        if self.objects.of(bucket):
            raise errors.BucketNotEmpty()
        del self.by_name[bucket.name]

    async def set_tags(self, bucket: BucketRecord, tags: Mapping[str, str] | None) -> None:
        self.tags[bucket.name] = tags or {}

    async def get_tags(self, bucket: BucketRecord) -> Mapping[str, str] | None:
        return self.tags.get(bucket.name) or None


class FakeObjects:
    def __init__(self, now_ms: Callable[[], int]) -> None:
        self.now_ms = now_ms
        self.objects: dict[bytes, dict[bytes, Stored]] = {}
        self.uploads: dict[str, Upload] = {}
        self.streams: list[FakeStream] = []
        self.fail_after: int | None = None
        self.soon: Callable[[Callable[[], None]], object] = lambda tell: asyncio.get_running_loop().call_soon(tell)
        """When ``try_read`` and ``try_put`` tell."""
        self.told: list[ReadResult] = []
        self.busy = False
        self.put_told: list[PutResult | Exception] = []
        self.readings: list[Reading | None] = []
        self._upload_numbers = count(1)

    def of(self, bucket: BucketRecord) -> dict[bytes, Stored]:
        return self.objects.setdefault(bucket.id, {})

    # --- conditions

    @staticmethod
    def check_read(info: ObjectInfo, conditions: ReadConditions) -> None:
        c = conditions
        seconds = info.modified_ms // 1000
        if isinstance(c.if_match, Tags) and info.etag not in c.if_match.strong:
            raise errors.PreconditionFailed(Condition="If-Match")
        if c.if_match is None and c.if_unmodified_since_ms is not None and seconds > c.if_unmodified_since_ms // 1000:
            raise errors.PreconditionFailed(Condition="If-Unmodified-Since")
        if c.if_none_match == ANY or (
            isinstance(c.if_none_match, Tags) and info.etag in (*c.if_none_match.strong, *c.if_none_match.weak)
        ):
            raise errors.NotModified(ETag=info.etag)
        if c.if_none_match is None and c.if_modified_since_ms is not None and seconds <= c.if_modified_since_ms // 1000:
            raise errors.NotModified(ETag=info.etag)

    @staticmethod
    def check_write(current: Stored | None, conditions: WriteConditions) -> None:
        c = conditions
        if c.if_match is not None and current is None:
            raise errors.NoSuchKey()
        if current is None:
            return
        etag = current.info.etag
        if isinstance(c.if_match, Tags) and etag not in c.if_match.strong:
            raise errors.PreconditionFailed(Condition="If-Match")
        if c.if_none_match == ANY or (
            isinstance(c.if_none_match, Tags) and etag in (*c.if_none_match.strong, *c.if_none_match.weak)
        ):
            raise errors.PreconditionFailed(Condition="If-None-Match")
        if c.if_match_size is not None and c.if_match_size != current.info.size:
            raise errors.PreconditionFailed(Condition="x-amz-if-match-size")
        if c.if_match_modified_ms is not None and c.if_match_modified_ms // 1000 != current.info.modified_ms // 1000:
            raise errors.PreconditionFailed(Condition="x-amz-if-match-last-modified-time")

    @staticmethod
    async def read(body: Body, checks: BodyChecks) -> tuple[bytes, dict[str, str]]:
        data = b"".join([bytes(piece) async for piece in body])
        if checks.size is not None and len(data) != checks.size:
            raise errors.IncompleteBody()
        if checks.md5 is not None and hashlib.md5(data).digest() != checks.md5:
            raise errors.BadDigest()
        if checks.sha256 and hashlib.sha256(data).hexdigest() != checks.sha256:
            raise errors.XAmzContentSHA256Mismatch()
        computed = {name: checksum(name, data) for name in checks.algorithms or (api.DEFAULT_ALGORITHM,)}
        for name, value in {**checks.checksums, **(checks.trailing() if checks.trailing else {})}.items():
            if computed[name] != value:
                raise errors.BadDigest()
        return data, computed

    # --- objects

    def store(
        self, bucket: BucketRecord, key: bytes, data: bytes, meta: NewMeta, etag: str, owner: str, **more: object
    ) -> PutResult:
        info = ObjectInfo(
            key=key, version_id=NULL_VERSION, size=len(data), modified_ms=self.now_ms(), etag=etag, headers=dict(meta.headers),  # noqa: E501
            user=dict(meta.user), tags=dict(meta.tags), checksums=more.get("checksums", {}),  # type: ignore[arg-type]
            checksum_type=str(more.get("checksum_type", "")), storage_class=meta.storage_class,
            part_count=len(more.get("parts", ())), parts=more.get("parts", ()), owner=owner,  # type: ignore[arg-type]
        )  # fmt: skip
        self.of(bucket)[key] = Stored(info, data)
        return PutResult(etag, NULL_VERSION, len(data), info.checksums, info.checksum_type, info.modified_ms)

    async def put(
        self, bucket: BucketRecord, key: bytes, body: Body, meta: NewMeta, checks: BodyChecks, *, owner: str,
        conditions: WriteConditions = ANY_WRITE,
    ) -> PutResult:  # fmt: skip
        self.check_write(self.of(bucket).get(key), conditions)
        data, computed = await self.read(body, checks)
        self.check_write(self.of(bucket).get(key), conditions)
        kind = "FULL_OBJECT" if computed else ""
        return self.store(
            bucket, key, data, meta, hashlib.md5(data).hexdigest(), owner, checksums=computed, checksum_type=kind
        )

    small_bytes_max = HELD_BYTES_MAX

    def try_put(
        self, bucket: BucketRecord, key: bytes, plain: Buffer, meta: NewMeta, checks: BodyChecks, then: Callable[[PutResult | Exception], None], *,  # noqa: E501
        owner: str, conditions: WriteConditions = ANY_WRITE,
    ) -> bool:  # fmt: skip
        """Judged at once, stored when it tells; ``busy``: not taken on."""
        if self.busy or len(plain) > self.small_bytes_max:
            return False
        work = self.put(bucket, key, pieces_of(bytes(plain)), meta, checks, owner=owner, conditions=conditions)
        try:
            work.send(None)
        except StopIteration as done:
            found: PutResult | Exception = done.value
        except errors.PreconditionFailed as error:
            found = error

        def tell() -> None:
            self.put_told.append(found)
            then(found)

        self.soon(tell)
        return True

    def find(self, bucket: BucketRecord, key: bytes, version_id: str) -> Stored:
        if version_id not in ("", NULL_VERSION):
            raise errors.NoSuchVersion()
        if key not in self.of(bucket):
            raise errors.NoSuchKey(Key=key.decode())
        return self.of(bucket)[key]

    async def head(
        self, bucket: BucketRecord, key: bytes, *, version_id: str = "", conditions: ReadConditions = ANY_READ,
        part_number: int | None = None, reading: Reading | None = None,
    ) -> ObjectInfo:  # fmt: skip
        info = self.find(bucket, key, version_id).info
        self.check_read(info, conditions)
        if part_number is not None and part_number > max(info.part_count, 1):
            raise errors.InvalidPartNumber()
        return info

    def try_read(self, bucket: BucketRecord, key: bytes, want_plain: bool, then: Callable[[ReadResult], None]) -> None:
        """What is small is held; the rest is to be asked for, as is what shall break off."""

        def tell() -> None:
            found: ReadResult
            try:
                stored = self.find(bucket, key, "")
            except errors.S3Error as error:
                found = error
            else:
                small = len(stored.data) <= HELD_BYTES_MAX and self.fail_after is None
                found = (
                    stored.info
                    if not want_plain
                    else HeldStream(stored.info, Span(0, len(stored.data), False), stored.data)
                    if small
                    else None
                )
            self.told.append(found)
            then(found)

        self.soon(tell)

    async def get(
        self, bucket: BucketRecord, key: bytes, *, version_id: str = "", conditions: ReadConditions = ANY_READ,
        span: RangeSpec | None = None, part_number: int | None = None, reading: Reading | None = None,
    ) -> FakeStream:  # fmt: skip
        self.readings.append(reading)
        info = await self.head(bucket, key, version_id=version_id, conditions=conditions, part_number=part_number)
        first, length, partial = 0, info.size, False
        if part_number is not None:
            partial = True
            if info.part_count:
                first = sum(part.size for part in info.parts[: part_number - 1])
                length = info.parts[part_number - 1].size
        elif span is not None and not (span.first is None and span.last and not info.size):
            first, length = self.resolve(span, info.size)
            partial = True
        stream = FakeStream(self.of(bucket)[key], first, length, partial)
        stream.fail_after = self.fail_after
        self.streams.append(stream)
        return stream

    @staticmethod
    def resolve(span: RangeSpec, size: int) -> tuple[int, int]:
        if span.first is None:
            first, length = max(size - (span.last or 0), 0), min(span.last or 0, size)
        else:
            first, length = span.first, min(size if span.last is None else span.last + 1, size) - span.first
        if length <= 0:
            raise errors.InvalidRange(ActualObjectSize=str(size))
        return first, length

    async def delete(
        self, bucket: BucketRecord, key: bytes, *, version_id: str = "", conditions: WriteConditions = ANY_WRITE
    ) -> DeleteResult:
        current = self.of(bucket).get(key)
        if current is not None:
            self.check_write(current, conditions)
        return DeleteResult(existed=self.of(bucket).pop(key, None) is not None)

    async def copy(
        self, source_bucket: BucketRecord, source_key: bytes, bucket: BucketRecord, key: bytes, *, owner: str, version_id: str = "",  # noqa: E501
        meta: NewMeta | None, tags: Mapping[str, str] | None = None, algorithm: str = "",
        source_conditions: ReadConditions = ANY_READ, conditions: WriteConditions = ANY_WRITE,
    ) -> PutResult:  # fmt: skip
        source = self.find(source_bucket, source_key, version_id)
        try:
            self.check_read(source.info, source_conditions)
        except errors.NotModified:
            raise errors.PreconditionFailed() from None
        self.check_write(self.of(bucket).get(key), conditions)
        info = source.info
        kept = meta or NewMeta(headers=info.headers, user=info.user, storage_class=info.storage_class)
        kept = replace(kept, tags=info.tags if tags is None else tags)
        names = [algorithm] if algorithm else list(info.checksums) or [api.DEFAULT_ALGORITHM]
        sums = {name: checksum(name, source.data) for name in names}
        return self.store(
            bucket,
            key,
            source.data,
            kept,
            hashlib.md5(source.data).hexdigest(),
            owner,
            checksums=sums,
            checksum_type="FULL_OBJECT",
        )

    async def set_tags(self, bucket: BucketRecord, key: bytes, tags: Mapping[str, str], *, version_id: str = "") -> str:
        stored = self.find(bucket, key, version_id)
        stored.info = stored.info._replace(tags=dict(tags))
        return NULL_VERSION

    # --- listings

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
        found = self._listed(bucket, prefix=prefix, after=after, delimiter=delimiter, limit=limit)
        rows = found.versions
        return Listing(
            [row.key for row in rows],
            show(
                [row.size for row in rows],
                [row.modified_ms for row in rows],
                [SealedList(row.etag, row.algorithm, row.checksum_type, row.storage_class) for row in rows],
            ),
            found.prefixes,
            found.next_after,
        )

    def _listed(
        self,
        bucket: BucketRecord,
        *,
        prefix: bytes = b"",
        after: bytes = b"",
        delimiter: bytes = b"",
        limit: int = 1000,
    ) -> VersionListing:
        found: list[ListedVersion] = []
        prefixes: list[bytes] = []
        last = b""
        for key in sorted(self.of(bucket)):
            if key <= after or not key.startswith(prefix):
                continue
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            group = key[: cut + len(delimiter)] if cut >= 0 else b""
            if group and prefixes and prefixes[-1] == group:
                continue
            if len(found) + len(prefixes) == limit:
                return VersionListing(found, prefixes, last)
            if group:
                prefixes.append(group)
                last = group + b"\xff" * 20
            else:
                info = self.of(bucket)[key].info
                name = next(iter(info.checksums), "")
                found.append(
                    ListedVersion(
                        key,
                        NULL_VERSION,
                        info.size,
                        info.modified_ms,
                        info.etag,
                        info.storage_class,
                        name,
                        info.checksum_type,
                        info.owner,
                    )
                )
                last = key
        return VersionListing(found, prefixes, None)

    async def list_versions(
        self, bucket: BucketRecord, *, prefix: bytes = b"", after: bytes = b"", after_version: str = "", delimiter: bytes = b"",  # noqa: E501
        limit: int = 1000,
    ) -> VersionListing:  # fmt: skip
        return self._listed(bucket, prefix=prefix, after=after, delimiter=delimiter, limit=limit)

    # --- multipart

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
        upload_id = base64.urlsafe_b64encode(next(self._upload_numbers).to_bytes(16, "big")).decode().rstrip("=")
        info = UploadInfo(key, upload_id, self.now_ms(), owner, meta.storage_class, algorithm, checksum_type)
        self.uploads[upload_id] = Upload(info, meta)
        return info

    def upload(self, key: bytes, upload_id: str) -> Upload:
        found = self.uploads.get(upload_id)
        if found is None or found.info.key != key:
            raise errors.NoSuchUpload(UploadId=upload_id)
        return found

    async def put_part(
        self, bucket: BucketRecord, key: bytes, upload_id: str, number: int, body: Body, checks: BodyChecks
    ) -> PutResult:
        upload = self.upload(key, upload_id)
        kept = upload.info.algorithm or api.DEFAULT_ALGORITHM
        if kept not in checks.algorithms:
            checks = replace(checks, algorithms=(*checks.algorithms, kept))
        data, computed = await self.read(body, checks)
        return self.store_part(upload, number, data, computed)

    def store_part(self, upload: Upload, number: int, data: bytes, computed: dict[str, str]) -> PutResult:
        name = upload.info.algorithm or api.DEFAULT_ALGORITHM
        part = PartInfo(number, len(data), hashlib.md5(data).hexdigest(), self.now_ms(), name, computed.get(name, ""))
        upload.parts[number] = (part, data)
        return PutResult(part.etag, NULL_VERSION, part.size, computed, "", part.modified_ms)

    async def copy_part(
        self, source_bucket: BucketRecord, source_key: bytes, span: RangeSpec | None, bucket: BucketRecord, key: bytes, upload_id: str,  # noqa: E501
        number: int, *, version_id: str = "", source_conditions: ReadConditions = ANY_READ,
    ) -> PutResult:  # fmt: skip
        upload = self.upload(key, upload_id)
        source = self.find(source_bucket, source_key, version_id)
        self.check_read(source.info, source_conditions)
        first, length = (
            (0, source.info.size) if span is None else (span.first or 0, (span.last or 0) + 1 - (span.first or 0))
        )
        if first + length > source.info.size:
            raise errors.InvalidRange()
        data = source.data[first : first + length]
        name = upload.info.algorithm or api.DEFAULT_ALGORITHM
        return self.store_part(upload, number, data, {name: checksum(name, data)})

    async def list_parts(
        self, bucket: BucketRecord, key: bytes, upload_id: str, *, after: int = 0, limit: int = 1000
    ) -> tuple[UploadInfo, list[PartInfo], int | None]:
        upload = self.upload(key, upload_id)
        behind = [upload.parts[number][0] for number in sorted(upload.parts) if number > after]
        return upload.info, behind[:limit], behind[limit - 1].number if len(behind) > limit else None

    async def list_uploads(
        self, bucket: BucketRecord, *, prefix: bytes = b"", after_key: bytes = b"", after_upload: str = "", delimiter: bytes = b"",  # noqa: E501
        limit: int = 1000,
    ) -> tuple[list[UploadInfo], list[bytes], tuple[bytes, str] | None]:  # fmt: skip

        def behind(info: UploadInfo) -> bool:
            return (info.key, info.upload_id) > (after_key, after_upload) if after_upload else info.key > after_key

        found = sorted(
            (
                u.info
                for u in self.uploads.values()
                if u.done is None and u.info.key.startswith(prefix) and behind(u.info)
            ),
            key=lambda info: (info.key, info.upload_id),
        )
        page = found[:limit]
        return page, [], (page[-1].key, page[-1].upload_id) if len(found) > limit else None

    async def complete(
        self, bucket: BucketRecord, key: bytes, upload_id: str, parts: Sequence[CompletedPart], *, owner: str,
        checksums: Mapping[str, str] | None = None, checksum_type: str = "", declared_size: int | None = None,
        conditions: WriteConditions = ANY_WRITE,
    ) -> PutResult:  # fmt: skip
        upload = self.upload(key, upload_id)
        if upload.done is not None and upload.done[0] == list(parts):
            return upload.done[1]
        self.check_write(self.of(bucket).get(key), conditions)
        data = b""
        digests = b""
        sealed = []
        for position, wanted in enumerate(parts):
            part, content = upload.parts.get(wanted.number, (None, b""))
            if part is None or part.etag != wanted.etag:
                raise errors.InvalidPart(PartNumber=str(wanted.number))
            if part.size < api.PART_BYTES_MIN and position + 1 < len(parts):
                raise errors.EntityTooSmall()
            data += content
            digests += bytes.fromhex(part.etag)
            sealed.append(SealedPart(wanted.number, part.size, part.etag, part.checksum))
        name = upload.info.algorithm or api.DEFAULT_ALGORITHM
        sums = {name: checksum(name, data)}
        if upload.info.checksum_type == "COMPOSITE":
            joined = b"".join(base64.b64decode(part.checksum) for part in sealed)
            sums = {name: f"{checksum(name, joined)}-{len(parts)}"}
        if any(sums.get(name) != value for name, value in (checksums or {}).items()):
            raise errors.BadDigest()
        etag = f"{hashlib.md5(digests).hexdigest()}-{len(parts)}"
        kind = upload.info.checksum_type or "FULL_OBJECT"
        result = self.store(
            bucket, key, data, upload.meta, etag, owner, checksums=sums, checksum_type=kind, parts=tuple(sealed)
        )
        upload.done = (list(parts), result)
        return result

    async def abort(self, bucket: BucketRecord, key: bytes, upload_id: str) -> None:
        upload = self.upload(key, upload_id)
        if upload.done is not None:
            raise errors.NoSuchUpload(UploadId=upload_id)
        del self.uploads[upload_id]
