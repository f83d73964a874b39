"""Request documents (XML): read whole, checked against their digests, and parsed without blocking the event loop.

The digests of an object's bytes are not checked here: the object plane does that.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from storaged.errors import BadDigest, InvalidRequest
from storaged.objects.write.checksums import checksum_of
from storaged.s3 import headers as h
from storaged.s3.request import Request
from storaged.units import KIB

INLINE_BYTES_MAX = 16 * KIB
"""A longer document is parsed in a thread. The smallest elements that fit into 16 KiB are 4,000 and take 5 ms to parse;
a thread costs 0.1 ms. Nearly all documents are smaller."""

T = TypeVar("T")


async def parse_document(parse: Callable[[bytes], T], document: bytes) -> T:
    """``parse(document)``, in a thread if the document is large. Raises what ``parse`` raises."""
    if len(document) > INLINE_BYTES_MAX:
        return await asyncio.to_thread(parse, document)
    return parse(document)


async def read_document(request: Request, *, bytes_max: int, required: bool = False, of_object: bool = False) -> bytes:
    """The whole body of a request, at most ``bytes_max`` bytes.

    ``required``: the request must have a Content-MD5 or a checksum. ``of_object``: the x-amz-checksum-* headers are the
    checksums of an object, not of this body.

    Raises BadDigest, InvalidDigest, InvalidRequest, MaxMessageLengthExceeded.
    """
    md5 = h.content_md5(request.headers)
    declared = {} if of_object else h.declared_checksums(request.headers)
    decoder = request.body.decoder
    trailing = bool(decoder and h.trailing_names(request.headers))
    if required and md5 is None and not declared and not trailing:
        raise InvalidRequest("Missing required header for this request: Content-MD5 OR x-amz-checksum-*")
    data = await request.body.read(bytes_max)
    if decoder is not None:
        declared.update(
            {
                name: h.check_checksum(name, value, f"x-amz-checksum-{name.lower()}")
                for name, value in decoder.trailing_checksums().items()
            }
        )
    await parse_document(partial(_check, md5=md5, declared=declared), data)
    return data


def _check(data: bytes, md5: bytes | None, declared: Mapping[str, str]) -> None:
    """Raises BadDigest."""
    if md5 is not None and hashlib.md5(data).digest() != md5:
        raise BadDigest("The Content-MD5 you specified did not match what we received.")
    for algorithm, value in declared.items():
        if checksum_of(algorithm, data) != value:
            raise BadDigest(f"The {algorithm} you specified did not match what we received.")
