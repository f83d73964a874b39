"""The ids of versions, as clients see them. Pure."""

from __future__ import annotations

import base64
import re
from typing import NamedTuple

from storaged.errors import InvalidArgument
from storaged.ids import DATA_ID_BYTES
from storaged.objects.records import NULL_VERSION, Kept, Version

ORDINAL_BYTES = 8
_NAME = re.compile(f"[A-Za-z0-9_-]{{{(ORDINAL_BYTES + DATA_ID_BYTES) * 4 // 3}}}")


def version_name(kept: Kept, version: Version) -> str:
    """``null``, or 32 characters: URL-safe base64 of the ordinal (u64) and the context id."""
    if version.version_id == NULL_VERSION:
        return NULL_VERSION
    return place_name(kept, version)


def place_name(kept: Kept, version: Version) -> str:
    """As the id of a version that is not the null version. As a marker it names the place of the null version, too:
    ``null`` would name none once that is deleted.
    """
    return base64.urlsafe_b64encode(kept.ordinal.to_bytes(ORDINAL_BYTES, "big") + version.context_id).decode()


class VersionName(NamedTuple):
    """A version id, parsed. Both are empty for the null version."""

    ordinal: int
    context_id: bytes


NULL_NAME = VersionName(-1, b"")


def required_name(text: str) -> VersionName:
    """Raises InvalidArgument for what no version id can be."""
    name = parse_name(text)
    if name is None:
        raise InvalidArgument("Invalid version id specified", ArgumentName="versionId", ArgumentValue=text)
    return name


def parse_name(text: str) -> VersionName | None:
    """None for what no version id can be."""
    if text == NULL_VERSION:
        return NULL_NAME
    if not _NAME.fullmatch(text):
        return None
    raw = base64.urlsafe_b64decode(text)
    return VersionName(int.from_bytes(raw[:ORDINAL_BYTES], "big"), raw[ORDINAL_BYTES:])
