"""What records say of loans (``write.loans``). Pure."""

from __future__ import annotations

from storaged.meta.names import Value
from storaged.objects.code.versions import decode_record
from storaged.objects.records import Borrowed, Borrower, Loan, ObjectRecord, SharingRecord, sharing_of


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
