"""The parts that a Complete names: checked against those that were uploaded, and their checksums combined. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from storaged.errors import BadDigest, EntityTooSmall, InvalidPart, InvalidPartOrder, InvalidRequest, MalformedXML
from storaged.objects.api import DEFAULT_ALGORITHM
from storaged.objects.plane import ObjectLimits
from storaged.objects.records import SealedPart
from storaged.objects.upload_records import PartRecord, UploadRecord
from storaged.objects.upload_types import CompletedPart
from storaged.objects.write.checksums import COMPOSITE, FULL_OBJECT, multipart_checksum, same_checksums

Rows = dict[int, tuple[PartRecord, SealedPart]]
"""The uploaded parts by number, with the checksums in the clear."""


def chosen_parts(
    limits: ObjectLimits, rows: Rows, parts: Sequence[CompletedPart], record: UploadRecord
) -> list[tuple[PartRecord, SealedPart]]:
    """The parts that the client names, checked against the uploaded ones. Where the upload was created for a composite
    checksum, the client has to name the checksum of each part, as on AWS. Raises MalformedXML, InvalidPartOrder,
    InvalidPart, InvalidRequest, EntityTooSmall.
    """
    algorithm = record.checksum_algorithm or DEFAULT_ALGORITHM
    composite = bool(record.checksum_algorithm) and record.checksum_type == COMPOSITE
    if not parts or len(parts) > limits.parts_max:
        raise MalformedXML
    numbers = [part.number for part in parts]
    if any(first >= second for first, second in itertools.pairwise(numbers)):
        raise InvalidPartOrder
    chosen = []
    for part in parts:
        found = rows.get(part.number)
        if (
            found is None
            or found[1].etag != part.etag
            or not same_checksums(part.checksums, {algorithm: found[1].checksum})
        ):
            raise InvalidPart(PartNumber=str(part.number), ETag=part.etag)
        if composite and algorithm not in part.checksums:
            raise InvalidRequest(
                f"The upload was created using a {algorithm.lower()} checksum. The complete request must include the"
                f" checksum for each part. It was missing for part {part.number} in the request."
            )
        chosen.append(found)
    for row, sealed in chosen[:-1]:
        if sealed.size < limits.part_bytes_min:
            raise EntityTooSmall(
                ProposedSize=str(sealed.size),
                MinSizeAllowed=str(limits.part_bytes_min),
                PartNumber=str(row.entry.number),
                ETag=sealed.etag,
            )
    return chosen


def checksums_of(
    record: UploadRecord, parts: Sequence[SealedPart], declared: Mapping[str, str], checksum_type: str
) -> tuple[dict[str, str], str]:
    """(algorithm -> value, type) of the whole object, for the algorithm that the upload was created for, or CRC64NVME.
    Raises InvalidRequest, BadDigest.
    """
    algorithm, kind = record.checksum_algorithm or DEFAULT_ALGORITHM, record.checksum_type or FULL_OBJECT
    if checksum_type and checksum_type != kind:
        raise BadDigest(f"The upload was created for checksums of type {kind}, not {checksum_type}.")
    if any(name != algorithm for name in declared):
        raise InvalidRequest(f"The upload was created for {algorithm} checksums, not {', '.join(declared)}.")
    if not record.checksum_algorithm and not declared and not all(part.checksum for part in parts):
        return {}, ""  # old parts, of a version that kept no checksum without being asked
    value = multipart_checksum(algorithm, kind, [(part.checksum, part.size) for part in parts])
    if declared and declared[algorithm] not in (value, value.partition("-")[0]):
        raise BadDigest(f"The {algorithm} you specified did not match the calculated checksum.")
    return {algorithm: value}, kind
