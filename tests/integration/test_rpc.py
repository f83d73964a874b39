"""Calls between nodes over real mutual TLS on loopback: answers, refusals, bounds, and what happens when either side
goes away.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from storaged.cluster import identity, issuing, tls
from storaged.cluster.layout import Layout, NodeEntry, confirmed_roles
from storaged.cluster.policy import Policy
from storaged.cluster.ports import Call, Method, Methods, OnAnswer, PeerChecks
from storaged.cluster.rpc import BODY_BYTES_MAX, PoolLimits, RpcPool, RpcServer, ServerLimits
from storaged.cluster.rpc.framing import HEAD_BYTES_MAX, PROTOCOL_VERSION, FrameError, Hello, Kind, pack_header
from storaged.cluster.rpc.server_connection import ServerConnection
from storaged.errors import (
    CertificateRefused,
    FragmentMissing,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    PortInUse,
    StoragedError,
)
from storaged.units import KIB, MIB
from storaged.wire import encode
from tests.patience import GUARD_S
from tests.worlds.authority import ROLES, Note, Service, World, pooled, run_out, serving, until


@pytest.fixture(params=["uvloop", "asyncio"])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


class Pair:
    """A storage node n1 that serves, and a gateway that calls it."""

    def __init__(self, world: World, service: Service, server: RpcServer, pool: RpcPool) -> None:
        self.world, self.service, self.server, self.pool = world, service, server, pool

    async def call(self, method: str, text: str = "", number: int = 0, **options: Any) -> tuple[Note, memoryview]:
        return await self.pool.call("n1", method, Note(text, number), Note, **options)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
async def pair(world: World) -> AsyncIterator[Pair]:
    service = Service()
    async with (
        serving(world.node("n1"), service) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        yield Pair(world, service, server, pool)


# --- answers


async def test_a_call_brings_its_answer_and_tells_the_handler_who_asks(pair: Pair) -> None:
    answer, body = await pair.call("t.echo", "hello", body=[b"abc", b"", bytearray(b"de")])
    assert (answer, bytes(body)) == (Note("hello", 5), b"")
    assert pair.service.last is not None
    assert (pair.service.last.peer.name, pair.service.last.peer.roles) == ("gw", ("gateway",))
    assert bytes(pair.service.last.body) == b"abcde"


@pytest.mark.parametrize("size", [0, 1, 16 * KIB, 16 * KIB + 1, 300 * KIB, 5 * MIB + 7])
async def test_bodies_of_any_size_come_back_as_they_were_sent(pair: Pair, size: int) -> None:
    sent = os.urandom(size)
    _answer, body = await pair.call("t.mirror", body=[memoryview(sent)[: size // 3], sent[size // 3 :]])
    assert bytes(body) == sent


async def test_the_largest_body_goes_through_and_one_byte_more_is_refused_before_it_is_sent(pair: Pair) -> None:
    answer, _ = await pair.call("t.echo", body=[bytes(BODY_BYTES_MAX)], timeout_s=60)
    assert answer.number == BODY_BYTES_MAX
    with pytest.raises(ValueError):
        await pair.call("t.echo", body=[bytes(BODY_BYTES_MAX), b"x"])
    assert (await pair.call("t.echo", "still there"))[0].text == "still there"


async def test_calls_without_time_left_expire_and_the_next_ones_go_out(pair: Pair) -> None:
    await pair.call("t.echo")
    answers: list[object] = []
    for timeout_s in (-1.0, 0.0, 0.0001, 5.0):
        assert pair.pool.try_call(
            "n1", "t.echo", Note("x"), Note, lambda answer, _bulk: answers.append(answer), timeout_s=timeout_s
        )
    await until(lambda: len(answers) == 4)
    assert Note("x") in answers
    assert all(isinstance(answer, PeerTimeout | Note) for answer in answers)


async def test_a_callback_that_raises_keeps_its_news_from_nobody_else(pair: Pair) -> None:
    await pair.call("t.echo")
    told: list[object] = []

    def mistaken(_answer: object, _bulk: object) -> None:
        raise RuntimeError("a mistake")

    for method in ("t.echo", "t.fail"):
        assert pair.pool.try_call("n1", method, Note("x"), Note, mistaken)
        assert (await pair.call("t.echo", "after"))[0].text == "after"
    assert [link.connects for link in pair.pool.statistics().links] == [1]
    for then in (mistaken, lambda answer, _bulk: told.append(answer)):
        for timeout_s in (0.01, 60.0):
            assert pair.pool.try_call("n1", "t.hold", Note("x"), Note, then, timeout_s=timeout_s)
    await until(lambda: len(told) == 1)
    assert isinstance(told[0], PeerTimeout)
    for connection in pair.server._connections:
        connection.abort("a test")
    await until(lambda: len(told) == 2)
    assert isinstance(told[1], PeerUnreachable)


def arrive(connection: ServerConnection, frame: bytes) -> None:
    """A frame has arrived and was decrypted."""
    connection.reader.buffer()[: len(frame)] = frame
    try:
        connection.reader.received(len(frame))
    except FrameError as error:
        connection.on_protocol_error(error)


async def test_what_arrives_after_a_connection_was_ended_holds_no_room(pair: Pair) -> None:
    await pair.call("t.echo")
    (connection,) = pair.server._connections
    connection.abort("a test")
    for request_id in (101, 102, 103):
        head = b"\x06t.echo" + encode(Note("late"))
        frame = pack_header(Kind.REQUEST, request_id, len(head), 5000) + head + bytes(5000)
        arrive(connection, frame)
    await connection.lost
    assert pair.server.statistics().inflight_bytes == 0


async def test_a_peer_that_uses_a_requests_id_again_is_disconnected_and_holds_no_room(pair: Pair) -> None:
    await pair.call("t.echo")
    (connection,) = pair.server._connections
    for _ in range(2):
        head = b"\x06t.hold" + encode(Note("twice"))
        frame = pack_header(Kind.REQUEST, 101, len(head), 5000, 60_000) + head + bytes(5000)
        arrive(connection, frame)
    await connection.lost
    await until(lambda: pair.server.statistics().calls_cancelled == 1)
    assert pair.server.statistics().inflight_bytes == 0


async def test_many_calls_at_once_each_get_their_own_answer(pair: Pair) -> None:
    async def one(number: int) -> None:
        sent = number.to_bytes(4, "big") * (number * 37 % 9000)
        answer, body = await pair.call("t.mirror", str(number), number, body=[sent])
        assert (answer, bytes(body)) == (Note(str(number), number), sent)

    await asyncio.gather(*(one(number) for number in range(300)))
    statistics = pair.server.statistics()
    assert statistics.calls == 300
    assert (statistics.inflight_bytes, statistics.handlers_running) == (0, 0)


async def test_a_wide_memoryview_is_measured_in_bytes(pair: Pair) -> None:
    wide = memoryview(bytearray(64 * KIB)).cast("Q")
    assert (await pair.call("t.echo", body=[wide]))[0].number == 64 * KIB


async def test_a_call_to_ones_own_name_behaves_as_one_over_the_network(world: World) -> None:
    service = Service()
    async with pooled(world.node("n1"), {}, local_methods=service.methods()) as pool:

        async def call(method: str, text: str = "", **options: Any) -> tuple[Note, memoryview]:
            return await pool.call("n1", method, Note(text), Note, **options)

        assert (await call("t.echo", "me", body=[b"ab", b"c"]))[0] == Note("me", 3)
        assert bytes((await call("t.mirror", body=[b"abcd"]))[1]) == b"abcd"
        assert (await call("t.echo", body=[memoryview(b"")]))[0].number == 0
        with pytest.raises(FragmentMissing):
            await call("t.fail", "missing")
        with pytest.raises(PeerRefused) as refusal:
            await call("t.fail", "bucket")
        assert refusal.value.remote_code == "NoSuchBucket"
        with pytest.raises(PeerRefused) as refusal:
            await call("t.fail", "bug")
        assert (refusal.value.remote_code, "secret" in refusal.value.message) == ("INTERNAL", False)
        with pytest.raises(PeerRefused) as refusal:
            await call("t.gateways")
        assert refusal.value.remote_code == "ROLE_REFUSED"
        await run_out(lambda timeout_s: call("t.hold", timeout_s=timeout_s), service.entered)
        assert service.cancelled == 1
        assert pool.connected("n1")


# --- errors


async def test_a_peer_error_arrives_as_the_class_it_is(pair: Pair) -> None:
    with pytest.raises(FragmentMissing, match="block 7 is not here") as error:
        await pair.call("t.fail", "missing")
    assert error.value.details == {"disk": "d1"}


async def test_another_error_of_the_store_arrives_as_a_refusal_with_its_code(pair: Pair) -> None:
    with pytest.raises(PeerRefused, match="no bucket of that name") as error:
        await pair.call("t.fail", "bucket")
    assert error.value.remote_code == "NoSuchBucket"


async def test_an_unexpected_exception_tells_the_caller_nothing_of_the_inside(pair: Pair) -> None:
    with pytest.raises(PeerRefused) as error:
        await pair.call("t.fail", "bug")
    assert error.value.remote_code == "INTERNAL"
    assert "secret" not in str(error.value)
    assert (await pair.call("t.echo", "x"))[0].text == "x"


async def test_unknown_methods_bad_messages_and_wrong_roles_are_refused_and_the_connection_lives(pair: Pair) -> None:
    for method, request, code in (
        ("t.nothing", Note(""), "UNKNOWN_METHOD"),
        ("t.echo", Hello("a", "b", b"c", 1), "BAD_MESSAGE"),
    ):
        with pytest.raises(PeerRefused) as error:
            await pair.pool.call("n1", method, request, Note, body=[b"x" * 100_000])
        assert error.value.remote_code == code
    with pytest.raises(PeerRefused) as error:
        await pair.pool.call("n1", "t.echo", Note(""), Hello)
    assert error.value.remote_code == "BAD_REPLY"
    assert pair.pool.statistics().links[0].connects == 1
    assert pair.server.statistics().inflight_bytes == 0


async def test_a_method_for_gateways_refuses_a_storage_node(pair: Pair) -> None:
    assert (await pair.call("t.gateways", "ok"))[0].text == "ok"
    async with pooled(pair.world.node("n2"), {"n1": f"127.0.0.1:{pair.server.port}"}) as pool:
        with pytest.raises(PeerRefused, match="n2 is storage") as error:
            await pool.call("n1", "t.gateways", Note(""), Note)
        assert error.value.remote_code == "ROLE_REFUSED"


# --- giving up


async def test_a_call_that_takes_too_long_times_out_and_its_handler_is_cancelled(pair: Pair) -> None:
    await run_out(lambda timeout_s: pair.call("t.hold", timeout_s=timeout_s), pair.service.entered)
    await until(lambda: pair.service.cancelled >= 1)
    await until(lambda: pair.server.statistics().handlers_running == 0)


async def test_the_handler_knows_the_deadline(pair: Pair) -> None:
    await pair.call("t.echo", timeout_s=5)
    assert pair.service.last is not None
    assert 0 < pair.service.last.deadline - asyncio.get_running_loop().time() <= 5.1


async def test_a_cancelled_call_is_dropped_on_the_server_and_its_bytes_are_free(pair: Pair) -> None:
    call = asyncio.create_task(pair.call("t.hold", body=[bytes(MIB)]))
    await pair.service.entered.wait()
    assert pair.server.statistics().inflight_bytes == MIB
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: pair.service.cancelled >= 1)
    await until(lambda: pair.server.statistics().inflight_bytes == 0)
    assert (await pair.call("t.echo", "next"))[0].text == "next"


async def test_a_call_cancelled_at_once_leaves_nothing_behind(pair: Pair) -> None:
    await pair.call("t.echo")
    calls = [asyncio.create_task(pair.call("t.hold", body=[bytes(100 * KIB)])) for _ in range(50)]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert (await pair.call("t.echo", "next"))[0].text == "next"
    await until(lambda: pair.server.statistics().handlers_running == 0)
    assert pair.server.statistics().inflight_bytes == 0
    assert pair.pool.statistics().links[0].calls_pending == 0


async def test_a_begun_call_that_is_given_up_is_dropped_on_the_server_and_calls_nothing_back(pair: Pair) -> None:
    await pair.call("t.echo")
    heard: list[Any] = []
    give_up = pair.pool.begin_call(
        "n1", "t.hold", Note("x"), Note, lambda *answer: heard.append(answer), body=[bytes(MIB)]
    )
    assert give_up is not None
    await pair.service.entered.wait()
    give_up()
    await until(lambda: pair.service.cancelled >= 1)
    assert (await pair.call("t.echo", "next"))[0].text == "next"
    await until(lambda: pair.server.statistics().inflight_bytes == 0)
    assert heard == []


async def test_a_begun_call_brings_its_answer_once_and_may_be_given_up_afterwards(pair: Pair) -> None:
    await pair.call("t.echo")
    heard: list[Any] = []
    give_up = pair.pool.begin_call("n1", "t.echo", Note("x"), Note, lambda answer, _body: heard.append(answer.text))
    assert give_up is not None
    await until(lambda: len(heard) == 1)
    give_up()
    assert (await pair.call("t.echo", "next"))[0].text == "next"
    assert heard == ["x"]
    assert pair.pool.begin_call("no-such-node", "t.echo", Note("x"), Note, lambda *_: None) is None


class Hung:
    """A method that accepts calls and answers when the test says so, or never."""

    def __init__(self) -> None:
        self.answers: list[OnAnswer] = []

    def begin(self, _request: Note, _call: Call, answer: OnAnswer) -> bool:
        self.answers.append(answer)
        return True

    def methods(self) -> Methods:
        service = Service()
        return {**service.methods(), "t.begin": Method(Note, service.hold, ROLES, try_start=self.begin)}


async def test_calls_that_a_hung_disk_took_on_end_with_their_deadlines_and_other_calls_go_on(world: World) -> None:
    hung = Hung()
    async with (
        serving(world.node("n1"), hung.methods()) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        limits = server.limits
        size = limits.inflight_bytes_per_connection_max // limits.handlers_per_connection_max // 2
        timeout_s, reached = 0.25, False
        while not reached:  # a slow machine needs longer to have all of them on their way
            timeout_s *= 2
            await until(lambda: server.statistics().handlers_running == 0)  # of the try before: its deadlines end it
            hung.answers.clear()
            calls = [
                asyncio.create_task(pool.call("n1", "t.begin", Note(""), Note, body=[bytes(size)], timeout_s=timeout_s))
                for _ in range(2 * limits.handlers_per_connection_max)
            ]
            await until(lambda: server.statistics().connections_waiting == 1 or all(call.done() for call in calls))  # noqa: B023
            reached = len(hung.answers) == limits.handlers_per_connection_max and not calls[0].done()
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {PeerTimeout}
        assert (await pool.call("n1", "t.echo", Note("on"), Note, timeout_s=5))[0].text == "on"
        await until(lambda: server.statistics().handlers_running == 0)
        assert server.statistics().inflight_bytes == 0
        for answer in hung.answers:
            answer(Note("late"))
        assert (await pool.call("n1", "t.echo", Note("still"), Note))[0].text == "still"
        assert pool.statistics().links[0].connects == 1
        assert server.statistics().inflight_bytes == 0


@asynccontextmanager
async def one_taken_on(world: World) -> AsyncIterator[tuple[RpcServer, RpcPool, Hung, asyncio.Task[Any]]]:
    """A call with a large body, on its way until it is ended or answered."""
    hung = Hung()
    async with (
        serving(world.node("n1"), hung.methods()) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        call = asyncio.create_task(pool.call("n1", "t.begin", Note(""), Note, body=[bytes(MIB)], timeout_s=60))
        await until(lambda: bool(hung.answers))
        yield server, pool, hung, call


async def test_a_withdrawn_call_that_was_taken_on_is_let_go_at_once_and_its_answer_goes_nowhere(world: World) -> None:
    async with one_taken_on(world) as (server, pool, hung, call):
        assert server.statistics().inflight_bytes == MIB
        call.cancel()
        await until(lambda: server.statistics().handlers_running == 0)
        assert (server.statistics().inflight_bytes, server.statistics().calls_cancelled) == (0, 1)
        hung.answers[0](Note("late"))
        assert (await pool.call("n1", "t.echo", Note("on"), Note))[0].text == "on"
        assert server.statistics().inflight_bytes == 0


async def test_a_call_whose_answer_exceeds_a_frame_fails_and_holds_nothing(world: World) -> None:
    async with one_taken_on(world) as (server, pool, hung, call):
        hung.answers[0](Note("x" * (HEAD_BYTES_MAX + 1)))
        with pytest.raises(PeerRefused, match="its log says why"):
            await call
        assert server.statistics().inflight_bytes == 0
        assert (await pool.call("n1", "t.echo", Note("on"), Note))[0].text == "on"


async def test_what_was_taken_on_holds_nothing_when_its_connection_is_gone(world: World) -> None:
    async with one_taken_on(world) as (server, _, hung, call):
        for connection in server._connections:
            connection.abort("a test")
        with pytest.raises(PeerUnreachable):
            await call
        await until(lambda: server.statistics().inflight_bytes == 0)
        hung.answers[0](Note("late"))
        assert server.statistics().inflight_bytes == 0


async def test_an_answer_that_comes_too_late_is_skipped_and_harms_nobody(world: World) -> None:
    service = Service()

    async def stubborn(request: Note, call: Any) -> Any:
        service.entered.set()
        try:
            await service.gate.wait()
        except asyncio.CancelledError:
            return await service.make(Note("late", 200 * KIB), call)

    methods = {**service.methods(), "t.stubborn": service.methods()["t.echo"]._replace(handler=stubborn)}
    async with (
        serving(world.node("n1"), methods) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        await run_out(
            lambda timeout_s: pool.call("n1", "t.stubborn", Note(""), Note, timeout_s=timeout_s), service.entered
        )
        await until(lambda: pool.statistics().links[0].bytes_in > 200 * KIB)
        assert (await pool.call("n1", "t.echo", Note("after"), Note))[0].text == "after"
        assert pool.statistics().links[0].connects == 1
        assert server.statistics().inflight_bytes == 0


# --- who is let in


class Refusals(list[tuple[str, str]]):
    def __call__(self, peer: str, error: StoragedError) -> None:
        self.append((peer.partition(":")[0], error.code))


async def refused_between(
    server_own: identity.Identity, client_own: identity.Identity, **options: Any
) -> tuple[str, Refusals, Refusals]:
    """The reason that the caller is given, and the refusals that the server and the caller recorded."""
    at_server, at_client = Refusals(), Refusals()
    pool_options = {"admission": options.pop("client_admission")} if "client_admission" in options else {}
    async with (
        serving(server_own, Service(), on_refusal=at_server, **options) as server,
        pooled(client_own, {server_own.name: f"127.0.0.1:{server.port}"}, on_refusal=at_client, **pool_options) as pool,
    ):
        with pytest.raises(PeerUnreachable) as error:
            await pool.call(server_own.name, "t.echo", Note(""), Note)
        await until(lambda: bool(at_server or at_client))
        assert not pool.connected(server_own.name)
        assert server.statistics().calls == 0
        return error.value.message, at_server, at_client


async def test_a_certificate_of_another_authority_is_refused_by_both_sides(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other")
    reason, _server, client = await refused_between(world.node("n1"), other.node("gw", ("gateway",)))
    assert "not of this cluster" in reason
    assert client == [("n1", "CERTIFICATE_REFUSED")]
    # A caller that trusts this authority, but whose certificate is of another one: the server says no.
    mixed = other.node("gw2", ("gateway",))
    (mixed.directory / "authority.crt").write_bytes((world.authority.directory / "authority.crt").read_bytes())
    _reason, server, _client = await refused_between(world.node("n1"), mixed)
    assert server[0] == ("127.0.0.1", "CERTIFICATE_REFUSED")


async def test_a_node_of_another_cluster_under_the_same_authority_is_refused_with_the_reason(world: World) -> None:
    stranger = world.forged(world.node("gw", ("gateway",)), cluster="c2")
    reason, server, client = await refused_between(world.node("n1"), stranger)
    assert "'c1'" in reason
    assert "'c2'" in reason
    assert client == [("n1", "CERTIFICATE_REFUSED")]
    assert server in ([], [("gw", "CERTIFICATE_REFUSED")])


@pytest.mark.parametrize(
    ("country", "jurisdiction"), [("US", "FR"), ("FR", "US"), ("NC", "FR"), ("", "FR"), ("FR", "")]
)
async def test_a_caller_outside_the_eu_is_refused_and_recorded(world: World, country: str, jurisdiction: str) -> None:
    stranger = world.forged(world.node("gw", ("gateway",)), country=country, jurisdiction=jurisdiction)
    reason, server, client = await refused_between(world.node("n1"), stranger)
    assert "refuses this node" in reason
    assert server[0][1] == "JURISDICTION_REFUSED"
    assert client == [("n1", "JURISDICTION_REFUSED")]


async def test_a_server_outside_the_eu_is_refused_by_the_caller_and_recorded(world: World) -> None:
    stranger = world.forged(world.node("n1"), country="US")
    reason, _server, client = await refused_between(stranger, world.node("gw", ("gateway",)))
    assert "outside the European Union" in reason
    assert client == [("n1", "JURISDICTION_REFUSED")]


async def test_a_narrower_policy_refuses_another_member_state_on_either_side(world: World) -> None:
    reason, server, _ = await refused_between(
        world.node("n1"), world.node("gw", ("gateway",), "DE/fra/a"), admission=Policy(["FR"]).admit
    )
    assert "DE is not among the countries allowed here: FR" in reason
    assert server[0] == ("gw", "JURISDICTION_REFUSED")
    reason, _, client = await refused_between(
        world.node("n2", location="DE/fra/a"), world.node("gw", ("gateway",)), client_admission=Policy(["FR"]).admit
    )
    assert client == [("n2", "JURISDICTION_REFUSED")]


async def test_a_certified_node_that_the_layout_does_not_name_gets_no_more_than_the_layout(world: World) -> None:
    """A certificate is valid for years; a node that was removed must not be able to read, write or delete with it, not
    even on an open connection.
    """
    service, members = Service(), {"gw": frozenset({"gateway"})}
    methods = {**service.methods(), "t.open": Method(Note, service.echo, ROLES, for_non_members=True)}
    async with (
        serving(world.node("n1"), methods, roles_of=lambda peer: members.get(peer.name, frozenset())) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):

        async def call(method: str) -> str:
            try:
                return (await pool.call("n1", method, Note("fine"), Note))[0].text
            except PeerRefused as error:
                return error.remote_code

        assert [await call(method) for method in ("t.echo", "t.gateways", "t.open")] == ["fine"] * 3
        del members["gw"]
        server.recheck_peers()
        assert [await call(method) for method in ("t.echo", "t.gateways", "t.open")] == [
            "NOT_A_MEMBER",
            "NOT_A_MEMBER",
            "fine",
        ]
        members["gw"] = frozenset({"storage"})
        server.recheck_peers()
        assert [await call(method) for method in ("t.echo", "t.gateways")] == ["fine", "ROLE_REFUSED"]
        assert pool.statistics().links[0].connects == 1


async def test_a_peer_that_a_new_policy_does_not_admit_is_let_go_and_recorded(world: World) -> None:
    refusals, policies = Refusals(), [Policy()]
    async with (
        serving(
            world.node("n1"), Service(), admission=lambda peer: policies[-1].admit(peer), on_refusal=refusals
        ) as server,
        pooled(world.node("gw", ("gateway",), "DE/fra/a"), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        assert (await pool.call("n1", "t.echo", Note("fine"), Note))[0].text == "fine"
        policies.append(Policy(["FR"]))
        server.recheck_peers()
        await until(lambda: not pool.connected("n1"))
        assert refusals[0] == ("gw", "JURISDICTION_REFUSED")
        with pytest.raises(PeerUnreachable):
            await pool.call("n1", "t.echo", Note(""), Note)


@pytest.mark.parametrize(
    ("name", "location", "roles", "standing"),
    [
        ("n1", "FR/par1/a", ("storage", "gateway"), {"storage"}),
        ("n1", "DE/fra/a", ("storage",), set()),
        ("n1", "FR/par1/a", ("gateway",), set()),
        ("n2", "FR/par1/a", ("storage",), set()),
    ],
)
def test_standing_is_what_certificate_and_layout_both_say(
    name: str, location: str, roles: tuple[str, ...], standing: set[str]
) -> None:
    layout = Layout("c1", 1, (NodeEntry("n1", "FR/par1/a", "h:1", ("storage",)),), (), ())
    assert confirmed_roles(layout, name, location, roles) == standing


async def test_a_node_at_another_nodes_address_is_not_taken_for_it(world: World) -> None:
    refusals = Refusals()
    async with (
        serving(world.node("n1"), Service()) as server,
        pooled(world.node("gw", ("gateway",)), {"n2": f"127.0.0.1:{server.port}"}, on_refusal=refusals) as pool,
    ):
        with pytest.raises(PeerUnreachable, match="is n1's"):
            await pool.call("n2", "t.echo", Note(""), Note)
        assert refusals[0] == ("n2", "CERTIFICATE_REFUSED")


async def raw_connection(world: World, server: RpcServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = tls.client_context(world.node("raw", ("gateway",)))
    return await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname="n1")


@pytest.mark.parametrize(
    ("hello", "complaint"),
    [
        (Hello("c2", "raw", bytes(8), PROTOCOL_VERSION), b"belongs to cluster 'c2'"),
        (Hello("c1", "raw", bytes(8), PROTOCOL_VERSION + 1), b"speaks protocol version 4"),
        (Hello("c1", "n7", bytes(8), PROTOCOL_VERSION), b"introduces itself as 'n7'"),
    ],
)
async def test_a_handshake_that_does_not_fit_is_answered_with_the_reason(
    world: World, hello: Hello, complaint: bytes
) -> None:
    refusals = Refusals()
    async with serving(world.node("n1"), Service(), on_refusal=refusals) as server:
        reader, writer = await raw_connection(world, server)
        head = encode(hello)
        writer.write(pack_header(Kind.HELLO, 0, len(head)) + head)
        answer = await reader.read()
        writer.close()
        assert answer[3] == Kind.REFUSED
        assert complaint in answer
        assert refusals == [("raw", "CERTIFICATE_REFUSED")]


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\nHost: n1\r\n\r\n", pack_header(Kind.REQUEST, 1, 0), b"SR\x03" + bytes(40)]
)
async def test_a_peer_that_does_not_begin_with_a_handshake_is_refused(world: World, sent: bytes) -> None:
    async with serving(world.node("n1"), Service()) as server:
        reader, writer = await raw_connection(world, server)
        writer.write(sent)
        answer = await reader.read()
        writer.close()
        assert answer[3] == Kind.REFUSED
        assert server.statistics().calls == 0


async def test_a_node_of_the_version_before_is_refused_and_reads_why(world: World) -> None:
    """What it understands of the answer is its header: the version there is what its own log names."""
    refusals: list[str] = []
    async with serving(
        world.node("n1"), Service(), on_refusal=lambda _peer, error: refusals.append(error.message)
    ) as server:
        reader, writer = await raw_connection(world, server)
        head = encode(Hello("c1", "raw", bytes(8), 2))
        writer.write(b"SR\x02" + pack_header(Kind.HELLO, 0, len(head))[3:] + head)
        answer = await reader.read()
        writer.close()
        assert answer[:4] == b"SR\x03" + bytes([Kind.REFUSED])
        assert refusals == ["The handshake failed: the peer speaks protocol version 2, this daemon 3."]


async def test_a_server_of_the_version_before_counts_as_away_with_the_versions_as_the_reason(world: World) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readexactly(4))[:3] == b"SR\x03"
        writer.write(b"SR\x02" + pack_header(Kind.REFUSED, 0, 0)[3:])
        await reader.read()
        writer.close()

    context = tls.server_context(world.node("n1"))
    async with (
        await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context) as old,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{old.sockets[0].getsockname()[1]}"}) as pool,
    ):
        with pytest.raises(PeerUnreachable, match="the peer speaks protocol version 2, this daemon 3"):
            await pool.call("n1", "t.echo", Note(""), Note)


async def test_somebody_who_says_nothing_or_speaks_no_tls_is_disconnected(world: World) -> None:
    async with serving(world.node("n1"), Service(), limits=ServerLimits(handshake_timeout_s=0.2)) as server:
        for sent in (b"", b"\x00" * 100):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent)
            async with asyncio.timeout(GUARD_S):
                while await reader.read(1000):
                    pass
            writer.close()
        silent_reader, silent_writer = await raw_connection(world, server)
        async with asyncio.timeout(GUARD_S):
            assert await silent_reader.read() == b""
        silent_writer.close()


async def test_strangers_who_connect_and_say_nothing_do_not_keep_nodes_out(world: World) -> None:
    """All handshakes that there may be at once are taken, and would be for ten minutes; a node still gets in."""
    limits = ServerLimits(handshakes_max=4, handshake_timeout_s=600.0)
    async with serving(world.node("n1"), Service(), limits=limits) as server:
        strangers = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(9)]
        async with pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool:
            assert (await pool.call("n1", "t.echo", Note("in"), Note))[0].text == "in"
        assert await strangers[0][0].read() == b""  # the oldest made way
        for _, writer in strangers:
            writer.close()


async def test_a_strangers_port_is_no_part_of_what_is_recorded_of_a_refusal(world: World) -> None:
    """Each attempt comes from another port; were it recorded, none would be a repetition of the one before, and a
    stranger could fill the disk.
    """
    recorded: list[tuple[str, str]] = []
    async with serving(
        world.node("n1"), Service(), on_refusal=lambda peer, error: recorded.append((peer, error.message))
    ) as server:
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await until(lambda: len(recorded) == 3)
    assert len(set(recorded)) == 1
    assert recorded[0][0] == "127.0.0.1"


async def test_tls_1_2_is_not_spoken(world: World) -> None:
    async with serving(world.node("n1"), Service()) as server:
        context = tls.client_context(world.node("gw"))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname="n1")


async def test_a_renewed_certificate_is_used_for_new_connections(pair: Pair) -> None:
    await pair.call("t.echo")
    own = pair.world.node("n1", location="FR/par1/z")
    pair.server.renew(own)
    async with pooled(
        pair.world.node("g2", ("gateway",)),
        {"n1": f"127.0.0.1:{pair.server.port}"},
        admission=lambda peer: seen.append(peer.rack),
    ) as pool:
        seen: list[str] = []
        await pool.call("n1", "t.echo", Note(""), Note)
        assert set(seen) == {"z"}, "it is checked again after the handshake"


# --- bounds


async def test_a_flood_of_bodies_never_holds_more_than_the_bound_and_all_are_answered(world: World) -> None:
    service = Service()
    limits = ServerLimits(inflight_bytes_per_connection_max=4 * MIB, inflight_bytes_max=6 * MIB, drain_s=0.1)
    async with serving(world.node("n1"), service, limits=limits) as server:
        addresses = {"n1": f"127.0.0.1:{server.port}"}
        async with (
            pooled(world.node("g1", ("gateway",)), addresses) as first,
            pooled(world.node("g2", ("gateway",)), addresses) as second,
        ):
            calls = [
                asyncio.create_task(pool.call("n1", "t.hold", Note(""), Note, body=[bytes(MIB)], timeout_s=60))
                for pool in (first, second)
                for _ in range(16)
            ]
            await until(lambda: server.statistics().connections_waiting == 2)
            assert server.statistics().inflight_bytes == 6 * MIB
            assert service.held_bytes <= 6 * MIB
            service.gate.set()
            answers = await asyncio.gather(*calls)
            assert [answer.number for answer, _body in answers] == [MIB] * 32
            assert service.held_bytes_peak <= 6 * MIB
            assert server.statistics().inflight_bytes_peak <= 6 * MIB
            await until(lambda: server.statistics().inflight_bytes == 0)


async def test_a_body_larger_than_the_bound_is_served_when_it_is_alone(world: World) -> None:
    limits = ServerLimits(inflight_bytes_per_connection_max=MIB, inflight_bytes_max=MIB, drain_s=0.1)
    async with (
        serving(world.node("n1"), Service(), limits=limits) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        calls = [pool.call("n1", "t.echo", Note(""), Note, body=[bytes(3 * MIB)], timeout_s=60) for _ in range(4)]
        assert [answer.number for answer, _body in await asyncio.gather(*calls)] == [3 * MIB] * 4
        assert server.statistics().inflight_bytes_peak <= 3 * MIB


async def test_no_more_handlers_than_the_bound_run_at_once(world: World) -> None:
    service = Service()
    limits = ServerLimits(handlers_per_connection_max=5, drain_s=0.1)
    async with (
        serving(world.node("n1"), service, limits=limits) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        calls = [asyncio.create_task(pool.call("n1", "t.hold", Note(""), Note)) for _ in range(30)]
        await until(lambda: server.statistics().connections_waiting == 1)
        assert service.running == 5
        service.gate.set()
        await asyncio.gather(*calls)
        assert (service.running_peak, service.finished) == (5, 30)


async def test_answers_that_nobody_reads_stop_the_server_from_taking_more(world: World) -> None:
    limits = ServerLimits(inflight_bytes_per_connection_max=8 * MIB, handlers_per_connection_max=16, drain_s=0.1)
    async with serving(world.node("n1"), Service(), limits=limits) as server:
        reader, writer = await raw_connection(world, server)
        head = encode(Hello("c1", "raw", bytes(8), PROTOCOL_VERSION))
        writer.write(pack_header(Kind.HELLO, 0, len(head)) + head)
        await reader.readexactly(24)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        request = bytes([6]) + b"t.make" + encode(Note("", MIB))
        for number in range(1, 201):
            writer.write(pack_header(Kind.REQUEST, number, len(request), 0, 60_000) + request)
        await until(lambda: server.statistics().connections_waiting == 1)
        assert server.statistics().calls < 60
        writer.transport.abort()
        await until(lambda: server.statistics().connections == 0)
        await until(lambda: server.statistics().inflight_bytes == 0)


async def test_a_caller_waits_for_room_rather_than_queueing_without_bound(world: World) -> None:
    service = Service()
    server_limits = ServerLimits(inflight_bytes_per_connection_max=MIB, drain_s=0.1)
    pool_limits = PoolLimits(queued_bytes_max=2 * MIB)
    async with (
        serving(world.node("n1"), service, limits=server_limits) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}, limits=pool_limits) as pool,
    ):
        await pool.call("n1", "t.echo", Note(""), Note)
        calls = [
            asyncio.create_task(pool.call("n1", "t.hold", Note(""), Note, body=[bytes(MIB)], timeout_s=60))
            for _ in range(40)
        ]
        await until(lambda: server.statistics().connections_waiting == 1)
        await asyncio.sleep(0.05)
        assert pool.statistics().links[0].queued_bytes <= 3 * MIB
        refusal = ""
        while "accepts no more calls" not in refusal:  # the socket of a slow machine may take one or two more before
            with pytest.raises(PeerTimeout) as refused:
                await pool.call("n1", "t.echo", Note(""), Note, body=[bytes(MIB)], timeout_s=0.05)
            refusal = refused.value.message
        assert pool.statistics().links[0].queued_bytes <= 3 * MIB
        service.gate.set()
        assert len(await asyncio.gather(*calls)) == 40


async def test_a_peer_that_stops_in_the_middle_of_a_frame_is_disconnected(world: World) -> None:
    async with serving(world.node("n1"), Service(), limits=ServerLimits(stall_timeout_s=0.2, drain_s=0.1)) as server:
        reader, writer = await raw_connection(world, server)
        head = encode(Hello("c1", "raw", bytes(8), PROTOCOL_VERSION))
        writer.write(pack_header(Kind.HELLO, 0, len(head)) + head)
        await reader.readexactly(24)
        request = bytes([6]) + b"t.echo" + encode(Note(""))
        writer.write(pack_header(Kind.REQUEST, 1, len(request), MIB, 60_000) + request + bytes(1000))
        await until(lambda: server.statistics().inflight_bytes == MIB)
        await until(lambda: server.statistics().connections == 0)
        assert server.statistics().inflight_bytes == 0
        writer.close()


# --- going away


async def test_a_peer_that_dies_fails_its_calls_at_once_and_is_found_again(world: World) -> None:
    service = Service()
    own = world.node("n1")
    port = free_port()
    async with pooled(
        world.node("gw", ("gateway",)), lambda name: f"127.0.0.1:{port}" if name == "n1" else None
    ) as pool:
        async with serving(own, service, port=port) as server:
            call = asyncio.create_task(pool.call("n1", "t.hold", Note(""), Note))
            await service.entered.wait()
            first = pool.incarnation("n1")
            for connection in list(server._connections):
                connection.abort("killed by the test")
        with pytest.raises(PeerUnreachable, match="broke"):
            await call
        await until(lambda: bool(pool.away_reason("n1")))
        with pytest.raises(PeerUnreachable, match="is away"):
            await pool.call("n1", "t.echo", Note(""), Note, timeout_s=60)
        assert not pool.connected("n1")
        async with serving(own, Service(), port=port):
            await until(lambda: pool.connected("n1"))
            assert (await pool.call("n1", "t.echo", Note("back"), Note))[0].text == "back"
            assert pool.incarnation("n1") != first
            assert pool.last_read_at("n1") is not None


async def test_a_node_without_an_address_is_unreachable_and_gets_no_link(world: World) -> None:
    async with pooled(world.node("gw", ("gateway",)), lambda name: None) as pool:
        with pytest.raises(PeerUnreachable, match="No address of n9"):
            await pool.call("n9", "t.echo", Note(""), Note)
        assert pool.statistics().links == ()


async def test_a_link_survives_an_address_that_makes_no_sense(world: World) -> None:
    addresses = {"n1": "127.0.0.1:99999"}
    async with (
        serving(world.node("n1"), Service()) as server,
        pooled(world.node("gw", ("gateway",)), lambda name: addresses[name]) as pool,
    ):
        with pytest.raises(PeerUnreachable):
            await pool.call("n1", "t.echo", Note(""), Note)
        addresses["n1"] = f"127.0.0.1:{server.port}"
        await until(lambda: pool.connected("n1"))


async def test_closing_the_server_lets_running_calls_finish(world: World) -> None:
    service = Service()
    server = RpcServer(
        world.node("n1"), service.methods(), checks=PeerChecks(Policy().admit), limits=ServerLimits(drain_s=10)
    )
    await server.start("127.0.0.1", 0)
    async with pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool:
        call = asyncio.create_task(pool.call("n1", "t.hold", Note("kept"), Note))
        await service.entered.wait()
        closing = asyncio.create_task(server.close())
        await asyncio.sleep(0.02)
        service.gate.set()
        assert (await call)[0].text == "kept"
        await closing


async def test_a_port_in_use_is_named(world: World) -> None:
    own = world.node("n1")
    async with serving(own, Service()) as server:
        with pytest.raises(PortInUse, match=str(server.port)):
            await RpcServer(own, {}, checks=PeerChecks(Policy().admit)).start("127.0.0.1", server.port)


def test_an_expired_certificate_is_refused(world: World) -> None:
    own = issuing.issue(
        world.authority, world.directory / "old", name="old", location="FR/par1/a", roles=("storage",), days=0
    )
    with pytest.raises(CertificateRefused, match="expired"):
        identity.load_identity(own.directory)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
