"""Which bytes of an object a read wants: a Range, a part, or all. Pure."""

from __future__ import annotations

from typing import NamedTuple

from storaged.errors import InvalidPartNumber, InvalidRange
from storaged.objects.api import ObjectInfo, RangeSpec


class Span(NamedTuple):
    """``first .. first + length - 1``. ``partial``: the request names a range or a part (a 206 answer)."""

    first: int
    length: int
    partial: bool


def span_of(span: RangeSpec | None, size: int) -> Span:
    """The bytes of an object of ``size`` bytes that a Range names. The last bytes of an empty object are all of it, as
    on AWS. Raises InvalidRange.
    """
    if span is None or (span.first is None and span.last and not size):
        return Span(0, size, False)
    if span.first is None:
        length = min(span.last or 0, size)
        if not length:
            raise InvalidRange(ActualObjectSize=str(size))
        return Span(size - length, length, True)
    if span.first >= size:
        raise InvalidRange(
            ActualObjectSize=str(size), RangeRequested=f"bytes={span.first}-{'' if span.last is None else span.last}"
        )
    end = size if span.last is None else min(span.last + 1, size)
    return Span(span.first, end - span.first, True)


def span_of_part(info: ObjectInfo, part_number: int) -> Span:
    """The bytes of the n-th part, counted from 1 whatever numbers the parts were uploaded under. An object that was not
    uploaded in parts has one. Raises InvalidPartNumber.
    """
    sizes = [part.size for part in info.parts] or [info.size]
    if not 1 <= part_number <= len(sizes):
        raise InvalidPartNumber(ActualPartCount=str(len(sizes)), PartNumberRequested=str(part_number))
    return Span(sum(sizes[: part_number - 1]), sizes[part_number - 1], True)
