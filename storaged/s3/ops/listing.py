"""Listings: objects (both versions of the call), versions, uploads. A page of 1,000 keys is a list of f-strings."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from storaged import errors
from storaged.objects.api import UploadInfo
from storaged.objects.brief import listed_checksum
from storaged.objects.listing_types import ListedVersion, Listing, Show, VersionListing
from storaged.objects.records import SealedList
from storaged.s3 import headers as h
from storaged.s3 import xml
from storaged.s3.context import Front
from storaged.s3.ops.acl import is_enforced, names_of
from storaged.s3.reply import Reply, xml_reply
from storaged.s3.request import Request

PAGE_MAX = 1000
_BEYOND = b"\xff"
"""It sorts after every key with a given prefix, since no UTF-8 contains it."""


@dataclass(frozen=True, slots=True)
class _Params:
    """The parameters that all listings have."""

    prefix: bytes
    delimiter: bytes
    limit: int
    url: bool

    def key(self, key: bytes) -> str:
        return xml.escape_key(key, self.url)

    def common(self, bucket: str, tag: str = "Name", *, plain_prefix: bool = False) -> str:
        """``plain_prefix``: the first version of ListObjects does not encode it, and its clients do not decode it."""
        prefix = xml.escape_key(self.prefix, self.url and not (plain_prefix and xml.representable(self.prefix)))
        return (
            f"{xml.element(tag, bucket)}<Prefix>{prefix}</Prefix>"
            f"{f'<Delimiter>{self.key(self.delimiter)}</Delimiter>' if self.delimiter else ''}"
            f"{'<EncodingType>url</EncodingType>' if self.url else ''}"
        )

    def prefixes(self, prefixes: Sequence[bytes]) -> str:
        return "".join(f"<CommonPrefixes><Prefix>{self.key(prefix)}</Prefix></CommonPrefixes>" for prefix in prefixes)

    def after(self, marker: bytes) -> bytes:
        """Where to continue after ``marker``. If it is itself a common prefix, that is after all keys with it."""
        if self.delimiter and marker.startswith(self.prefix):
            rest = marker[len(self.prefix) :]
            if rest.find(self.delimiter) == len(rest) - len(self.delimiter) >= 0:
                return marker + _BEYOND
        return marker


def _params_of(request: Request, limit_name: str = "max-keys") -> _Params:
    query = request.query
    wanted = request.headers.get("x-amz-optional-object-attributes", "RestoreStatus")
    # no object is archived, so none has a RestoreStatus
    if any(name.strip() != "RestoreStatus" for name in wanted.split(",")):
        raise errors.InvalidArgument(
            "Invalid attribute name specified.", ArgumentName="x-amz-optional-object-attributes", ArgumentValue=wanted
        )
    encoding = query.get("encoding-type")
    if encoding not in (None, "url"):
        raise errors.InvalidArgument(
            "Invalid Encoding Method specified in Request", ArgumentName="encoding-type", ArgumentValue=encoding
        )
    limit = min(h.integer(limit_name, query[limit_name], 0, 2**31 - 1), PAGE_MAX) if query.get(limit_name) else PAGE_MAX
    return _Params(query.get("prefix", "").encode(), query.get("delimiter", "").encode(), limit, encoding == "url")


async def _page(front: Front, request: Request, params: _Params, after: bytes, show: Show) -> Listing:
    if params.limit == 0:
        return Listing()
    return await front.objects.list_objects(
        request.grant,
        prefix=params.prefix,
        after=params.after(after),
        delimiter=params.delimiter,
        limit=params.limit,
        show=show,
    )


async def _owned_page(
    front: Front, request: Request, params: _Params, after: bytes, *, owners: bool = True
) -> tuple[Listing, list[str]]:
    """A page, and its printed rows. ``owners``: with the owner of each: the bucket's, where its rule is that one."""
    owner, bucket = "", request.bucket_record
    if owners:
        if not is_enforced(front.buckets.configuration_of(bucket)):
            page = await _page(front, request, params, after, _shown_with_owner)
            names = xml.escape_keys(page.keys, params.url)
            printed = await _owners(front, request, {its for _, its in page.shown})
            return page, [
                f"<Contents><Key>{name}{shown}{printed[its]}</Contents>"
                for name, (shown, its) in zip(names, page.shown, strict=True)
            ]
        owner = xml.owner_on_record(bucket.owner, request.who)
    page = await _page(front, request, params, after, _shown)
    names = xml.escape_keys(page.keys, params.url)
    return page, [
        f"<Contents><Key>{name}{shown}{owner}</Contents>" for name, shown in zip(names, page.shown, strict=True)
    ]


async def _owners(front: Front, request: Request, ids: Set[str]) -> Mapping[str, str]:
    """The printed owner of objects by the id on record. Rows of the first versions may have none: the bucket's."""
    names, first = await names_of(front, request.who, ids), request.bucket_record.owner
    return {id_: xml.owner(id_ or first, names.get(id_ or first, "")) for id_ in ids}


def _shown_with_owner(
    sizes: Sequence[int], times_ms: Sequence[int], printed: Sequence[SealedList], owners: Iterable[str]
) -> list[tuple[str, str]]:
    return list(zip(_shown(sizes, times_ms, printed, ()), owners, strict=True))


def _shown(
    sizes: Sequence[int], times_ms: Sequence[int], printed: Sequence[SealedList], _owners: Iterable[str]
) -> list[str]:
    """What a list has for each object, from the end of its key to its storage class. A call formats a thousand objects:
    it formats each distinct time and kind of object once, before the one expression for each row."""
    times = xml.iso_times(times_ms)
    kinds = [(entry.algorithm, entry.checksum_type, entry.storage_class) for entry in printed]
    around = {kind: _around_size(*kind) for kind in set(kinds)}
    if len(around) == 1:
        [(before, after)] = around.values()
        return [
            f"</Key><LastModified>{time}</LastModified><ETag>&quot;{entry.etag}{before}{size}{after}"
            for time, entry, size in zip(times, printed, sizes, strict=True)
        ]
    return [
        f"</Key><LastModified>{time}</LastModified><ETag>&quot;{entry.etag}{around[kind][0]}{size}{around[kind][1]}"
        for time, entry, size, kind in zip(times, printed, sizes, kinds, strict=True)
    ]


def _around_size(algorithm: str, checksum_type: str, storage_class: str) -> tuple[str, str]:
    """What a list has before and after an object's size."""
    return (
        f"&quot;</ETag>{_checksum(*listed_checksum(algorithm, checksum_type))}<Size>",
        f"</Size><StorageClass>{storage_class}</StorageClass>",
    )


def _checksum(algorithm: str, checksum_type: str) -> str:
    return (
        f"<ChecksumAlgorithm>{algorithm}</ChecksumAlgorithm><ChecksumType>{checksum_type}</ChecksumType>"
        if algorithm
        else ""
    )


def _following(page: Listing | VersionListing) -> bytes | None:
    """The marker of the next page as a client can send it: a key, or the common prefix that ended this page. (A page
    that is not the last one may be short, even empty: the object plane bounds how many deleted keys it skips for one
    page.)"""
    return None if page.next_after is None else page.next_after.rstrip(_BEYOND)


async def list_objects_v1(front: Front, request: Request) -> Reply:
    """NextMarker is there only when it differs from the last key, as on AWS."""
    params = _params_of(request)
    marker = request.query.get("marker", "").encode()
    page, rows = await _owned_page(front, request, params, marker)
    following = _following(page)
    last = page.keys[-1] if page.keys else b""
    next_marker = (
        f"<NextMarker>{params.key(following)}</NextMarker>"
        if following is not None and (params.delimiter or following != last)
        else ""
    )
    return xml_reply(
        xml.document(
            "ListBucketResult",
            params.common(request.bucket, plain_prefix=True),
            f"<Marker>{params.key(marker)}</Marker>{next_marker}<MaxKeys>{params.limit}</MaxKeys>",
            xml.boolean("IsTruncated", following is not None),
            *rows,
            params.prefixes(page.prefixes),
        )
    )


async def list_objects_v2(front: Front, request: Request) -> Reply:
    query = request.query
    if query.get("list-type") != "2":
        raise errors.InvalidArgument(
            "Invalid list-type", ArgumentName="list-type", ArgumentValue=query.get("list-type", "")
        )
    params = _params_of(request)
    start_after = query.get("start-after", "").encode()
    token = query.get("continuation-token")
    after = _from_token(token) if token else start_after
    page, rows = await _owned_page(front, request, params, after, owners=query.get("fetch-owner") == "true")
    truncated = page.next_after is not None
    return xml_reply(
        xml.document(
            "ListBucketResult",
            params.common(request.bucket),
            f"<MaxKeys>{params.limit}</MaxKeys><KeyCount>{len(page.keys) + len(page.prefixes)}</KeyCount>",
            xml.boolean("IsTruncated", truncated),
            xml.element("ContinuationToken", token) if token is not None else "",
            (
                f"<NextContinuationToken>{_to_token(page.next_after)}</NextContinuationToken>"
                if page.next_after is not None
                else ""
            ),
            f"<StartAfter>{params.key(start_after)}</StartAfter>" if start_after else "",
            *rows,
            params.prefixes(page.prefixes),
        )
    )


def _to_token(after: bytes) -> str:
    """One byte after a prefix means the same as the many that the object plane uses."""
    short = after.rstrip(_BEYOND)
    return base64.urlsafe_b64encode(short if short == after else short + _BEYOND).decode()


def _from_token(token: str) -> bytes:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise errors.InvalidArgument(
            "The continuation token provided is incorrect", ArgumentName="continuation-token"
        ) from None


async def list_versions(front: Front, request: Request) -> Reply:
    """Versions and delete markers, newest first within a key. An object in a bucket that never had versioning is listed
    as its own version ``null``.
    """
    params = _params_of(request)
    key_marker = request.query.get("key-marker", "").encode()
    version_marker = request.query.get("version-id-marker", "")
    if version_marker and not key_marker:
        raise errors.InvalidArgument(
            "A version-id marker cannot be specified without a key marker.", ArgumentName="version-id-marker"
        )
    page = VersionListing()
    if params.limit:
        page = await front.objects.list_versions(
            request.grant,
            prefix=params.prefix,
            after=params.after(key_marker),
            after_version=version_marker,
            delimiter=params.delimiter,
            limit=params.limit,
        )
    found = {item.owner for item in page.versions}
    owners: Mapping[str, str]
    if is_enforced(front.buckets.configuration_of(request.bucket_record)):
        owners = dict.fromkeys(found, xml.owner_on_record(request.bucket_record.owner, request.who))
    else:
        owners = await _owners(front, request, found)
    following = _following(page)
    next_markers = ""
    if following is not None:
        last = page.versions[-1] if page.versions else None
        version = page.next_version or (last.version_id if last is not None and last.key == following else "")
        next_markers = (
            f"<NextKeyMarker>{params.key(following)}</NextKeyMarker>{xml.optional('NextVersionIdMarker', version)}"
        )
    return xml_reply(
        xml.document(
            "ListVersionsResult",
            params.common(request.bucket),
            f"<KeyMarker>{params.key(key_marker)}</KeyMarker>{xml.element('VersionIdMarker', version_marker)}",
            f"{next_markers}<MaxKeys>{params.limit}</MaxKeys>",
            xml.boolean("IsTruncated", following is not None),
            "".join(_version(params, item, owners[item.owner]) for item in page.versions),
            params.prefixes(page.prefixes),
        )
    )


def _version(params: _Params, item: ListedVersion, owner: str) -> str:
    head = (
        f"<Key>{params.key(item.key)}</Key><VersionId>{xml.escape(item.version_id)}</VersionId>"
        f"{xml.boolean('IsLatest', item.latest)}<LastModified>{xml.iso_time(item.modified_ms)}</LastModified>"
    )
    if item.delete_marker:
        return f"<DeleteMarker>{head}{owner}</DeleteMarker>"
    return (
        f"<Version>{head}<ETag>&quot;{item.etag}&quot;</ETag>{_checksum(item.algorithm, item.checksum_type)}"
        f"<Size>{item.size}</Size>{owner}<StorageClass>{item.storage_class}</StorageClass></Version>"
    )


async def list_uploads(front: Front, request: Request) -> Reply:
    params = _params_of(request, "max-uploads")
    query = request.query
    key_marker = query.get("key-marker", "").encode()
    upload_marker = query.get("upload-id-marker", "") if key_marker else ""
    uploads: list[UploadInfo] = []
    prefixes: list[bytes] = []
    following: tuple[bytes, str] | None = None
    if params.limit:
        try:
            uploads, prefixes, following = await front.objects.list_uploads(
                request.grant,
                prefix=params.prefix,
                after_key=params.after(key_marker),
                after_upload=upload_marker,
                delimiter=params.delimiter,
                limit=params.limit,
            )
        except errors.NoSuchUpload:
            raise errors.InvalidArgument(
                "Invalid uploadId marker", ArgumentName="upload-id-marker", ArgumentValue=upload_marker
            ) from None
    names = await names_of(front, request.who, {id_ for its in uploads for id_ in (its.owner, its.initiator)})
    rows = "".join(_upload(params, upload, names) for upload in uploads)
    next_markers = ""
    if following is not None:
        key, upload_id = following
        next_markers = (
            f"<NextKeyMarker>{params.key(key)}</NextKeyMarker>{xml.optional('NextUploadIdMarker', upload_id)}"
        )
    return xml_reply(
        xml.document(
            "ListMultipartUploadsResult",
            params.common(request.bucket, "Bucket"),
            f"<KeyMarker>{params.key(key_marker)}</KeyMarker>{xml.element('UploadIdMarker', upload_marker)}",
            next_markers,
            f"<MaxUploads>{params.limit}</MaxUploads>{xml.boolean('IsTruncated', following is not None)}",
            rows,
            params.prefixes(prefixes),
        )
    )


def _upload(params: _Params, upload: UploadInfo, names: Mapping[str, str]) -> str:
    return (
        f"<Upload><Key>{params.key(upload.key)}</Key>{xml.element('UploadId', upload.upload_id)}"
        f"{xml.owner(upload.initiator, names.get(upload.initiator, ''), 'Initiator')}"
        f"{xml.owner(upload.owner, names.get(upload.owner, ''))}"
        f"<StorageClass>{upload.storage_class}</StorageClass><Initiated>{xml.iso_time(upload.created_ms)}</Initiated>"
        f"{xml.optional('ChecksumAlgorithm', upload.algorithm)}"
        f"{xml.optional('ChecksumType', upload.checksum_type)}</Upload>"
    )
