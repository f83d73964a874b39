"""Where the disks that take writes now can hold a part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

from storaged.cluster.layout import Profile
from storaged.errors import StoragedError
from storaged.maintain.context import MaintainContext
from storaged.maintain.health import BlockPlace, DisksNow, Room
from storaged.objects.code.place import Placement, choose_prompt, is_eligible, near
from storaged.objects.records import PartEntry


class Placements:
    """Asks the placement of writes."""

    def __init__(self, context: MaintainContext) -> None:
        self._context = context
        self._rooms: dict[tuple[str, ...], Room] = {}
        """By the countries of a bucket."""
        self._taking: frozenset[str] = frozenset()

    def choose(
        self, entry: PartEntry, profile: Profile, countries: tuple[str, ...], among: Collection[str] | None = None
    ) -> Placement | None:
        """Where a write of this profile would go now; None when it would be refused. ``among``: to no other disks."""
        liveness = self._context.liveness
        writable: Callable[[str], bool] = liveness.disk_writable
        if among is not None:
            writable = frozenset(filter(liveness.disk_writable, among)).__contains__
        try:
            return choose_prompt(
                self._context.layouts.current, entry.data_id, profile, writable, liveness.disk_prompt, countries
            )
        except StoragedError:
            return None

    def at_target(
        self,
        entry: PartEntry,
        countries: tuple[str, ...],
        present: BlockPlace | None = None,
        *,
        first_choice: bool = False,
        among: Collection[str] | None = None,
    ) -> Placement | None:
        """Where the part can lie under the target profile of the layout in force, within the limits of the failure
        domains; None when it can't now. ``present``: where it is; disks that keep a fragment keep its position.
        ``first_choice``: nowhere but on the disks that the layout prefers. ``among``: on no other disks.
        """
        target = self._context.layouts.current.target
        placement = self.choose(entry, target, countries, among)
        if placement is None or placement.profile != target or (first_choice and placement.moved):
            return None
        domain_of = self._context.layouts.current.domain_by_disk
        shares = Counter(domain_of[disk] for disk in placement.disks)
        if placement.moved and max(shares.values()) > target.m:
            return None
        if present is None or present.profile != target:
            return placement
        return near(self._context.layouts.current, placement, entry.data_id, present.disks, countries)

    def may_stay(self, place: BlockPlace) -> bool:
        """Whether new fragments might go to all disks of a block, so that nothing urges it away."""
        layout = self._context.layouts.current
        known = layout.disk_by_id
        return all(disk in known and is_eligible(layout, disk, place.countries) for disk in place.disks)

    def room(self, entry: PartEntry, countries: tuple[str, ...]) -> Room:
        """Whether ``at_target`` finds a place, remembered until ``forget``. What one placement group can, all can: only
        the number of disks in each domain matters.
        """
        known = self._rooms.get(countries)
        if known is None:
            can_hold_target = self.at_target(entry, countries) is not None
            known = self._rooms[countries] = Room(can_hold_target, self.disks_now().taking)
        return known

    def disks_now(self) -> DisksNow:
        """``taking`` is the same object while nothing changes: findings keep it."""
        readable, writable = self._context.usable_disks()
        taking = frozenset(filter(self._context.liveness.disk_prompt, writable))
        if taking != self._taking:
            self._taking = taking
        return DisksNow(readable, writable, self._taking)

    def forget(self) -> None:
        """Disks may have come or gone."""
        self._rooms.clear()
