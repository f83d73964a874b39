"""Heartbeats, the states of nodes and disks, clocks, and how layouts spread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.layouts import LayoutBook, LayoutFiles
from storaged.cluster.membership import Membership, OwnNode
from storaged.cluster.messages import Ping
from storaged.cluster.moves import RefusedLayout
from storaged.cluster.ports import Call, DiskStatus, PeerIdentity, Reply
from storaged.cluster.signed_layout import SignedLayout, sign_layout
from storaged.errors import LayoutRefused, PeerError, PeerTimeout, PeerUnreachable
from storaged.wire import Buffer, Message
from tests.worlds.authority import World, until

T = TypeVar("T", bound=Message)


class Clock:
    """Real seconds for intervals; a wall clock that is off by ``skew_ms``."""

    def __init__(self, skew_ms: int = 0) -> None:
        self.skew_ms = skew_ms

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_ms(self) -> int:
        return 1_767_225_600_000 + int(asyncio.get_running_loop().time() * 1000) + self.skew_ms


class Network:
    """A Caller for each node, without sockets: the nodes that answer, and how those who do not behave."""

    def __init__(self) -> None:
        self.members: dict[str, Membership] = {}
        self.errors: dict[str, PeerError] = {}
        self.calls: list[tuple[str, str, str]] = []

    def caller(self, name: str) -> Any:
        network = self

        class Caller:
            async def call(
                self,
                node: str,
                method: str,
                request: Message,
                reply: type[T],
                *,
                body: Sequence[Buffer] = (),
                timeout_s: float = 10.0,
            ) -> tuple[T, memoryview]:
                network.calls.append((name, node, method))
                await asyncio.sleep(0)
                if node in network.errors:
                    raise network.errors[node]
                if node not in network.members:
                    raise PeerUnreachable(f"{node} is away: connection refused")
                peer = PeerIdentity(name, "FR", "s", "r", ("storage",), "FR", "c1")
                answer = (
                    await network.members[node].methods()[method].handler(request, Call(peer, memoryview(b""), 0.0))
                )
                assert not isinstance(answer, Reply)
                assert isinstance(answer, reply)
                return answer, memoryview(b"")

        return Caller()


class Links:
    def __init__(self) -> None:
        self.heard_at: float | None = None
        self.watcher: Callable[[str, bool], None] = lambda node, reached: None

    def last_read_at(self, node: str) -> float | None:
        return self.heard_at

    def watch(self, watcher: Callable[[str, bool], None]) -> None:
        self.watcher = watcher


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def layout(
    epoch: int = 1,
    names: Sequence[str] = ("n1", "n2", "n3"),
    gateway: bool = False,
    addresses: dict[str, str] | None = None,
    disks: Sequence[str] | None = None,
) -> Layout:
    """``disks``: the nodes that have one (default: all)."""
    nodes = [
        NodeEntry(name, f"FR/par1/{name}", (addresses or {}).get(name, f"{name}:1"), ("storage",)) for name in names
    ]
    if gateway:
        nodes.append(NodeEntry("gw", "FR/par1/n1", "", ("gateway",)))
    return Layout(
        "c1",
        epoch,
        tuple(nodes),
        tuple(DiskEntry(f"disk-{name}", name, 1) for name in (names if disks is None else disks)),
        ("disk-n1",),
    )


def is_up(member: Membership, node: str) -> bool:
    return any(status.name == node and status.state == "up" for status in member.statuses())


def signed(world: World, value: Layout) -> SignedLayout:
    return sign_layout(value, world.authority.administration)


def book(world: World, *known: Layout) -> LayoutBook:
    return LayoutBook(
        world.authority.administration.public_key(), "c1", known=[signed(world, value) for value in known]
    )


@asynccontextmanager
async def member(
    network: Network,
    world: World,
    name: str,
    layouts: LayoutBook,
    *,
    state: str = "ok",
    incarnation: bytes = b"",
    **options: Any,
) -> AsyncIterator[Membership]:
    options.setdefault("clock", Clock())
    own = OwnNode(
        name,
        incarnation or name.encode().ljust(8),
        pid=7,
        disks=lambda: [DiskStatus(f"disk-{name}", f"/{name}", state)],
        **{field: options.pop(field) for field in ("ledger", "certificate_until_ms") if field in options},
    )
    found = Membership(own, network.caller(name), layouts, interval_s=0.02, **options)
    network.members[name] = found
    await found.start()
    try:
        yield found
    finally:
        network.members.pop(name, None)
        await found.close()


# --- states


async def test_every_node_says_when_its_certificate_expires(world: World) -> None:
    network = Network()
    async with (
        member(network, world, "n1", book(world, layout()), certificate_until_ms=lambda: 1) as first,
        member(network, world, "n2", book(world, layout()), certificate_until_ms=lambda: 2) as second,
    ):
        await until(
            lambda: first.status("n2").certificate_until_ms == 2 and second.status("n1").certificate_until_ms == 1
        )
        assert first.status("n1").certificate_until_ms == 1


async def test_nodes_that_answer_are_up_and_their_disks_are_known(world: World) -> None:
    network = Network()
    async with (
        member(network, world, "n1", book(world, layout())) as first,
        member(network, world, "n2", book(world, layout()), state="full"),
        member(network, world, "n3", book(world, layout()), state="failed"),
    ):
        await until(lambda: [status.state for status in first.statuses()] == ["up"] * 3)
        assert [first.disk_writable(f"disk-n{n}") for n in (1, 2, 3)] == [True, False, False]
        assert [first.disk_readable(f"disk-n{n}") for n in (1, 2, 3)] == [True, True, False]
        status = first.status("n2")
        assert (status.pid, status.incarnation, status.epoch) == (7, b"n2      ", 1)
        assert status.disks == (DiskStatus("disk-n2", "/n2", "full"),)
        assert not first.disk_writable("disk-of-nobody")


async def test_votes_repeat_no_text_that_another_node_made_up(world: World) -> None:
    """A node that calls its 36 disks long names would make the vote of every other node longer than any believes."""
    network = Network()
    async with (
        member(network, world, "n1", book(world, layout())) as first,
        member(network, world, "n2", book(world, layout()), state="hung"),
        member(network, world, "n3", book(world, layout()), state="\U0001f512" * 500),
    ):
        await until(lambda: [status.state for status in first.statuses()] == ["up"] * 3)
        assert [first.why_away(f"disk-n{n}") for n in (1, 2, 3)] == ["", "hung", "failed"]


async def test_a_node_never_reached_counts_as_away(world: World) -> None:
    network = Network()
    network.errors["n2"] = PeerTimeout("slow")
    async with member(network, world, "n1", book(world, layout())) as first:
        assert first.status("n2").state == "unknown"
        assert not is_up(first, "n2")
        assert not first.disk_readable("disk-n2")


async def test_three_missed_pings_make_a_node_down_and_one_answer_makes_it_up(world: World) -> None:
    network = Network()
    async with (
        member(network, world, "n1", book(world, layout())) as first,
        member(network, world, "n2", book(world, layout())),
    ):
        await until(lambda: is_up(first, "n2"))
        changes: list[tuple[str, str]] = []
        first.watch(lambda status: changes.append((status.name, status.state)))
        before = len([call for call in network.calls if call[1] == "n2"])
        network.errors["n2"] = PeerTimeout("slow")
        await until(lambda: not is_up(first, "n2"))
        assert len([call for call in network.calls if call[1] == "n2"]) - before >= 2, "the first was perhaps under way"
        assert "no answer to 3 pings" in first.status("n2").reason
        assert not first.disk_readable("disk-n2")
        assert first.status("n2").disks != ()
        del network.errors["n2"]
        await until(lambda: is_up(first, "n2"))
        assert [change for change in changes if change[0] == "n2"] == [("n2", "down"), ("n2", "up")]


async def test_a_refused_connection_makes_a_node_down_at_once_but_only_after_a_second_try(world: World) -> None:
    network = Network()
    async with member(network, world, "n1", book(world, layout(names=("n1", "n2")))) as first:
        await until(lambda: first.status("n2").state == "down")
        assert "connection refused" in first.status("n2").reason
        assert network.calls.count(("n1", "n2", "cluster.ping")) == 2


async def test_a_late_ping_is_not_missed_while_other_bytes_arrive(world: World) -> None:
    network, links = Network(), Links()
    async with (
        member(network, world, "n1", book(world, layout()), links=links) as first,
        member(network, world, "n2", book(world, layout())),
    ):
        await until(lambda: is_up(first, "n2"))
        network.errors["n2"] = PeerTimeout("slow")
        links.heard_at = asyncio.get_running_loop().time() + 1000
        seen = len(network.calls)
        await until(lambda: network.calls[seen:].count(("n1", "n2", "cluster.ping")) >= 6)
        assert is_up(first, "n2")
        links.heard_at = None
        await until(lambda: not is_up(first, "n2"))


async def test_a_connection_that_cannot_be_made_again_is_noticed_without_waiting_for_a_ping(world: World) -> None:
    network, links = Network(), Links()
    async with (
        member(network, world, "n1", book(world, layout()), links=links) as first,
        member(network, world, "n2", book(world, layout())),
    ):
        await until(lambda: is_up(first, "n2"))
        links.watcher("n2", False)
        assert first.status("n2").state == "down"
        links.watcher("n2", True)
        await until(lambda: is_up(first, "n2"))


async def test_a_node_that_restarted_is_told_apart_by_its_incarnation(world: World) -> None:
    network = Network()
    async with member(network, world, "n1", book(world, layout())) as first:
        changes: list[bytes] = []
        first.watch(lambda status: changes.append(status.incarnation))
        for incarnation in (b"first   ", b"second  "):
            async with member(network, world, "n2", book(world, layout()), incarnation=incarnation):
                await until(lambda expected=incarnation: first.status("n2").incarnation == expected)  # type: ignore[misc]
        assert b"first   " in changes
        assert b"second  " in changes


async def test_a_gateway_without_an_address_is_known_by_its_pings(world: World) -> None:
    network = Network()
    async with member(network, world, "n1", book(world, layout(gateway=True))) as first:
        assert first.status("gw").state == "unknown"
        async with member(network, world, "gw", book(world, layout(gateway=True))):
            await until(lambda: is_up(first, "gw"))
        assert ("n1", "gw", "cluster.ping") not in network.calls
        await until(lambda: not is_up(first, "gw"))
        assert "stopped sending pings" in first.status("gw").reason


async def test_a_node_that_the_layout_does_not_name_is_not_heard_about_steps(world: World) -> None:
    network, layouts = Network(), book(world, layout())
    behind: list[str] = []
    layouts.partitions.on_behind = behind.append
    async with member(network, world, "n1", layouts) as first:
        for name in ("removed", "n2"):
            peer = PeerIdentity(name, "FR", "par1", name, ("storage",), "FR", "c1")
            ping = Ping(node=name, incarnation=b"12345678", pid=1, wall_ms=0, epoch=1, steps=99)
            await first.methods()["cluster.ping"].handler(ping, Call(peer, memoryview(b""), 0.0))
    assert behind == ["n2"]


async def test_a_node_does_not_speak_for_disks_that_the_layout_gives_to_another(world: World) -> None:
    network = Network()
    async with member(network, world, "n1", book(world, layout(names=("n1", "n2", "n3")))) as first:
        lies = OwnNode(
            "n2",
            b"n2      ",
            disks=lambda: [DiskStatus("disk-n3", "/x", "ok"), DiskStatus("disk-n2", "/y", "ok")],
        )
        liar = Membership(lies, network.caller("n2"), book(world, layout()))
        network.members["n2"] = liar
        await until(lambda: first.disk_writable("disk-n2"))
        assert not first.disk_writable("disk-n3")


async def test_clock_skew_and_round_trips_are_measured(world: World) -> None:
    network = Network()
    async with (
        member(network, world, "n1", book(world, layout())) as first,
        member(network, world, "n2", book(world, layout()), clock=Clock(5000)),
    ):
        await until(lambda: first.status("n2").clock_skew_ms is not None)
        status = first.status("n2")
        assert status.clock_skew_ms is not None
        assert abs(status.clock_skew_ms - 5000) < 1000
        assert status.rtt_min_ms is not None
        assert status.rtt_min_ms >= 0


# --- layouts


async def test_a_node_that_was_away_learns_every_layout_it_missed(world: World) -> None:
    network = Network()
    newest = [layout(1), layout(2), layout(5)]
    behind = book(world, layout(1))
    async with member(network, world, "n1", book(world, *newest)), member(network, world, "n2", behind):
        await until(lambda: behind.epoch == 5)
        assert behind.at(2) == layout(2)
        with pytest.raises(KeyError):
            behind.at(3)


async def test_a_node_that_begins_with_a_later_layout_learns_the_earlier_ones_too(world: World) -> None:
    """A gateway that is added later is issued with the newest layout alone, and objects name the layouts under which
    they were written.
    """
    network = Network()
    added = book(world, layout(5))
    async with (
        member(network, world, "n1", book(world, layout(1), layout(5))),
        member(network, world, "n2", book(world, layout(1), layout(2), layout(4), layout(5))),
        member(network, world, "n3", added),
    ):
        await until(lambda: [epoch for epoch in range(1, 6) if added.knows(epoch)] == [1, 2, 4, 5])
        assert added.epoch == 5
        assert added.at(2) == layout(2)


async def test_what_no_peer_has_of_the_history_is_not_asked_for_again_and_again(world: World) -> None:
    network = Network()
    newest = layout(5)
    async with (
        member(network, world, "n1", book(world, newest)) as first,
        member(network, world, "n2", book(world, newest)),
    ):
        await until(lambda: is_up(first, "n2"))
        await until(lambda: network.calls.count(("n1", "n2", "cluster.ping")) > 8)
        assert network.calls.count(("n1", "n2", "cluster.layout")) == 1


async def test_an_earlier_layout_that_the_administration_did_not_sign_is_not_taken(
    world: World, tmp_path: Path
) -> None:
    network = Network()
    stranger = World(tmp_path / "stranger")
    forged = LayoutBook(
        stranger.authority.administration.public_key(),
        "c1",
        known=[signed(stranger, layout(1)), signed(stranger, layout(5))],
    )
    honest = book(world, layout(5))
    async with member(network, world, "n1", honest) as first, member(network, world, "n2", forged):
        await until(lambda: is_up(first, "n2"))
        await until(lambda: ("n1", "n2", "cluster.layout") in network.calls)
        await until(lambda: network.calls.count(("n1", "n2", "cluster.ping")) > 5)
        assert not honest.knows(1)


async def test_a_node_without_any_layout_is_given_one_by_those_who_know_it(world: World) -> None:
    network = Network()
    empty = book(world)
    with pytest.raises(LayoutRefused):
        _ = empty.current
    async with member(network, world, "n2", empty) as fresh, member(network, world, "n1", book(world, layout(3))):
        await until(lambda: empty.epoch == 3)
        await until(lambda: is_up(fresh, "n1"))


async def test_a_new_layout_changes_who_is_pinged(world: World) -> None:
    network = Network()
    with_second, with_third = (layout(epoch, ("n1", other), disks=["n1"]) for epoch, other in ((1, "n2"), (2, "n3")))
    layouts = book(world, with_second)
    async with (
        member(network, world, "n1", layouts) as first,
        member(network, world, "n2", book(world, with_second)),
        member(network, world, "n3", book(world, with_second)),
    ):
        await until(lambda: is_up(first, "n2"))
        assert await layouts.learn(signed(world, with_third), "a test")
        await until(lambda: is_up(first, "n3"))
        assert [status.name for status in first.statuses()] == ["n1", "n3"]
        assert not is_up(first, "n2")


async def test_a_layout_that_would_move_data_is_refused_wherever_it_comes_from_and_everybody_goes_on(
    world: World,
) -> None:
    network = Network()
    books = {name: book(world, layout()) for name in ("n1", "n2")}
    strayed = book(world, layout(2, ("n1", "n2", "n3", "n4")))  # as a node that was added under an older release has it
    async with (
        member(network, world, "n1", books["n1"]) as first,
        member(network, world, "n2", books["n2"]),
        member(network, world, "n4", strayed),
    ):
        await until(lambda: books["n1"].refusals() != () and first.status("n2").refused != ())
        for refused in (*books["n1"].refusals(), *first.status("n2").refused):
            assert (refused.epoch, refused.source) == (2, "node n4")
            assert "disk disk-n4 of n4 is new" in refused.reason
        assert first.status("n1").refused == books["n1"].refusals()
        assert {known.epoch for known in books.values()} == {1}
        assert is_up(first, "n2")
        assert await books["n1"].learn(signed(world, layout(3, addresses={"n2": "elsewhere:1"})), "a test")
        await until(lambda: books["n2"].epoch == 3)


async def test_a_refused_layout_is_judged_and_logged_once_however_often_it_is_offered(world: World) -> None:
    heard: list[RefusedLayout] = []
    layouts = book(world, layout())
    layouts.on_refusal = heard.append
    moving, harmless = signed(world, layout(2, ("n1", "n2"))), signed(world, layout(2, addresses={"n1": "elsewhere:1"}))
    for _ in range(3):
        with pytest.raises(LayoutRefused, match="disk disk-n3 of n3 is gone"):
            await layouts.learn(moving, "a file")
    assert [(refused.epoch, refused.source) for refused in heard] == [(2, "a file")]
    assert layouts.refusals() == tuple(heard)
    assert await layouts.learn(harmless, "a file")
    assert layouts.refusals() == ()


async def test_two_layouts_of_one_epoch_show_by_the_nodes_that_go_by_them(world: World) -> None:
    network = Network()
    one, other = book(world, layout()), book(world, layout(addresses={"n3": "elsewhere:1"}))
    async with member(network, world, "n1", one), member(network, world, "n2", other):
        await until(lambda: one.refusals() != () and other.refusals() != ())
        assert "Two layouts were signed under epoch 1; n2 uses the other one" in one.refusals()[0].reason
        assert "n1 uses the other one" in other.refusals()[0].reason
        third = signed(world, layout(2))
        assert await one.learn(third, "a test")
        await until(lambda: other.epoch == 2 and one.refusals() == () == other.refusals())


async def test_a_layout_that_the_administration_did_not_sign_is_not_taken_and_harms_nobody(
    world: World, tmp_path: Path
) -> None:
    network = Network()
    stranger = World(tmp_path / "stranger")
    forged = LayoutBook(
        stranger.authority.administration.public_key(),
        "c1",
        known=[sign_layout(layout(9), stranger.authority.administration)],
    )
    honest = book(world, layout(1))
    async with member(network, world, "n1", honest) as first, member(network, world, "n2", forged):
        await until(lambda: network.calls.count(("n1", "n2", "cluster.layout")) >= 2)
        await until(lambda: network.calls.count(("n2", "n1", "cluster.offer")) >= 2)
        assert honest.epoch == 1
        assert is_up(first, "n2")


async def test_epochs_only_grow_and_one_epoch_has_one_layout(world: World) -> None:
    layouts = book(world, layout(4))
    assert not await layouts.learn(signed(world, layout(4)), "a test")
    assert await layouts.learn(signed(world, layout(2)), "a test")
    assert (layouts.epoch, layouts.at(2)) == (4, layout(2))
    with pytest.raises(LayoutRefused, match="Another layout is known under epoch 4"):
        await layouts.learn(signed(world, layout(4, ("n1",))), "a test")
    with pytest.raises(LayoutRefused):
        await layouts.learn(signed(world, layout(0)), "a test")


async def test_a_layout_is_on_disk_before_it_is_used_and_is_found_again(world: World, tmp_path: Path) -> None:
    files = LayoutFiles(tmp_path / "layouts")
    persisted: list[int] = []

    async def persist(epoch: int, value: SignedLayout) -> None:
        persisted.append(layouts.epoch)
        await files.save(epoch, value)

    layouts = LayoutBook(world.authority.administration.public_key(), "c1", persist=persist)
    for epoch in (1, 2, 12):
        await layouts.learn(signed(world, layout(epoch)), "a test")
    assert persisted == [0, 1, 2]
    again = LayoutBook(world.authority.administration.public_key(), "c1", known=files.load())
    assert (again.epoch, again.at(2)) == (12, layout(2))
    (tmp_path / "layouts" / "layout-000000000013.signed").write_bytes(b"\xc1")
    with pytest.raises(LayoutRefused, match="layout-000000000013"):
        files.load()


async def test_a_layout_that_cannot_be_persisted_is_not_used(world: World) -> None:
    async def persist(epoch: int, value: SignedLayout) -> None:
        raise OSError("no space")

    layouts = LayoutBook(world.authority.administration.public_key(), "c1", persist=persist)
    with pytest.raises(OSError):
        await layouts.learn(signed(world, layout(1)), "a test")
    assert layouts.epoch == 0


# --- over the network
