"""What listings of objects return, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from msgspec import Struct

from storaged.objects.brief import full_list
from storaged.objects.records import SealedList


class ListedVersion(Struct, frozen=True):
    key: bytes
    version_id: str
    size: int
    modified_ms: int
    etag: str
    storage_class: str
    algorithm: str
    checksum_type: str
    owner: str
    latest: bool = True
    delete_marker: bool = False


class ListedObject(NamedTuple):
    size: int
    modified_ms: int
    printed: SealedList


Show = Callable[[Sequence[int], Sequence[int], Sequence[SealedList], Iterable[str]], Sequence[Any]]
"""Turns sizes, times, list fields and owners of objects into what the caller of a listing shows of each. A pure
function: its results are cached and returned again (``objects.cache.listed_rows``).
"""


def as_rows(
    sizes: Sequence[int], times_ms: Sequence[int], printed: Sequence[SealedList], _owners: Iterable[str]
) -> Sequence[ListedObject]:
    return list(map(ListedObject, sizes, times_ms, map(full_list, printed)))


class Listing(Struct, frozen=True):
    """Current objects in the order of their keys, as columns: the keys, and the result of ``show`` for each; and common
    prefixes. ``next_after``: where the next page begins; None at the end.
    """

    keys: Sequence[bytes] = ()
    shown: Sequence[Any] = ()
    prefixes: Sequence[bytes] = ()
    next_after: bytes | None = None


class VersionListing(Struct, frozen=True):
    """``next_after``, ``next_version``: as ``after`` and ``after_version`` of the next page; ``next_version`` is empty
    where that begins with another key. ``next_after`` is None at the end.
    """

    versions: Sequence[ListedVersion] = ()
    prefixes: Sequence[bytes] = ()
    next_after: bytes | None = None
    next_version: str = ""
