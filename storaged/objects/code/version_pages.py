"""Single pages of older versions (``code.history``): how they are read and checked, and removed when they are lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence, Set
from typing import Any

import msgspec

from storaged.errors import DataDamaged
from storaged.meta.names import RegisterName
from storaged.meta.ports import Pages
from storaged.objects.records import PageRef, Version, VersionsPage
from storaged.wire import decode


def decode_page(body: bytes, ref: PageRef) -> VersionsPage:
    """Raises DataDamaged for what is not the page that ``ref`` describes. So a walk over pages ends: pages of one key
    have ordinals that no other page has.
    """
    try:
        page = decode(body, VersionsPage)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"A page of older versions cannot be read: {error}") from None
    ordinals = [kept.ordinal for kept in page.kept]
    for one in page.refs:
        ordinals += [one.newest, one.oldest] if one.newest != one.oldest else [one.newest]
    falling = all(first > second for first, second in itertools.pairwise(ordinals))
    if (
        len(page.kept) != len(page.versions)
        or bool(page.versions) == bool(page.refs)
        or not falling
        or (ordinals[0], ordinals[-1]) != (ref.newest, ref.oldest)
    ):
        raise DataDamaged("A page of older versions is not what its record says.")
    return page


async def read_page(pages: Pages, near: RegisterName, ref: PageRef) -> VersionsPage:
    """Raises DataDamaged."""
    return decode_page(await pages.get_page(near, ref.hash), ref)


def without_lost(
    refs: Sequence[PageRef],
    lost: Set[bytes],
    page_of: Callable[[PageRef], VersionsPage],
    new_page: Callable[[Sequence[Any], Sequence[PageRef]], PageRef],
) -> list[PageRef]:
    """The references but for those to lost pages; a branch that refers to some becomes another one. ``page_of`` and
    ``new_page``: of the draft that is changed."""
    left = []
    for ref in refs:
        if ref.hash in lost:
            continue
        under = page_of(ref).refs
        kept = without_lost(under, lost, page_of, new_page)
        if len(kept) < len(under) or any(one is not other for one, other in zip(kept, under, strict=True)):
            if kept:
                left.append(new_page((), kept))
        else:
            left.append(ref)
    return left


def weight(version: Version) -> int:
    """About the bytes that a version takes in a record."""
    parts = sum(len(part.inline) + 160 for part in version.parts)
    return 96 + len(version.wrapped_key) + len(version.meta) + len(version.listing) + parts + 21 * len(version.pages)
