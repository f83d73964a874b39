"""What records say of loans (``write.loans``) and of departures (``write.departures``). Pure."""

from __future__ import annotations

from storaged.meta.names import RegisterName, Table, Value, object_name
from storaged.objects.code.history import newest_in
from storaged.objects.code.versions import decode_record
from storaged.objects.records import BucketRecord, Loan, ObjectRecord, SharingRecord, sharing_of
from storaged.objects.sharing import Borrowed, Borrower, Departure

LENT = "an object that was copied or renamed has a small part here: that stays whole until the object is written again"
"""Why a small body is not coded (``write.divide``)."""


def may_lend(owner_bucket: BucketRecord, bucket: BucketRecord) -> bool:
    """Whether a copy in ``bucket`` may borrow data of the other one. Readers compute the places of blocks from the
    countries of the bucket that they read; and either bucket's records name keys of the other one.
    """
    return owner_bucket.id == bucket.id or set(owner_bucket.countries) == set(bucket.countries)


def name_of_owner(bucket: BucketRecord, borrowed: Borrowed) -> RegisterName:
    """The register that has what a version of ``bucket`` borrows."""
    return _name(bucket, borrowed)


def name_of_borrower(bucket: BucketRecord, borrower: Borrower) -> RegisterName:
    """The register of a version that borrows from a record of ``bucket``."""
    return _name(bucket, borrower)


def _name(bucket: BucketRecord, there: Borrowed | Borrower) -> RegisterName:
    if not there.scope:
        return object_name(bucket.id, bucket.shard_numbers, there.key)
    return RegisterName(Table.OBJECT, there.scope, there.shard, there.key)


def find_borrower(value: Value | None, borrower_id: bytes) -> tuple[Loan, Borrower] | None:
    """In the record of an owner. Raises DataDamaged."""
    for loan in sharing_of(decode_record(value)).loans:
        for borrower in loan.borrowers:
            if borrower.id == borrower_id:
                return loan, borrower
    return None


def borrowed_by(record: ObjectRecord, ordinal: int) -> Borrowed | None:
    """Where the version with this ordinal has its data, if it has none of its own."""
    return record.sharing.borrowed.get(ordinal) if isinstance(record, SharingRecord) else None


def uses(value: Value | None, borrower_id: bytes) -> bool:
    """Whether a version of the record, also one on a page, is this borrower. Raises DataDamaged."""
    return any(one.id == borrower_id for one in sharing_of(decode_record(value)).borrowed.values())


def departure_in(value: Value | None) -> Departure | None:
    """None: the key is not being renamed. Raises DataDamaged."""
    return sharing_of(decode_record(value)).departure


def arrived_as(record: ObjectRecord) -> bytes:
    """The id of the departure that became the current version of the record, if one did; another id if none did."""
    entry = newest_in(record)
    borrowed = borrowed_by(record, entry.ordinal)
    return borrowed.id if borrowed is not None else entry.version.context_id


def has_arrived(value: Value | None, departure_id: bytes) -> bool:
    """Whether the key has got what departed under this id. Raises DataDamaged."""
    return any(arrival.id == departure_id for arrival in sharing_of(decode_record(value)).arrivals)
