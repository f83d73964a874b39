"""Names of users: claims carry an authenticator, those from before get one, and from then on one without is refused."""

from __future__ import annotations

import msgspec
import pytest

from storaged.errors import DataDamaged, InvalidArgument
from storaged.meta.names import Change, Value, Visibility
from storaged.objects.system import claims
from storaged.objects.system.claims import DAMAGED, NameClaim, authenticate_all, claim_of, decode_claim, register_of
from storaged.objects.system.users import UserService
from storaged.wire import decode, encode
from tests.worlds.objects import World

ANNE = register_of("anne")


async def held(world: World, name: str = "anne") -> Value:
    value = (await world.ring.read(register_of(name))).value
    assert value is not None
    return value


async def put(world: World, name: str, claim: NameClaim) -> None:
    await world.ring.change(register_of(name), lambda _value: Change(encode(claim)))


async def test_a_claim_that_was_moved_changed_or_played_back_is_not_authentic() -> None:
    world = World()
    plane = world.plane()
    await UserService(plane).add("anne", access_key="AK-anne")
    value = await held(world)
    claim = decode_claim(plane, ANNE, value)
    assert claim is not None
    assert (claim.access_key, len(claim.authenticator)) == ("AK-anne", 32)
    for register, forged in (
        (register_of("ben"), value),
        (ANNE, msgspec.structs.replace(value, sequence=value.sequence + 1)),
        (ANNE, msgspec.structs.replace(value, body=encode(msgspec.structs.replace(claim, access_key="AK-ben")))),
        (ANNE, msgspec.structs.replace(value, body=encode(msgspec.structs.replace(claim, authenticator=b"")))),
        (ANNE, msgspec.structs.replace(value, body=encode(msgspec.structs.replace(claim, authenticator=bytes(32))))),
    ):
        with pytest.raises(DataDamaged, match="not authentic"):
            decode_claim(plane, register, forged)
        assert claim_of(plane, register, forged) is DAMAGED


async def test_a_forged_claim_keeps_no_name_from_being_used() -> None:
    world = World()
    users = UserService(world.plane())
    await put(world, "anne", NameClaim("AK-of-nobody", world.clock.wall_ms()))
    anne, _ = await users.add("anne")
    assert (await users.lookup(anne.access_key))[0] == anne
    with pytest.raises(InvalidArgument):
        await users.add("anne")


async def test_claims_from_before_are_read_until_all_have_an_authenticator_and_then_refused() -> None:
    world, done = World(), False
    plane = world.plane()
    plane.names_authenticated = lambda: done
    users = UserService(plane)
    await users.add("anne", access_key="AK-anne")
    await put(world, "anne", NameClaim("AK-anne", 5))
    await put(world, "ben", NameClaim("AK-ben", 6))
    await world.ring.change(register_of("gone"), lambda _value: Change(b"", Visibility.TOMBSTONE))
    await world.ring.change(register_of("noise"), lambda _value: Change(b"of no message"))
    assert decode_claim(plane, ANNE, await held(world)) == NameClaim("AK-anne", 5)
    assert await authenticate_all(plane) == 2
    done = True
    for name, claim in (("anne", NameClaim("AK-anne", 5)), ("ben", NameClaim("AK-ben", 6))):
        found = decode_claim(plane, register_of(name), await held(world, name))
        assert found is not None
        assert msgspec.structs.replace(found, authenticator=b"") == claim
    assert await authenticate_all(plane) == 0, "nothing is written twice"
    assert (await held(world, "noise")).body == b"of no message"
    await put(world, "anne", NameClaim("AK-anne", 5))
    assert claim_of(plane, ANNE, await held(world)) is DAMAGED


async def test_a_claim_that_changes_while_it_is_authenticated_keeps_what_it_became() -> None:
    world = World()
    plane = world.plane()
    await put(world, "anne", NameClaim("AK-anne", 5))

    async def interfere(_name: object) -> None:
        world.ring.interfere = None
        value = (await world.ring.read(ANNE)).value
        await world.ring.change(ANNE, lambda _value: claims.claim_change(plane, ANNE, value, NameClaim("AK-other", 7)))

    world.ring.interfere = interfere
    await authenticate_all(plane)
    found = decode_claim(plane, ANNE, await held(world))
    assert found is not None
    assert found.access_key == "AK-other"


async def test_versions_before_read_what_this_one_writes() -> None:
    """The authenticator is a field after those that they know."""
    world = World()
    await UserService(world.plane()).add("anne", access_key="AK-anne")
    assert decode((await held(world)).body, list)[:1] == ["AK-anne"]
