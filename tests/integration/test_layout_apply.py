"""Layouts that move data are decided, accepted and brought into force: gateways and storage nodes without sockets, over
one register."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from storaged.cluster.certificates import accept, is_enough, verify_certificate
from storaged.cluster.identity import NodeSigner
from storaged.cluster.layout import Layout
from storaged.cluster.layouts import LayoutFiles
from storaged.cluster.messages import AcceptAnswer
from storaged.cluster.ports import Call
from storaged.cluster.rpc import faults
from storaged.cluster.signed_layout import SignedLayout
from storaged.errors import (
    DiskUnusable,
    LayoutNotAccepted,
    LayoutOvertaken,
    LayoutRefused,
    NoQuorum,
    PeerUnreachable,
    RecoverRefused,
    SlowDown,
    StoragedError,
)
from storaged.node.accepting import PROMISE_FILE, LayoutAcceptor
from storaged.node.applying import LayoutApplication
from storaged.node.system import SystemPaths, exchange_layout
from storaged.wire import Buffer, Message, decode, encode
from tests.integration.test_node import Registers
from tests.patience import GUARD_S
from tests.worlds.authority import World, until
from tests.worlds.layouts import NODES, History, with_nodes

T = TypeVar("T", bound=Message)


class Cluster:
    """Gateways ``gw`` and ``gw2``, storage nodes, one register."""

    def __init__(self, directory: Path) -> None:
        self.history = History(World(directory))
        self.registers = Registers()
        self.paths = SystemPaths(self.registers)  # type: ignore[arg-type]  # only read and change are asked for
        self.away: set[str] = set()
        self.files = {name: LayoutFiles(directory / f"{name} layouts") for name in (*NODES, "n4", "gw", "gw2")}
        self.books = {name: self.history.book(persist=files.save) for name, files in self.files.items()}
        self.acceptors: dict[str, LayoutAcceptor] = {}
        for name in (*NODES, "n4"):
            self.boot(name)

    def boot(self, name: str) -> None:
        self.acceptors[name] = LayoutAcceptor(
            self.history.identity(name), self.books[name], self.paths, self.files[name].directory
        )

    def gateway(self, name: str = "gw", collect_s: float = GUARD_S) -> LayoutApplication:
        authority = self.history.world.authority
        own = self.history.identity("gw")
        return LayoutApplication(own, authority.certificate, self.books[name], self.paths, self, collect_s=collect_s)

    async def call(
        self, node: str, method: str, request: Message, reply: type[T], *,
        body: Sequence[Buffer] = (), timeout_s: float = 10.0,
    ) -> tuple[T, memoryview]:  # fmt: skip
        await asyncio.sleep(0)
        if node in self.away:
            raise PeerUnreachable(f"{node} is away")
        entry = self.acceptors[node].methods()[method]
        try:
            answer: Any = await entry.handler(
                decode(encode(request), entry.request), Call(self.history.identity("gw").peer, memoryview(b""), 0.0)
            )
        except StoragedError as error:
            raise faults.from_head(faults.to_head(error), node) from None
        return decode(encode(answer), reply), memoryview(b"")

    @property
    def register(self) -> SignedLayout:
        return decode(self.registers.values[b"layout"].body, SignedLayout)

    def moving(self, *names: str, **facts: Any) -> tuple[Layout, SignedLayout]:
        layout = self.history.after(with_nodes(self.history.layouts[-1], *(names or ("n4",))), **facts)
        return layout, self.history.sign(layout)

    async def spread(self) -> None:
        for book in self.books.values():
            await book.learn(self.register, "a peer")


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


async def test_a_layout_that_moves_nothing_needs_no_acceptances(cluster: Cluster) -> None:
    before = cluster.history.layouts[0]
    elsewhere = replace(before, nodes=tuple(replace(node, address="h:2") for node in before.nodes))
    signed = cluster.history.sign(cluster.history.after(elsewhere, moving=False))
    cluster.away.update(NODES)
    assert await cluster.gateway().apply(signed) == {"epoch": 2, "moves": [], "accepted": []}
    assert cluster.books["gw"].epoch == 2
    assert cluster.register == signed
    assert (await cluster.gateway().apply(signed))["epoch"] == 2, "again"
    other = cluster.history.sign(cluster.history.after(replace(before, profile="1+1"), moving=False, epoch=3))
    with pytest.raises(
        LayoutOvertaken, match=r"Layout 2 came first\. It changed: node gw changes: address none to h:2"
    ):
        await cluster.gateway().apply(other)
    with pytest.raises(LayoutOvertaken, match=r"Layout 1 was in force\. Layout 2 followed it"):
        await cluster.gateway().apply(cluster.history.signed[0])


async def test_a_layout_is_decided_accepted_by_a_majority_and_passed_on_with_its_certificate(cluster: Cluster) -> None:
    layout, signed = cluster.moving()
    cluster.away.add("n3")
    done = await cluster.gateway().apply(signed)
    assert (done["epoch"], done["accepted"]) == (100, ["n1", "n2"])
    assert "disk d4a of n4 is new" in done["moves"]
    assert cluster.books["gw"].current == layout
    held = cluster.register
    assert held == cluster.books["gw"].signed(100)
    verify_certificate(held, layout, cluster.history.layouts[0], cluster.history.world.authority.certificate)
    assert cluster.books["n1"].epoch == 1, "an acceptance uses nothing"
    await cluster.spread()
    assert {book.epoch for book in cluster.books.values()} == {100}
    again = cluster.history.book(cluster.history.signed[0], *cluster.files["n2"].load())
    assert again.signed(100).certificate == held.certificate
    assert (await cluster.gateway("gw2").apply(signed))["accepted"] == [], "it is in force"
    assert (await cluster.gateway("gw2").newest()) == (held, True)


async def test_a_decided_layout_waits_for_the_nodes_that_are_missing_and_any_gateway_goes_on(cluster: Cluster) -> None:
    _, signed = cluster.moving()
    cluster.away.update(("n2", "n3"))
    with pytest.raises(LayoutNotAccepted, match=r"Missing: n2 \(n2 is away\); n3 \(n3 is away\)\. Accepted: n1"):
        await cluster.gateway(collect_s=0.2).apply(signed)
    assert (cluster.register, cluster.books["gw"].epoch) == (signed, 1)
    assert await cluster.gateway("gw2").newest() == (signed, False)
    for _ in range(2):
        await exchange_layout(cluster.paths, cluster.books["gw2"])
    assert cluster.register == signed, "what was decided stays"
    assert cluster.books["gw2"].refusals() == ()
    cluster.away.clear()
    assert (await cluster.gateway("gw2").apply(signed))["epoch"] == 100


async def test_another_gateway_ends_what_one_did_that_was_killed_before_it_used_the_layout(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, signed = cluster.moving()

    async def killed(learnt: SignedLayout, _source: str) -> bool:
        if learnt.certificate:
            raise asyncio.CancelledError
        return False

    monkeypatch.setattr(cluster.books["gw"], "learn", killed)
    with pytest.raises(asyncio.CancelledError):
        await cluster.gateway().apply(signed)
    assert cluster.register.certificate, "the certificate is in the register, and no node uses the layout yet"
    done = await cluster.gateway("gw2").apply(signed)
    assert (done["epoch"], done["accepted"]) == (100, [])
    assert "disk d4a of n4 is new" in done["moves"]
    assert cluster.books["gw2"].epoch == 100


async def test_of_two_administrators_at_once_one_wins_and_the_other_learns_what_changed(cluster: Cluster) -> None:
    one, other = cluster.moving("n4")[1], cluster.moving("n5", "n6")[1]
    done = await asyncio.gather(
        cluster.gateway("gw").apply(one), cluster.gateway("gw2").apply(other), return_exceptions=True
    )
    won = [each for each in done if isinstance(each, dict)]
    lost = [each for each in done if isinstance(each, LayoutOvertaken)]
    assert (len(won), len(lost)) == (1, 1), done
    assert "It changed: disk d" in lost[0].message
    assert cluster.register.payload in (one.payload, other.payload)
    loser = other if cluster.register.payload == one.payload else one
    await cluster.spread()
    for name in ("gw", "gw2"):
        with pytest.raises(LayoutOvertaken, match="Layout 100 came first"):
            await cluster.gateway(name).apply(loser)


@pytest.mark.parametrize(
    ("last", "said"),
    [(2, r"Layout 100 was in force\. Layout 101 followed it"), (3, "may have been before: layout 102")],
)
async def test_a_layout_that_another_gateway_has_brought_into_force_meanwhile_is_not_called_unused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, last: int, said: str
) -> None:
    moved, signed = cluster.moving()
    steps, before = [cluster.history.add(moved, signed)], moved
    for number in (2, 3):
        elsewhere = replace(before, nodes=tuple(replace(node, address=f"h:{number}") for node in before.nodes))
        before = cluster.history.after(elsewhere, moving=False)
        steps.append(cluster.history.add(before, cluster.history.sign(before)))
    late = cluster.gateway("gw2")
    judge = cluster.books["gw2"].judge

    def while_others_go_on(layout: Layout) -> Layout:
        found = judge(layout)
        for signed in steps[:last]:
            asyncio.run_coroutine_threadsafe(cluster.gateway().apply(signed), loop).result(GUARD_S)
        return found

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(cluster.books["gw2"], "judge", while_others_go_on)
    with pytest.raises(LayoutOvertaken, match=said):
        await late.apply(steps[0])


async def test_what_is_no_layout_in_the_register_ends_no_gateway(cluster: Cluster) -> None:
    """Gateways look there by themselves, and one of them may lie."""
    used = cluster.history.signed[0]
    for body in (b"", b"\xc1", encode(SignedLayout(b"\xc1", b"")), encode(SignedLayout(encode(["c1"]), b""))):
        await cluster.paths.write("layout", body)
        assert await cluster.gateway().newest() == (used, True)


async def test_a_layout_that_was_decided_and_not_accepted_overtakes_another(cluster: Cluster) -> None:
    decided, late = cluster.moving("n4")[1], cluster.moving("n5")[1]
    cluster.away.update(NODES)
    with pytest.raises(LayoutNotAccepted):
        await cluster.gateway(collect_s=0.1).apply(decided)
    with pytest.raises(LayoutOvertaken, match=r"another layout 100 is decided, and not in force yet: apply it first"):
        await cluster.gateway("gw2").apply(late)
    cluster.away.clear()
    for name in NODES:
        with pytest.raises(StoragedError, match="has decided another layout"):
            await cluster.call(name, "cluster.accept", late, AcceptAnswer)


async def test_without_a_majority_of_the_system_partition_nothing_is_decided(cluster: Cluster) -> None:
    cluster.registers.away = 1000
    with pytest.raises(NoQuorum, match="no majority"):
        await cluster.gateway().apply(cluster.moving()[1])
    cluster.registers.away = 0
    assert not cluster.registers.values
    assert (await cluster.gateway().newest())[1]


async def test_a_register_that_others_change_all_the_time_is_no_majority_either(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*_more: Any) -> None:
        raise SlowDown("Other changes of this key took too long.")

    monkeypatch.setattr(cluster.paths, "replace", slow)
    with pytest.raises(NoQuorum, match="took too long"):
        await cluster.gateway().apply(cluster.moving()[1])


async def test_a_layout_that_breaks_a_rule_is_refused_before_it_is_decided(cluster: Cluster) -> None:
    for facts, said in (
        ({"base": 0}, "placed them"),
        ({"epoch": 150}, "multiples"),
        ({"profile": "9+1"}, "can't work"),
    ):
        with pytest.raises(LayoutRefused, match=said):
            await cluster.gateway().apply(cluster.moving(**facts)[1])
    with pytest.raises(LayoutRefused, match="never in force here"):
        await cluster.gateway().apply(cluster.moving(predecessor=bytes(32))[1])
    assert cluster.register == cluster.history.signed[0]


async def test_a_node_that_is_behind_accepts_once_it_has_caught_up(cluster: Cluster) -> None:
    await cluster.gateway().apply(cluster.moving()[1])
    cluster.history.add(cluster.books["gw"].current, cluster.register)
    for name in ("n1", "gw2"):
        await cluster.books[name].learn(cluster.register, "a peer")
    _, signed = cluster.moving("n5")
    applying = asyncio.create_task(cluster.gateway().apply(signed))
    await until(lambda: cluster.register.payload == signed.payload)
    await asyncio.sleep(0.05)
    assert not applying.done(), "n2 and n3 do not know layout 100"
    await cluster.books["n2"].learn(cluster.books["gw"].signed(100), "a peer")
    assert (await applying)["accepted"] == ["n1", "n2"]


async def test_a_node_that_accepted_one_layout_accepts_no_other_whatever_the_register_holds(cluster: Cluster) -> None:
    """A gateway that lies changes the register."""
    first, second = cluster.moving("n4")[1], cluster.moving("n5")[1]
    await cluster.paths.write("layout", encode(first))
    await cluster.call("n1", "cluster.accept", first, AcceptAnswer)
    await cluster.paths.write("layout", encode(second))
    for _ in range(2):
        with pytest.raises(StoragedError, match="n1 has accepted another layout 100"):
            await cluster.call("n1", "cluster.accept", second, AcceptAnswer)
        cluster.boot("n1")
    await cluster.paths.write("layout", encode(first))
    assert (await cluster.call("n1", "cluster.accept", first, AcceptAnswer))[0].acceptance
    (cluster.files["n1"].directory / PROMISE_FILE).write_bytes(b"\xc1")
    with pytest.raises(StoragedError, match="does not decode"):
        await cluster.call("n1", "cluster.accept", first, AcceptAnswer)


async def test_an_acceptance_that_can_not_be_noted_is_not_given(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, signed = cluster.moving()
    await cluster.paths.write("layout", encode(signed))

    def full(_path: Path, _content: bytes) -> None:
        raise OSError("no space")

    monkeypatch.setattr("storaged.node.accepting.replace_file", full)
    with pytest.raises(DiskUnusable, match="n1 can't note what it accepts"):
        await cluster.call("n1", "cluster.accept", signed, AcceptAnswer)


async def test_a_node_accepts_nothing_that_was_not_decided(cluster: Cluster) -> None:
    _, signed = cluster.moving()
    for name in NODES:
        with pytest.raises(StoragedError, match="has decided another layout"):
            await cluster.call(name, "cluster.accept", signed, AcceptAnswer)
    await cluster.paths.write("layout", encode(signed))
    with pytest.raises(StoragedError, match="n4 has no seed disk by layout 1"):
        await cluster.call("n4", "cluster.accept", signed, AcceptAnswer)


async def test_acceptances_of_others_do_not_count(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, signed = cluster.moving()
    answer = AcceptAnswer(accept(NodeSigner(cluster.history.identity("n1")), signed, layout))

    async def lie(_node: str, *_more: Any, **_options: Any) -> tuple[AcceptAnswer, memoryview]:
        return answer, memoryview(b"")

    monkeypatch.setattr(cluster, "call", lie)
    with pytest.raises(LayoutNotAccepted, match=r"n2 \(it sent another node's acceptance\)"):
        await cluster.gateway(collect_s=0.2).apply(signed)


async def test_the_exchange_of_a_seed_ends_when_the_new_replica_has_everything(cluster: Cluster) -> None:
    before = cluster.history.layouts[0]
    wanted = replace(before, disks=tuple(disk for disk in before.disks if disk.id != "d3a"))
    joint, settled = cluster.history.exchange("d3a", wanted)
    first = cluster.history.move(joint, ())
    assert (await cluster.gateway().apply(first))["epoch"] == 100
    await cluster.spread()
    second = cluster.history.sign(cluster.history.after(settled))
    with pytest.raises(LayoutNotAccepted, match="ends the exchange of a seed disk too early"):
        await cluster.gateway(collect_s=0.2).apply(second)

    async def whole(_layout: Layout) -> str:
        return ""

    for acceptor in cluster.acceptors.values():
        acceptor.may_settle = whole
    await cluster.gateway().apply(second)
    assert cluster.books["gw"].current.seeds == ("d1a", "d2a", "d3b")


async def certified(cluster: Cluster, seed: int) -> set[bytes]:
    """Which rivals get a certificate while a lying gateway writes the register as it likes, and nodes restart."""
    draw = random.Random(seed)
    rivals = [cluster.moving(name)[1] for name in ("n4", "n5")]
    given: dict[bytes, set[str]] = {rival.payload: set() for rival in rivals}
    for _ in range(24):
        node = draw.choice(NODES)
        match draw.randrange(5):
            case 0:
                cluster.boot(node)
            case 1 | 2:
                await cluster.paths.write("layout", encode(draw.choice(rivals)))
            case _:
                rival = draw.choice(rivals)
                with contextlib.suppress(StoragedError):
                    await cluster.call(node, "cluster.accept", rival, AcceptAnswer)
                    given[rival.payload].add(node)
    return {
        payload
        for payload, nodes in given.items()
        if is_enough(cluster.history.layouts[0], decode(payload, Layout), nodes)
    }


async def test_no_two_layouts_get_a_certificate_whatever_the_register_holds(tmp_path: Path) -> None:
    found = [await certified(Cluster(tmp_path / str(seed)), seed) for seed in range(12)]
    assert all(len(each) <= 1 for each in found)
    assert any(found)


async def test_nodes_that_forget_what_they_accepted_would_certify_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: so the test above can find it."""
    monkeypatch.setattr(LayoutAcceptor, "_load", lambda _self: None)
    assert any([len(await certified(Cluster(tmp_path / str(seed)), seed)) > 1 for seed in range(12)])


async def test_a_disk_that_answers_is_not_called_lost(cluster: Cluster) -> None:
    """It could be of a quorum that nobody else knows."""
    wider = with_nodes(cluster.history.layouts[0], "n4")
    without = tuple(disk for disk in wider.disks if disk.id != "d3b")
    layout = cluster.history.after(replace(wider, disks=without), lost=("d3b",))
    signed, up = cluster.history.sign(layout), {"d3b"}
    authority, own = cluster.history.world.authority, cluster.history.identity("gw")
    gateway = LayoutApplication(
        own, authority.certificate, cluster.books["gw"], cluster.paths, cluster, answers=up.__contains__
    )
    with pytest.raises(RecoverRefused, match="calls disk d3b lost for good, and it answers"):
        await gateway.apply(signed)
    assert b"layout" not in cluster.registers.values
    up.clear()
    assert (await gateway.apply(signed))["epoch"] == 100
    assert cluster.books["gw"].current.lost == ("d3b",)
