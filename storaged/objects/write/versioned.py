"""Changes of a key's versions: what ``code.history`` decides becomes the register's value.

Theory of operation. An update makes a draft of the versions from the value that its promise brought, and changes it. A
page that the draft has to read is loaded, and the update runs again, under another promise (``PageNeeded``). The pages
that the changed record refers to and the one before it did not are written after the promise and before the accept, on
a majority, leaves before branches. So

* a record that is chosen refers only to pages that a majority has;
* no sweep deletes them: it deletes a page only after a round of the register that began after the page was last put,
  and that round ends the promise, or finds the record (``maintain.manifest_gc``).

Pages that both records refer to were never without a record that names them, so nothing deletes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from storaged.meta.names import Change, RegisterName, Value, Visibility
from storaged.meta.ports import Outcome, Pages
from storaged.objects.bucket_keys import BucketKeys, change_with_keys
from storaged.objects.code.adding import next_ordinal
from storaged.objects.code.history import BOUNDS, Bounds, CheckRemoval, Draft, Entry, Shelf, never_locked
from storaged.objects.code.lock import check_removal
from storaged.objects.code.versions import decode_record, record_change
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import Version
from storaged.objects.sharing import Borrowed
from storaged.objects.write.commit import AfterPromise, change_once

Edit = Callable[[Draft, int], bool]
"""``edit(draft, ordinal)`` changes the versions of a key; False: it left them as they are. ``ordinal``: of the version
that the change may add. It may run several times, and raises what the change is to raise: KeyNeeded, PageNeeded, too.
"""


class Gone(NamedTuple):
    """What a change removes: versions whose data nothing uses any more once the change is committed, and loans that
    they borrowed from."""

    versions: Sequence[Version] = ()
    borrowed: Sequence[Borrowed] = ()


class PagesToPut(Exception):
    """A change has new pages."""


class VersionsUpdate:
    """The update function of one change, as ``Registers.change`` wants it, and what became of its last run."""

    def __init__(
        self, shelf: Shelf, edit: Edit, bounds: Bounds | None = None, check: CheckRemoval = never_locked
    ) -> None:
        """``check``: of each version that the edit removes."""
        self._shelf = shelf
        self._edit = edit
        self._check = check
        self._bounds = bounds or BOUNDS
        self._fresh: dict[bytes, bytes] = {}
        self.removed = Gone()

    def update(self, value: Value | None, payload: bytes = b"") -> Change | None:
        """``payload``: the data id of small copies that come along with the new null version. Raises DataDamaged, and
        what the edit raises.
        """
        self._fresh, self.removed = {}, Gone()
        draft = Draft(decode_record(value), self._shelf, self._bounds, self._check)
        if not self._edit(draft, next_ordinal(value)):
            return None
        change = record_change(draft.record(), payload or _payload_of(value, draft.removed))
        self._fresh, self.removed = draft.fresh, Gone(_unlent(draft), draft.returned)
        return change

    def update_without_pages(self, value: Value | None) -> Change | None:
        """Raises PagesToPut when the change has new pages: it must not be accepted before they are durable."""
        change = self.update(value)
        if self._fresh:
            raise PagesToPut
        return change

    async def put_pages(self, pages: Pages, name: RegisterName) -> None:
        """Makes the pages durable that the changed record needs. Raises ServiceUnavailable."""
        for page_hash, body in self._fresh.items():
            await pages.put_page(name, body, page_hash)


def _payload_of(value: Value | None, removed: list[Version]) -> bytes:
    """The small copies that the register names go with the version that has them."""
    if value is None or value.visibility == Visibility.TOMBSTONE:
        return b""
    if any(part.data_id == value.payload for version in removed for part in version.parts):
        return b""
    return value.payload


def _unlent(draft: Draft) -> list[Version]:
    """The removed versions, except those whose data stays in the record for other keys."""
    if not draft.loans:
        return draft.removed
    lent = {part.data_id for loan in draft.loans for part in loan.parts}
    manifests = {loan.manifest for loan in draft.loans if loan.manifest}
    return [
        version
        for version in draft.removed
        if version.manifest not in manifests and not any(part.data_id in lent for part in version.parts)
    ]


def unlocked(plane: ObjectPlane, *, bypass: bool = False) -> CheckRemoval:
    """Lets versions go that no lock keeps now. ``bypass``: see ``code.lock``."""

    def check(entry: Entry) -> None:
        check_removal(entry.kept.lock, plane.clock.wall_ms(), bypass=bypass)

    return check


async def change_versions(
    plane: ObjectPlane,
    keys: BucketKeys,
    name: RegisterName,
    edit: Edit,
    check: CheckRemoval = never_locked,
    *,
    after_promise: AfterPromise | None = None,
) -> tuple[Outcome, Gone]:
    """Changes the versions of a key; returns what went, too. ``check``: see VersionsUpdate.
    ``after_promise``: awaited before the accept. Raises what ``edit`` raises, AccessDenied (a locked version),
    SlowDown, ServiceUnavailable, DataDamaged.
    """
    change = VersionsUpdate(keys.shelf, edit, check=check)
    if after_promise is not None:

        async def ready() -> None:
            await change.put_pages(plane.pages, name)
            await after_promise()

        return await change_once(plane, keys, name, change.update, ready), change.removed
    try:
        outcome = await change_with_keys(plane.registers, keys, name, change.update_without_pages)
    except PagesToPut:
        outcome = await change_once(plane, keys, name, change.update, lambda: change.put_pages(plane.pages, name))
    return outcome, change.removed
