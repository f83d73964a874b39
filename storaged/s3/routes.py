"""Finds the operation of a request: by its resource (service, bucket, object), its subresource, its method, and what it
carries (a copy source, a browser's form).

The tables list every subresource that AWS's documentation names. Where this server does not implement one, a read of a
configuration that was never set gets AWS's answer for that, and the rest gets 501. A subresource of another resource,
in another case, or together with a second one is refused before anything else happens: a ``DELETE /bucket/key?policy``
must not delete the object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from storaged import errors
from storaged.s3 import aws_names, xml
from storaged.s3.context import Front, Handler
from storaged.s3.cors import preflight
from storaged.s3.operation import NO_BODY, STREAM, Attempt, Body, Document, Operation
from storaged.s3.ops import (
    access,
    acl,
    attributes,
    bucket_logging,
    buckets,
    configuration,
    copy,
    cors,
    delete,
    encryption_settings,
    get,
    inventory,
    lifecycle,
    listing,
    lock,
    multipart,
    notification,
    post,
    put,
    rename,
    tags,
    versioning,
    website,
)
from storaged.s3.ops.iam.query import query
from storaged.s3.reply import Reply, xml_reply
from storaged.s3.request import Request
from storaged.units import KIB, MIB

Methods = Mapping[str, Operation]

SOURCE = "x-amz-copy-source"

TAGS = Document(256 * KIB)
"""50 tags of 128 and 256 characters, each character escaped, are 190 KiB."""
ENCRYPTION = Document(16 * KIB)
ACL = Document(256 * KIB)
"""100 grants with names of at most 1 KiB each."""
POLICY = Document(64 * KIB)
"""A policy has at most 20 KiB; what is larger gets the error for that."""
RULES = Document(64 * KIB)
"""AWS's limit for CORS."""
WEBSITE = Document(128 * KIB)
"""AWS's limit."""
LIFECYCLE = Document(MIB)
"""1,000 rules with IDs and tags; what the bucket's record can't hold gets the error for that."""
SMALL = Document(16 * KIB)
"""A few settings."""
CREATION = Document(256 * KIB)
"""A bucket's location and tags."""
SETTING = Document(16 * KIB)
"""A setting of a few words."""
KEYS = Document(2 * MIB, digest_required=True)
"""1,000 keys of 1 KiB."""
PARTS = Document(4 * MIB, of_object=True)
"""10,000 parts with their ETags and checksums of 88 characters are 2.5 MB, without any white space."""


def _change(
    name: str,
    handler: Handler,
    body: Body = NO_BODY,
    *,
    needs_bucket: bool = True,
    signed: bool = True,
    copy: Operation | None = None,
    attempt: Attempt | None = None,
) -> Operation:
    return Operation(
        name, handler, body, changes=True, needs_bucket=needs_bucket, signed=signed, copy=copy, attempt=attempt
    )


def _get_never_set(name: str, error: type[errors.S3Error]) -> Operation:
    """Reads, or removes, a configuration that can't have been set."""

    async def handler(front: Front, request: Request) -> Reply:
        raise error(BucketName=request.bucket)

    return Operation(name, handler, answer=f"{error.status} {error.code}, since it can't have been set")


def _delete_never_set(name: str) -> Operation:
    """Removes a configuration that can't have been set: it succeeds."""

    async def handler(front: Front, request: Request) -> Reply:
        return Reply(204)

    return replace(_change(name, handler), answer="204, since it can't have been set")


def _get_fixed(name: str, root: str, content: str = "") -> Operation:
    """Reads a setting that has only one value here."""

    async def handler(front: Front, request: Request) -> Reply:
        return xml_reply(xml.document(root, content))

    return Operation(name, handler, answer="200, what AWS answers where it was never set")


def _not_implemented(name: str, *, needs_bucket: bool = True) -> Operation:
    """An operation that this server does not implement. It changes nothing, so its parameters need no check."""

    async def handler(front: Front, request: Request) -> Reply:
        raise errors.NotImplemented(f"{name} is not implemented.")

    return Operation(name, handler, needs_bucket=needs_bucket, answer="501 NotImplemented")


async def _foreign_action(front: Front, request: Request) -> Reply:
    """Query-style calls by GET. The answer is a 4xx, because clients retry 5xx."""
    raise errors.InvalidAction()


def _none_implemented(**names: str) -> Methods:
    """A subresource of which nothing is implemented: its methods, and AWS's names of their operations."""
    return {method: _not_implemented(name) for method, name in names.items()}


def _configuration(name: str, error: type[errors.S3Error]) -> Methods:
    return {
        "GET": _get_never_set(f"Get{name}", error),
        "PUT": _not_implemented(f"Put{name}"),
        "DELETE": _delete_never_set(f"Delete{name}"),
    }


def _configured(name: str, row: configuration.Row[Any], document: Document) -> Methods:
    """A configuration that is stored and honoured."""
    return {
        "GET": Operation(f"Get{name}", configuration.getter(row)),
        "PUT": _change(f"Put{name}", configuration.putter(row), document),
        "DELETE": _change(f"Delete{name}", configuration.deleter(row)),
    }


def _named(name: str, root: str) -> Methods:
    """Configurations of which a bucket may have many, and none can be set. Tools that take stock of an account read
    them all, and stop at a 501. ``root``: the document element of AWS's list."""
    missing = errors.NoSuchConfiguration
    unnamed = _get_fixed(f"ListBucket{name}Configurations", root, xml.boolean("IsTruncated", False))
    return {
        "GET": replace(_get_never_set(f"GetBucket{name}Configuration", missing), unnamed=unnamed),
        "PUT": _not_implemented(f"PutBucket{name}Configuration"),
        "DELETE": _get_never_set(f"DeleteBucket{name}Configuration", missing),
    }


def _several(name: str, row: configuration.NamedRow[Any, Any], document: Document) -> Methods:
    """The same, stored and honoured."""
    unnamed = Operation(f"ListBucket{name}Configurations", configuration.lister(row))
    return {
        "GET": Operation(f"GetBucket{name}Configuration", configuration.named_getter(row), unnamed=unnamed),
        "PUT": _change(f"PutBucket{name}Configuration", configuration.named_putter(row), document),
        "DELETE": _change(f"DeleteBucket{name}Configuration", configuration.named_deleter(row)),
    }


def _table(name: str) -> Methods:
    return _none_implemented(PUT=f"UpdateBucketMetadata{name}TableConfiguration")


QUERY = Operation("QueryApi", query, needs_bucket=False, signed=False)
"""IAM and STS. Their signatures cover the body: the handler reads it first."""
FOREIGN = Operation("ForeignAction", _foreign_action, needs_bucket=False, signed=False)
PREFLIGHT = Operation("Preflight", preflight, needs_bucket=False, signed=False)
FORM = _change("PostObject", post.post_object, STREAM, needs_bucket=False, signed=False)

SERVICE: dict[str, Methods] = {
    "": {"GET": Operation("ListBuckets", buckets.list_buckets, needs_bucket=False), "POST": QUERY},
    "Action": {"GET": FOREIGN, "POST": QUERY},
    "max-directory-buckets": {"GET": _not_implemented("ListDirectoryBuckets", needs_bucket=False)},
}

BUCKET: dict[str, Methods] = {
    "": {
        "GET": Operation("ListObjects", listing.list_objects_v1),
        "PUT": _change("CreateBucket", buckets.create_bucket, CREATION, needs_bucket=False),
        "HEAD": Operation("HeadBucket", buckets.head_bucket),
        "DELETE": _change("DeleteBucket", buckets.delete_bucket),
        "OPTIONS": PREFLIGHT,
    },
    "list-type": {"GET": Operation("ListObjectsV2", listing.list_objects_v2)},
    "versions": {"GET": Operation("ListObjectVersions", listing.list_versions)},
    "uploads": {"GET": Operation("ListMultipartUploads", listing.list_uploads)},
    "delete": {"POST": _change("DeleteObjects", delete.delete_objects, KEYS)},
    "location": {"GET": Operation("GetBucketLocation", buckets.get_location)},
    "versioning": {
        "GET": Operation("GetBucketVersioning", versioning.get_versioning),
        "PUT": _change("PutBucketVersioning", versioning.put_versioning, SETTING),
    },
    "tagging": _configured("BucketTagging", tags.BUCKET_TAGS, TAGS),
    "acl": {
        "GET": Operation("GetBucketAcl", acl.get_bucket_acl),
        "PUT": _change("PutBucketAcl", acl.put_bucket_acl, ACL),
    },
    "policy": _configured("BucketPolicy", access.BUCKET_POLICY, POLICY),
    "policyStatus": {"GET": Operation("GetBucketPolicyStatus", access.get_policy_status)},
    "cors": _configured("BucketCors", cors.BUCKET_CORS, RULES),
    "lifecycle": {
        "GET": Operation("GetBucketLifecycleConfiguration", lifecycle.get_lifecycle),
        "PUT": _change("PutBucketLifecycleConfiguration", lifecycle.put_lifecycle, LIFECYCLE),
        "DELETE": _change("DeleteBucketLifecycle", lifecycle.delete_lifecycle),
    },
    "website": _configured("BucketWebsite", website.BUCKET_WEBSITE, WEBSITE),
    "replication": _configuration("BucketReplication", errors.ReplicationConfigurationNotFoundError),
    "encryption": {
        "GET": Operation("GetBucketEncryption", encryption_settings.get_encryption),
        "PUT": _change("PutBucketEncryption", encryption_settings.put_encryption, ENCRYPTION),
        "DELETE": _change("DeleteBucketEncryption", encryption_settings.delete_encryption),
    },
    "publicAccessBlock": _configured("PublicAccessBlock", access.BLOCK, SMALL),
    "ownershipControls": _configured("BucketOwnershipControls", access.CONTROLS, SMALL),
    "object-lock": {
        "GET": Operation("GetObjectLockConfiguration", configuration.getter(lock.BUCKET_LOCK)),
        "PUT": _change("PutObjectLockConfiguration", lock.put_configuration, SETTING),
    },
    "logging": {
        "GET": Operation("GetBucketLogging", bucket_logging.get_logging),
        "PUT": _change("PutBucketLogging", bucket_logging.put_logging, SMALL),
    },
    "notification": {
        "GET": Operation("GetBucketNotificationConfiguration", notification.get_notification),
        "PUT": _change("PutBucketNotificationConfiguration", notification.put_notification, RULES),
    },
    "accelerate": {
        "GET": _get_fixed("GetBucketAccelerateConfiguration", "AccelerateConfiguration"),
        "PUT": _not_implemented("PutBucketAccelerateConfiguration"),
    },
    "requestPayment": {
        "GET": _get_fixed("GetBucketRequestPayment", "RequestPaymentConfiguration", "<Payer>BucketOwner</Payer>"),
        "PUT": _not_implemented("PutBucketRequestPayment"),
    },
    "analytics": _named("Analytics", "ListBucketAnalyticsConfigurationResult"),
    "inventory": _several("Inventory", inventory.BUCKET_INVENTORIES, SMALL),
    "metrics": _named("Metrics", "ListMetricsConfigurationsResult"),
    "intelligent-tiering": _named("IntelligentTiering", "ListBucketIntelligentTieringConfigurationsOutput"),
    "abac": _none_implemented(GET="GetBucketAbac", PUT="PutBucketAbac"),
    "session": _none_implemented(GET="CreateSession"),
    "metadataConfiguration": _none_implemented(
        GET="GetBucketMetadataConfiguration",
        POST="CreateBucketMetadataConfiguration",
        DELETE="DeleteBucketMetadataConfiguration",
    ),
    "metadataTable": _none_implemented(
        GET="GetBucketMetadataTableConfiguration",
        POST="CreateBucketMetadataTableConfiguration",
        DELETE="DeleteBucketMetadataTableConfiguration",
    ),
    "metadataInventoryTable": _table("Inventory"),
    "metadataJournalTable": _table("Journal"),
    "metadataAnnotationTable": _table("Annotation"),
}

OBJECT: dict[str, Methods] = {
    "": {
        "GET": Operation("GetObject", get.get_object, attempt=get.GET_ATTEMPT),
        "PUT": _change(
            "PutObject",
            put.put_object,
            STREAM,
            copy=_change("CopyObject", copy.copy_object),
            attempt=put.PUT_ATTEMPT,
        ),
        "HEAD": Operation("HeadObject", get.head_object, attempt=get.HEAD_ATTEMPT),
        "DELETE": _change("DeleteObject", delete.delete_object),
        "OPTIONS": PREFLIGHT,
    },
    "uploads": {"POST": _change("CreateMultipartUpload", multipart.create)},
    "uploadId": {
        "GET": Operation("ListParts", multipart.list_parts),
        "PUT": _change("UploadPart", multipart.put_part, STREAM, copy=_change("UploadPartCopy", copy.upload_part_copy)),
        "POST": _change("CompleteMultipartUpload", multipart.complete, PARTS),
        "DELETE": _change("AbortMultipartUpload", multipart.abort),
    },
    "attributes": {"GET": Operation("GetObjectAttributes", attributes.get_attributes)},
    "tagging": {
        "GET": Operation("GetObjectTagging", attributes.get_tagging),
        "PUT": _change("PutObjectTagging", attributes.put_tagging, TAGS),
        "DELETE": _change("DeleteObjectTagging", attributes.delete_tagging),
    },
    "acl": {
        "GET": Operation("GetObjectAcl", acl.get_object_acl),
        "PUT": _change("PutObjectAcl", acl.put_object_acl, ACL),
    },
    "retention": {
        "GET": Operation("GetObjectRetention", lock.get_retention),
        "PUT": _change("PutObjectRetention", lock.put_retention, SETTING),
    },
    "legal-hold": {
        "GET": Operation("GetObjectLegalHold", lock.get_legal_hold),
        "PUT": _change("PutObjectLegalHold", lock.put_legal_hold, SETTING),
    },
    "torrent": {
        "GET": Operation(
            "GetObjectTorrent", attributes.get_torrent, answer="404 NoSuchKey, since no object has a torrent"
        )
    },
    "restore": _none_implemented(POST="RestoreObject"),
    "select": _none_implemented(POST="SelectObjectContent"),
    "renameObject": {"PUT": _change("RenameObject", rename.rename_object)},
    "encryption": {"PUT": _change("UpdateObjectEncryption", encryption_settings.update_object_encryption, ENCRYPTION)},
    "annotation": _none_implemented(
        GET="GetObjectAnnotation", PUT="PutObjectAnnotation", DELETE="DeleteObjectAnnotation"
    ),
    "append": _none_implemented(POST="AppendObject", PUT="AppendObject"),
}
"""``append`` exists in other stores (Aliyun's): a client that asks for it must not get an overwrite."""

SUBRESOURCES = frozenset({*BUCKET, *OBJECT} - {""})

_FOLDED = {name.lower(): name for name in (*aws_names.PARAMETERS, *sorted(SUBRESOURCES))}
"""Lower case -> the name as AWS spells it. Names of subresources take precedence."""

_WORD = re.compile(r"\A[^\w-]+|(?<=[\w-])[^\w-].*\Z", re.DOTALL)
"""The text around the first word of a parameter's name: ``?acl?versionId=x`` and ``?%20acl`` mean the subresource."""


def find(
    method: str, bucket: str, key: bytes, query: Mapping[str, str], headers: Mapping[str, str], count: int = 0
) -> Operation:
    """The operation of a request, by its target and the names of its headers. ``count``: the number of its query
    parameters.

    Raises MethodNotAllowed, NotImplemented (another case), InvalidArgument (two subresources, a parameter of another
    operation).
    """
    table = OBJECT if key else BUCKET if bucket else SERVICE
    methods = table[_subresource(table, query) if query and method != "OPTIONS" else ""]
    operation = methods.get(method)
    if operation is None and methods is BUCKET[""] and method == "POST" and post.is_form(headers):
        operation = FORM
    if operation is None:
        raise errors.MethodNotAllowed(
            Method=method, ResourceType="OBJECT" if key else "BUCKET" if bucket else "SERVICE"
        )
    if operation.copy is not None and (SOURCE in headers or (query and any(name.lower() == SOURCE for name in query))):
        operation = operation.copy
    if operation.unnamed is not None and "id" not in query:
        operation = operation.unnamed
    if query and operation.changes:
        _check_case(query)
        operation.check_parameters(query, count)
    return operation


def _subresource(table: Mapping[str, Methods], query: Mapping[str, str]) -> str:
    """Empty: there is none. Parameters that name no subresource are the operation's, or AWS ignores them too
    (``x-id``)."""
    found = ""
    for name in query:
        if name in table and name:
            if found:
                raise errors.InvalidArgument(
                    f"Conflicting query string parameters: {found}, {name}",
                    ArgumentName="ResourceType",
                    ArgumentValue=found,
                )
            found = name
        elif name in SUBRESOURCES:
            raise errors.MethodNotAllowed(ResourceType=name)
        elif (spelt := _FOLDED.get(_WORD.sub("", name).lower(), name)) != name and spelt in SUBRESOURCES:
            raise _misspelt(name, spelt)
    return found


def _check_case(query: Mapping[str, str]) -> None:
    """Checks parameters that are no subresources. A read ignores unknown ones, as AWS does; a change does not. Raises
    NotImplemented."""
    for name in query:
        if (spelt := _FOLDED.get(_WORD.sub("", name).lower(), name)) != name:
            raise _misspelt(name, spelt)


def _misspelt(name: str, spelt: str) -> errors.NotImplemented:
    return errors.NotImplemented(
        f"The query parameter {name[:100]} is not implemented; parameters are case-sensitive: {spelt}"
    )
