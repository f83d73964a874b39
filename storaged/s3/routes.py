"""Which operation a request asks for: by what it names (service, bucket, object), by its subresource, by its method.

Subresources that exist on AWS and not here are listed too: those that only read what was never set get AWS's answer for that, the others 501.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from storaged import errors
from storaged.s3 import acl, buckets, copy, listing, multipart, objects, xml
from storaged.s3.context import Front, Handler
from storaged.s3.reply import Reply, xml_reply
from storaged.s3.request import Request


@dataclass(frozen=True, slots=True)
class Route:
    """``operation``: AWS's name of it, for logs and metrics. ``needs_bucket``: the bucket must exist and belong to the requester before the handler runs."""

    operation: str
    handler: Handler
    needs_bucket: bool = True
    signed: bool = True


Methods = Mapping[str, Route]


def _missing(operation: str, error: type[errors.S3Error]) -> Route:
    """Reads a configuration that cannot have been set."""

    async def handler(front: Front, request: Request) -> Reply:
        raise error(BucketName=request.bucket)

    return Route(operation, handler)


def _unset(operation: str) -> Route:
    """Removes a configuration that cannot have been set: done already."""

    async def handler(front: Front, request: Request) -> Reply:
        return Reply(204)

    return Route(operation, handler)


def _fixed(operation: str, root: str, content: str = "") -> Route:
    """Reads a setting that has one value here."""

    async def handler(front: Front, request: Request) -> Reply:
        return xml_reply(xml.document(root, content))

    return Route(operation, handler)


def _absent(operation: str) -> Route:
    async def handler(front: Front, request: Request) -> Reply:
        raise errors.NotImplemented(f"{operation} is not implemented.")

    return Route(operation, handler)


async def _no_lock(front: Front, request: Request) -> Reply:
    """Retention and legal holds need a bucket with Object Lock, and no bucket can have it."""
    raise errors.InvalidRequest("Bucket is missing Object Lock Configuration")


async def _no_lock_on_bucket(front: Front, request: Request) -> Reply:
    raise errors.InvalidBucketState("Object Lock configuration cannot be enabled on existing buckets", BucketName=request.bucket)


async def _put_or_copy(front: Front, request: Request) -> Reply:
    if "x-amz-copy-source" in request.headers:
        request.operation = "CopyObject"
        return await copy.copy_object(front, request)
    return await objects.put_object(front, request)


async def _part_or_copy(front: Front, request: Request) -> Reply:
    if "x-amz-copy-source" in request.headers:
        request.operation = "UploadPartCopy"
        return await copy.upload_part_copy(front, request)
    return await multipart.put_part(front, request)


async def _foreign_action(front: Front, request: Request) -> Reply:
    """IAM, STS and other query-style calls: answered at once, since clients retry 5xx."""
    raise errors.InvalidAction()


def _not_yet(*names: str) -> dict[str, Methods]:
    """Subresources of which nothing exists."""
    table: dict[str, Methods] = {}
    for name in names:
        title = "".join(word.capitalize() for word in name.split("-"))
        table[name] = {
            method: _absent(f"{verb}{title}") for method, verb in (("GET", "Get"), ("PUT", "Put"), ("POST", "Post"), ("DELETE", "Delete"))
        }
    return table


def _configuration(name: str, error: type[errors.S3Error], *, prefix: str = "Bucket") -> Methods:
    return {
        "GET": _missing(f"Get{prefix}{name}", error),
        "PUT": _absent(f"Put{prefix}{name}"),
        "DELETE": _unset(f"Delete{prefix}{name}"),
    }


SERVICE: dict[str, Methods] = {
    "": {
        "GET": Route("ListBuckets", buckets.list_buckets, needs_bucket=False),
        "POST": Route("ForeignAction", _foreign_action, needs_bucket=False, signed=False),
    },
    "Action": {method: Route("ForeignAction", _foreign_action, needs_bucket=False, signed=False) for method in ("GET", "POST")},
}

BUCKET: dict[str, Methods] = {
    "": {
        "GET": Route("ListObjects", listing.list_objects_v1),
        "PUT": Route("CreateBucket", buckets.create_bucket, needs_bucket=False),
        "HEAD": Route("HeadBucket", buckets.head_bucket),
        "DELETE": Route("DeleteBucket", buckets.delete_bucket),
        "OPTIONS": Route("Preflight", buckets.preflight, needs_bucket=False, signed=False),
    },
    "list-type": {"GET": Route("ListObjectsV2", listing.list_objects_v2)},
    "versions": {"GET": Route("ListObjectVersions", listing.list_versions)},
    "uploads": {"GET": Route("ListMultipartUploads", listing.list_uploads)},
    "delete": {"POST": Route("DeleteObjects", objects.delete_objects)},
    "location": {"GET": Route("GetBucketLocation", buckets.get_location)},
    "versioning": {"GET": Route("GetBucketVersioning", buckets.get_versioning), "PUT": _absent("PutBucketVersioning")},
    "tagging": {
        "GET": Route("GetBucketTagging", buckets.get_tagging),
        "PUT": Route("PutBucketTagging", buckets.put_tagging),
        "DELETE": Route("DeleteBucketTagging", buckets.delete_tagging),
    },
    "acl": {"GET": Route("GetBucketAcl", buckets.get_acl), "PUT": Route("PutBucketAcl", acl.put_acl)},
    "policy": _configuration("Policy", errors.NoSuchBucketPolicy),
    "policyStatus": {"GET": _fixed("GetBucketPolicyStatus", "PolicyStatus", "<IsPublic>false</IsPublic>")},
    "cors": _configuration("Cors", errors.NoSuchCORSConfiguration),
    "lifecycle": _configuration("Lifecycle", errors.NoSuchLifecycleConfiguration),
    "website": _configuration("Website", errors.NoSuchWebsiteConfiguration),
    "replication": _configuration("Replication", errors.ReplicationConfigurationNotFoundError),
    "encryption": _configuration("Encryption", errors.ServerSideEncryptionConfigurationNotFoundError),
    "publicAccessBlock": _configuration("PublicAccessBlock", errors.NoSuchPublicAccessBlockConfiguration, prefix=""),
    "ownershipControls": _configuration("OwnershipControls", errors.OwnershipControlsNotFoundError),
    "object-lock": {
        "GET": _missing("GetObjectLockConfiguration", errors.ObjectLockConfigurationNotFoundError),
        "PUT": Route("PutObjectLockConfiguration", _no_lock_on_bucket),
    },
    "logging": {"GET": _fixed("GetBucketLogging", "BucketLoggingStatus"), "PUT": _absent("PutBucketLogging")},
    "notification": {"GET": _fixed("GetBucketNotification", "NotificationConfiguration"), "PUT": _absent("PutBucketNotification")},
    "accelerate": {"GET": _fixed("GetBucketAccelerate", "AccelerateConfiguration"), "PUT": _absent("PutBucketAccelerate")},
    "requestPayment": {
        "GET": _fixed("GetBucketRequestPayment", "RequestPaymentConfiguration", "<Payer>BucketOwner</Payer>"),
        "PUT": _absent("PutBucketRequestPayment"),
    },
    **_not_yet("analytics", "inventory", "metrics", "intelligent-tiering", "metadataTable", "metadataConfiguration", "session", "abac"),
}  # fmt: skip

OBJECT: dict[str, Methods] = {
    "": {
        "GET": Route("GetObject", objects.get_object),
        "PUT": Route("PutObject", _put_or_copy),
        "HEAD": Route("HeadObject", objects.head_object),
        "DELETE": Route("DeleteObject", objects.delete_object),
        "OPTIONS": Route("Preflight", buckets.preflight, needs_bucket=False, signed=False),
    },
    "uploads": {"POST": Route("CreateMultipartUpload", multipart.create)},
    "uploadId": {
        "GET": Route("ListParts", multipart.list_parts),
        "PUT": Route("UploadPart", _part_or_copy),
        "POST": Route("CompleteMultipartUpload", multipart.complete),
        "DELETE": Route("AbortMultipartUpload", multipart.abort),
    },
    "attributes": {"GET": Route("GetObjectAttributes", objects.get_attributes)},
    "tagging": {
        "GET": Route("GetObjectTagging", objects.get_tagging),
        "PUT": Route("PutObjectTagging", objects.put_tagging),
        "DELETE": Route("DeleteObjectTagging", objects.delete_tagging),
    },
    "acl": {"GET": Route("GetObjectAcl", objects.get_acl), "PUT": Route("PutObjectAcl", acl.put_acl)},
    "retention": {"GET": Route("GetObjectRetention", _no_lock), "PUT": Route("PutObjectRetention", _no_lock)},
    "legal-hold": {"GET": Route("GetObjectLegalHold", _no_lock), "PUT": Route("PutObjectLegalHold", _no_lock)},
    "torrent": {"GET": Route("GetObjectTorrent", objects.get_torrent)},
    **_not_yet("restore", "select", "renameObject", "encryption", "append"),
}


def find(method: str, bucket: str, key: bytes, query: Mapping[str, str]) -> Route:
    """Raises MethodNotAllowed. Parameters that name no subresource are the operation's, or nobody's (``x-id``)."""
    table = OBJECT if key else BUCKET if bucket else SERVICE
    methods = table[""]
    for name in query:
        if name and name in table:
            methods = table[name]
            break
    route = methods.get(method)
    if route is None:
        raise errors.MethodNotAllowed(Method=method, ResourceType="OBJECT" if key else "BUCKET" if bucket else "SERVICE")
    return route
