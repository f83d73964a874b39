"""Temporary credentials: a session's token has all that is known of the session, sealed by the keyring. No register has
a row of it.

A session lives as long as the key that it was made with: a key that is removed or set to inactive ends its sessions,
and so does the removal of its user. A session of a role ends with the role, too. What it may do is judged by the
policies as they are at each request.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from storaged.errors import InvalidAccessKeyId, InvalidToken
from storaged.objects.accounts import SESSION_FORMAT, StoredSession
from storaged.objects.cache.ttl import TtlCache
from storaged.objects.grant_types import Principal
from storaged.objects.identities import identity_of_role, identity_of_root
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import SealBroken
from storaged.objects.system.accounts import AccountService
from storaged.wire import decode, encode

CONTEXT: Final = (b"session",)
TOKEN_CHARS_MAX: Final = 12 * 1024
"""A header has 16 KiB. Policies of a session have at most 2,048 characters in all."""
SESSIONS_CACHED: Final = 1024

Lookup = Callable[[str], Awaitable[tuple[Principal, str]]]


class Sessions:
    """The sessions of all accounts. ``lookup``: of long-term keys; ``loaded_s``: when what it returns was read."""

    def __init__(
        self, plane: ObjectPlane, accounts: AccountService, lookup: Lookup, loaded_s: Callable[[str], float]
    ) -> None:
        self._plane = plane
        self._accounts = accounts
        self._lookup = lookup
        self._loaded_s = loaded_s
        self._cache: TtlCache[tuple[str, str], tuple[Principal, str]] = TtlCache(
            plane.clock,
            plane.limits.user_cache_s,
            SESSIONS_CACHED,
            self._load,
            plane.background.spawn,
            self._made_s,
        )

    def seal(self, session: StoredSession) -> str:
        sealed = self._plane.keys.seal_secret(encode(session), CONTEXT)
        return base64.b64encode(sealed).decode()

    def open(self, token: str) -> StoredSession:
        """Raises InvalidToken."""
        if len(token) > TOKEN_CHARS_MAX:
            raise InvalidToken()
        try:
            sealed = base64.b64decode(token, validate=True)
            session = decode(self._plane.keys.open_secret(sealed, CONTEXT), StoredSession)
        except (binascii.Error, ValueError, SealBroken, msgspec.MsgspecError):
            raise InvalidToken() from None
        if session.format != SESSION_FORMAT:
            raise InvalidToken()
        return session

    async def get(self, access_key: str, token: str) -> tuple[Principal, str]:
        """Raises InvalidToken."""
        return await self._cache.get((access_key, token))

    def try_get(self, access_key: str, token: str) -> tuple[Principal, str] | None:
        return self._cache.try_get((access_key, token))

    def _made_s(self, found: tuple[Principal, str]) -> float:
        who, identity = found[0], found[0].identity
        assert identity is not None
        issuer_s = self._loaded_s(identity.issuer)
        return min(issuer_s, self._accounts.loaded_s(who.user_id)) if identity.role else issuer_s

    async def _load(self, key: tuple[str, str]) -> tuple[Principal, str]:
        access_key, token = key
        session = self.open(token)
        if session.access_key != access_key:
            raise InvalidToken()
        try:
            issuer, _ = await self._lookup(session.issuer)
        except InvalidAccessKeyId:
            raise InvalidToken("The key that these temporary credentials come from does not exist any more.") from None
        who = await self._of_role(session) if session.role else self._of_issuer(session, issuer)
        assert who.identity is not None
        identity = msgspec.structs.replace(
            who.identity,
            session=session.policies,
            issuer=session.issuer,
            issued_ms=session.issued_ms,
            expires_ms=session.expires_ms,
        )
        return Principal(session.account, who.display_name, access_key, identity=identity), session.secret_key

    async def _of_role(self, session: StoredSession) -> Principal:
        account = await self._accounts.get(session.account)
        role = account.role_of(session.role)
        if role is None or account.closed:
            raise InvalidToken("The role of these temporary credentials does not exist any more.")
        identity = identity_of_role(session.account, account, role, session)
        return Principal(session.account, account.name, identity=identity)

    def _of_issuer(self, session: StoredSession, issuer: Principal) -> Principal:
        if issuer.user_id != session.account:
            raise InvalidToken()
        return msgspec.structs.replace(issuer, identity=issuer.identity or identity_of_root(issuer.user_id))

    def forget_account(self, user_id: str) -> None:
        """A session of a role has the rights of another account than its issuer's: both may have changed."""
        self._cache.forget_loads()
        self._cache.forget_where(lambda found: found[0].user_id == user_id or _has_role(found[0]))

    def forget_all(self) -> None:
        self._cache.forget_loads()
        self._cache.forget_where(lambda _: True)


def _has_role(who: Principal) -> bool:
    return who.identity is not None and bool(who.identity.role)
