"""Conditions of reads and writes: part of the port of the object plane (``api``)."""

from __future__ import annotations

from msgspec import Struct

from storaged.objects.etags import Condition
from storaged.objects.grant_types import Allowed


class ReadConditions(Struct, frozen=True):
    """If-Match, If-None-Match, If-(Un)Modified-Since in milliseconds. Evaluated as by RFC 9110 and AWS."""

    if_match: Condition = None
    if_none_match: Condition = None
    if_modified_since_ms: int | None = None
    if_unmodified_since_ms: int | None = None


class WriteConditions(Struct, frozen=True):
    """Conditions of PUT, Complete, Delete and the destination of a Copy.

    If-Match: ``ANY`` wants the object to exist. If-None-Match: ``ANY`` wants it not to exist, tags want it to have
    another. x-amz-if-match-size and x-amz-if-match-last-modified-time (ms) are of Delete alone. ``allowed``: no
    client's condition, but the object that the change was allowed for.
    """

    if_match: Condition = None
    if_none_match: Condition = None
    if_match_size: int | None = None
    if_match_modified_ms: int | None = None
    allowed: Allowed = None


NO_READ_CONDITIONS = ReadConditions()
NO_WRITE_CONDITIONS = WriteConditions()
