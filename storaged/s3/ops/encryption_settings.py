"""The default encryption of a bucket (ServerSideEncryptionConfiguration), and UpdateObjectEncryption.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketEncryption.html, and botocore 1.44.8,
``UpdateObjectEncryption``, for the errors of that.
"""

from __future__ import annotations

from msgspec.structs import replace

from storaged import errors
from storaged.objects.configuration.document import Configuration
from storaged.objects.configuration.kinds import ENCRYPTION, SSE_C, DefaultEncryption
from storaged.objects.encryption import KMS, S3, Encryption
from storaged.s3 import encryption, xml
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.reply import Reply, xml_reply
from storaged.s3.request import Request, version_of

NONE = "NONE"
"""A list of blocked encryption types with this alone blocks nothing."""


def parse_default(document: bytes) -> tuple[DefaultEncryption, bool]:
    """The default, and whether the document says what is blocked. Raises MalformedXML, InvalidArgument,
    NotImplemented."""
    root = xml.parse(document, "ServerSideEncryptionConfiguration")
    if len(root.children) != 1 or root.children[0].name != "Rule":
        raise errors.MalformedXML()
    parts = {child.name: child for child in root.children[0].children}
    known = {"ApplyServerSideEncryptionByDefault", "BucketKeyEnabled", "BlockedEncryptionTypes"}
    if not parts or set(parts) - known or len(parts) != len(root.children[0].children):
        raise errors.MalformedXML()
    algorithm, key_id = _by_default(parts.get("ApplyServerSideEncryptionByDefault"))
    bucket_key = parts["BucketKeyEnabled"].text if "BucketKeyEnabled" in parts else "false"
    if bucket_key not in ("true", "false"):
        raise errors.MalformedXML()
    blocked = _blocked(parts.get("BlockedEncryptionTypes"))
    return DefaultEncryption(algorithm, key_id, bucket_key == "true", blocked or ()), blocked is not None


def _by_default(node: xml.Node | None) -> tuple[str, str]:
    """(algorithm, key id)"""
    if node is None:
        return S3, ""
    fields = node.fields({"SSEAlgorithm", "KMSMasterKeyID"})
    algorithm, key_id = fields.get("SSEAlgorithm", ""), fields.get("KMSMasterKeyID", "")
    if algorithm == encryption.DSSE:
        raise errors.NotImplemented("DSSE-KMS is not implemented: objects are encrypted in one layer.")
    if algorithm not in (S3, KMS):
        raise errors.MalformedXML()
    if "KMSMasterKeyID" in fields and (algorithm != KMS or not key_id):
        raise errors.InvalidArgument(
            "a KMSMasterKeyID is not applicable if the default sse algorithm is not aws:kms or aws:kms:dsse",
            ArgumentName="KMSMasterKeyID",
        )
    return algorithm, key_id


def _blocked(node: xml.Node | None) -> tuple[str, ...] | None:
    """None: the document does not say."""
    if node is None:
        return None
    kinds = {child.text for child in node.children}
    if not kinds or any(child.name != "EncryptionType" or child.children for child in node.children):
        raise errors.MalformedXML()
    if kinds not in ({NONE}, {SSE_C}):
        raise errors.MalformedXML()
    return (SSE_C,) if SSE_C in kinds else ()


def show_default(value: DefaultEncryption) -> bytes:
    applied = f"<SSEAlgorithm>{value.algorithm}</SSEAlgorithm>{xml.optional('KMSMasterKeyID', value.key_id)}"
    blocked = "".join(xml.element("EncryptionType", kind) for kind in value.blocked)
    return xml.document(
        "ServerSideEncryptionConfiguration",
        f"<Rule><ApplyServerSideEncryptionByDefault>{applied}</ApplyServerSideEncryptionByDefault>",
        xml.boolean("BucketKeyEnabled", value.bucket_key),
        f"<BlockedEncryptionTypes>{blocked}</BlockedEncryptionTypes>" if blocked else "",
        "</Rule>",
    )


async def get_encryption(front: Front, request: Request) -> Reply:
    """AWS shows SSE-S3 where nothing is set, since it encrypts all new objects so. Before 2023 it answered an error,
    which clients of that time expect."""
    value = (await front.buckets.configuration(request.bucket_record)).get(ENCRYPTION)
    if value is None and front.endpoint.legacy_buckets:
        raise errors.ServerSideEncryptionConfigurationNotFoundError(BucketName=request.bucket)
    return xml_reply(show_default(value or DefaultEncryption(S3)))


async def delete_encryption(front: Front, request: Request) -> Reply:
    """The default is SSE-S3 again. What is blocked stays so: the request does not speak of it."""

    def change(before: Configuration) -> DefaultEncryption | None:
        earlier = before.get(ENCRYPTION)
        return DefaultEncryption(S3, blocked=earlier.blocked) if earlier is not None and earlier.blocked else None

    await front.buckets.configure(request.bucket_record, ENCRYPTION, change, who=request.who)
    return Reply(204)


async def put_encryption(front: Front, request: Request) -> Reply:
    """A document that does not say what is blocked leaves that as it is. A key that does not exist is refused here, not
    at the next upload."""
    if not request.document.strip():
        raise errors.MissingRequestBodyError()
    value, says_blocked = await parse_document(parse_default, request.document)
    if value.algorithm == KMS:
        encryption.kms_arn(front, value.key_id)

    def change(before: Configuration) -> DefaultEncryption:
        earlier = before.get(ENCRYPTION)
        return value if says_blocked or earlier is None else replace(value, blocked=earlier.blocked)

    await front.buckets.configure(request.bucket_record, ENCRYPTION, change, who=request.who)
    return Reply()


# --- an object's ------------------------------------------------------------------------------------------------------


async def update_object_encryption(front: Front, request: Request) -> Reply:
    """Only SSE-KMS can be asked for. The data key is wrapped anew; data, ETag, checksums and times stay."""
    asked = await parse_document(_parse_object_encryption, request.document)
    if not asked.key_id.startswith("arn:"):
        raise errors.InvalidRequest(
            "Requests that modify an object's encryption type to SSE-KMS require an Amazon Web Services KMS key Amazon"
            " Resource Name (ARN). Modify the request to specify a KMS key ARN, and then try again."
        )
    asked = replace(asked, key_id=encryption.kms_arn(front, asked.key_id))
    await front.objects.set_encryption(request.grant, request.key, asked, version_id=version_of(request))
    return Reply()


def _parse_object_encryption(document: bytes) -> Encryption:
    """Raises MalformedXML, InvalidRequest."""
    root = xml.parse(document, "ObjectEncryption")
    if len(root.children) != 1 or root.children[0].name != "SSE-KMS":
        raise errors.InvalidRequest(
            "Requests that modify an object encryption configuration require a valid new encryption type. Valid values"
            " are SSEKMS. Modify the request to specify SSE-KMS for the updated encryption type, and then try again."
        )
    fields = root.children[0].fields({"KMSKeyArn", "BucketKeyEnabled"})
    bucket_key = fields.get("BucketKeyEnabled", "false")
    if bucket_key not in ("true", "false"):
        raise errors.InvalidRequest(
            "The BucketKeyEnabled value isn't valid. Valid values are true or false. Modify the request to specify a"
            " valid value, and then try again."
        )
    return Encryption(KMS, fields.get("KMSKeyArn", ""), bucket_key == "true")
