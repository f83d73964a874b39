"""Certificates that end while connections made under them stand."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from storaged.cluster import identity, issuing
from storaged.cluster.rpc.expiry import REDIAL_BEFORE_S
from storaged.errors import PeerUnreachable, StoragedError
from tests.worlds.authority import Note, Service, World, pooled, serving, until


class Wall:
    """A clock that a test sets. What is real in it is monotonic."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return int((time.time() + self.ahead_s) * 1000)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def issued(
    world: World, name: str, roles: tuple[str, ...], *, seconds: float, directory: str = ""
) -> identity.Identity:
    """A certificate that is over after so many seconds."""
    place = world.directory / (directory or name)
    return issuing.issue(world.authority, place, name=name, location="FR/par1/a", roles=roles, days=seconds / 86400)


async def test_the_standing_connection_of_a_certificate_that_expires_is_ended_and_no_other_is_let_in(
    world: World,
) -> None:
    refusals: list[tuple[str, str]] = []

    def refused(peer: str, error: StoragedError) -> None:
        refusals.append((peer, error.message))

    wall, gateway = Wall(), issued(world, "gw", ("gateway",), seconds=3600)
    async with (
        serving(world.node("n1"), Service(), clock=wall, on_refusal=refused) as server,
        pooled(gateway, {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        await pool.call("n1", "t.echo", Note("in time"), Note)
        wall.ahead_s = 3500
        await asyncio.sleep(0.6)
        await pool.call("n1", "t.echo", Note("the last minutes"), Note)
        assert pool.statistics().links[0].connects == 1
        wall.ahead_s = 3601
        await until(
            lambda: len(refusals) >= 2 and "expired on" in pool.away_reason("n1")
        )  # what stood, and what was tried again
        with pytest.raises(PeerUnreachable, match=r"The certificate of gw expired on"):
            await pool.call("n1", "t.echo", Note("too late"), Note)
        assert server.statistics().connections == 0
    assert all(peer == "gw" and message.startswith("The certificate of gw expired on") for peer, message in refusals)


@pytest.mark.parametrize("whose", ["n1", "gw"])
async def test_the_dialling_side_ends_what_its_peers_certificate_or_its_own_no_longer_carries(
    world: World, whose: str
) -> None:
    wall = Wall()
    node = issued(world, "n1", ("storage",), seconds=3600 if whose == "n1" else 90_000)
    gateway = issued(world, "gw", ("gateway",), seconds=3600 if whose == "gw" else 90_000)
    async with (
        serving(node, Service()) as server,
        pooled(gateway, {"n1": f"127.0.0.1:{server.port}"}, clock=wall) as pool,
    ):
        await pool.call("n1", "t.echo", Note("in time"), Note)
        before = pool._links["n1"].connection
        assert before is not None
        wall.ahead_s = 3601
        await until(lambda: not before.is_open)
        assert before.reason == "its certificate, or this node's, has expired"
        if whose == "n1":
            await until(lambda: "expired on" in pool.away_reason("n1"))
            with pytest.raises(PeerUnreachable, match=r"The certificate of n1 expired on"):
                await pool.call("n1", "t.echo", Note("too late"), Note)


async def test_a_certificate_of_seconds_really_ends_its_connection(world: World) -> None:
    """Nothing is injected: TLS and both sides go by the machine's clock."""
    gateway = issued(world, "gw", ("gateway",), seconds=3)
    async with (
        serving(world.node("n1"), Service()) as server,
        pooled(gateway, {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        await pool.call("n1", "t.echo", Note("in time"), Note)
        await until(lambda: server.statistics().connections == 0 and pool.away_reason("n1") != "")
        assert datetime.now(UTC) >= gateway.expires
        with pytest.raises(PeerUnreachable):
            await pool.call("n1", "t.echo", Note("too late"), Note)


async def test_a_renewal_makes_a_new_connection_and_breaks_no_call(world: World) -> None:
    service, gateway = Service(), issued(world, "gw", ("gateway",), seconds=3600)
    async with (
        serving(world.node("n1"), service) as server,
        pooled(gateway, {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        held = asyncio.create_task(pool.call("n1", "t.hold", Note("under the old one"), Note, timeout_s=60))
        await service.entered.wait()
        old = pool._links["n1"].connection
        pool.renew(issued(world, "gw", ("gateway",), seconds=90_000))
        await until(lambda: pool.statistics().links[0].connects == 2)
        new = pool._links["n1"].connection
        assert new is not None
        assert new is not old
        assert new.expires_s > time.time() + 80_000
        await pool.call("n1", "t.echo", Note("under the new one"), Note)
        assert old is not None
        assert old.is_open
        service.gate.set()
        assert (await held)[0].text == "under the old one"
        await until(lambda: server.statistics().connections == 1)
        assert not old.is_open


async def test_a_minute_before_the_end_a_servers_renewed_certificate_is_looked_for(world: World) -> None:
    wall, node = Wall(), issued(world, "n1", ("storage",), seconds=3600)
    async with (
        serving(node, Service()) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}, clock=wall) as pool,
    ):
        await pool.call("n1", "t.echo", Note(""), Note)
        server.renew(issued(world, "n1", ("storage",), seconds=90_000))
        wall.ahead_s = 3600 - REDIAL_BEFORE_S / 2
        await until(lambda: pool.statistics().links[0].connects == 2)
        wall.ahead_s = 3700
        await asyncio.sleep(1.2)
        await pool.call("n1", "t.echo", Note("nothing has happened"), Note)
        assert pool.statistics().links[0].connects == 2
