"""Manifests: up to 32 parts of an object lie in its record, more in a chain of immutable pages addressed by their hash,
on the replicas of its register.

A page is written, and synced on a majority, before the page that names it, and all pages before the record that names
the first. So a reader of the record can read its pages. The record also lists the hashes of all pages, for repair and
for the garbage collection of pages that no record names. That collection spares pages that were put, or put again,
after it looked: so a proposer of a record puts its pages again after its promise (``maintain.manifest_gc``).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from storaged.errors import DataDamaged
from storaged.hashes import page_hash
from storaged.ids import Entropy
from storaged.meta.names import RegisterName
from storaged.meta.ports import Pages
from storaged.objects.code.geometry import problem_of
from storaged.objects.ports import SealBroken
from storaged.objects.records import (
    PARTS_INLINE_MAX,
    Loan,
    PartEntry,
    SealedMeta,
    SealedPart,
    Version,
)
from storaged.sov1 import SALT_BYTES, open_message, seal_message
from storaged.wire import Message, decode, encode

T = TypeVar("T")

PAGE_PARTS_MAX = 256
PAGE_SEALED_PARTS_MAX = 1000
PAGES_MAX = 64
"""10,000 parts make fewer pages: a longer chain is damage."""
PARTS_LABEL = "sov.parts.v1"


class PartsPage(Message, frozen=True):
    """``next``: hash of the following page, empty at the end. Up to 256 parts a page."""

    parts: tuple[PartEntry, ...]
    next: bytes = b""


class SealedPartsPage(Message, frozen=True):
    """A page of up to 1,000 SealedParts, of an object with more than 32 parts. It is sealed under the version's DEK
    (label ``sov.parts.v1``) before it is hashed and stored. ``next``: hash of the following page; empty at the end.
    """

    parts: tuple[SealedPart, ...]
    next: bytes = b""


class Manifest(NamedTuple):
    """What a version stores of its parts: the ``parts`` themselves, or ``first``, the hash of the first page, and
    ``pages``, the hashes of all.
    """

    parts: tuple[PartEntry, ...]
    first: bytes = b""
    pages: tuple[bytes, ...] = ()


async def write_manifest(pages: Pages, near: RegisterName, parts: Sequence[PartEntry]) -> Manifest:
    """Returns when every page is durable on a majority."""
    if len(parts) <= PARTS_INLINE_MAX:
        return Manifest(tuple(parts))
    written: list[bytes] = []
    following = b""
    for start in reversed(range(0, len(parts), PAGE_PARTS_MAX)):
        page = PartsPage(tuple(parts[start : start + PAGE_PARTS_MAX]), following)
        following = await pages.put_page(near, encode(page))
        written.append(following)
    return Manifest((), following, tuple(written))


async def with_parts(pages: Pages, near: RegisterName, version: Version, parts: Sequence[PartEntry]) -> Version:
    """The version with a manifest of these parts, whose pages are durable when this returns. Its other pages, which
    have what is sealed about the parts, stay: they are those of the version that its present manifest does not have.
    """
    before = {one async for one, _ in manifest_pages(pages, near, version)}
    manifest = await write_manifest(pages, near, parts)
    others = tuple(one for one in version.pages if one not in before)
    return msgspec.structs.replace(
        version,
        parts=manifest.parts,
        manifest=manifest.first,
        pages=manifest.pages + others if version.pages else (),
    )


async def parts_of(pages: Pages, near: RegisterName, having: Version | Loan) -> AsyncIterator[PartEntry]:
    """The parts in order, page by page. Raises DataDamaged, also for an entry that cannot be a part."""
    for part in having.parts:
        yield checked(part)
    async for _, page in manifest_pages(pages, near, having):
        for part in page.parts:
            yield checked(part)


async def manifest_pages(
    pages: Pages, near: RegisterName, having: Version | Loan
) -> AsyncIterator[tuple[bytes, PartsPage]]:
    """(hash, page) along the chain. Raises DataDamaged."""
    following = having.manifest
    for _ in range(PAGES_MAX):
        if not following:
            return
        page = _decode(await pages.get_page(near, following), PartsPage)
        yield following, page
        following = page.next
    raise DataDamaged("The manifest of this object does not end.")


def checked(part: PartEntry) -> PartEntry:
    """Raises DataDamaged for an entry that cannot be a part."""
    if problem := problem_of(part):
        raise DataDamaged(f"The record of this key names a part that cannot be: {problem}.")
    return part


def bound_parts(version: Version, whole: SealedPart, sealed: Sequence[SealedPart]) -> Iterator[PartEntry]:
    """The parts of a version without a manifest, in order, each only if it is the part that was sealed into the version
    at this place. Without this check a malicious storage node could reorder parts, leave some out, or name a superseded
    attempt: each would open, since all are sealed under the upload's key.

    ``whole``: the only part of an object that was not uploaded in parts (``sealed`` is empty then). Raises DataDamaged,
    also for an entry that cannot be a part.
    """
    expected = iter(sealed or (whole,))
    for part in version.parts:
        yield _bound(checked(part), next(expected, None))
    _check_ended(expected)


async def bound_parts_of(
    pages: Pages, near: RegisterName, version: Version, whole: SealedPart, sealed: Sequence[SealedPart]
) -> AsyncGenerator[PartEntry, None]:
    """As ``bound_parts``, of any version."""
    expected = iter(sealed or (whole,))
    async for part in parts_of(pages, near, version):
        yield _bound(part, next(expected, None))
    _check_ended(expected)


def _bound(part: PartEntry, wanted: SealedPart | None) -> PartEntry:
    if wanted is None or not wanted.names(part):
        raise DataDamaged("The record of this key names other parts than are sealed in it.")
    return part


def _check_ended(expected: Iterator[SealedPart]) -> None:
    if next(expected, None) is not None:
        raise DataDamaged("The record of this key names fewer parts than are sealed in it.")


async def write_sealed_parts(
    pages: Pages, near: RegisterName, dek: bytes, context: bytes, parts: Sequence[SealedPart], entropy: Entropy
) -> tuple[bytes, ...]:
    """Writes the pages of ``seal_parts``. Returns their hashes, the first one's first."""
    sealed = seal_parts(dek, context, parts, entropy)
    for name, body in reversed(sealed.items()):
        await pages.put_page(near, body, name)
    return tuple(sealed)


def seal_parts(dek: bytes, context: bytes, parts: Sequence[SealedPart], entropy: Entropy) -> dict[bytes, bytes]:
    """Pages with the parts' ETags, sizes and checksums, sealed under the version's key, by their hashes; the first one
    first.
    """
    following = b""
    pages: list[tuple[bytes, bytes]] = []
    for start in reversed(range(0, len(parts), PAGE_SEALED_PARTS_MAX)):
        page = SealedPartsPage(tuple(parts[start : start + PAGE_SEALED_PARTS_MAX]), following)
        body = seal_message(dek, PARTS_LABEL, context, encode(page), entropy(SALT_BYTES))
        following = page_hash(body)
        pages.append((following, body))
    return dict(reversed(pages))


async def sealed_parts_of(
    pages: Pages, near: RegisterName, dek: bytes, context: bytes, meta: SealedMeta
) -> tuple[SealedPart, ...]:
    """The sealed description of all parts; empty for an object that was not uploaded in parts. Raises DataDamaged."""
    found = list(meta.parts)
    following = meta.parts_page
    for _ in range(PAGES_MAX):
        if not following:
            return tuple(found)
        try:
            body = open_message(dek, PARTS_LABEL, context, await pages.get_page(near, following))
        except SealBroken as error:
            raise DataDamaged(f"The list of parts of this object does not open: {error}") from None
        page = _decode(body, SealedPartsPage)
        found.extend(page.parts)
        following = page.next
    raise DataDamaged("The list of parts of this object does not end.")


async def renew_pages(pages: Pages, near: RegisterName, hashes: Sequence[bytes]) -> None:
    """Puts pages again, so that no sweep that looked at them before deletes them, and on all replicas that answer.
    Raises DataDamaged for a page that is gone, ServiceUnavailable.
    """
    for name in hashes:
        await pages.put_page(near, await pages.get_page(near, name), name)


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return decode(body, kind)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"A page of this object's manifest cannot be read: {error}") from None
