"""Object Lock: the configuration of a bucket, retention and legal holds of versions."""

from __future__ import annotations

from storaged import errors
from storaged.objects.configuration.document import Configuration
from storaged.objects.configuration.kinds import ENABLED, LOCK, VERSIONING, ObjectLock
from storaged.objects.records import Lock
from storaged.s3 import xml
from storaged.s3.conditions import parse_time
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.locks import MODES, bypasses
from storaged.s3.ops.configuration import Row, putter
from storaged.s3.reply import Reply, xml_reply
from storaged.s3.request import Request, version_of

DAYS_MAX, YEARS_MAX = 36_500, 100


# --- of a bucket


def _configuration(document: bytes) -> ObjectLock:
    """Raises MalformedXML, InvalidRetentionPeriod."""
    root = xml.parse(document, "ObjectLockConfiguration")
    parts = {child.name: child for child in root.children}
    enabled = parts.pop("ObjectLockEnabled", None)
    rule = parts.pop("Rule", None)
    if parts or enabled is None or enabled.text.strip() != ENABLED or len(root.children) != (1 if rule is None else 2):
        raise errors.MalformedXML()
    if rule is None:
        return ObjectLock()
    if [child.name for child in rule.children] != ["DefaultRetention"]:
        raise errors.MalformedXML()
    fields = rule.children[0].fields({"Mode", "Days", "Years"})
    if fields.get("Mode") not in MODES or len(fields) != 2:
        raise errors.MalformedXML()
    days, years = _period(fields.get("Days"), DAYS_MAX), _period(fields.get("Years"), YEARS_MAX)
    return ObjectLock(fields["Mode"], days, years)


def _period(text: str | None, most: int) -> int:
    if text is None:
        return 0
    digits = text.strip().removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
        raise errors.MalformedXML()
    if not 0 < int(text) <= most:
        raise errors.InvalidRetentionPeriod()
    return int(text)


def _print(value: ObjectLock) -> bytes:
    rule = ""
    if value.mode:
        period = f"<Days>{value.days}</Days>" if value.days else f"<Years>{value.years}</Years>"
        rule = f"<Rule><DefaultRetention><Mode>{value.mode}</Mode>{period}</DefaultRetention></Rule>"
    return xml.document("ObjectLockConfiguration", "<ObjectLockEnabled>Enabled</ObjectLockEnabled>", rule)


def _check(request: Request, value: ObjectLock, configuration: Configuration) -> None:
    versioning = configuration.get(VERSIONING)
    if versioning is None or versioning.status != ENABLED:
        raise errors.InvalidBucketState(
            "Versioning must be 'Enabled' on the bucket to apply a Object Lock configuration",
            BucketName=request.bucket,
        )


BUCKET_LOCK = Row(LOCK, _configuration, _print, errors.ObjectLockConfigurationNotFoundError, check_put=_check)


async def put_configuration(front: Front, request: Request) -> Reply:
    """Answers when all gateways know the retention of new versions. Object Lock itself needs no wait: it is judged by
    the record of the version."""
    reply = await putter(BUCKET_LOCK)(front, request)
    await front.buckets.known_everywhere()
    return reply


# --- of a version


def _require_lock(front: Front, request: Request) -> None:
    """Raises InvalidRequest."""
    if front.buckets.configuration_of(request.bucket_record).get(LOCK) is None:
        raise errors.InvalidRequest("Bucket is missing Object Lock Configuration")


async def _lock_of(front: Front, request: Request) -> Lock:
    _require_lock(front, request)
    info = await front.objects.head(request.grant, request.key, version_id=version_of(request), customer_key=None)
    return info.lock or Lock()


async def get_retention(front: Front, request: Request) -> Reply:
    lock = await _lock_of(front, request)
    if not lock.mode:
        raise errors.NoSuchObjectLockConfiguration()
    until = f"<RetainUntilDate>{xml.iso_time(lock.until_ms)}</RetainUntilDate>"
    return xml_reply(xml.document("Retention", f"<Mode>{lock.mode}</Mode>{until}"))


async def put_retention(front: Front, request: Request) -> Reply:
    """An empty document ends the retention, where the sender may bypass it."""
    _require_lock(front, request)
    mode, until_ms = await parse_document(_retention, request.document)
    await front.objects.set_retention(
        request.grant,
        request.key,
        mode,
        until_ms,
        version_id=version_of(request),
        bypass_governance=bypasses(request.headers),
        who=request.who,
    )
    return Reply()


def _retention(document: bytes) -> tuple[str, int]:
    """Raises MalformedXML."""
    fields = xml.parse(document, "Retention").fields({"Mode", "RetainUntilDate"})
    if not fields:
        return "", 0
    until_ms = parse_time(fields.get("RetainUntilDate", ""))
    if fields.get("Mode") not in MODES or until_ms is None:
        raise errors.MalformedXML()
    return fields["Mode"], until_ms


async def get_legal_hold(front: Front, request: Request) -> Reply:
    lock = await _lock_of(front, request)
    return xml_reply(xml.document("LegalHold", f"<Status>{'ON' if lock.hold else 'OFF'}</Status>"))


async def put_legal_hold(front: Front, request: Request) -> Reply:
    _require_lock(front, request)
    hold = await parse_document(_hold, request.document)
    await front.objects.set_hold(request.grant, request.key, hold, version_id=version_of(request), who=request.who)
    return Reply()


def _hold(document: bytes) -> bool:
    """Raises MalformedXML."""
    status = xml.parse(document, "LegalHold").fields({"Status"}).get("Status")
    if status not in ("ON", "OFF"):
        raise errors.MalformedXML()
    return status == "ON"
