"""The names that AWS's documentation has: every request header and query parameter of S3, the operations that take it,
and whether this server supports it. Pure tables.

An operation honours a header or parameter if ``HEADERS`` or ``PARAMETERS`` lists it for that operation without a
``refusal``. If an operation changes something, it refuses all other names in these tables
(``operation.Operation.check_headers``). AWS ignores names that are not in the tables, and so does this server.
``tests/unit/test_s3_aws.py`` compares the tables with botocore's model of S3.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html and botocore
1.44.8, ``data/s3/2006-03-01/service-2.json``.
"""

from __future__ import annotations

from typing import NamedTuple

from storaged.s3.headers import CHECKSUM_HEADERS

EVERY = frozenset({"*"})


class Name(NamedTuple):
    """A header or a parameter. ``operations``: AWS's names of those that take it, or ``EVERY``. ``refusal``: why this
    server does not honour it; empty: it does. ``note``: why it is taken without effect, or what else to know of it."""

    operations: frozenset[str]
    refusal: str = ""
    note: str = ""


def _of(*operations: str, refusal: str = "", note: str = "") -> Name:
    return Name(frozenset(operations), refusal, note)


# --- sets of operations -----------------------------------------------------------------------------------------------

_CREATING = ("PutObject", "CopyObject", "CreateMultipartUpload", "PostObject")
"""Operations that describe a new object."""
_COPYING = ("CopyObject", "UploadPartCopy")
_READING = ("GetObject", "HeadObject")
_CONDITIONAL_READS = (*_READING, "GetObjectAttributes")
_CONDITIONAL_WRITES = ("PutObject", "CopyObject", "CompleteMultipartUpload")
_LISTING = ("ListObjects", "ListObjectsV2", "ListObjectVersions")
_ACL = ("PutBucketAcl", "PutObjectAcl")
_DELETING = ("DeleteObject", "DeleteObjects")
_CUSTOMER_KEY = (
    *_READING, *_CREATING, "GetObjectAttributes", "UploadPart", "UploadPartCopy", "CompleteMultipartUpload",
    "ListParts", "SelectObjectContent",
)  # fmt: skip
_VERSIONED = (
    *_READING, "DeleteObject", "GetObjectAttributes", "RestoreObject", "UpdateObjectEncryption",
    "GetObjectAcl", "PutObjectAcl", "GetObjectTagging", "PutObjectTagging", "DeleteObjectTagging",
    "GetObjectRetention", "PutObjectRetention", "GetObjectLegalHold", "PutObjectLegalHold",
    "GetObjectAnnotation", "PutObjectAnnotation", "DeleteObjectAnnotation", "ListObjectAnnotations",
)  # fmt: skip
_NAMED_CONFIGURATIONS = tuple(
    f"{verb}Bucket{name}Configuration"
    for verb in ("Get", "Put", "Delete")
    for name in ("Analytics", "Inventory", "Metrics", "IntelligentTiering")
)
_LISTED_CONFIGURATIONS = tuple(
    f"ListBucket{name}Configurations" for name in ("Analytics", "Inventory", "Metrics", "IntelligentTiering")
)
DOCUMENTS = frozenset(
    {
        "CreateBucket", "DeleteObjects", "CompleteMultipartUpload", "PutBucketAcl", "PutObjectAcl", "PutBucketTagging",
        "PutObjectTagging", "PutBucketVersioning", "PutBucketPolicy", "PutBucketCors", "PutBucketWebsite",
        "PutBucketLifecycleConfiguration", "PutBucketReplication", "PutBucketEncryption", "PutPublicAccessBlock",
        "PutBucketOwnershipControls",
        "PutObjectLockConfiguration", "PutBucketLogging", "PutBucketNotificationConfiguration",
        "PutBucketInventoryConfiguration",
        "PutBucketAccelerateConfiguration", "PutBucketRequestPayment", "PutBucketAbac", "PutObjectRetention",
        "PutObjectLegalHold", "RestoreObject", "SelectObjectContent", "UpdateObjectEncryption",
        "CreateBucketMetadataConfiguration",
        "CreateBucketMetadataTableConfiguration", "UpdateBucketMetadataAnnotationTableConfiguration",
        "UpdateBucketMetadataInventoryTableConfiguration", "UpdateBucketMetadataJournalTableConfiguration",
    }
)  # fmt: skip
"""Operations whose body is a document."""
_BODIES = (*DOCUMENTS, "PutObject", "PostObject", "UploadPart", "PutObjectAnnotation")

# --- why something is refused -----------------------------------------------------------------------------------------

_NO_EVENT_HOLD = "Event holds are not implemented."
_NO_APPEND = "Appending to objects is not implemented."
_NO_MFA = "MFA Delete is not implemented."
_NO_SESSION = "Sessions of directory buckets are not implemented."
_NO_ANNOTATIONS = "Annotations are not implemented."
_NO_CONFIGURATION = "This configuration is not implemented."
_NO_LAMBDA = "Object Lambda is not implemented."

CUSTOMER_KEY = "x-amz-server-side-encryption-customer-"
CUSTOMER_KEY_SOURCE = "x-amz-copy-source-server-side-encryption-customer-"
_CUSTOMER_KEY_PARTS = ("algorithm", "key", "key-md5")
LOCK = "x-amz-object-lock-"
META = "x-amz-meta-"

CHECKSUMS = tuple(
    f"x-amz-checksum-{name}"
    for name in ("crc32", "crc32c", "crc64nvme", "sha1", "sha256", "sha512", "md5", "xxhash64", "xxhash3", "xxhash128")
)

HEADERS: dict[str, Name] = {
    # transport, signature, payer, expected owner
    "x-amz-content-sha256": Name(EVERY),
    "x-amz-date": Name(EVERY),
    "x-amz-security-token": Name(EVERY),
    "x-amz-user-agent": Name(EVERY, note="no effect: it only names the client"),
    "x-amz-decoded-content-length": Name(EVERY),
    "x-amz-trailer": Name(EVERY),
    "x-amz-sdk-checksum-algorithm": Name(EVERY),
    "x-amz-checksum-mode": Name(EVERY),  # about the answer only
    "x-amz-request-payer": Name(EVERY, note="no effect: no bucket makes its requesters pay"),
    "x-amz-expected-bucket-owner": Name(EVERY),
    "x-amz-source-expected-bucket-owner": _of(*_COPYING),
    # metadata of a new object
    "x-amz-acl": _of(*_CREATING, *_ACL, "CreateBucket"),
    "x-amz-storage-class": _of(
        *_CREATING, note="GLACIER and DEEP_ARCHIVE: 400 InvalidStorageClass, since nothing is archived"
    ),
    "x-amz-tagging": _of(*_CREATING),
    "x-amz-server-side-encryption": _of(*_CREATING, "CreateSession"),
    "x-amz-website-redirect-location": _of(*_CREATING),
    "x-amz-write-offset-bytes": _of("PutObject", refusal=_NO_APPEND),
    **{
        f"x-amz-server-side-encryption-{name}": _of(*_CREATING, "CreateSession")
        for name in ("aws-kms-key-id", "context", "bucket-key-enabled")
    },
    **{CUSTOMER_KEY + name: _of(*_CUSTOMER_KEY) for name in _CUSTOMER_KEY_PARTS},
    **{CUSTOMER_KEY_SOURCE + name: _of(*_COPYING) for name in _CUSTOMER_KEY_PARTS},
    **{
        LOCK + name: _of(*_CREATING) for name in ("mode", "retain-until-date", "legal-hold")
    },
    **{
        LOCK + name: _of(*_CREATING, refusal=_NO_EVENT_HOLD)
        for name in ("event-hold", "event-hold-duration-days", "event-hold-duration-years")
    },
    **{
        f"x-amz-grant-{name}": _of(*_CREATING, *_ACL, "CreateBucket")
        for name in ("full-control", "read", "read-acp", "write-acp")
    },
    "x-amz-grant-write": _of("PutObject", *_ACL, "CreateBucket"),
    # copies
    "x-amz-copy-source": _of(*_COPYING),
    "x-amz-copy-source-range": _of("UploadPartCopy"),
    **{
        f"x-amz-copy-source-{name}": _of(*_COPYING)
        for name in ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since")
    },
    "x-amz-metadata-directive": _of("CopyObject"),
    "x-amz-tagging-directive": _of("CopyObject"),
    "x-amz-object-annotation-directive": _of("CopyObject", refusal=_NO_ANNOTATIONS),
    # checksums
    **{
        name: _of(*_BODIES, refusal="" if name in CHECKSUM_HEADERS else "This checksum algorithm is not implemented.")
        for name in CHECKSUMS
    },
    "x-amz-checksum-algorithm": _of(*_BODIES, "CopyObject", "CreateMultipartUpload"),
    "x-amz-checksum-type": _of("CreateMultipartUpload", "CompleteMultipartUpload"),
    "x-amz-mp-object-size": _of("CompleteMultipartUpload"),
    # conditions
    "if-match": _of(*_CONDITIONAL_READS, *_CONDITIONAL_WRITES, "DeleteObject", "RenameObject"),
    "if-none-match": _of(*_CONDITIONAL_READS, *_CONDITIONAL_WRITES, "RenameObject"),
    "if-modified-since": _of(*_CONDITIONAL_READS, "RenameObject"),
    "if-unmodified-since": _of(*_CONDITIONAL_READS, "RenameObject"),
    "x-amz-if-match-size": _of("DeleteObject"),
    "x-amz-if-match-last-modified-time": _of("DeleteObject"),
    "x-amz-if-match-initiated-time": _of("AbortMultipartUpload", refusal="Aborting by time is not implemented."),
    "x-amz-object-if-match": _of("PutObjectAnnotation", "DeleteObjectAnnotation", refusal=_NO_ANNOTATIONS),
    # RFC 9110, section 14.5: a PUT of a part must not become a PUT of the whole
    "content-range": _of("PutObject", refusal=_NO_APPEND),
    # deleting
    "x-amz-bypass-governance-retention": _of(*_DELETING, "PutObjectRetention"),
    "x-amz-mfa": _of(*_DELETING, "PutBucketVersioning", refusal=_NO_MFA),
    # lists and attributes
    "x-amz-optional-object-attributes": _of(*_LISTING, note="no object is archived, so none has a RestoreStatus"),
    "x-amz-object-attributes": _of("GetObjectAttributes"),
    "x-amz-max-parts": _of("GetObjectAttributes"),
    "x-amz-part-number-marker": _of("GetObjectAttributes"),
    # buckets
    "x-amz-bucket-object-lock-enabled": _of("CreateBucket"),
    "x-amz-object-ownership": _of("CreateBucket"),
    "x-amz-bucket-namespace": _of("CreateBucket", refusal="Account-regional namespaces are not implemented."),
    "x-amz-bucket-object-lock-token": _of(
        "PutObjectLockConfiguration", "PutBucketReplication", refusal=_NO_CONFIGURATION
    ),
    "x-amz-confirm-remove-self-bucket-access": _of(
        "PutBucketPolicy", note="no effect: a policy never locks the bucket's owner out"
    ),
    "x-amz-skip-destination-validation": _of("PutBucketNotificationConfiguration"),
    "x-amz-transition-default-minimum-object-size": _of("PutBucketLifecycleConfiguration"),
    # directory buckets
    "x-amz-create-session-mode": _of("CreateSession", refusal=_NO_SESSION),
    "x-amz-s3session-token": Name(EVERY, _NO_SESSION),
    "x-amz-rename-source": _of("RenameObject"),
    **{
        f"x-amz-rename-source-{name}": _of("RenameObject")
        for name in ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since")
    },
    "x-amz-client-token": _of("RenameObject"),
    # Object Lambda
    "x-amz-request-route": _of("WriteGetObjectResponse", refusal=_NO_LAMBDA),
    "x-amz-request-token": _of("WriteGetObjectResponse", refusal=_NO_LAMBDA),
    # this server's own
    "x-storaged-countries": _of("CreateBucket"),
    # the signature of a form
    **{f"x-amz-{name}": _of("PostObject") for name in ("algorithm", "credential", "signature")},
}  # fmt: skip

METADATA = frozenset(_CREATING)
"""Operations that take ``x-amz-meta-*``."""

FAMILIES = (
    "x-amz-server-side-encryption", "x-amz-copy-source", LOCK, "x-amz-object-", "x-amz-grant-", "x-amz-checksum-",
    "x-amz-if-", "x-amz-rename-", "x-amz-bucket-", "x-amz-mp-", "x-amz-write-", "x-amz-website-", "x-amz-fwd-",
)  # fmt: skip
"""Prefixes of headers that ask AWS for something. A new or misspelt header with such a prefix is refused too."""

OWN = "x-storaged-"

# --- parameters -------------------------------------------------------------------------------------------------------

PARAMETERS: dict[str, Name] = {
    "versionId": _of(*_VERSIONED),
    "partNumber": _of(*_READING, "UploadPart", "UploadPartCopy"),
    "uploadId": _of("UploadPart", "UploadPartCopy", "CompleteMultipartUpload", "AbortMultipartUpload", "ListParts"),
    **{
        f"response-{name}": _of(*_READING)
        for name in (
            "cache-control", "content-disposition", "content-encoding", "content-language", "content-type", "expires",
        )
    },
    "prefix": _of(*_LISTING, "ListMultipartUploads", "ListBuckets"),
    "delimiter": _of(*_LISTING, "ListMultipartUploads"),
    "encoding-type": _of(*_LISTING, "ListMultipartUploads", "ListParts"),
    "max-keys": _of(*_LISTING),
    "marker": _of("ListObjects"),
    "start-after": _of("ListObjectsV2"),
    "fetch-owner": _of("ListObjectsV2"),
    "continuation-token": _of(
        "ListObjectsV2", "ListBuckets", "ListDirectoryBuckets", "ListObjectAnnotations", *_LISTED_CONFIGURATIONS
    ),
    "key-marker": _of("ListObjectVersions", "ListMultipartUploads"),
    "version-id-marker": _of("ListObjectVersions"),
    "upload-id-marker": _of("ListMultipartUploads"),
    "max-uploads": _of("ListMultipartUploads"),
    "max-parts": _of("ListParts"),
    "part-number-marker": _of("ListParts"),
    "max-buckets": _of("ListBuckets"),
    "bucket-region": _of("ListBuckets"),
    "max-directory-buckets": _of("ListDirectoryBuckets"),
    "id": _of(*_NAMED_CONFIGURATIONS),
    "select-type": _of("SelectObjectContent"),
    "annotationName": _of("GetObjectAnnotation", "PutObjectAnnotation", "DeleteObjectAnnotation"),
    "annotation-prefix": _of("ListObjectAnnotations"),
    "max-annotation-results": _of("ListObjectAnnotations"),
}  # fmt: skip

SIGNATURE = frozenset(
    f"x-amz-{name}"
    for name in (
        "algorithm",
        "credential",
        "date",
        "expires",
        "signedheaders",
        "signature",
        "security-token",
        "content-sha256",
    )
)
"""Parameters of presigned URLs, in lower case. Any operation takes them."""

IGNORED_IN_QUERY = frozenset({*CHECKSUMS, "x-amz-sdk-checksum-algorithm", "x-amz-user-agent"})
"""Headers that SDKs put into presigned URLs before there is a body. AWS ignores them there: a checksum in the URL would
be that of an empty body."""


def honoured(operation: str) -> frozenset[str]:
    """The headers of ``HEADERS`` that this operation honours, or that do not affect it."""
    return frozenset(
        name
        for name, row in HEADERS.items()
        if not row.refusal and (row.operations is EVERY or operation in row.operations)
    )


def parameters(operation: str) -> frozenset[str]:
    """The parameters of ``PARAMETERS`` that this operation takes."""
    return frozenset(name for name, row in PARAMETERS.items() if operation in row.operations)
