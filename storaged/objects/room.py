"""Whether a cluster that is nearly full takes a write that needs more room: one admission for every write of a client,
the smallest too.

A write is refused before its body is read, when fewer than a majority of its register's disks take another row, or when
the disks that are not full can't hold a coded block: a full cluster takes no small objects either, unless deleted rows
have left room to new ones. What frees room or needs none is not asked here: deletes, aborts, and Complete, whose record
takes the place of its parts' rows.

While no disk is full this costs a look at an empty set. The disks themselves keep the last of their room
(``disk_room``); heartbeats say that they are full before they have to refuse.
"""

from __future__ import annotations

from collections.abc import Sequence

from storaged.cluster.layout import Layout
from storaged.cluster.ports import Layouts, Liveness
from storaged.errors import InsufficientStorage, ServiceUnavailable
from storaged.ids import DATA_ID_BYTES
from storaged.meta.names import RegisterName
from storaged.objects.code import place

_ANY_DATA = bytes(DATA_ID_BYTES)


class Room:
    """``check`` is on the path of every write."""

    def __init__(self, layouts: Layouts, liveness: Liveness) -> None:
        self._layouts = layouts
        self._liveness = liveness
        self._judged: tuple[Layout | None, frozenset[str]] = None, frozenset()
        self._held: dict[tuple[str, ...], bool] = {}
        """Whether the disks that are not full hold a block, by the bucket's countries, as judged for ``_judged``."""

    def check(self, name: RegisterName, countries: Sequence[str] = ()) -> None:
        """Raises InsufficientStorage, ServiceUnavailable."""
        full = self._liveness.disks_full()
        if full:
            self._check(name, tuple(countries), full)

    def _check(self, name: RegisterName, countries: tuple[str, ...], full: frozenset[str]) -> None:
        sets = self._layouts.partition(name.partition).voters
        takes_rows = self._liveness.disk_takes_rows
        for disks in sets:
            taking = sum(disk not in full or takes_rows(disk) for disk in disks)
            if taking <= len(disks) // 2:
                raise InsufficientStorage(
                    f"{len(disks) - taking} of the {len(disks)} disks for this key's metadata are full."
                    " Nothing was changed."
                )
        if all(takes_rows(disk, outside_reserve=True) for disks in sets for disk in disks if disk in full):
            return  # rows have room that nothing else can use; an object that is too large for a row is refused later
        self._check_blocks(countries, full)

    def check_blocks(self, countries: Sequence[str]) -> None:
        """Raises InsufficientStorage when a coded block has no place for want of room."""
        full = self._liveness.disks_full()
        if full:
            self._check_blocks(tuple(countries), full)

    def _check_blocks(self, countries: tuple[str, ...], full: frozenset[str]) -> None:
        if not self._holds_blocks(countries, full):
            raise InsufficientStorage(
                f"{len(full)} of {len(self._layouts.current.disks)} disks are full, and the others can't hold an object"
                " so that it survives the loss of a disk. Nothing was changed."
            )

    def _holds_blocks(self, countries: tuple[str, ...], full: frozenset[str]) -> bool:
        layout = self._layouts.current
        if self._judged[0] is not layout or self._judged[1] is not full:
            self._judged, self._held = (layout, full), {}
        held = self._held.get(countries)
        if held is None:
            held = self._held[countries] = _holds(layout, countries, full)
        return held


def _holds(layout: Layout, countries: tuple[str, ...], full: frozenset[str]) -> bool:
    """Disks that are away count as free: that they don't answer is not for want of room."""
    try:
        place.choose(layout, _ANY_DATA, layout.target, lambda disk: disk not in full, countries)
    except ServiceUnavailable:
        return not full.intersection(disk.id for disk in layout.disks)  # else it is not for want of room
    return True
