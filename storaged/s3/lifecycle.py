"""What answers say about the lifecycle of an object or an upload: x-amz-expiration, x-amz-abort-date.

Only buckets whose configuration is not plain come here. Days are those of the calendar, also where a test lets the days
of expiration last seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from urllib.parse import quote

from storaged.objects.api import ObjectInfo, PutResult, UploadInfo
from storaged.objects.code.lifecycle import DAY_MS, Due, Rules, Subject, current_due, rules_of, upload_due
from storaged.s3.context import Front
from storaged.s3.headers import http_time
from storaged.s3.reply import Headers
from storaged.s3.request import Request

LAST_DAY = (date.max - date(1970, 1, 1)).days
"""The last moment that can be written as a date: rules may have up to 2^31 days."""


def _rules(front: Front, request: Request) -> Rules:
    return front.buckets.configuration_of(request.bucket_record).derive(rules_of)


def _date(due: Due) -> str:
    return http_time(min(due.day, LAST_DAY) * DAY_MS // 1000)


def _expiration(
    front: Front, request: Request, size: int, modified_ms: int, tags: Mapping[str, str], answer: Headers
) -> None:
    rules = _rules(front, request)
    due = current_due(rules, Subject(request.key, size, modified_ms, lambda: tags)) if rules.current else None
    if due is not None:
        answer["x-amz-expiration"] = f'expiry-date="{_date(due)}", rule-id="{quote(due.rule.id, safe="")}"'


def read_expiration(front: Front, request: Request, info: ObjectInfo, answer: Headers) -> None:
    """Of an object that is read. A version that is read by its id may be another one than the current version."""
    if "versionId" not in request.query:
        _expiration(front, request, info.size, info.modified_ms, info.tags, answer)


def stored_expiration(front: Front, request: Request, result: PutResult, answer: Headers) -> None:
    """Of an object that was just stored."""
    _expiration(front, request, result.size, result.modified_ms, result.tags, answer)


def abort_headers(front: Front, request: Request, upload: UploadInfo, answer: Headers) -> None:
    """When an upload will be aborted."""
    if request.bucket_record.plain:
        return
    due = upload_due(_rules(front, request), request.key, upload.created_ms)
    if due is not None:
        answer["x-amz-abort-date"] = _date(due)
        answer["x-amz-abort-rule-id"] = quote(due.rule.id, safe="")
