"""Users and accounts, as the port of the object plane has them: part of ``api``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from storaged.objects.accounts import IamKey, StoredAccount, StoredSession
from storaged.objects.grant_types import Principal

NO_FACTS: Final[Mapping[str, str]] = {}

AccountChange = Callable[[StoredAccount], StoredAccount]
"""From an account to what it becomes. Raises S3 errors where that can't be. It may run several times."""


class Accounts(Protocol):
    """What IAM knows of accounts, by canonical id."""

    async def get(self, user_id: str) -> StoredAccount:
        """Cached for ``user_cache_s``; an empty one when nothing was ever set. Raises DataDamaged."""

    async def change(
        self,
        user_id: str,
        edit: AccountChange,
        *,
        action: str,
        target: str,
        who: Principal | None = None,
        facts: Mapping[str, str] = NO_FACTS,
    ) -> StoredAccount:
        """Changes an account by compare-and-set, and returns it. This gateway obeys it at once, others within
        ``user_cache_s``. ``action``, ``target`` (an ARN), ``who``, ``facts``: for the audit log. Raises LimitExceeded,
        and what ``edit`` raises; then nothing was changed.
        """

    def new_id(self, prefix: str) -> str:
        """A random id, as AWS writes them: ``AIDA`` and 16 letters and digits."""


class Users(Protocol):
    @property
    def accounts(self) -> Accounts: ...

    async def lookup(self, access_key: str) -> tuple[Principal, str]:
        """(principal, secret key), cached for ``user_cache_s``. Raises InvalidAccessKeyId, also for a key that is
        inactive."""

    def try_get(self, access_key: str) -> tuple[Principal, str] | None:
        """As ``lookup``, from memory; None when the record must be read."""

    async def lookup_session(self, access_key: str, token: str) -> tuple[Principal, str]:
        """As ``lookup``, of temporary credentials. Raises InvalidToken. The caller compares
        ``Identity.expires_ms`` with the time."""

    def try_session(self, access_key: str, token: str) -> tuple[Principal, str] | None: ...

    def seal_session(self, session: StoredSession) -> str:
        """The token of a session."""

    async def add(
        self, name: str, *, access_key: str = "", secret_key: str = "", email: str = "", user_id: str = ""
    ) -> tuple[Principal, str]:
        """Keys are random unless given. ``user_id``: the owner id whose buckets the user gets; empty: a new one. Raises
        InvalidArgument when the name is taken.
        """

    async def list_users(self) -> list[Principal]:
        """The accounts' own users: one for each of their keys."""

    async def directory(self) -> Mapping[str, Principal]:
        """All accounts by canonical id, cached for ``user_cache_s``."""

    async def remove(self, name_or_access_key: str) -> Principal:
        """Returns the removed user. Its buckets stay; a user added with this user id owns them. Raises
        InvalidArgument."""

    async def root_keys(self, user_id: str) -> list[IamKey]:
        """The keys of an account's root, inactive ones as well."""

    async def add_key(self, user_id: str, name: str, iam_user: str, *, who: Principal | None = None) -> tuple[str, str]:
        """Makes a key and its secret. ``iam_user``: the id of the user of the account, which must then be made to list
        it; empty: the root's, and it works at once. ``name``: of the user."""

    async def set_key_active(
        self, user_id: str, access_key: str, active: bool, *, who: Principal | None = None
    ) -> None:
        """Of a key of the root. Raises NoSuchEntity."""

    async def remove_key(self, user_id: str, access_key: str, iam_user: str, *, who: Principal | None = None) -> None:
        """Removes a key of this account and user. Raises NoSuchEntity, DeleteConflict (the last key of a root)."""
