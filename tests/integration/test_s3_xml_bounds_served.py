"""Documents that clients send: what they may be made of, and that no document keeps the event loop.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from typing import Any

import pytest

from storaged.s3 import xml
from storaged.s3.documents import INLINE_BYTES_MAX
from tests.integration.s3_front import ACCESS, REGION, s3_world, signed

SPACE = b" " * INLINE_BYTES_MAX


DOCUMENTS = {
    "PUT /bucket?tagging": b"<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet>%b</Tagging>",
    "PUT /bucket/k?tagging": b"<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet>%b</Tagging>",
    "PUT /bucket?acl": b"<AccessControlPolicy><AccessControlList></AccessControlList>%b</AccessControlPolicy>",
    "PUT /another": b"<CreateBucketConfiguration>%b</CreateBucketConfiguration>",
    "POST /bucket?delete": b"<Delete><Object><Key>none</Key></Object>%b</Delete>",
    "POST /bucket/k?uploadId=none": (
        b"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>e</ETag></Part>%b</CompleteMultipartUpload>"
    ),
}


@pytest.mark.parametrize("request_line", DOCUMENTS)
@pytest.mark.parametrize("large", [False, True])
async def test_a_document_is_understood_in_a_thread_when_it_is_large(
    request_line: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, parse, digest = [], xml.parse, hashlib.md5

    def counted(*args: Any, **more: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return parse(*args, **more)

    def counted_md5(data: bytes = b"", **more: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return digest(data, **more)

    method, target = request_line.split(" ")
    body = DOCUMENTS[request_line] % (SPACE if large else b"")
    md5 = base64.b64encode(digest(body).digest()).decode()
    async with s3_world() as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        await world.raw(signed(world, "PUT", "/bucket/k", body=b"x", headers={"Connection": "close"}))
        request = signed(world, method, target, body=body, headers={"Connection": "close", "Content-MD5": md5})
        monkeypatch.setattr(xml, "parse", counted)
        monkeypatch.setattr("storaged.s3.documents.hashlib.md5", counted_md5)
        answer = await world.raw(request)
    assert not answer.startswith(b"HTTP/1.1 5") or b"NotImplemented" in answer
    assert len(threads) >= 2, answer
    assert threads[:2] == [not large] * 2, "its digest, and its parts"
