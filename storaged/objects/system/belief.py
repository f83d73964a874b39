"""Which values of system registers a gateway wrote: the gateway's quorums check this (``meta.client``, ``believes``).

A storage node can write anything to its own disk, under any ballot. If its value counted as the newest, a gateway that
settles the register would carry it to the other replicas, and the record of a bucket or a user would be gone. These
records carry an authenticator, so a value without a valid one is set aside while other replicas have better values.
"""

from __future__ import annotations

from storaged.errors import DataDamaged, StoragedError
from storaged.meta.names import RegisterName, Value
from storaged.objects.plane import ObjectPlane
from storaged.objects.system import accounts, bucket_records, claims, users
from storaged.objects.system.bucket_records import BucketRecords
from storaged.objects.system.users import UserService


class Belief:
    """``believes(name, value)`` of a gateway. True while the keyring is not open, since nothing can be verified
    then.
    """

    def __init__(self, plane: ObjectPlane, its_users: UserService) -> None:
        self._plane = plane
        self._buckets = BucketRecords(plane)
        self._users = its_users

    def __call__(self, name: RegisterName, value: Value) -> bool:
        if value.sequence == 0:
            return True  # the register was never written
        try:
            if name.key.startswith(bucket_records.PREFIX.encode()):
                self._buckets.require_authentic(name, value)
            elif name.key.startswith(users.PREFIX.encode()):
                self._users.require_authentic(name, value)
            elif name.key.startswith(accounts.PREFIX.encode()):
                self._users.accounts.require_authentic(name, value)
            elif name.key.startswith(claims.PREFIX.encode()):
                claims.require_authentic(self._plane, name, value)
        except DataDamaged:
            return False
        except StoragedError:
            return True
        return True
