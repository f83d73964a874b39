"""Where the access log of a bucket goes (PutBucketLogging, GetBucketLogging).

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketLogging.html
"""

from __future__ import annotations

from storaged import errors
from storaged.objects.configuration.logging import (
    DELIVERY_TIME,
    EVENT_TIME,
    LOGGING,
    SIMPLE,
    BucketLogging,
)
from storaged.objects.names import bucket_name_possible
from storaged.objects.records import BucketRecord
from storaged.s3 import xml
from storaged.s3.authorization import log_grant
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.reply import Reply, xml_reply
from storaged.s3.request import Request

PREFIX_BYTES_MAX = 800
"""A key has at most 1,024 bytes, and a log's name and partition take up to 190 of them."""


def parse(document: bytes) -> BucketLogging | None:
    """None: there is to be no log. Raises MalformedXML, NotImplemented (TargetGrants)."""
    root = xml.parse(document, "BucketLoggingStatus")
    if not root.children:
        return None
    if len(root.children) != 1 or root.children[0].name != "LoggingEnabled":
        raise errors.MalformedXML()
    parts = {child.name: child for child in root.children[0].children}
    wanted = {"TargetBucket", "TargetPrefix", "TargetGrants", "TargetObjectKeyFormat"}
    if len(parts) != len(root.children[0].children) or parts.keys() - wanted:
        raise errors.MalformedXML()
    if "TargetBucket" not in parts or "TargetPrefix" not in parts:
        raise errors.MalformedXML()
    if "TargetGrants" in parts and parts["TargetGrants"].children:
        raise errors.NotImplemented(
            "TargetGrants are not implemented. Give access to the logs by the policy of the target bucket."
        )
    prefix = parts["TargetPrefix"].text
    if len(prefix.encode()) > PREFIX_BYTES_MAX:
        raise errors.InvalidArgument(
            f"A TargetPrefix has at most {PREFIX_BYTES_MAX} bytes.", ArgumentName="TargetPrefix"
        )
    return BucketLogging(parts["TargetBucket"].text, prefix, _format(parts.get("TargetObjectKeyFormat")))


def _format(node: xml.Node | None) -> str:
    if node is None:
        return ""
    names = [child.name for child in node.children]
    if names == ["SimplePrefix"] and not node.children[0].children:
        return SIMPLE
    if names != ["PartitionedPrefix"]:
        raise errors.MalformedXML()
    source = node.children[0].fields({"PartitionDateSource"}).get("PartitionDateSource", EVENT_TIME)
    if source not in (EVENT_TIME, DELIVERY_TIME):
        raise errors.MalformedXML()
    return source


def show(value: BucketLogging | None) -> bytes:
    if value is None:
        return xml.document("BucketLoggingStatus")
    content = xml.element("TargetBucket", value.target) + xml.element("TargetPrefix", value.prefix)
    if value.format:
        kind = "<SimplePrefix/>"
        if value.format != SIMPLE:
            kind = f"<PartitionedPrefix>{xml.element('PartitionDateSource', value.format)}</PartitionedPrefix>"
        content += f"<TargetObjectKeyFormat>{kind}</TargetObjectKeyFormat>"
    return xml.document("BucketLoggingStatus", f"<LoggingEnabled>{content}</LoggingEnabled>")


async def get_logging(front: Front, request: Request) -> Reply:
    configuration = await front.buckets.configuration(request.bucket_record)
    return xml_reply(show(configuration.get(LOGGING)))


async def put_logging(front: Front, request: Request) -> Reply:
    if not request.document.strip():
        raise errors.MissingRequestBodyError()
    value = await parse_document(parse, request.document)
    if value is not None:
        await _check_target(front, request.bucket_record, value)
    await front.buckets.configure(request.bucket_record, LOGGING, lambda _: value, who=request.who)
    return Reply()


async def _check_target(front: Front, source: BucketRecord, value: BucketLogging) -> None:
    """Raises InvalidTargetBucketForLogging."""
    try:
        if not bucket_name_possible(value.target):
            raise errors.NoSuchBucket(BucketName=value.target)
        target = await front.buckets.renewed(value.target)
        if target.owner != source.owner:
            raise errors.AccessDenied()
        log_grant(front, source, target, f"{value.prefix}2026-01-01-00-00-00-0123456789ABCDEF".encode())
    except (errors.NoSuchBucket, errors.AccessDenied):
        raise errors.InvalidTargetBucketForLogging(TargetBucket=value.target[:200]) from None
