"""Users: registers ``user/ACCESS_KEY`` with the secret key sealed, and ``username/NAME``, which keeps names unique
(``claims``).

A record grants access, so it carries an authenticator of the keyring over its register's name and sequence number: a
storage node can neither read a secret nor create a user.

Each user here is the root of an account. An account may have users of its own (``accounts``): a key of theirs has the
same kind of record, which names the user, and grants only what the account says.
"""

from __future__ import annotations

import base64
import contextlib
import math
import re
from collections.abc import Mapping
from functools import partial

import msgspec

from storaged.errors import DataDamaged, DeleteConflict, InvalidAccessKeyId, InvalidArgument, NoSuchEntity
from storaged.meta.names import Change, RegisterName, Value, Visibility, system_name
from storaged.objects.accounts import NO_ACCOUNT, IamKey
from storaged.objects.cache.ttl import TtlCache
from storaged.objects.grant_types import Principal
from storaged.objects.identities import identity_of_user
from storaged.objects.identity import account_of
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import SealBroken
from storaged.objects.system import claims, rows
from storaged.objects.system.accounts import AccountService
from storaged.objects.system.claims import NameClaim
from storaged.objects.system.sessions import Sessions
from storaged.objects.user_records import UserRecord, encode_user
from storaged.wire import Message, decode, encode

PREFIX = "user/"
CLAIM_STALE_MS = 600_000
"""A name whose user was not created within this time of the claim is free again: the gateway stopped in between."""
NAME_BYTES_MAX = 128
_USER_ID = re.compile(r"[0-9a-f]{64}")


class UserSecret(Message, frozen=True):
    """Sealed in ``UserRecord.sealed``."""

    secret_key: str


class UserService:
    """Implements ``api.Users``."""

    def __init__(self, plane: ObjectPlane) -> None:
        self._plane = plane
        limits = plane.limits
        self._cache: TtlCache[str, tuple[Principal, str]] = TtlCache(
            plane.clock, limits.user_cache_s, limits.cache_entries_max, self._load, plane.background.spawn, self._made_s
        )
        self.try_get = self._cache.try_get
        self._directory: TtlCache[str, dict[str, Principal]] = TtlCache(
            plane.clock, limits.user_cache_s, 1, self._load_directory, plane.background.spawn
        )
        self.accounts = AccountService(plane, self._account_changed)
        self._sessions = Sessions(plane, self.accounts, self.lookup, self._cache.loaded_s)
        self.lookup_session, self.try_session = self._sessions.get, self._sessions.try_get
        self.seal_session = self._sessions.seal

    def _decode(self, name: RegisterName, value: Value | None) -> UserRecord | None:
        """Raises DataDamaged for a record that no gateway of this cluster wrote."""
        if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
            return None
        return self._verified(name, value)

    def _verified(self, name: RegisterName, value: Value) -> UserRecord:
        try:
            record = decode(value.body, UserRecord)
        except msgspec.MsgspecError as error:
            raise DataDamaged(f"The record of a user cannot be read: {error}") from None
        if not rows.is_authentic(self._plane.keys, name, value, record, record.authenticator, encode_user):
            raise DataDamaged("The record of a user is not authentic.")
        return record

    def require_authentic(self, name: RegisterName, value: Value) -> None:
        """Raises DataDamaged for a value that no gateway of this cluster wrote, also for a removal, which leaves a
        record that says so. (Older removals left nothing: that counts when a majority holds it.)
        """
        record = self._verified(name, value)
        if (value.visibility == Visibility.TOMBSTONE) != (record.user_id == ""):
            raise DataDamaged("The record of a user says otherwise than its row.")

    def _open(self, name: RegisterName, record: UserRecord) -> str:
        """The secret of a key."""
        try:
            secret = decode(self._plane.keys.open_secret(record.sealed, (name.pack(), b"secret")), UserSecret)
        except (SealBroken, msgspec.MsgspecError) as error:
            raise DataDamaged(f"The secret of a user does not open: {error}") from None
        return secret.secret_key

    async def lookup(self, access_key: str) -> tuple[Principal, str]:
        """Raises InvalidAccessKeyId."""
        return await self._cache.get(access_key)

    def _made_s(self, found: tuple[Principal, str]) -> float:
        """A key of an account's user says what the cached account says."""
        who = found[0]
        return math.inf if who.identity is None else self.accounts.loaded_s(who.user_id)

    async def _load(self, access_key: str) -> tuple[Principal, str]:
        if not _is_access_key(access_key):
            raise InvalidAccessKeyId(AWSAccessKeyId=access_key)
        record = await self._read(access_key)
        if record is None or record.inactive:
            raise InvalidAccessKeyId(AWSAccessKeyId=access_key)
        secret = self._open(system_name(PREFIX + access_key), record)
        if not record.iam_user:
            return Principal(record.user_id, record.name, access_key), secret
        return await self._of_account(record), secret

    async def _of_account(self, record: UserRecord) -> Principal:
        """The user of an account that a key belongs to. Raises InvalidAccessKeyId when the account does not list it as
        active."""
        account = await self.accounts.get(record.user_id)
        user = account.user_of(record.iam_user)
        listed = user is not None and any(key.access_key == record.access_key and key.active for key in user.keys)
        if user is None or account.closed or not listed:
            raise InvalidAccessKeyId(AWSAccessKeyId=record.access_key)
        identity = identity_of_user(record.user_id, account, user)
        return Principal(record.user_id, account.name, record.access_key, identity=identity)

    async def _read(self, access_key: str) -> UserRecord | None:
        """The current record of an access key, healed if possible. Raises DataDamaged, ServiceUnavailable."""
        plane, register = self._plane, system_name(PREFIX + access_key)

        def rewrite(value: Value, record: UserRecord) -> Change:
            return self._change(register, value, record)

        return await rows.read(plane.registers, plane.bad_rows, self._decode, rewrite, PREFIX + access_key)

    def _change(self, register: RegisterName, before: Value | None, record: UserRecord) -> Change:
        return rows.authenticated_change(self._plane.keys, register, before, record, encode_user)

    async def add(
        self, name: str, *, access_key: str = "", secret_key: str = "", email: str = "", user_id: str = ""
    ) -> tuple[Principal, str]:
        """Random keys unless given. Claims the name first, then creates the user. With the ``user_id`` of another user,
        present or removed, the new one shares that user's buckets: this is how keys are exchanged. Raises
        InvalidArgument when the name or the access key is taken or invalid.
        """
        if not name.strip() or name != name.strip() or len(name.encode()) > NAME_BYTES_MAX or not name.isprintable():
            raise InvalidArgument(
                f"A user's name has 1 to {NAME_BYTES_MAX} printable characters, and no space at either end."
            )
        if user_id and not _USER_ID.fullmatch(user_id):
            raise InvalidArgument("A user id has 64 hexadecimal digits.")
        if user_id:
            await self._refuse_user_s_name(user_id, name)
        access_key = access_key or _random_text(self._plane.entropy(15))
        if not _is_access_key(access_key):
            raise InvalidArgument("An access key has 3 to 128 letters, digits, or characters of _-.")
        await self._claim(name, access_key)
        shared, user_id = bool(user_id), user_id or await self._new_id()
        secret_key = await self._write_key(access_key, user_id, name, secret_key, email=email)
        if shared:
            await self._reopen(user_id, name)
        return Principal(user_id, name, access_key), secret_key

    async def _write_key(
        self, access_key: str, user_id: str, name: str, secret_key: str = "", *, email: str = "", iam_user: str = ""
    ) -> str:
        """Returns the secret, which is random unless given. Raises InvalidArgument when the access key is taken."""
        secret_key = secret_key or base64.b64encode(self._plane.entropy(30)).decode()
        register = system_name(PREFIX + access_key)
        plain = UserRecord(
            access_key,
            user_id,
            name,
            self._plane.clock.wall_ms(),
            self._plane.keys.seal_secret(encode(UserSecret(secret_key)), (register.pack(), b"secret")),
            email,
            iam_user=iam_user,
        )

        def update(value: Value | None) -> Change:
            if self._decode(register, value) is not None:
                raise InvalidArgument(f"The access key {access_key} is taken.")
            return self._change(register, value, plain)

        await self._plane.registers.change(register, update)
        await self._changed(access_key)
        return secret_key

    async def _refuse_user_s_name(self, user_id: str, name: str) -> None:
        """Raises InvalidArgument when a user of the account has that name: the ARN of the two would be the same."""
        if name.lower() in (await self.accounts.get(user_id)).users:
            raise InvalidArgument(f"The account has a user named {name} already.")

    async def _reopen(self, user_id: str, name: str) -> None:
        """The account ``user_id`` has a root (again)."""
        if await self.accounts.get(user_id) != NO_ACCOUNT:
            await self.accounts.change(
                user_id,
                lambda account: msgspec.structs.replace(account, name=account.name or name, closed=False),
                action="Reopen",
                target=f"account:{user_id}",
            )

    async def _new_id(self) -> str:
        """A canonical id of which no user has the account. The number of an account is a hash, so that two users could
        have one: a policy that names one of them would name both.
        """
        taken = {account_of(user.user_id) for user in await self.list_users()}
        while account_of(drawn := self._plane.entropy(32).hex()) in taken:
            pass
        return drawn

    def _removed(self, register: RegisterName, access_key: str, before: Value | None) -> Change:
        """A record without a user, so that a removal is as authentic as the record it removes."""
        return self._change(register, before, UserRecord(access_key, "", "", 0, b""))._replace(
            visibility=Visibility.TOMBSTONE
        )

    async def _changed(self, access_key: str) -> None:
        self.forget(access_key)
        await self._plane.on_changed("user", access_key)

    def forget(self, access_key: str) -> None:
        """Drops the cached user: another process of this gateway has changed it."""
        self._cache.forget(access_key)
        self._directory.forget("")
        self._sessions.forget_all()

    def _account_changed(self, user_id: str) -> None:
        self._cache.forget_loads()
        self._cache.forget_where(lambda found: found[0].user_id == user_id)
        self._sessions.forget_account(user_id)

    async def _claim(self, name: str, access_key: str) -> None:
        register, now_ms = claims.register_of(name), self._plane.clock.wall_ms()
        before = claims.claim_of(self._plane, register, (await self._plane.registers.read(register)).value)
        if before is claims.DAMAGED and any(user.display_name == name for user in await self.list_users()):
            raise InvalidArgument(f"There is a user named {name} already.")
        if before is not None and before is not claims.DAMAGED and before.access_key != access_key:
            user = system_name(PREFIX + before.access_key)
            held = self._decode(user, (await self._plane.registers.read(user)).value)
            if (held is not None and held.name == name) or now_ms - before.claimed_ms < CLAIM_STALE_MS:
                raise InvalidArgument(f"There is a user named {name} already.")

        def update(value: Value | None) -> Change:
            if claims.claim_of(self._plane, register, value) != before:
                raise InvalidArgument(f"There is a user named {name} already.")
            return claims.claim_change(self._plane, register, value, NameClaim(access_key, now_ms))

        await self._plane.registers.change(register, update)

    async def list_users(self) -> list[Principal]:
        """By access key. Rows that can't be used are healed, or skipped and named in ``plane.bad_rows``."""
        return [Principal(user.user_id, user.name, user.access_key, user.email) for user in await self._roots()]

    async def _roots(self) -> list[UserRecord]:
        """The keys of all accounts' own users, by access key."""
        plane = self._plane
        users = await rows.scan_healed(plane.scanner, plane.bad_rows, self._decode, PREFIX, self._read)
        return sorted((user for user in users if not user.iam_user), key=lambda user: user.access_key)

    async def root_keys(self, user_id: str) -> list[IamKey]:
        """Implements ``api.Users``, as the next three."""
        return [
            IamKey(key.access_key, key.created_ms, not key.inactive)
            for key in await self._roots()
            if key.user_id == user_id
        ]

    async def add_key(self, user_id: str, name: str, iam_user: str, *, who: Principal | None = None) -> tuple[str, str]:
        access_key = self.accounts.new_id("AKIA")
        return access_key, await self._write_key(access_key, user_id, name, iam_user=iam_user)

    async def set_key_active(
        self, user_id: str, access_key: str, active: bool, *, who: Principal | None = None
    ) -> None:
        register = system_name(PREFIX + access_key)

        def update(value: Value | None) -> Change | None:
            found = self._own_key(register, value, user_id, "")
            if found.inactive != active:
                return None
            return self._change(register, value, msgspec.structs.replace(found, inactive=not active))

        await self._plane.registers.change(register, update)
        await self._changed(access_key)

    async def remove_key(self, user_id: str, access_key: str, iam_user: str, *, who: Principal | None = None) -> None:
        if not iam_user:
            await self._leave_name(user_id, access_key)
        await self._remove_record(user_id, access_key, iam_user)

    async def _remove_record(self, user_id: str, access_key: str, iam_user: str) -> None:
        register = system_name(PREFIX + access_key)

        def update(value: Value | None) -> Change:
            self._own_key(register, value, user_id, iam_user)
            return self._removed(register, access_key, value)

        await self._plane.registers.change(register, update)
        await self._changed(access_key)

    async def _leave_name(self, user_id: str, access_key: str) -> None:
        """Gives the name of a root to another of its keys, before this one goes. Raises NoSuchEntity, and
        DeleteConflict for the last key: nothing would name the account any more.
        """
        register = system_name(PREFIX + access_key)
        removed = self._own_key(register, (await self._plane.registers.read(register)).value, user_id, "")
        left = [
            key
            for key in await self._roots()
            if (key.user_id, key.name) == (user_id, removed.name) and key.access_key != access_key
        ]
        if not left:
            raise DeleteConflict("Cannot delete the last access key of an account's root.")
        own, now_ms = claims.register_of(removed.name), self._plane.clock.wall_ms()

        def pass_on(value: Value | None) -> Change | None:
            held = claims.claim_of(self._plane, own, value)
            if held is None or held is claims.DAMAGED or held.access_key != access_key:
                return None
            return claims.claim_change(self._plane, own, value, NameClaim(left[0].access_key, now_ms))

        await self._plane.registers.change(own, pass_on)

    def _own_key(self, register: RegisterName, value: Value | None, user_id: str, iam_user: str) -> UserRecord:
        """The record of a key, if it is this user's. Raises NoSuchEntity."""
        found = self._decode(register, value)
        if found is None or (found.user_id, found.iam_user) != (user_id, iam_user):
            raise NoSuchEntity(f"The Access Key with id {register.key.decode().removeprefix(PREFIX)} cannot be found.")
        return found

    async def directory(self) -> Mapping[str, Principal]:
        """All users by canonical id. Of users that share one: the first by access key, of those with an address if
        there are any.
        """
        return await self._directory.get("")

    async def _load_directory(self, _: str) -> dict[str, Principal]:
        users = reversed(await self.list_users())
        return {user.user_id: user for user in sorted(users, key=lambda user: user.email != "")}

    async def check_names(self) -> None:
        """Names the claims that can't be used in ``plane.bad_rows``."""
        plane = self._plane
        bad: dict[bytes, str] = {}
        prefix = claims.PREFIX.encode()
        async for _ in rows.scan(plane.scanner, plane.bad_rows, partial(claims.decode_claim, plane), prefix, found=bad):
            pass
        plane.bad_rows.replace(prefix, bad)

    async def remove(self, name_or_access_key: str) -> Principal:
        """The access key stops working when the cache expires; buckets stay. Returns the user, or only the access key
        when its record can't be used.

        Raises InvalidArgument when there is no such user.
        """
        register = claims.register_of(name_or_access_key)
        claim = claims.claim_of(self._plane, register, (await self._plane.registers.read(register)).value)
        claim = None if claim is claims.DAMAGED else claim
        access_key = claim.access_key if claim is not None else name_or_access_key
        user = system_name(PREFIX + access_key)
        try:
            found = await self._read(access_key) if _is_access_key(access_key) else None
        except DataDamaged:  # its record can't be used, and the operator wants it gone
            await self._plane.registers.change(user, partial(self._removed, user, access_key))
            self._plane.bad_rows.clear(user.key)
            await self._changed(access_key)
            return Principal("", name_or_access_key, access_key)
        if found is None or (claim is not None and found.name != name_or_access_key):  # a claim grants nothing
            raise InvalidArgument(f"there is no user {name_or_access_key!r}; `storaged user list` has the names")
        whole = await self._is_whole(found)
        if whole:
            await self._close(found)
        await self._plane.registers.change(user, partial(self._removed, user, access_key))
        await self._changed(access_key)
        if whole:
            await self._release(found)
        return Principal(found.user_id, found.name, access_key)

    async def _is_whole(self, removed: UserRecord) -> bool:
        """Whether the name belongs to this key, so that the user is meant; else it is a further key of a user."""
        own = claims.register_of(removed.name)
        held = claims.claim_of(self._plane, own, (await self._plane.registers.read(own)).value)
        mine = held is None or held is claims.DAMAGED or held.access_key == removed.access_key
        return mine and not removed.iam_user

    async def _release(self, removed: UserRecord) -> None:
        """Frees the name of a user."""
        own = claims.register_of(removed.name)

        def release(value: Value | None) -> Change | None:
            held = claims.claim_of(self._plane, own, value)
            mine = held is not None and (held is claims.DAMAGED or held.access_key == removed.access_key)
            return claims.release_change(self._plane, own, value) if mine else None

        await self._plane.registers.change(own, release)

    async def _close(self, removed: UserRecord) -> None:
        """Ends the other keys of a root that is removed, and its account's users, unless another root has the id."""
        others = [key for key in await self._roots() if key.user_id == removed.user_id]
        with contextlib.suppress(DataDamaged):  # an account whose record can't be used lets nobody in
            if all(key.name == removed.name for key in others):
                await self._close_account(removed.user_id)
        for key in others:
            if key.name == removed.name and key.access_key != removed.access_key:
                await self._remove_record(key.user_id, key.access_key, "")

    async def _close_account(self, user_id: str) -> None:
        if await self.accounts.get(user_id) != NO_ACCOUNT:
            await self.accounts.change(
                user_id,
                lambda account: msgspec.structs.replace(account, closed=True),
                action="Close",
                target=f"account:{user_id}",
            )


def _is_access_key(text: str) -> bool:
    return 3 <= len(text) <= 128 and text.isascii() and all(letter.isalnum() or letter in "_-." for letter in text)


def _random_text(raw: bytes) -> str:
    """Letters and digits, as in access keys."""
    return base64.b32encode(raw).decode()
