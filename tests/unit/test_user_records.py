"""Records of access keys: those of version 0.1.0 stay authentic, and a root's key is still written as that version
reads it.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from storaged.errors import DataDamaged, InvalidAccessKeyId, NoSuchEntity
from storaged.meta.names import Value, Visibility, system_name
from storaged.objects.system.users import UserSecret, UserService
from storaged.objects.user_records import UserRecord
from storaged.wire import decode, encode
from tests.worlds.objects import World

pytestmark = pytest.mark.virtual_time


def fields_of(world: World, access_key: str) -> list[Any]:
    return decode(world.ring.values[system_name(f"user/{access_key}")].body, list[Any])


async def test_a_record_of_version_0_1_0_is_authentic_and_works() -> None:
    world = World(None)
    name = system_name("user/AKOLD")
    sealed = world.keys.seal_secret(encode(UserSecret("secret")), (name.pack(), b"secret"))
    fields: list[Any] = ["AKOLD", "a" * 64, "anne", 1, sealed, "", b""]
    fields[6] = world.keys.authenticate((name.pack(), (1).to_bytes(8, "big")), encode(fields))
    world.ring.values[name] = Value(1, b"o" * 16, Visibility.LIVE, encode(fields))
    users = UserService(world.plane())
    who, secret = await users.lookup("AKOLD")
    assert (who.user_id, who.display_name, who.identity, secret) == ("a" * 64, "anne", None, "secret")
    await users.set_key_active("a" * 64, "AKOLD", False)
    with pytest.raises(InvalidAccessKeyId):
        await users.lookup("AKOLD")
    await users.set_key_active("a" * 64, "AKOLD", True)
    assert len(fields_of(world, "AKOLD")) == 7, "again as that version reads it"
    assert (await users.lookup("AKOLD"))[1] == "secret"


async def test_a_root_s_key_has_the_fields_of_version_0_1_0_and_a_user_s_key_has_more() -> None:
    world = World(None)
    users = UserService(world.plane())
    who, _ = await users.add("anne")
    assert len(fields_of(world, who.access_key)) == 7
    access_key, _ = await users.add_key(who.user_id, "bob", "AIDA1")
    assert len(fields_of(world, access_key)) == 9
    with pytest.raises(InvalidAccessKeyId):
        await users.lookup(access_key)  # the account does not list it
    assert [user.access_key for user in await users.list_users()] == [who.access_key]
    with pytest.raises(NoSuchEntity):
        await users.remove_key(who.user_id, access_key, "AIDA2")
    with pytest.raises(NoSuchEntity):
        await users.remove_key("b" * 64, access_key, "AIDA1")
    with pytest.raises(NoSuchEntity):
        await users.set_key_active(who.user_id, access_key, False)


@pytest.mark.parametrize("change", [{"iam_user": ""}, {"inactive": True}, {"user_id": "b" * 64}], ids=str)
async def test_a_key_that_a_storage_node_made_a_root_s_is_not_authentic(change: dict[str, Any]) -> None:
    world = World(None)
    users = UserService(world.plane())
    who, _ = await users.add("anne")
    access_key, _ = await users.add_key(who.user_id, "bob", "AIDA1")
    name = system_name(f"user/{access_key}")
    held = world.ring.values[name]
    forged = encode(msgspec.structs.replace(decode(held.body, UserRecord), **change))
    world.ring.values[name] = msgspec.structs.replace(held, body=forged)
    with pytest.raises(DataDamaged):
        await users.lookup(access_key)
