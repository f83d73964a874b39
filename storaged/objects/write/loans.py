"""Loans: a version of one key reads the data of another key, so that a copy moves no data.

Theory of operation. Data belongs to one register, its *owner*. Each of its fragments names the owner, and deletion,
repair and moves ask the owner alone. A copy does not change that: the owner's record keeps the data for it.

* The owner's record has a *loan*: the data (its place, too; of many parts the pages with both) and its *borrowers*. As
  long as it has one, the record refers to the data and names the pages (``write.references``), whether or not a
  version of its own key has it. So collection, sweep, repair, moves and the loss of disks need to know nothing of
  copies, and one register has the places of the data.
* The borrowing version has no parts. Its record says in which key's record they are, under which borrower's id
  (``records.Borrowed``). Readers look there (``read.borrowed``). A copy of a copy borrows from the same owner.

*Lending.* A borrower is added by a compare-and-set of a record that has the data at that moment. So no data comes back
that the collector may delete already. The borrower is added before the borrowing version is accepted (``with_loan``).

*Ending.* A borrower's id is drawn for one copy, and only that copy proposes a version with it; other proposers carry
this version on. A request that removed such a version, a copy that failed, and a look from time to time
(``end_unused``) end a loan in three steps (``end_loan``):

1. The borrower is marked as ending, with a random mark of this request. A later request sets its own.
2. The borrowing key's register is settled: a round at a new ballot, which ends all promises that were given before it,
   or brings an accept under such a promise into its value.
3. If that value names the borrower, the mark is taken off; otherwise the borrower goes. Both happen only if the mark is
   still the one of step 1. When the last borrower goes, so does the loan. If no version has the data either, the data
   goes to the garbage lists.

A copy looks at its borrower between its promise and its accept, and accepts nothing when the borrower is marked or gone
(``check_lent``). So no version is accepted whose borrower goes: the copy saw the borrower unmarked after its promise.
If the mark was set before that look, it was also taken off before it, so step 3 finds another mark or none. If it was
set after the look, step 2 came after the promise: it ended the promise, or found the accept.

*Creates.* A plain PUT of a new key may be a create. A create does not read the record that it overwrites, and it may
take effect late at a replica that holds no row (``meta.consensus.register``). A proposer that carries it on keeps the
loans of its key (``code.adding.overtake``); one of version 0.1.0 would overwrite them. So a copy goes on only when
every replica of the owner's register has accepted the loan (``check_everywhere``). Such a replica holds a row, which is
no create, and takes no create as long as it has the row:

* It accepts nothing below the loan any more. All values above it have the loan, until that is ended.
* A record with a loan is no tombstone. So the row is not expunged, and no floor replaces it
  (``meta.consensus.floors``).

A look before the loan does not suffice. A create that a replica holds may have a higher ballot than the loan gets, and
a tombstone that a replica holds may be expunged later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import msgspec

from storaged.errors import DataDamaged, NoSuchBucket, StoragedError
from storaged.fragments.ports import REPLACED
from storaged.ids import DATA_ID_BYTES
from storaged.meta.names import RegisterName, Value
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import Draft
from storaged.objects.code.lending import find_borrower, name_of_borrower, name_of_owner, uses
from storaged.objects.code.version_names import VersionName
from storaged.objects.code.versions import decode_record
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, Loan, Version, sharing_of
from storaged.objects.sharing import Borrowed, Borrower
from storaged.objects.write.commit import AfterPromise
from storaged.objects.write.retire import retire_paged, retire_removed, retirements
from storaged.objects.write.versioned import Gone, change_versions
from storaged.units import KIB

T = TypeVar("T")

MARK_BYTES = 8
BORROWER_ID_BYTES = DATA_ID_BYTES
BORROWERS_MAX = 64
KEYS_BYTES_MAX = 16 * KIB
"""Limits of one record: the borrowers of its loans, and the bytes of their keys. Further copies get their own data."""
LENT_PARTS_MAX = 96
"""Parts of the loans of one record, those on pages apart."""
LENT_PAGES_MAX = 96
"""Pages with parts of the loans of one record. 10,000 parts have 40."""
STRAGGLERS_S = (0.02, 0.2)
"""A loan is chosen when a majority has accepted it. Pauses before further looks, for the other replicas."""
BORROWED_MAX = 32
"""Versions of one key that borrow."""
FRESH_MS = 600_000
"""Copies that are younger have rarely ended, so a look at them would be wasted. Nothing else depends on it. A time that
is further in the future than this is of a wrong clock: such a copy counts as old.
"""


class Wanted(NamedTuple):
    """The data that a copy borrows, of the register ``owner``: a loan has it, or the version ``named`` (None: the
    current one). ``data_ids``: of its parts in the record. An upload that was completed twice may have made versions of
    some and of all of its parts, so the first one does not tell. ``borrower``: the new version. ``pages``: with the
    parts, the first one first. Their hashes name the places of the blocks, too: data whose blocks move in this moment
    is not lent.
    """

    owner: RegisterName
    data_ids: tuple[bytes, ...]
    named: VersionName | None
    borrower: Borrower
    pages: tuple[bytes, ...] = ()

    def are_parts_of(self, having: Version | Loan) -> bool:
        first = self.pages[0] if self.pages else b""
        return having.manifest == first and tuple(part.data_id for part in having.parts) == self.data_ids


def introduce(
    plane: ObjectPlane, owner: RegisterName, owner_bucket: BucketRecord, name: RegisterName, loan_id: bytes
) -> tuple[Borrowed, Borrower]:
    """What the records of the owner and of the borrowing key ``name`` will say of each other. ``owner_bucket``: that of
    the owner."""
    now_ms = plane.clock.wall_ms()
    if owner.scope == name.scope:
        return Borrowed(owner.key, loan_id), Borrower(loan_id, name.key, now_ms)
    return (
        Borrowed(owner.key, loan_id, owner.scope, owner.shard, owner_bucket.name),
        Borrower(loan_id, name.key, now_ms, b"", name.scope, name.shard),
    )


class NotLent(Exception):
    """The data is not lent: its record does not have it any more, or has no room for another borrower; or a replica of
    the record does not have the loan; or the borrower is marked or gone. The copy gets data of its own.
    """


async def check_everywhere(plane: ObjectPlane, owner: RegisterName, borrower_id: bytes) -> None:
    """Makes sure that every replica of the owner's register has accepted the loan: see *Creates*. Raises NotLent."""

    def lends(value: Value) -> bool:
        try:
            return find_borrower(value, borrower_id) is not None
        except DataDamaged:
            return False

    for pause_s in (0.0, *STRAGGLERS_S):
        await asyncio.sleep(pause_s)
        accepted = await plane.registers.accepted_everywhere(owner, lends)
        if accepted:
            return
        if accepted is None:
            break
    raise NotLent


async def with_loan(
    plane: ObjectPlane, bucket: BucketRecord, wanted: Wanted, commit: Callable[[AfterPromise], Awaitable[T]]
) -> T:
    """Lends the data, and has ``commit`` commit the borrowing version. ``bucket``: of the owner. ``commit`` gets a
    function to await between its promise and its accept. When ``commit`` raises, the loan is ended in the background,
    unless the version was accepted all the same. Returns what ``commit`` returns. Raises NotLent, and as ``commit``.
    """
    borrower_id = wanted.borrower.id
    await add_borrower(plane, bucket, wanted)
    try:
        await check_everywhere(plane, wanted.owner, borrower_id)
        return await commit(lambda: check_lent(plane, wanted.owner, borrower_id))
    except BaseException:
        plane.background.spawn(_try_end(plane, bucket, wanted.owner, borrower_id))
        raise


async def add_borrower(plane: ObjectPlane, bucket: BucketRecord, wanted: Wanted) -> None:
    """Lends the data. Raises NotLent, and as ``change_versions``."""
    borrower = wanted.borrower

    def edit(draft: Draft, _ordinal: int) -> bool:
        loan = next((loan for loan in draft.loans if wanted.are_parts_of(loan)), None)
        others = tuple(one for one in draft.loans if one is not loan)
        if loan is None:
            loan = _loan_of(draft, wanted)
        borrowers = tuple(one for one in loan.borrowers if one.id != borrower.id)
        draft.loans = (*others, msgspec.structs.replace(loan, borrowers=(*borrowers, borrower)))
        keys = [one.key for loan in draft.loans for one in loan.borrowers]
        parts, pages = sum(len(one.parts) for one in draft.loans), sum(len(one.pages) for one in draft.loans)
        if len(keys) > BORROWERS_MAX or sum(map(len, keys)) > KEYS_BYTES_MAX:
            raise NotLent
        if parts > LENT_PARTS_MAX or pages > LENT_PAGES_MAX:
            raise NotLent
        return True

    try:
        await change_versions(plane, BucketKeys(plane, bucket), wanted.owner, edit)
    except NoSuchBucket:
        raise NotLent from None  # it is being deleted: the copy may be in another bucket


def _loan_of(draft: Draft, wanted: Wanted) -> Loan:
    """Of the version that has this data, without borrowers."""
    entry = draft.find(wanted.named) if wanted.named is not None else draft.newest
    if entry is None or not wanted.are_parts_of(entry.version):
        raise NotLent
    version = entry.version
    if version.manifest:
        if not set(wanted.pages) <= set(version.pages):
            raise NotLent  # an old record does not list its pages
        return Loan(None, (), (), version.multipart, version.manifest, wanted.pages)
    if not version.parts:
        raise NotLent  # it has borrowed its data itself
    return Loan(version.parts[0], (), version.parts[1:], version.multipart)


async def check_lent(plane: ObjectPlane, owner: RegisterName, borrower_id: bytes) -> None:
    """To be awaited between the promise and the accept of the borrowing version. Raises NotLent, ServiceUnavailable."""
    try:
        found = find_borrower((await plane.lender_registers.read(owner)).value, borrower_id)
    except NoSuchBucket:
        raise NotLent from None
    if found is None or found[1].ending:
        raise NotLent


# --- the end


async def end_loan(plane: ObjectPlane, bucket: BucketRecord, owner: RegisterName, borrower_id: bytes) -> None:
    """Removes a borrower from its loan, if no version of its key has the data any more. ``bucket``: of the owner, which
    may be a lender. Raises StoragedError: then the loan stays until the next look at it.
    """
    plane, mark = plane.for_lenders(bucket), plane.entropy(MARK_BYTES)
    borrower = await _mark(plane, bucket, owner, borrower_id, mark)
    if borrower is None:
        return
    used = await _is_used(plane, name_of_borrower(bucket, borrower), borrower_id, settled=True)
    await _conclude(plane, bucket, owner, borrower_id, mark, used=used)


async def _is_used(plane: ObjectPlane, name: RegisterName, borrower_id: bytes, *, settled: bool = False) -> bool:
    """Whether a version of the key is the borrower; ``settled``: also after every proposal that is under way. A bucket
    that has ended uses nothing: its final fence, at a majority, is as good as a round. Raises StoragedError.
    """
    registers = plane.lender_registers
    try:
        return uses(await registers.settle(name) if settled else (await registers.read(name)).value, borrower_id)
    except NoSuchBucket as error:
        if error.details.get("final"):
            return False
        raise


async def _mark(
    plane: ObjectPlane, bucket: BucketRecord, owner: RegisterName, borrower_id: bytes, mark: bytes
) -> Borrower | None:
    """Returns the borrower; None: there is no such one."""
    found: Borrower | None = None

    def edit(draft: Draft, _ordinal: int) -> bool:
        nonlocal found
        found = None
        for loan in draft.loans:
            for borrower in loan.borrowers:
                if borrower.id == borrower_id:
                    found = borrower
                    _replace(draft, loan, borrower, msgspec.structs.replace(borrower, ending=mark))
                    return True
        return False

    await change_versions(plane, BucketKeys(plane, bucket), owner, edit)
    return found


async def _conclude(
    plane: ObjectPlane, bucket: BucketRecord, owner: RegisterName, borrower_id: bytes, mark: bytes, *, used: bool
) -> None:
    unused: Loan | None = None
    origin = b""

    def edit(draft: Draft, _ordinal: int) -> bool:
        nonlocal unused, origin
        unused = None
        for loan in draft.loans:
            for borrower in loan.borrowers:
                if borrower.id == borrower_id and borrower.ending == mark:
                    after = msgspec.structs.replace(borrower, ending=b"") if used else None
                    _replace(draft, loan, borrower, after)
                    if not used and len(loan.borrowers) == 1 and not _has(draft, loan):
                        unused, origin = loan, b"" if loan.uploaded or draft.layers()[1] else REPLACED
                    return True
        return False

    await change_versions(plane, BucketKeys(plane, bucket), owner, edit)
    if unused is None:
        return
    if unused.manifest:
        await retire_paged(plane, bucket, owner, unused, origin)
        return
    for disk, entry in retirements(plane, bucket, owner, unused.parts, origin):
        plane.garbage.add(disk, entry)


def _has(draft: Draft, loan: Loan) -> bool:
    """Whether a version in the record has the data. A version on a page may have it, too: so False does not prove that
    the data was replaced, and the collector makes a round.
    """
    versions = [entry.version for entry in draft.inline]
    if loan.part is None:
        return any(version.manifest == loan.manifest for version in versions)
    return any(part.data_id == loan.part.data_id for version in versions for part in version.parts)


def _replace(draft: Draft, loan: Loan, borrower: Borrower, by: Borrower | None) -> None:
    """None: the borrower goes, and the loan with the last one."""
    borrowers = tuple(by if one is borrower else one for one in loan.borrowers)
    left = tuple(one for one in borrowers if one is not None)
    after = (msgspec.structs.replace(loan, borrowers=left),) if left else ()
    at = draft.loans.index(loan)
    draft.loans = (*draft.loans[:at], *after, *draft.loans[at + 1 :])


async def try_end_loan(plane: ObjectPlane, bucket: BucketRecord, borrowed: Borrowed) -> None:
    """As ``end_loan``, in the background, of what a version of ``bucket`` has borrowed."""
    owner = name_of_owner(bucket, borrowed)
    try:
        owner_bucket = await bucket_of_owner(plane, bucket, borrowed)
    except StoragedError:
        return
    if owner_bucket is not None:
        await _try_end(plane, owner_bucket, owner, borrowed.id)


async def bucket_of_owner(plane: ObjectPlane, bucket: BucketRecord, borrowed: Borrowed | None) -> BucketRecord | None:
    """The bucket whose record has what a version of ``bucket`` has: its own, or that from which it was ``borrowed``.
    None: that can't be said now. Raises DataDamaged, ServiceUnavailable.
    """
    if borrowed is None or not borrowed.scope:
        return bucket
    return await plane.lenders.bucket(borrowed.bucket, borrowed.scope)


async def _try_end(plane: ObjectPlane, bucket: BucketRecord, owner: RegisterName, borrower_id: bytes) -> None:
    try:
        await end_loan(plane, bucket, owner, borrower_id)
    except StoragedError:
        return  # the next walk asks for a look at it


async def end_unused(plane: ObjectPlane, bucket: BucketRecord, owner: RegisterName, fresh_ms: int = FRESH_MS) -> int:
    """Ends the loans of failed copies, and of versions that were removed while no process could end their loans.
    Returns how many loans the record has afterwards. Raises StoragedError.
    """
    now_ms, registers = plane.clock.wall_ms(), plane.lender_registers
    loans, ended = sharing_of(decode_record((await registers.read(owner)).value)).loans, False
    for loan in loans:
        for borrower in loan.borrowers:
            if not now_ms - fresh_ms < borrower.since_ms <= now_ms + FRESH_MS and (
                borrower.ending or not await _is_used(plane, name_of_borrower(bucket, borrower), borrower.id)
            ):
                await end_loan(plane, bucket, owner, borrower.id)
                ended = True
    if ended:
        loans = sharing_of(decode_record((await registers.read(owner)).value)).loans
    return len(loans)


def retire_gone(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, gone: Gone) -> None:
    """After a committed change: retires the removed data, and ends the loans of the removed versions in the
    background."""
    retire_removed(plane, bucket, name, gone.versions)
    for borrowed in gone.borrowed:
        plane.background.spawn(try_end_loan(plane, bucket, borrowed))
