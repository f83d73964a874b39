"""What each operation asks permission for. Pure tables.

Sources: https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html and
https://docs.aws.amazon.com/AmazonS3/latest/userguide/acl-overview.html («Mapping of ACL permissions and access policy
permissions»).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from storaged.objects.api import AMEND, DELETE, LIST, READ, WRITE


class Action(NamedTuple):
    """``names``: the IAM actions, all of which are needed. ``versioned``: those for a request that names a version;
    empty: the same. ``access``: the calls of the object plane that the operation makes. ``acl``: the permission in an
    access control list that allows it too; empty: none does. ``of_object``: that list is the object's, not the
    bucket's. ``by_initiator``: it is about an upload, and the upload's initiator may do it.
    """

    names: tuple[str, ...]
    access: int = 0
    acl: str = ""
    of_object: bool = False
    versioned: tuple[str, ...] = ()
    by_initiator: bool = False

    def needed(self, version: str) -> tuple[str, ...]:
        return self.versioned if version and self.versioned else self.names


def _read(*names: str, versioned: tuple[str, ...] = (), acl: str = "READ", access: int = READ) -> Action:
    return Action(names, access, acl, True, versioned)


def _of_bucket(name: str, acl: str = "", access: int = 0) -> Action:
    return Action((name,), access, acl)


_GET = _read("s3:GetObject", versioned=("s3:GetObjectVersion",))
_PUT = Action(("s3:PutObject",), WRITE, "WRITE")
_DELETE = Action(("s3:DeleteObject",), DELETE, "WRITE", versioned=("s3:DeleteObjectVersion",))
LIST_BUCKET: Final = _of_bucket("s3:ListBucket", "READ", LIST)

ACTIONS: Final[dict[str, Action]] = {
    "ListObjects": LIST_BUCKET,
    "ListObjectsV2": LIST_BUCKET,
    "HeadBucket": LIST_BUCKET,
    "ListObjectVersions": _of_bucket("s3:ListBucketVersions", "READ", LIST),
    "ListMultipartUploads": _of_bucket("s3:ListBucketMultipartUploads", "READ", LIST),
    "DeleteObjects": Action(()),  # each key asks for itself
    "GetBucketAcl": _of_bucket("s3:GetBucketAcl", "READ_ACP"),
    "PutBucketAcl": _of_bucket("s3:PutBucketAcl", "WRITE_ACP"),
    "DeleteBucketTagging": _of_bucket("s3:PutBucketTagging"),
    "GetBucketCors": _of_bucket("s3:GetBucketCORS"),
    "PutBucketCors": _of_bucket("s3:PutBucketCORS"),
    "DeleteBucketCors": _of_bucket("s3:PutBucketCORS"),
    "GetPublicAccessBlock": _of_bucket("s3:GetBucketPublicAccessBlock"),
    "PutPublicAccessBlock": _of_bucket("s3:PutBucketPublicAccessBlock"),
    "DeletePublicAccessBlock": _of_bucket("s3:PutBucketPublicAccessBlock"),
    "DeleteBucketOwnershipControls": _of_bucket("s3:PutBucketOwnershipControls"),
    "GetBucketLifecycleConfiguration": _of_bucket("s3:GetLifecycleConfiguration"),
    "PutBucketLifecycleConfiguration": _of_bucket("s3:PutLifecycleConfiguration"),
    "DeleteBucketLifecycle": _of_bucket("s3:PutLifecycleConfiguration"),
    "GetBucketEncryption": _of_bucket("s3:GetEncryptionConfiguration"),
    "PutBucketEncryption": _of_bucket("s3:PutEncryptionConfiguration"),
    "DeleteBucketEncryption": _of_bucket("s3:PutEncryptionConfiguration"),
    "GetObjectLockConfiguration": _of_bucket("s3:GetBucketObjectLockConfiguration"),
    "PutObjectLockConfiguration": _of_bucket("s3:PutBucketObjectLockConfiguration"),
    **{
        f"{verb}Bucket{kind}Configuration{ending}": _of_bucket(f"s3:{right}{kind}Configuration")
        for kind in ("Analytics", "IntelligentTiering", "Metrics")
        for verb, ending, right in (("Get", "", "Get"), ("List", "s", "Get"), ("Put", "", "Put"), ("Delete", "", "Put"))
    },
    "GetBucketInventoryConfiguration": _of_bucket("s3:GetInventoryConfiguration"),
    "ListBucketInventoryConfigurations": _of_bucket("s3:GetInventoryConfiguration"),
    "PutBucketInventoryConfiguration": _of_bucket("s3:PutInventoryConfiguration"),
    "DeleteBucketInventoryConfiguration": _of_bucket("s3:PutInventoryConfiguration"),
    "GetBucketNotificationConfiguration": _of_bucket("s3:GetBucketNotification"),
    "PutBucketNotificationConfiguration": _of_bucket("s3:PutBucketNotification"),
    "GetBucketAccelerateConfiguration": _of_bucket("s3:GetAccelerateConfiguration"),
    "PutBucketAccelerateConfiguration": _of_bucket("s3:PutAccelerateConfiguration"),
    "GetObject": _GET,
    "HeadObject": _GET,
    "GetObjectAttributes": _read(
        "s3:GetObject",
        "s3:GetObjectAttributes",
        versioned=("s3:GetObjectVersion", "s3:GetObjectVersionAttributes"),
    ),
    "GetObjectTorrent": _read("s3:GetObjectTorrent", versioned=("s3:GetObjectVersionTorrent",)),
    "GetObjectAcl": _read("s3:GetObjectAcl", versioned=("s3:GetObjectVersionAcl",), acl="READ_ACP"),
    "PutObjectAcl": _read(
        "s3:PutObjectAcl", versioned=("s3:PutObjectVersionAcl",), acl="WRITE_ACP", access=READ | AMEND
    ),
    "GetObjectTagging": Action(("s3:GetObjectTagging",), READ, versioned=("s3:GetObjectVersionTagging",)),
    "PutObjectTagging": Action(("s3:PutObjectTagging",), AMEND, versioned=("s3:PutObjectVersionTagging",)),
    "DeleteObjectTagging": Action(("s3:DeleteObjectTagging",), AMEND, versioned=("s3:DeleteObjectVersionTagging",)),
    "GetObjectRetention": Action(("s3:GetObjectRetention",), READ),
    "PutObjectRetention": Action(("s3:PutObjectRetention",), READ | AMEND),
    "GetObjectLegalHold": Action(("s3:GetObjectLegalHold",), READ),
    "PutObjectLegalHold": Action(("s3:PutObjectLegalHold",), READ | AMEND),
    "UpdateObjectEncryption": Action(("s3:UpdateObjectEncryption",), AMEND),
    "PutObject": _PUT,
    "PostObject": _PUT,
    "CopyObject": _PUT,
    "RenameObject": _PUT,  # and to get and delete the source, and to get its tags, for which the handler asks
    "CreateMultipartUpload": _PUT,
    "UploadPart": _PUT,
    "UploadPartCopy": _PUT,
    "CompleteMultipartUpload": _PUT,
    "AbortMultipartUpload": Action(("s3:AbortMultipartUpload",), WRITE, by_initiator=True),
    "ListParts": Action(("s3:ListMultipartUploadParts",), WRITE, by_initiator=True),
    "DeleteObject": _DELETE,
}
"""By the operation's name."""

DELETE_KEY: Final = _DELETE
"""One key of DeleteObjects."""

POLICY_ACTIONS: Final = frozenset({"s3:GetBucketPolicy", "s3:PutBucketPolicy", "s3:DeleteBucketPolicy"})
"""A bucket's owner always may: no policy locks the owner out.
https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketPolicy.html"""


def action_of(operation: str) -> Action:
    """The row of an operation; one without a row has the IAM action of its own name, and only policies and the owner
    allow it."""
    found = ACTIONS.get(operation)
    return found if found is not None else Action((f"s3:{operation}",))
