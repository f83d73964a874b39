"""Events as the documents that AWS sends. Pure.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote_plus

from storaged.objects.pending_events import CREATED, EventFacts
from storaged.objects.records import BucketRecord


def document(bucket: BucketRecord, key: bytes, facts: EventFacts, region: str) -> bytes:
    """One event. Its sequencer grows, as text, with each event of the key. Deliveries of one event have the same."""
    thing: dict[str, Any] = {"key": quote_plus(key)}
    if facts.name.startswith(CREATED):
        thing |= {"size": facts.size, "eTag": facts.etag}
    if facts.version_id:
        thing["versionId"] = facts.version_id
    thing["sequencer"] = f"{facts.sequence:016X}" + (f"{facts.number:04X}" if facts.number else "")
    record = {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "awsRegion": region,
        "eventTime": _moment(facts.at_ms),
        "eventName": facts.name,
        "userIdentity": {"principalId": facts.requester or "Anonymous"},
        "requestParameters": {"sourceIPAddress": facts.remote},
        "responseElements": {"x-amz-request-id": facts.request_id, "x-amz-id-2": ""},
        "s3": {
            "s3SchemaVersion": "1.0",
            "configurationId": facts.rule,
            "bucket": {
                "name": bucket.name,
                "ownerIdentity": {"principalId": bucket.owner},
                "arn": f"arn:aws:s3:::{bucket.name}",
            },
            "object": thing,
        },
    }
    return json.dumps({"Records": [record]}).encode()


def trial_document(bucket: str, request_id: str, now_ms: int) -> bytes:
    """What a destination gets when a configuration names it."""
    found = {
        "Service": "Amazon S3",
        "Event": "s3:TestEvent",
        "Time": _moment(now_ms),
        "Bucket": bucket,
        "RequestId": request_id,
        "HostId": "",
    }
    return json.dumps(found).encode()


def _moment(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{ms % 1000:03d}Z"
