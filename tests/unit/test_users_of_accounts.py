"""Keys and sessions of an account's users, as a gateway sees them after another gateway has changed the account."""

from __future__ import annotations

import base64

import pytest
from msgspec import structs

from storaged.errors import InvalidAccessKeyId, InvalidToken
from storaged.objects.accounts import SESSION_FORMAT, IamKey, IamRole, IamUser, StoredAccount, StoredSession
from storaged.objects.system.users import UserService
from tests.worlds.objects import World

pytestmark = pytest.mark.virtual_time

CACHE_S = 1.0


class TwoGateways:
    """Both have the same registers, each has its own caches. The account has the user bob and the role reader."""

    def __init__(self) -> None:
        self.world = World(user_cache_s=CACHE_S)
        self.here, self.there = UserService(self.world.plane()), UserService(self.world.plane())
        self.key = self.user_id = ""

    async def make(self) -> None:
        anne, _ = await self.there.add("anne")
        self.user_id = anne.user_id
        self.key, _ = await self.there.add_key(anne.user_id, "bob", "AIDA1")
        bob = IamUser("bob", "AIDA1", "/", 1, keys=(IamKey(self.key, 1),))
        await self.change(StoredAccount(users={"bob": bob}, roles={"reader": IamRole("reader", "AROA1", "/", 1, "")}))

    async def change(self, account: StoredAccount) -> None:
        await self.there.accounts.change(self.user_id, lambda _: account, action="", target="")

    def session(self, role: str = "") -> tuple[str, str]:
        secret = base64.b64encode(bytes(30)).decode()
        session = StoredSession(
            SESSION_FORMAT, "ASIA1", secret, self.key, self.user_id, 1, 2**62, role, "now" * bool(role)
        )
        return session.access_key, self.here.seal_session(session)


async def test_a_key_that_another_gateway_removed_works_no_longer_than_one_cache_keeps_it() -> None:
    """The caches of accounts, keys and sessions are loaded from each other: their lifetimes must not add up."""
    both = TwoGateways()
    await both.make()
    own, role = both.session(), both.session("AROA1")
    await both.here.accounts.get(both.user_id)
    account = await both.there.accounts.get(both.user_id)
    await both.change(structs.replace(account, users={"bob": structs.replace(account.users["bob"], keys=())}))
    both.world.clock.ahead_s += CACHE_S * 0.4
    await both.here.lookup(both.key)
    both.world.clock.ahead_s += CACHE_S * 0.4
    assert both.here.try_get(both.key) is not None
    for session in (own, role):
        await both.here.lookup_session(*session)
    both.world.clock.ahead_s += CACHE_S * 0.3
    with pytest.raises(InvalidAccessKeyId):
        await both.here.lookup(both.key)
    for session in (own, role):
        with pytest.raises(InvalidToken):
            await both.here.lookup_session(*session)


async def test_a_session_of_a_role_ends_with_the_role_when_another_gateway_removed_that() -> None:
    both = TwoGateways()
    await both.make()
    role = both.session("AROA1")
    await both.here.accounts.get(both.user_id)
    await both.change(structs.replace(await both.there.accounts.get(both.user_id), roles={}))
    both.world.clock.ahead_s += CACHE_S * 0.5
    await both.here.lookup_session(*role)
    both.world.clock.ahead_s += CACHE_S * 0.6
    with pytest.raises(InvalidToken):
        await both.here.lookup_session(*role)
