"""Accounts: registers ``account/USER_ID``, with all that IAM knows of an account sealed (``objects.accounts``).

A record grants access, so it carries an authenticator of the keyring over its register's name and sequence number, as
the records of users do: a storage node can neither read a policy nor write one.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Mapping

import msgspec

from storaged.errors import DataDamaged
from storaged.meta.names import Change, RegisterName, Value, Visibility, system_name
from storaged.objects.accounts import NO_ACCOUNT, AccountRecord, StoredAccount, packed_account, unpacked_account
from storaged.objects.cache.ttl import TtlCache
from storaged.objects.grant_types import Principal
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import SealBroken
from storaged.objects.quotas import Limit
from storaged.objects.system import rows
from storaged.objects.user_types import NO_FACTS, AccountChange
from storaged.wire import decode

PREFIX = "account/"
ID_RAW_BYTES = 10


class AccountService:
    """Implements ``api.Accounts``. ``on_change`` is called with the canonical id when an account changed."""

    def __init__(self, plane: ObjectPlane, on_change: Callable[[str], None]) -> None:
        self._plane = plane
        self._on_change = on_change
        limits = plane.limits
        self._cache: TtlCache[str, StoredAccount] = TtlCache(
            plane.clock, limits.user_cache_s, limits.cache_entries_max, self._load, plane.background.spawn
        )

    async def get(self, user_id: str) -> StoredAccount:
        return await self._cache.get(user_id)

    def loaded_s(self, user_id: str) -> float:
        """When the account that ``get`` returns was read."""
        return self._cache.loaded_s(user_id)

    async def _load(self, user_id: str) -> StoredAccount:
        plane, register = self._plane, system_name(PREFIX + user_id)

        def rewrite(value: Value, account: StoredAccount) -> Change:
            return self._change_to(user_id, register, value, account)

        found = await rows.read(plane.registers, plane.bad_rows, self._decode, rewrite, PREFIX + user_id)
        return NO_ACCOUNT if found is None else found

    def _decode(self, name: RegisterName, value: Value | None) -> StoredAccount | None:
        """Raises DataDamaged for a record that no gateway of this cluster wrote, ServiceUnavailable for one of a newer
        version."""
        if value is None or not value.body:
            return None
        record = self._verified(name, value)
        try:
            return unpacked_account(self._plane.keys.open_secret(record.sealed, _context(name)))
        except SealBroken as error:
            raise DataDamaged(f"What IAM knows of an account does not open: {error}") from None

    def _verified(self, name: RegisterName, value: Value) -> AccountRecord:
        try:
            record = decode(value.body, AccountRecord)
        except msgspec.MsgspecError as error:
            raise DataDamaged(f"The record of an account cannot be read: {error}") from None
        if not rows.is_authentic(self._plane.keys, name, value, record, record.authenticator):
            raise DataDamaged("The record of an account is not authentic.")
        return record

    def require_authentic(self, name: RegisterName, value: Value) -> None:
        """Raises DataDamaged for a value that no gateway of this cluster wrote. There are no removals."""
        self._verified(name, value)
        if value.visibility != Visibility.LIVE:
            raise DataDamaged("The record of an account says otherwise than its row.")

    def _change_to(self, user_id: str, name: RegisterName, before: Value | None, account: StoredAccount) -> Change:
        """Raises LimitExceeded."""
        sealed = self._plane.keys.seal_secret(packed_account(account), _context(name))
        record = AccountRecord(user_id, self._plane.clock.wall_ms(), sealed)
        return rows.authenticated_change(self._plane.keys, name, before, record)

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
        """``action``, ``target``, ``who`` and ``facts`` are for the audit log (``node.audited``)."""
        register = system_name(PREFIX + user_id)
        after = NO_ACCOUNT

        def update(value: Value | None) -> Change | None:
            nonlocal after
            found = self._decode(register, value)
            before = NO_ACCOUNT if found is None else found
            after = edit(before)
            return None if after == before else self._change_to(user_id, register, value, after)

        await self._load(user_id)  # so that a row that can't be used is healed before it is changed
        await self._plane.registers.change(register, update)
        self.forget(user_id)
        await self._plane.on_changed("account", user_id)
        return after

    def forget(self, user_id: str) -> None:
        """Drops the cached account: it was changed, perhaps by another process of this gateway."""
        self._cache.forget(user_id)
        self._on_change(user_id)

    async def with_quota(self) -> AsyncIterator[tuple[str, Limit]]:
        """The canonical ids of the accounts that have a quota, and what it is. Raises as ``rows.scan``."""
        plane = self._plane

        def decode_row(name: RegisterName, value: Value | None) -> tuple[str, Limit] | None:
            found = self._decode(name, value)
            if found is None or not (found.bytes_max or found.objects_max):
                return None
            return name.key.decode().removeprefix(PREFIX), Limit(found.bytes_max, found.objects_max)

        async for found in rows.scan(plane.scanner, plane.bad_rows, decode_row, PREFIX.encode()):
            yield found

    def new_id(self, prefix: str) -> str:
        return prefix + base64.b32encode(self._plane.entropy(ID_RAW_BYTES)).decode()


def _context(name: RegisterName) -> tuple[bytes, ...]:
    return (name.pack(), b"account")
