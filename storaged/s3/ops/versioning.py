"""The versioning configuration of a bucket."""

from __future__ import annotations

from storaged import errors
from storaged.objects.configuration import kinds
from storaged.objects.configuration.document import Configuration
from storaged.objects.configuration.kinds import ENABLED, LOCK, SUSPENDED, VERSIONING, Versioning
from storaged.s3 import xml
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.reply import Reply, xml_reply
from storaged.s3.request import Request


async def get_versioning(front: Front, request: Request) -> Reply:
    """An empty document for a bucket that never had versioning, as on AWS."""
    found = (await front.buckets.configuration(request.bucket_record)).get(VERSIONING)
    return xml_reply(xml.document("VersioningConfiguration", xml.element("Status", found.status) if found else ""))


async def put_versioning(front: Front, request: Request) -> Reply:
    """Answers when all gateways know the new status: a PUT that begins after the answer obeys it wherever it comes."""
    if not request.document.strip():
        raise errors.MissingRequestBodyError()
    status = await parse_document(_status_in, request.document)
    changed = False

    def change(configuration: Configuration) -> Versioning:
        nonlocal changed
        if status != ENABLED and configuration.get(LOCK) is not None:
            raise errors.InvalidBucketState(
                "An Object Lock configuration is present on this bucket, so the versioning state cannot be changed.",
                BucketName=request.bucket,
            )
        changed = configuration.get(kinds.VERSIONING) != Versioning(status)
        return Versioning(status)

    await front.buckets.configure(request.bucket_record, VERSIONING, change, who=request.who)
    if changed:
        await front.buckets.known_everywhere()
    return Reply()


def _status_in(document: bytes) -> str:
    """Raises MalformedXML, IllegalVersioningConfigurationException, NotImplemented."""
    fields = xml.parse(document, "VersioningConfiguration").fields({"Status", "MfaDelete", "MFADelete"})
    if fields.get("MfaDelete", fields.get("MFADelete", "Disabled")) != "Disabled":
        raise errors.NotImplemented("MFA Delete is not implemented.")
    status = fields.get("Status", "")
    if not status:
        raise errors.IllegalVersioningConfigurationException("The Versioning element must be specified")
    if status not in (ENABLED, SUSPENDED):
        raise errors.MalformedXML()
    return status
