"""Operations of rows that are more than one kind of request: a mix, ranges of large objects, multipart uploads."""

from __future__ import annotations

import hashlib
import re

from benches.rows import MIB, Bodies, Operation, getting, heading, putting
from benches.s3client import Ask, Connection, Signer, Target, WrongAnswer, path_of

PART_BYTES = 8 * MIB

CYCLE = "GHGPGHGDGHGPHGHGDHPG"
"""Twenty operations: 45% GET, 30% HEAD, 15% PUT, 10% DELETE."""

BEHIND = 3
"""A DELETE removes what a PUT has written so many cycles before; in the first ones it finds nothing."""

_UPLOAD_ID = re.compile(rb"<UploadId>([^<]+)</UploadId>")


def mixing(target: Target, bucket: str, prefix: str, source: str, bodies: Bodies, count: int, size: int) -> Operation:
    """GET and HEAD of the ``count`` objects under ``source``, which stay; PUT of new keys under ``prefix``, most of
    which are deleted later.
    """
    get, put = getting(target, bucket, source, bodies, count), putting(target, bucket, prefix, bodies, size)
    head = heading(target, bucket, source, count, size)
    sign, path = Signer(target), path_of(bucket, prefix)
    put_at = [place for place, kind in enumerate(CYCLE) if kind == "P"]
    deleted_at = [place for place, kind in enumerate(CYCLE) if kind == "D"]

    def any_of(number: int) -> Ask:
        cycle, place = divmod(number, len(CYCLE))
        kind = CYCLE[place]
        if kind == "G":
            return get(number)
        if kind == "H":
            return head(number)
        if kind == "P":
            return put(number)
        key = (cycle - BEHIND) * len(CYCLE) + put_at[deleted_at.index(place)]
        return Ask(sign.head("DELETE", f"{path}{max(key, 0):08d}"))

    return any_of


def ranging(target: Target, bucket: str, prefix: str, bodies: Bodies, count: int, whole: int, size: int) -> Operation:
    """``size`` bytes from anywhere in the ``count`` objects of ``whole`` bytes under ``prefix``."""
    sign, path = Signer(target), path_of(bucket, prefix)

    def get(number: int) -> Ask:
        key, start = number * 7919 % count, number * 999_983 % (whole - size)
        asked = f"Range: bytes={start}-{start + size - 1}\r\n"
        head = sign.head("GET", f"{path}{key:08d}", unsigned=asked)
        return Ask(head, expect=bodies.of(key)[start : start + size])

    return get


def uploading(target: Target, bucket: str, prefix: str, bodies: Bodies, size: int) -> Operation:
    """A whole multipart upload: its parts of ``PART_BYTES`` one after the other."""
    sign, path = Signer(target), path_of(bucket, prefix)
    digests: dict[tuple[int, int], tuple[str, str]] = {}

    def digests_of(number: int, start: int) -> tuple[str, str]:
        """SHA-256 and MD5 of a part, computed once for each of the slices that bodies are."""
        known = digests.get((number * 7 % 4096, start))
        if known is None:
            piece = bodies.of(number)[start : start + PART_BYTES]
            known = hashlib.sha256(piece).hexdigest(), hashlib.md5(piece, usedforsecurity=False).hexdigest()
            digests[number * 7 % 4096, start] = known
        return known

    def upload(number: int) -> Ask:
        key, body, tags = f"{path}{number:08d}", bodies.of(number), list[str]()

        def part(upload_id: str, start: int) -> Ask:
            sha256, md5 = digests_of(number, start)
            tags.append(md5)
            piece, query = body[start : start + PART_BYTES], f"partNumber={len(tags)}&uploadId={upload_id}"
            head = sign.head("PUT", key, query, sha256=sha256, length=len(piece))
            return Ask(head, piece, then=lambda _kept: next_of(upload_id, start + PART_BYTES))

        def next_of(upload_id: str, start: int) -> Ask:
            if start < size:
                return part(upload_id, start)
            parts = "".join(
                f"<Part><PartNumber>{place}</PartNumber><ETag>{tag}</ETag></Part>" for place, tag in enumerate(tags, 1)
            )
            document = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
            sha256 = hashlib.sha256(document).hexdigest()
            head = sign.head("POST", key, f"uploadId={upload_id}", sha256=sha256, length=len(document))
            return Ask(head, document, check=_is_complete)

        def first(kept: bytes) -> Ask:
            found = _UPLOAD_ID.search(kept)
            assert found is not None  # checked
            return next_of(found[1].decode(), 0)

        return Ask(sign.head("POST", key, "uploads="), check=_has_upload_id, then=first)

    return upload


def _has_upload_id(answered: Connection) -> None:
    if _UPLOAD_ID.search(answered.kept) is None:
        raise WrongAnswer(f"no UploadId: {bytes(answered.kept[:200])!r}")


def _is_complete(answered: Connection) -> None:
    if b"<CompleteMultipartUploadResult" not in answered.kept:
        raise WrongAnswer(f"the upload was not completed: {bytes(answered.kept[:200])!r}")
