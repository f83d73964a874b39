"""The records of users' access keys. Pure."""

from __future__ import annotations

from typing import Final

from storaged.wire import Message, encode


class UserRecord(Message, frozen=True):
    """``user/ACCESS_KEY``. ``sealed``: the secret key, sealed by the keyring and bound to the register's name.
    ``authenticator``: as in BucketRecord.

    ``iam_user``: the id of the user of an account whose key this is. Such a key works while the account
    (``accounts``) lists it. Empty: a key of the account's own user, its root. ``inactive``: of a key of the root: it
    does not work now.
    """

    access_key: str
    user_id: str
    name: str
    created_ms: int
    sealed: bytes
    email: str = ""
    authenticator: bytes = b""
    iam_user: str = ""
    inactive: bool = False


_FIELDS_OF_OLD: Final = 1 + UserRecord.__struct_fields__.index("authenticator")


def encode_user(record: UserRecord) -> bytes:
    """A record without the newer fields, where they say nothing, is the one that version 0.1.0 wrote: so its
    authenticator stays right, and gateways of that version read it."""
    if record.iam_user or record.inactive:
        return encode(record)
    return encode([getattr(record, name) for name in UserRecord.__struct_fields__[:_FIELDS_OF_OLD]])
