"""DeleteObject and DeleteObjects."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from storaged import errors
from storaged.objects.pending_events import REMOVED
from storaged.s3 import conditions as c
from storaged.s3 import xml
from storaged.s3.auth.actions import DELETE_KEY
from storaged.s3.auth.authorize import owns_plain
from storaged.s3.authorization import Ask, permit
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.locks import bypasses
from storaged.s3.origins import origin_of
from storaged.s3.reply import Headers, Reply, version_header, xml_reply
from storaged.s3.request import BatchKey, Request, check_key, version_of
from storaged.tasks import TaskGroup

log = logging.getLogger("storaged.s3")

DELETE_KEYS_MAX = 1000


async def delete_object(front: Front, request: Request) -> Reply:
    """It succeeds also when there is no such object."""
    version = version_of(request)
    result = await front.objects.delete(
        request.grant,
        request.key,
        version_id=version,
        bypass_governance=bypasses(request.headers),
        conditions=c.delete_conditions(request.headers, version),
        origin=origin_of(request, REMOVED),
        who=request.who,
    )
    headers: Headers = {}
    version_header(result.version_id, headers)
    if result.delete_marker:
        headers["x-amz-delete-marker"] = "true"
    return Reply(204, headers)


async def delete_objects(front: Front, request: Request) -> Reply:
    """Deletes up to 1,000 keys. The answer has a result for each."""
    body = request.document
    root = await parse_document(partial(xml.parse, root="Delete"), body)
    wanted = root.all("Object")
    others = [child for child in root.children if child.name != "Object"]
    if not wanted or len(wanted) > DELETE_KEYS_MAX or any(child.name != "Quiet" for child in others):
        raise errors.MalformedXML()
    quiet = bool(others) and others[0].text.strip().lower() == "true"
    entries = [node.fields({"Key", "VersionId", "ETag", "LastModifiedTime", "Size"}) for node in wanted]
    if any(not entry.get("Key") for entry in entries):
        raise errors.MalformedXML()
    lines = [""] * len(entries)
    request.batch = None if request.bucket_record.plain else []
    following = iter(range(len(entries)))
    waits, turn = not owns_plain(request.who, request.bucket_record), asyncio.Lock()

    async def worker() -> None:
        for index in following:
            if waits:
                async with turn:
                    await asyncio.sleep(0)  # long policies take time: other requests have a turn after each decision
            lines[index] = await _delete_entry(front, request, entries[index], quiet)

    async with TaskGroup() as group:
        for _ in range(min(len(entries), front.endpoint.limits.deletes_in_flight_max)):
            group.create_task(worker())
    return xml_reply(xml.document("DeleteResult", *lines))


async def _delete_entry(front: Front, request: Request, entry: dict[str, str], quiet: bool) -> str:
    key = entry["Key"].encode()
    version = entry.get("VersionId", "")
    named = f"<Key>{xml.escape(entry['Key'])}</Key>{xml.optional('VersionId', version)}"
    try:
        check_key(key)
        if "VersionId" in entry and not version:
            raise errors.InvalidArgument("Version id cannot be the empty string")
        grant = await permit(front, request, Ask(DELETE_KEY, request.bucket_record, key, version))
        result = await front.objects.delete(
            grant,
            key,
            version_id=version,
            bypass_governance=bypasses(request.headers),
            conditions=c.entry_conditions(entry),
            who=request.who,
            origin=origin_of(request, REMOVED),
        )
    except errors.S3Error as error:
        _note(request, BatchKey(key, version, error.status, error.code))
        return f"<Error>{named}{xml.element('Code', error.code)}{xml.element('Message', error.message)}</Error>"
    except Exception:
        log.exception("DeleteObjects failed for one key, request %s", request.id)
        _note(request, BatchKey(key, version, 500, "InternalError"))
        return (
            f"<Error>{named}<Code>InternalError</Code><Message>An internal error occurred. Try again.</Message></Error>"
        )
    _note(request, BatchKey(key, version or result.version_id, 204))
    if quiet:
        return ""
    marker = ""
    if result.delete_marker:
        shown = result.version_id or version
        marker = f"<DeleteMarker>true</DeleteMarker>{xml.optional('DeleteMarkerVersionId', shown)}"
    return f"<Deleted>{named}{marker}</Deleted>"


def _note(request: Request, key: BatchKey) -> None:
    if request.batch is not None:
        request.batch.append(key)
