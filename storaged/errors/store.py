"""Answers of the S3 front that are about the store (5xx): clients retry most of them."""

from __future__ import annotations

from storaged.errors.base import S3Error


class InternalError(S3Error):
    """An internal error occurred. Try again."""

    status = 500


class ServiceUnavailable(S3Error):
    """The store cannot do this safely now (too few disks, racks or replicas answer). Nothing was changed. Retry."""

    status = 503
    hint = (
        "See `storaged status`: a write needs enough disks to survive the loss of one more, a register two of its three"
        " replicas."
    )


class InsufficientStorage(S3Error):
    """The disks are full: this would take more room than they have left. Nothing was changed. Reads, listings and
    deletes go on.

    A retry does not help before there is room, so this is no 503, which clients try again.
    """

    status = 507
    hint = (
        "`storaged status` names the full disks. Delete data (what was deleted is given back after"
        " `limits.retire_delay_s`), end uploads that nobody completes, or add disks: writes go on by themselves then."
    )


class OutcomeUnknown(ServiceUnavailable):
    """The write may or may not have been applied: a replica stopped answering in the middle. Read, or retry."""

    code = "ServiceUnavailable"


class SlowDown(S3Error):
    """Please reduce your request rate."""

    status = 503


class KeyringUnavailable(ServiceUnavailable):
    """The keyring does not answer or is not this cluster's; nothing can be sealed or opened."""

    code = "ServiceUnavailable"
    hint = "See KEYRING_MISMATCH: `storaged explain KEYRING_MISMATCH`."


class KeyReleaseRefused(KeyringUnavailable):
    """The policy does not allow this gateway to have the key. The message names the rule."""

    code = "ServiceUnavailable"
    hint = "See KEY_RELEASE_REFUSED: `storaged explain KEY_RELEASE_REFUSED`."


class DataDamaged(ServiceUnavailable):
    """Too many fragments of this object are missing or damaged to read it now. Nothing unverified was sent."""

    code = "ServiceUnavailable"


class CopyUnreadable(ServiceUnavailable):
    """The newest record of this key may count, but its copy can't be read now. So it is not decided what the key
    has."""

    code = "ServiceUnavailable"


class PageLost(DataDamaged):
    """Each replica of this key says that it does not have a page which the key's record names. What was on the page is
    lost."""

    code = "ServiceUnavailable"
    hint = "When no disk comes back that may have it: `storaged bucket forget-lost` removes the versions on it."
