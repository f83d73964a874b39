"""Small request documents, verified against the digests that came with them. (Objects' digests are the object plane's
work.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial

from storaged.errors import BadDigest, InvalidRequest
from storaged.objects.write.checksums import checksum_of
from storaged.s3 import headers as h
from storaged.s3.context import Front
from storaged.s3.documents import understood
from storaged.s3.request import Request


async def read_verified(
    front: Front, request: Request, *, bytes_max: int, required: bool = False, of_object: bool = False
) -> bytes:
    """The whole body, at most ``bytes_max``. ``required``: a Content-MD5 or a checksum must have come. ``of_object``:
    x-amz-checksum-* are of another thing than this body.

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
    await understood(partial(_check, md5=md5, declared=declared), data)
    return data


def _check(data: bytes, md5: bytes | None, declared: Mapping[str, str]) -> None:
    """Raises BadDigest."""
    if md5 is not None and hashlib.md5(data).digest() != md5:
        raise BadDigest("The Content-MD5 you specified did not match what we received.")
    for algorithm, value in declared.items():
        if checksum_of(algorithm, data) != value:
            raise BadDigest(f"The {algorithm} you specified did not match what we received.")
