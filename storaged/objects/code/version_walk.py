"""The versions of a key in order, newest first: those in its record, then those on pages (``code.history``).

A page has a dozen versions, so a list of a thousand needs some 84 of them. Read one after the other, each page would
wait for an answer. A caller can say how many versions it wants: then the pages that have these are read together, up to
``TOGETHER_MAX``, and no others. The references say how many versions each page has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from storaged.errors import DataDamaged
from storaged.meta.names import RegisterName
from storaged.meta.ports import Pages
from storaged.objects.code.history import Entry, entries_in, entries_on, levels_of
from storaged.objects.code.version_pages import read_page
from storaged.objects.records import ObjectRecord, PageRef, VersionsPage
from storaged.tasks import gather_bounded

TOGETHER_MAX = 16
"""Pages in memory at once. One has about 6 KiB, and at most some 100 KiB."""

OnUnreadable = Callable[[DataDamaged], None]
"""Called for a page that can't be read, which is left out. Where there is none, DataDamaged is raised."""


async def every_entry(
    pages: Pages,
    near: RegisterName,
    record: ObjectRecord,
    *,
    below: int | None = None,
    wanted: int = 0,
    on_unreadable: OnUnreadable | None = None,
) -> AsyncIterator[Entry]:
    """All versions of a key, newest first; those with an ordinal less than ``below``. ``wanted``: about how many the
    caller takes; 0: each page is read when its versions are next. Raises DataDamaged.
    """
    async for run in every_run(pages, near, record, below=below, wanted=wanted, on_unreadable=on_unreadable):
        for entry in run:
            yield entry


async def every_run(
    pages: Pages,
    near: RegisterName,
    record: ObjectRecord,
    *,
    below: int | None = None,
    wanted: int = 0,
    on_unreadable: OnUnreadable | None = None,
) -> AsyncIterator[list[Entry]]:
    """As ``every_entry``; those of the record, and of a page, together."""
    run = _those_below(entries_in(record), below)
    if run:
        yield run
    wanted -= len(run)
    async for _, page in every_page(pages, near, record, below=below, wanted=wanted, on_unreadable=on_unreadable):
        run = _those_below(entries_on(page), below)
        if run:
            yield run


def _those_below(entries: list[Entry], below: int | None) -> list[Entry]:
    return entries if below is None else [entry for entry in entries if entry.ordinal < below]


async def every_page(
    pages: Pages,
    near: RegisterName,
    record: ObjectRecord,
    *,
    below: int | None = None,
    wanted: int = 0,
    on_unreadable: OnUnreadable | None = None,
) -> AsyncIterator[tuple[bytes, VersionsPage]]:
    """(hash, page) of all pages with older versions, branches before what they refer to. ``below``: only those that
    have versions with ordinals less than this. ``wanted``: of versions, as of ``every_entry``. Raises DataDamaged.
    """
    waiting = [ref for level in reversed(levels_of(record)) for ref in reversed(level)]
    ahead: dict[bytes, VersionsPage | DataDamaged] = {}
    lowest: int | None = None
    while waiting:
        ref = waiting.pop()
        if lowest is not None and ref.newest >= lowest:
            raise DataDamaged("The pages of older versions of this key are not in order.")
        if below is not None and ref.oldest >= below:
            lowest = ref.oldest
            continue
        if ref.hash not in ahead:
            ahead |= await _read_together(pages, near, _together(ref, waiting, ahead, wanted))
        page = ahead.pop(ref.hash)
        if isinstance(page, DataDamaged):
            if on_unreadable is None:
                raise page
            on_unreadable(page)
            lowest = ref.oldest
            continue
        yield ref.hash, page
        if page.refs:
            waiting += reversed(page.refs)
        else:
            lowest = ref.oldest
            wanted -= len(page.versions)


def _together(
    first: PageRef, waiting: Sequence[PageRef], ahead: dict[bytes, VersionsPage | DataDamaged], wanted: int
) -> list[PageRef]:
    """``first``, and those after it that are needed for so many versions."""
    found, count = [first], first.count
    for ref in reversed(waiting):
        if count >= wanted or len(found) + len(ahead) >= TOGETHER_MAX or ref.hash in ahead:
            break
        found.append(ref)
        count += ref.count
    return found


async def _read_together(
    pages: Pages, near: RegisterName, refs: Sequence[PageRef]
) -> dict[bytes, VersionsPage | DataDamaged]:
    if len(refs) == 1:  # without a task
        return {refs[0].hash: await _read(pages, near, refs[0])}
    read = await gather_bounded([_read(pages, near, ref) for ref in refs], TOGETHER_MAX)
    return {ref.hash: page for ref, page in zip(refs, read, strict=True)}


async def _read(pages: Pages, near: RegisterName, ref: PageRef) -> VersionsPage | DataDamaged:
    try:
        return await read_page(pages, near, ref)
    except DataDamaged as error:
        return error
