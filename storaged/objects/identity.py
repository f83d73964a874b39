"""The names that AWS gives a user, beside the canonical id: the account and the ARN. Pure.

Every user is an account of its own, whose number follows from the canonical id, so it needs no register and never
changes. Users that share a canonical id (exchanged keys) are one account.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

ACCOUNT_DIGITS = 12

ANONYMOUS_ID = "65a011a29cdf8ec533ec3d1ccaae921c"
"""What AWS names as the owner of an object that an anonymous request wrote."""


@lru_cache(maxsize=4096)
def account_of(user_id: str) -> str:
    """12 digits, the first of them not 0. ``UserService.add`` draws ids until the account is new."""
    number = int.from_bytes(sha256(b"storaged account\0" + user_id.encode()).digest()[:16], "big")
    return str(10 ** (ACCOUNT_DIGITS - 1) + number % (9 * 10 ** (ACCOUNT_DIGITS - 1)))


def names_of(user_id: str, name: str) -> dict[str, str]:
    """What commands and the admin API print of a user."""
    return {"user_id": user_id, "account": account_of(user_id), "arn": arn_of(user_id, name)}


def arn_of(user_id: str, name: str) -> str:
    """``arn:aws:iam::123456789012:user/anne``"""
    return f"arn:aws:iam::{account_of(user_id)}:user/{name}"
