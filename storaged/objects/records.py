"""Values of registers: the records of buckets, objects, uploads and users in the metadata ring. Pure.

In the clear: names, sizes, times, version ids, placement. Sealed: ETag, checksums, content type, user metadata and tags
(SealedMeta), and the fields that a listing prints (SealedList). See FORMATS.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from storaged.cluster.layout import Profile
from storaged.meta.storage.row_head import HEAD_MARK, LEAD_BYTES, message_of, with_head
from storaged.objects.configuration.access import AclEntry
from storaged.objects.pending_events import PendingEvent
from storaged.objects.sharing import Arrival, Borrowed, Borrower, Departure
from storaged.wire import Message, decode, encode

NULL_VERSION = "null"
NAMED_VERSION = "v"
"""``Version.version_id`` of all others. The id that a client sees is ``code.version_names.version_name``."""
PARTS_INLINE_MAX = 32


class Run(Message, frozen=True):
    """Where the blocks ``first .. first + count - 1`` of a part are: coded k+m under the layout of ``epoch``. Fragment
    i is on the i-th disk that ``objects.code.place`` names for (data id, epoch, profile), or on ``moved[i]``, a disk
    id.
    """

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
    """One sealed byte stream.

    ``size``: of the plaintext, in bytes. ``header``: the SOV1 header of 64 bytes (chunk size in byte 5).
    ``block_cells``: data cells of a block, of several blocks a multiple of the target profile's k, so that a run
    recoded with another k keeps the block's borders. ``target``: the profile that it should have, as text. ``inline``:
    the sealed chunks, when they are in the record; then there are no runs.
    """

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
    copy_hash: bytes = b""
    """The hash of these copies (``hashes.fragment_hash`` of the sealed bytes), by which nodes without keys tell a true
    one. Empty in records of version 0.1.0.
    """


class Version(Message, frozen=True):
    """One version of an object.

    ``parts``: up to 32. A longer manifest is the chain of pages that ``manifest`` names (``hashes.page_hash``, newest
    first; each page is a PartsPage). ``wrapped_key``: the DEK, 112 bytes, bound to (bucket id, key, version id,
    ``context_id``). ``meta``: a sealed SealedMeta (SOV1, label ``sov.meta.v1``, or ``sov.meta.v2`` with a
    SealedEncryption). ``listing``: a sealed SealedList. ``pages``: the hashes of all pages that the version needs,
    those of ``manifest`` and those of the sealed list of its parts. Storage nodes, which can't open the latter, keep
    the pages named here.

    The fields up to ``listing`` are ``ListedFields``, which a list prints.
    """

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


class Lock(Message, frozen=True):
    """What keeps a version (``code.lock``): a retention of ``mode`` (empty: none) until ``until_ms``, a legal hold.
    ``released``: a client has said that there is no legal hold. That keeps nothing; a read shows the hold as off, where
    it shows none of a version of which nobody ever said anything."""

    mode: str = ""
    until_ms: int = 0
    hold: bool = False
    released: bool = False


class Kept(Message, frozen=True):
    """What is kept beside a version. ``ordinal``: the register's sequence when it was added, by which it is ordered."""

    ordinal: int
    lock: Lock | None = None


class PageRef(Message, frozen=True):
    """A page of older versions. ``newest``, ``oldest``: the ordinals of its first and last version. ``count``: how many
    versions it has, those on pages under it included.
    """

    hash: bytes
    newest: int
    oldest: int
    count: int


class VersionsPage(Message, frozen=True):
    """An immutable page of older versions, newest first: a leaf with ``versions`` and, in the same order, ``kept``; or
    a branch with ``refs`` to such pages.
    """

    versions: tuple[Version, ...] = ()
    kept: tuple[Kept, ...] = ()
    refs: tuple[PageRef, ...] = ()


class History(Message, frozen=True):
    """What a record has besides the versions in it, in a bucket with versioning.

    ``kept``: of each version in the record, in the same order. ``levels``: the pages with older versions, by level
    (``code.history``). ``null_at``: the ordinal of the null version, if it lies on a page; else -1. ``copied``: the
    part whose small copies ``Value.payload`` names, if its version lies on a page: nodes verify copies by it.
    ``outbox``: events that are not delivered yet, oldest first. With them alone, a key without versioning has a
    history too.
    """

    kept: tuple[Kept, ...]
    levels: tuple[tuple[PageRef, ...], ...] = ()
    null_at: int = -1
    copied: PartEntry | None = None
    outbox: tuple[PendingEvent, ...] = ()

    @property
    def is_unversioned(self) -> bool:
        """The key has no versioning: the record has a history only for its outbox, or because it shares data."""
        return not self.levels and self.kept in ((), (Kept(0),))


class ObjectRecord(Message, frozen=True):
    """The newest versions of one key, newest first. Without versions the key is deleted, and its register a tombstone.
    ``encode_object`` makes the register's body.

    ``history``: None in a bucket that never had versioning; such a record has one version, the null version.
    """

    versions: tuple[Version, ...]
    history: History | None = None


class Loan(Message, frozen=True):
    """Data of a key that versions of other keys read, whether or not a version of its own key still has it: the parts
    of a version, of which ``more`` are all but the first. ``uploaded``: they are of an upload, not of a PUT. Without a
    ``part`` they are on pages: ``manifest``, as of a Version, and ``pages``, the hashes of all of its pages.
    """

    part: PartEntry | None
    borrowers: tuple[Borrower, ...]
    more: tuple[PartEntry, ...] = ()
    uploaded: bool = False
    manifest: bytes = b""
    pages: tuple[bytes, ...] = ()

    @property
    def parts(self) -> tuple[PartEntry, ...]:
        """Those in the record."""
        return (self.part, *self.more) if self.part is not None else ()


class Sharing(Message, frozen=True):
    """What a record shares with those of other keys (``write.loans``). ``borrowed``: by the ordinals of the versions,
    which may lie on pages. ``departure``: None: the key is not being renamed. ``arrivals``: of renames to this key.
    """

    loans: tuple[Loan, ...] = ()
    borrowed: dict[int, Borrowed] = msgspec.field(default_factory=dict)
    departure: Departure | None = None
    arrivals: tuple[Arrival, ...] = ()


class SharingRecord(ObjectRecord, frozen=True):
    """A record that shares something. It has a history, so that no change takes it for one that has nothing else."""

    sharing: Sharing = msgspec.field(default_factory=Sharing)


def sharing_of(record: ObjectRecord) -> Sharing:
    return record.sharing if isinstance(record, SharingRecord) else Sharing()


class ListedFields(Message, frozen=True, gc=False):
    """The first fields of a Version. A page has a thousand; Python's garbage collector does not track them."""

    version_id: str
    modified_ms: int
    size: int
    owner: str
    bucket_key: int
    context_id: bytes
    listing: bytes


class _VersionOfOld(Message, frozen=True):
    """A Version in an old record, which has no head."""

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


class _MarkedRecord(Message, frozen=True):
    """How a SharingRecord is stored. Programs that do not know loans can't read it, because of its first field: so they
    refuse to change it, and can't lose what it shares.
    """

    mark: Literal["shares"]
    versions: tuple[Version, ...]
    history: History
    sharing: Sharing


_MARK = encode("shares")
_MARK_BYTES = len(_MARK)

assert ListedFields.__struct_fields__ == Version.__struct_fields__[: len(ListedFields.__struct_fields__)]
assert len(Version.__struct_fields__) < 16, "the array of a version begins with one byte"


def encode_object(record: ObjectRecord) -> bytes:
    """The body of an object's register. Its head is the ListedFields of the newest version."""
    if isinstance(record, SharingRecord):
        assert record.history is not None
        message, at = encode(_MarkedRecord("shares", record.versions, record.history, record.sharing)), _MARK_BYTES
    else:
        message, at = encode(record), 0
    if not record.versions:
        return with_head(message, 0, 0)
    listed = listed_fields(record.versions[0])
    at += 3 if len(record.versions) < 16 else 5  # the arrays of the record, of the versions, of the first one
    return with_head(message, at, at + len(encode(listed)) - 1)


def shares(body: bytes) -> bool:
    """Whether this is the body of a SharingRecord, as far as its first bytes tell."""
    return body[LEAD_BYTES + 1 : LEAD_BYTES + 1 + _MARK_BYTES] == _MARK and body[0] == HEAD_MARK


def decode_object(body: bytes) -> ObjectRecord:
    """Raises msgspec.MsgspecError."""
    message = message_of(body)
    if message is not None:
        try:
            record = decode(message, ObjectRecord)
        except msgspec.ValidationError:
            record = _decode_marked(message)
        if record.history is not None and len(record.history.kept) != len(record.versions):
            raise msgspec.ValidationError("a record keeps other versions than it has")
        return record
    return ObjectRecord(tuple(version.renewed() for version in decode(body, _ObjectRecordOfOld).versions))


def _decode_marked(message: bytes) -> ObjectRecord:
    found = decode(message, _MarkedRecord)
    return SharingRecord(found.versions, found.history, found.sharing)


def decode_version(data: bytes) -> Version:
    """A single version, as a completing upload pins it. Raises msgspec.MsgspecError."""
    try:
        return decode(data, Version)
    except msgspec.ValidationError:
        return decode(data, _VersionOfOld).renewed()


def decode_heads(heads: Sequence[bytes]) -> list[ListedFields]:
    """The listed fields of rows, from the heads of their bodies, or from the whole body of a row without a head. Raises
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
        return listed_fields(versions[0])


def listed_fields(version: Version) -> ListedFields:
    return ListedFields(
        version.version_id,
        version.modified_ms,
        version.size,
        version.owner,
        version.bucket_key,
        version.context_id,
        version.listing,
    )


class SealedPart(Message, frozen=True):
    """A part's ETag and checksum (for GetObjectAttributes and reads by part number), and the identity of its data. A
    PartEntry is in the clear, and counts only when it agrees with this.
    """

    number: int
    size: int
    etag: str
    checksum: str = ""
    data_id: bytes = b""

    def names(self, entry: PartEntry) -> bool:
        return (entry.number, entry.size, entry.data_id) == (self.number, self.size, self.data_id)


class SealedMeta(Message, frozen=True):
    """The metadata of a version, sealed in the record.

    ``headers``: content-type, cache-control, content-disposition, content-encoding, content-language, expires,
    x-amz-website-redirect-location, in lower case, as the client sent them. ``user``: x-amz-meta-*, names without the
    prefix. ``checksums``: algorithm (``api.CHECKSUM_ALGORITHMS``) -> base64, with ``-N`` when composite.
    ``checksum_type``: FULL_OBJECT or COMPOSITE. ``parts``: of multipart objects only; more than 32 are sealed in pages
    of their own, from ``parts_page``. ``size``: the object's. The record also has it in the clear, and the two must
    agree. ``acl``: None for the owner's alone.
    """

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
    acl: tuple[AclEntry, ...] | None = None


class SealedEncryption(Message, frozen=True):
    """How a version is encrypted, sealed in the record with its metadata; absent with SSE-S3.

    ``kind``, ``key_id``, ``bucket_key``, ``context``: as in ``encryption.Encryption``. ``wrapped``: with SSE-C, the
    data key of the body under the customer's key (``code.customer``); then the metadata is under a key of its own.
    """

    kind: str
    key_id: str = ""
    bucket_key: bool = False
    context: str = ""
    wrapped: bytes = b""


class EncryptedMeta(NamedTuple):
    """What is sealed as the metadata of a version with a SealedEncryption."""

    meta: SealedMeta
    encryption: SealedEncryption


class SealedList(Message, frozen=True, gc=False):
    """What a list prints: ETag (hex, ``-N`` for multipart), checksum algorithm and type, storage class."""

    etag: str
    algorithm: str = ""
    checksum_type: str = ""
    storage_class: str = "STANDARD"


ACTIVE, DELETING, DELETED, LENDING = "active", "deleting", "deleted", "lending"
"""The states of a bucket's record."""


class BucketRecord(Message, frozen=True):
    """``bucket/NAME`` in the system table; ``bucket/:ID`` of a deleted bucket that still lends (``system.lenders``).

    ``state``: active, deleting, deleted, lending. ``countries``: empty for all that the cluster's policy allows.
    ``shards``: the number of index shards. ``shard_list``: their numbers, one byte each, of a bucket with countries:
    the partitions of these shards lie inside them. Empty: 0 up to ``shards``, as in all old buckets.

    ``authenticator``: HMAC by a keyring key over (register name, sequence, the other fields); a record that does not
    verify is refused. ``signature``: over the public part (``objects.system.public``), by the key that ``signer``
    names; nodes without keys verify it.

    ``configuration``: the sealed entries of ``objects.configuration``; empty: there are none. ``plain``: none of them
    matters when the owner reads or writes an object. ``tags``: sealed, of a record that version 0.1.0 wrote.

    ``formerly``: the name that a bucket had that is lending.
    """

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
    configuration: bytes = b""
    plain: bool = True
    formerly: str = ""

    @property
    def shard_numbers(self) -> bytes:
        """The numbers of the index shards: a key's shard is the one at (hash of the key) modulo their count."""
        return self.shard_list or _FIRST_SHARDS[: self.shards]


_FIRST_SHARDS = bytes(range(256))
