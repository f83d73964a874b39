"""Sealed fields in brief: the checksum that most objects have takes one byte. Pure."""

from __future__ import annotations

import msgspec

from storaged.objects.records import SealedList, SealedMeta

USUAL_CODE = "N"
"""In sealed fields, the code for CRC64NVME of the whole object: an object that came without a checksum gets this one.
The row of a small object has half a kilobyte, and LMDB fits rows into pages: the name and type in full would cost such
an object 3% of its disk space.
"""

_USUAL = ("CRC64NVME", "FULL_OBJECT")


def brief_meta(meta: SealedMeta) -> SealedMeta:
    """Metadata as it is sealed: with USUAL_CODE in place of its only checksum, if that is the usual one."""
    if meta.checksum_type == _USUAL[1] and len(meta.checksums) == 1 and _USUAL[0] in meta.checksums:
        return msgspec.structs.replace(meta, checksums={USUAL_CODE: meta.checksums[_USUAL[0]]}, checksum_type="")
    return meta


def full_meta(meta: SealedMeta) -> SealedMeta:
    """The reverse of ``brief_meta``. Old metadata, without the code, does not change."""
    if USUAL_CODE in meta.checksums:
        return msgspec.structs.replace(meta, checksums={_USUAL[0]: meta.checksums[USUAL_CODE]}, checksum_type=_USUAL[1])
    return meta


def listed_checksum(algorithm: str, checksum_type: str) -> tuple[str, str]:
    """Algorithm and type that a list prints, from the fields of a SealedList."""
    return _USUAL if algorithm == USUAL_CODE else (algorithm, checksum_type)


def full_list(listed: SealedList) -> SealedList:
    """A list field written out, as by ``full_meta``."""
    algorithm, checksum_type = listed_checksum(listed.algorithm, listed.checksum_type)
    return msgspec.structs.replace(listed, algorithm=algorithm, checksum_type=checksum_type)
