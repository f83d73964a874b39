"""Values of registers: what the metadata ring keeps about buckets, objects, uploads, users. Pure.

In the clear: names, sizes, times, version ids, placement. Sealed: ETag, checksums, content type, user metadata, tags
(SealedMeta), and what a
listing prints (SealedList). See FORMATS.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from storaged.cluster.layout import Profile
from storaged.meta.storage.row_head import message_of, with_head
from storaged.wire import Message, decode, encode

NULL_VERSION = "null"
PARTS_INLINE_MAX = 32


class Run(Message, frozen=True):
    """Where the blocks ``first .. first + count - 1`` of a part are: coded k+m under the layout of ``epoch``; fragment
    i is on the i-th disk that
    ``objects.code.place`` names first for (data id, epoch, profile), but for ``moved``: index -> disk id."""

    first: int
    count: int
    k: int
    m: int
    epoch: int
    moved: dict[int, str] = msgspec.field(default_factory=dict)

    @property
    def profile(self) -> Profile:
        return Profile(self.k, self.m)


class PartEntry(Message, frozen=True):
    """One sealed byte stream. ``size`` is of the plaintext, ``header`` the SOV1 header of 64 bytes (chunk size in byte
    5), ``block_cells`` the data cells
    in a block (a multiple of the target profile's k, so that a run recoded with another k keeps the block's borders),
    ``target`` the profile it should have,
    as text. ``inline``: the sealed chunks themselves, when they are kept in the record (no runs then)."""

    number: int
    data_id: bytes
    size: int
    header: bytes
    block_cells: int
    target: str
    runs: tuple[Run, ...]
    inline: bytes = b""
    small: bool = False
    """Copies beside the register (``Value.payload`` is this data id): one block, k = 1, on the register's replicas."""


class Version(Message, frozen=True):
    """One version of an object. ``parts`` holds up to 32; a longer manifest is the chain of pages that ``manifest``
    names (xxh3-128, newest first; each page
    is a PartsPage). ``wrapped_key`` is the DEK, 112 bytes, bound to (bucket id, key, version id, data id of the first
    part or of the upload).
    ``meta`` is a sealed SealedMeta (SOV1 layout, label ``sov.meta.v1``), ``listing`` a sealed SealedList. ``pages``:
    the hashes of all pages that the version
    needs, those of ``manifest`` and those of what is sealed about its parts: storage nodes, which can't open the
    latter, keep what is named here.

    The fields up to ``listing`` are what a list prints: ``ListedFields``."""

    version_id: str
    modified_ms: int
    size: int
    owner: str
    bucket_key: int
    context_id: bytes
    listing: bytes
    delete_marker: bool
    wrapped_key: bytes
    meta: bytes
    parts: tuple[PartEntry, ...] = ()
    manifest: bytes = b""
    multipart: bool = False
    part_count: int = 1
    pages: tuple[bytes, ...] = ()


class ObjectRecord(Message, frozen=True):
    """The versions of one key, newest first. No versions: deleted (the register then is a tombstone). ``encode_object``
    makes a register's body of it.
    """

    versions: tuple[Version, ...]


class ListedFields(Message, frozen=True, gc=False):
    """The first fields of a Version. (A thousand at a time: the collector need not know of them.)"""

    version_id: str
    modified_ms: int
    size: int
    owner: str
    bucket_key: int
    context_id: bytes
    listing: bytes


class _VersionOfOld(Message, frozen=True):
    """A Version as it lay in records before these had a head."""

    version_id: str
    delete_marker: bool
    modified_ms: int
    size: int
    owner: str
    bucket_key: int
    context_id: bytes
    wrapped_key: bytes
    meta: bytes
    listing: bytes
    parts: tuple[PartEntry, ...] = ()
    manifest: bytes = b""
    multipart: bool = False
    part_count: int = 1
    pages: tuple[bytes, ...] = ()

    def renewed(self) -> Version:
        return Version(**{name: getattr(self, name) for name in Version.__struct_fields__})


class _ObjectRecordOfOld(Message, frozen=True):
    versions: tuple[_VersionOfOld, ...]


assert ListedFields.__struct_fields__ == Version.__struct_fields__[: len(ListedFields.__struct_fields__)]
assert len(Version.__struct_fields__) < 16, "the array of a version begins with one byte"


def encode_object(record: ObjectRecord) -> bytes:
    """The body of an object's register, whose head are the ListedFields of the newest version."""
    listed = _listed(record.versions[0])
    start = 3 if len(record.versions) < 16 else 5  # the arrays of the record, of the versions, of the first one
    return with_head(encode(record), start, start + len(encode(listed)) - 1)


def decode_object(body: bytes) -> ObjectRecord:
    """Raises msgspec.MsgspecError."""
    message = message_of(body)
    if message is not None:
        return decode(message, ObjectRecord)
    return ObjectRecord(tuple(version.renewed() for version in decode(body, _ObjectRecordOfOld).versions))


def decode_version(data: bytes) -> Version:
    """A version by itself, as an upload that is being completed pins it. Raises msgspec.MsgspecError."""
    try:
        return decode(data, Version)
    except msgspec.ValidationError:
        return decode(data, _VersionOfOld).renewed()


def decode_heads(heads: Sequence[bytes]) -> list[ListedFields]:
    """What is to be listed of rows, from their bodies' heads, or the whole bodies of those that have none. Raises
    msgspec.MsgspecError.
    """
    try:
        return decode(
            b"\xdd" + len(heads).to_bytes(4, "big") + b"\x97".join([b"", *heads]), list[ListedFields]
        )  # an array of arrays of seven
    except msgspec.MsgspecError:
        return [_listed_fields(head) for head in heads]


def _listed_fields(head: bytes) -> ListedFields:
    """A head begins with a version id, a text, and a body with an array: neither decodes as the other."""
    try:
        return decode(b"\x97" + head, ListedFields)
    except msgspec.MsgspecError:
        versions = decode_object(head).versions
        if not versions:
            raise msgspec.ValidationError("a listed record has no version") from None
        return _listed(versions[0])


def _listed(version: Version) -> ListedFields:
    return ListedFields(
        version.version_id,
        version.modified_ms,
        version.size,
        version.owner,
        version.bucket_key,
        version.context_id,
        version.listing,
    )


class PartsPage(Message, frozen=True):
    """``next``: hash of the following page, empty at the end. Up to 256 parts a page."""

    parts: tuple[PartEntry, ...]
    next: bytes = b""


class SealedPart(Message, frozen=True):
    """What a part's ETag and checksum are (GetObjectAttributes, partNumber reads), and which data it is: a PartEntry
    lies in the clear, and counts only
    where it agrees with this."""

    number: int
    size: int
    etag: str
    checksum: str = ""
    data_id: bytes = b""

    def names(self, entry: PartEntry) -> bool:
        return (entry.number, entry.size, entry.data_id) == (self.number, self.size, self.data_id)


class SealedPartsPage(Message, frozen=True):
    """What the parts of an object of more than 32 are: a page of up to 1,000, sealed under the version's DEK (label
    ``sov.parts.v1``) before it is hashed and stored.
    ``next``: hash of the following page, empty at the end."""

    parts: tuple[SealedPart, ...]
    next: bytes = b""


class SealedMeta(Message, frozen=True):
    """Sealed in the record. ``headers``: content-type, cache-control, content-disposition, content-encoding,
    content-language, expires, lower case, as they were sent.
    ``user``: x-amz-meta-*, names without the prefix. ``checksums``: algorithm (``api.CHECKSUM_ALGORITHMS``) -> base64,
    with ``-N`` when composite.
    ``checksum_type``: FULL_OBJECT or COMPOSITE. ``parts`` only for multipart objects of up to 10,000 parts (sealed in
    pages of its own when there are more than 32).
    ``size``: the object's, which the record also has in the clear: the two must agree."""

    etag: str
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    user: dict[str, str] = msgspec.field(default_factory=dict)
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    checksums: dict[str, str] = msgspec.field(default_factory=dict)
    checksum_type: str = ""
    storage_class: str = "STANDARD"
    parts: tuple[SealedPart, ...] = ()
    parts_page: bytes = b""
    size: int = -1


class SealedList(Message, frozen=True, gc=False):
    """What a list prints: ETag (hex, ``-N`` for multipart), checksum algorithm and type, storage class."""

    etag: str
    algorithm: str = ""
    checksum_type: str = ""
    storage_class: str = "STANDARD"


USUAL_CODE = "N"
"""Stands in sealed fields for CRC64NVME of the whole object: what an object gets that came without a checksum. A row of
a small
object is half a kilobyte, and LMDB fits rows into pages: written out, name and type cost such an object 3% of its disk
space."""

_USUAL = ("CRC64NVME", "FULL_OBJECT")


def brief_meta(meta: SealedMeta) -> SealedMeta:
    """As it is sealed: with USUAL_CODE where that is its only checksum."""
    if meta.checksum_type == _USUAL[1] and len(meta.checksums) == 1 and _USUAL[0] in meta.checksums:
        return msgspec.structs.replace(meta, checksums={USUAL_CODE: meta.checksums[_USUAL[0]]}, checksum_type="")
    return meta


def full_meta(meta: SealedMeta) -> SealedMeta:
    """What ``brief_meta`` made, written out again; metadata from before there was a code is as it was."""
    if USUAL_CODE in meta.checksums:
        return msgspec.structs.replace(meta, checksums={_USUAL[0]: meta.checksums[USUAL_CODE]}, checksum_type=_USUAL[1])
    return meta


def listed_checksum(algorithm: str, checksum_type: str) -> tuple[str, str]:
    """Algorithm and type that a list prints, from the fields of a SealedList."""
    return _USUAL if algorithm == USUAL_CODE else (algorithm, checksum_type)


def full_list(listed: SealedList) -> SealedList:
    """Written out, as ``full_meta``."""
    algorithm, checksum_type = listed_checksum(listed.algorithm, listed.checksum_type)
    return msgspec.structs.replace(listed, algorithm=algorithm, checksum_type=checksum_type)


class BucketRecord(Message, frozen=True):
    """``bucket/NAME`` in the system table. ``state``: active, deleting, deleted. ``countries`` empty: whatever the
    cluster's policy allows.

    ``shards``: how many index shards there are. ``shard_list``: their numbers, one byte each, where the bucket has
    countries: the partitions of
    these lie inside them. Empty: 0 up to ``shards``; so it was in all buckets at first.
    ``authenticator``: HMAC by a keyring key over (register name, sequence, the other fields); a record that does not
    verify is refused.
    ``signature``: what a node without keys verifies, over the public part (``objects.system.public``), by the key that
    ``signer`` names."""

    name: str
    id: bytes
    owner: str
    created_ms: int
    state: str
    shards: int
    region: str
    countries: tuple[str, ...] = ()
    profile: str = ""
    nonce: bytes = b""
    object_lock: bool = False
    tags: bytes = b""
    authenticator: bytes = b""
    shard_list: bytes = b""
    signer: bytes = b""
    signature: bytes = b""

    @property
    def shard_numbers(self) -> bytes:
        """The numbers of the index shards: a key's shard is the one at (hash of the key) modulo their count."""
        return self.shard_list or _FIRST_SHARDS[: self.shards]


_FIRST_SHARDS = bytes(range(256))
_AUTHENTICATOR_AT = BucketRecord.__struct_fields__.index("authenticator")


def authenticated_bytes(body: bytes) -> bytes:
    """What the authenticator of a bucket's record is over: the record as it lies in ``body``, with an empty
    authenticator.

    It has as many fields as when it was written: records from before have fewer. Empty for one that ends before its
    authenticator."""
    fields = decode(body, list[Any])
    if len(fields) <= _AUTHENTICATOR_AT:
        return b""
    fields[_AUTHENTICATOR_AT] = b""
    return encode(fields)


class UserRecord(Message, frozen=True):
    """``user/ACCESS_KEY``. ``sealed`` is the secret key and the display name under the keyring, bound to the register's
    name; ``authenticator`` as in BucketRecord.
    """

    access_key: str
    user_id: str
    name: str
    created_ms: int
    sealed: bytes
    email: str = ""
    authenticator: bytes = b""


class UploadRecord(Message, frozen=True):
    """A multipart upload: Open -> Completing(pinned) -> Done(result), or Open | Completing -> Aborted. One DEK an
    upload, wrapped for (bucket id, key, upload id).
    ``meta``: sealed SealedMeta given at Create. ``result``: sealed answer of Complete, kept for retries. ``pinned``:
    while completing, the encoded Version that is being
    made of it; its parts are referred to from here even when their rows are replaced. ``pinned_sequence``: the object
    register's sequence when it was pinned, so that a
    Complete taken up again can tell that nothing happened in between. ``request_digest``: of the Complete, keyed by
    the upload's DEK (33 bytes; 32 in records from before,
    which were not keyed and are rewritten when they are touched). ``changed_ms``: when the state last changed."""

    upload_id: bytes
    state: str
    owner: str
    created_ms: int
    bucket_key: int
    context_id: bytes
    wrapped_key: bytes
    meta: bytes
    checksum_algorithm: str = ""
    checksum_type: str = ""
    request_digest: bytes = b""
    result: bytes = b""
    pinned: bytes = b""
    pinned_sequence: int = 0
    changed_ms: int = 0


class CompleteResult(Message, frozen=True):
    """What Complete answered, sealed in ``UploadRecord.result`` (label ``sov.result.v1``)."""

    etag: str
    version_id: str
    size: int
    checksums: dict[str, str]
    checksum_type: str
    modified_ms: int


class PartRecord(Message, frozen=True):
    """One uploaded part of an open upload; every attempt has its own data id. ``sealed``: SealedPart and the part's
    ETag under the upload's DEK.
    """

    entry: PartEntry
    modified_ms: int
    sealed: bytes
