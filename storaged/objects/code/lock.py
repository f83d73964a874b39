"""Object lock: what a version's lock allows. Pure.

A version is locked while its retention lasts, and while it has a legal hold. A locked version is not removed, whatever
asks for it: each removal goes through ``history.Draft.remove``, inside of the compare-and-set, which asks here. Nothing
but the end of its retention unlocks a version in COMPLIANCE mode; one in GOVERNANCE mode goes with the permission to
bypass it. Delete markers and changes of metadata remove no version, so no lock forbids them.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-lock.html
"""

from __future__ import annotations

from storaged.errors import AccessDenied
from storaged.objects.records import Lock

GOVERNANCE = "GOVERNANCE"
COMPLIANCE = "COMPLIANCE"

_LOCKED = "Access Denied because object protected by object lock."


def check_removal(lock: Lock | None, now_ms: int, *, bypass: bool) -> None:
    """``bypass``: the sender may bypass governance, and asks for it. Raises AccessDenied."""
    if lock is None:
        return
    if lock.hold or (lock.until_ms > now_ms and not (bypass and lock.mode == GOVERNANCE)):
        raise AccessDenied(_LOCKED)


def with_retention(lock: Lock | None, mode: str, until_ms: int, now_ms: int, *, bypass: bool) -> Lock | None:
    """The lock with another retention; ``mode`` empty: with none. A retention that lasts is only made longer, unless it
    may be bypassed. Raises AccessDenied.
    """
    before = lock or Lock()
    if before.until_ms > now_ms:
        longer = mode == before.mode and until_ms >= before.until_ms
        if not longer and not (bypass and before.mode == GOVERNANCE):
            raise AccessDenied(_LOCKED)
    return _kept(Lock(mode, until_ms if mode else 0, before.hold, before.released))


def with_hold(lock: Lock | None, hold: bool) -> Lock | None:
    before = lock or Lock()
    return _kept(Lock(before.mode, before.until_ms, hold, not hold))


def _kept(lock: Lock) -> Lock | None:
    return lock if lock.mode or lock.hold or lock.released else None
