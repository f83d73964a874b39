"""Ledgers that talk to each other without sockets: real certificates, signatures, files and messages."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from storaged.cluster.claims import ClaimsAnswer, ClaimsOffer, DiskClaim, NodeClaims, SignedClaims, state_claims
from storaged.cluster.identity import NodeSigner
from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.ports import Call, LedgerReport, PeerIdentity, Reply
from storaged.cluster.rpc import faults
from storaged.errors import ClaimRefused, DiskForeign, DiskRolledBack, PeerRefused, PeerUnreachable, StoragedError
from storaged.node import ledger_exchange
from storaged.node.ledger import LEDGER_FILE, Ledger
from storaged.node.ledger_exchange import LedgerExchange
from storaged.wire import Buffer, Message, decode, encode
from tests.doubles.layouts import KnownLayouts
from tests.worlds.authority import World, until

T = TypeVar("T", bound=Message)
STORE, OTHER_STORE = b"s" * 16, b"t" * 16


def claim(starts: int = 1, position: int = 0, disk: str = "d1", store: bytes = STORE) -> DiskClaim:
    return DiskClaim(disk, store, starts, position)


class Disks:
    """``ExchangePorts`` of one node."""

    def __init__(self) -> None:
        self.is_formed: bool | None = True
        self.now: dict[str, int] = {}
        self.outdated: dict[str, DiskForeign] = {}

    def formed(self) -> bool | None:
        return self.is_formed

    def positions(self) -> Mapping[str, int]:
        return self.now

    def on_outdated(self, disk_id: str, error: DiskForeign) -> None:
        assert disk_id not in self.outdated
        self.outdated[disk_id] = error


class Machines:
    """Nodes ``n1`` ... with a disk each (``d1`` is of ``n1``), their ledgers, and a wire between them."""

    def __init__(self, directory: Path, count: int = 3) -> None:
        self.world = World(directory)
        names = [f"n{number}" for number in range(1, count + 1)]
        nodes = tuple(NodeEntry(name, "FR/par1/a", "", ("storage",)) for name in names)
        disks = tuple(DiskEntry("d" + name[1:], name, 1) for name in names)
        self.layout = Layout("c1", 1, nodes, disks, ("d1", "d2", "d3"))
        self.own = {name: self.world.node(name) for name in names}
        self.away: set[str] = set()
        self.before_claims: set[str] = set()
        self.lies: dict[str, Callable[[ClaimsOffer], tuple[ClaimsAnswer, bytes]]] = {}
        self.refusals: list[tuple[str, StoragedError]] = []
        self.up: dict[str, LedgerExchange] = {}
        self.disks: dict[str, Disks] = {}
        for name in names:
            self.directory(name).mkdir()
            self.boot(name)

    def directory(self, name: str) -> Path:
        return self.world.directory / f"{name} ledger"

    def boot(self, name: str) -> LedgerExchange:
        """A new process, which does not talk yet."""
        self.disks[name] = Disks()
        self.up[name] = LedgerExchange(
            Ledger(self.directory(name)),
            self.own[name],
            self.world.authority.certificate,
            KnownLayouts(self.layout),
            self.disks[name],
            lambda peer, error: self.refusals.append((peer, error)),
        )
        return self.up[name]

    def formed(self) -> None:
        """All ledgers count."""
        for exchange in self.up.values():
            exchange.ledger.count_again(fresh=False)

    @asynccontextmanager
    async def talking(self, *names: str) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.up[name].run(Wire(self, name))) for name in names]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def ask(self, source: str, node: str, offer: ClaimsOffer) -> tuple[ClaimsAnswer, list[SignedClaims]]:
        answer, body = await Wire(self, source).call(node, "cluster.claims", offer, ClaimsAnswer)
        return answer, decode(bytes(body), list[SignedClaims]) if body else []

    def known(self, node: str, disk: str = "d1") -> DiskClaim | None:
        return self.up[node].ledger.claimed(disk).only


class Wire:
    """A ``Caller``: requests and answers are encoded, and go to the other node's handler."""

    def __init__(self, machines: Machines, name: str) -> None:
        self.machines = machines
        self.peer: PeerIdentity = machines.own[name].peer

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
        machines = self.machines
        await asyncio.sleep(0)
        if node in machines.away or self.peer.name in machines.away:
            raise PeerUnreachable(f"{node} is away")
        if node in machines.before_claims:
            raise faults.refused(faults.UNKNOWN_METHOD, f"{node} has no method {method!r}.")
        entry = machines.up[node].methods()[method]
        asked = decode(encode(request), entry.request)
        if node in machines.lies:
            assert isinstance(asked, ClaimsOffer)
            message, bulk = machines.lies[node](asked)
            return decode(encode(message), reply), memoryview(bulk)
        try:
            answer: Any = await entry.handler(asked, Call(self.peer, memoryview(b""), 0.0))
        except StoragedError as error:
            raise faults.as_peer_error(error, node) from None
        assert isinstance(answer, Reply)
        return decode(encode(answer.message), reply), memoryview(b"".join(bytes(piece) for piece in answer.body))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("AGAIN_S", 0.01), ("AGAIN_S_MAX", 0.02), ("CALL_EVERY_S", 0.001), ("RECHECK_S", 0.05)):
        monkeypatch.setattr(ledger_exchange, name, seconds)


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    found = Machines(tmp_path)
    found.formed()
    return found


async def test_a_start_is_at_a_majority_before_the_disk_may_answer_and_at_all_soon(machines: Machines) -> None:
    machines.away = {"n2", "n3"}
    async with machines.talking("n1"):
        publishing = asyncio.create_task(machines.up["n1"].publish(claim(starts=4, position=9)))
        await asyncio.sleep(0.05)
        assert not publishing.done()
        machines.away = {"n3"}
        await publishing
        assert machines.up["n1"].stored_by(claim(starts=4)) == ["n2"]
        assert Ledger(machines.directory("n2")).claimed("d1").only == claim(starts=4, position=9), "synced"
        machines.away = set()
        await until(lambda: machines.known("n3") == claim(starts=4, position=9))


async def test_positions_follow_and_reach_the_disks_of_the_ledgers_at_a_flush(machines: Machines) -> None:
    async with machines.talking("n1"):
        await machines.up["n1"].publish(claim())
        await until(lambda: machines.known("n2") == machines.known("n3") == claim())
        machines.disks["n1"].now = {"d1": 77}
        await machines.up["n1"].publish_positions()
        await until(lambda: machines.known("n2") == claim(position=77))
        assert Ledger(machines.directory("n2")).claimed("d1").only == claim()
        await machines.up["n2"].publish_positions()
        for name in ("n1", "n2"):
            assert Ledger(machines.directory(name)).claimed("d1").only == claim(position=77)


async def test_a_failure_is_remembered_by_all(machines: Machines) -> None:
    async with machines.talking("n1"):
        await machines.up["n1"].publish(claim())
        machines.up["n1"].ledger.note_failed("d1", "meta", "EIO")
        await machines.up["n1"].publish_positions()
        await until(lambda: machines.known("n2") == DiskClaim("d1", STORE, 1, 0, failed=True))


async def test_a_lost_ledger_counts_again_when_both_others_were_read(machines: Machines) -> None:
    async with machines.talking("n1"):
        await machines.up["n1"].publish(claim(starts=3))
        await until(lambda: machines.known("n3") is not None)
    (machines.directory("n1") / LEDGER_FILE).unlink()
    again = machines.boot("n1")
    assert machines.known("n1") is None
    machines.away = {"n3"}
    async with machines.talking("n1"):
        await until(lambda: machines.known("n1") is not None)
        await asyncio.sleep(0.05)
        assert (again.ledger.whole, again.view().enough) == (False, False)
        machines.away = set()
        await until(lambda: Ledger(machines.directory("n1")).whole)
    assert Ledger(machines.directory("n1")).claimed("d1").only == claim(starts=3)


async def test_all_ledgers_are_lost_and_count_again_when_all_nodes_are_there(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    machines.away = {"n3"}
    async with machines.talking("n1", "n2", "n3"):
        await asyncio.sleep(0.05)
        assert not any(exchange.ledger.whole for exchange in machines.up.values())
        machines.away = set()
        await until(lambda: all(exchange.view().enough for exchange in machines.up.values()))


async def test_a_machine_that_was_put_back_is_noticed_at_its_start_or_when_one_returns_that_knows(
    machines: Machines,
) -> None:
    machines.away = {"n3"}
    async with machines.talking("n1"):
        await machines.up["n1"].publish(claim(starts=4))
        shutil.copytree(machines.directory("n1"), machines.directory("n1").with_name("snapshot"))
    machines.boot("n1")
    async with machines.talking("n1"):
        await machines.up["n1"].publish(claim(starts=5, position=7))
    shutil.rmtree(machines.directory("n1"))
    machines.directory("n1").with_name("snapshot").rename(machines.directory("n1"))
    machines.away = {"n2"}  # n3 has never heard of it
    machines.boot("n1")
    async with machines.talking("n1"):
        await machines.up["n1"].publish(claim(starts=5))
        assert machines.disks["n1"].outdated == {}
        machines.away = set()
        await until(lambda: bool(machines.disks["n1"].outdated))
    error = machines.disks["n1"].outdated["d1"]
    assert isinstance(error, DiskRolledBack)
    assert "position 7" in error.message
    machines.boot("n1")
    async with machines.talking("n1"):
        await machines.up["n1"].heard_first()
        assert machines.known("n1") == claim(starts=5, position=7), "the next start knows"


async def test_a_disk_whose_other_store_is_known_elsewhere_does_not_begin(machines: Machines) -> None:
    async with machines.talking("n1"):
        await machines.up["n1"].publish(claim(starts=4))
        await until(lambda: machines.known("n3") is not None)
    (machines.directory("n1") / LEDGER_FILE).unlink()
    machines.boot("n1").ledger.count_again(fresh=False)
    async with machines.talking("n1"):
        with pytest.raises(DiskForeign, match="the ledgers know"):
            await machines.up["n1"].publish(claim(store=OTHER_STORE))


# --- forged, and garbage


async def test_a_node_offers_its_own_statements_alone(machines: Machines) -> None:
    signer = NodeSigner(machines.own["n1"])
    stolen = state_claims(signer, "c1", "n1", [claim(starts=9)])
    with pytest.raises(PeerRefused) as refused:
        await machines.ask("n2", "n3", ClaimsOffer(stolen))
    assert refused.value.remote_code == ClaimRefused.code
    forged = [
        state_claims(NodeSigner(machines.own["n2"]), "c1", "n1", [claim(starts=9)]),
        state_claims(NodeSigner(machines.own["n2"]), "c1", "n2", [claim(starts=9)]),
        state_claims(NodeSigner(machines.own["n2"]), "c9", "n2", [claim(starts=9, disk="d2")]),
        SignedClaims(b"", b"", b""),
        SignedClaims(b"\xff" * 300_000, b"", b""),
    ]
    for statement in forged:
        with pytest.raises(PeerRefused) as refused:
            await machines.ask("n2", "n3", ClaimsOffer(statement))
        assert refused.value.remote_code == ClaimRefused.code
    assert {peer for peer, _error in machines.refusals} == {"n2"}
    assert len(machines.refusals) == len(forged) + 1
    assert machines.known("n3") is machines.known("n3", "d2") is None
    assert machines.up["n3"].ledger.statements() == ()


async def test_an_older_statement_of_the_node_itself_is_not_stored_and_answered_with_the_newer(
    machines: Machines,
) -> None:
    signer = NodeSigner(machines.own["n1"])
    newer = state_claims(signer, "c1", "n1", [claim(starts=9)])
    assert (await machines.ask("n1", "n3", ClaimsOffer(newer)))[0].stored
    for older in (claim(starts=8), claim(starts=9, store=OTHER_STORE)):
        answer, held = await machines.ask("n1", "n3", ClaimsOffer(state_claims(signer, "c1", "n1", [older])))
        assert (answer.stored, held) == (False, [newer])
    assert machines.known("n3") == claim(starts=9)


@pytest.mark.parametrize("kind", ["garbage", "forged", "huge", "no id"])
async def test_a_node_that_answers_falsely_neither_silences_a_disk_nor_fills_a_ledger(
    machines: Machines, kind: str
) -> None:
    liar = NodeSigner(machines.own["n3"])
    forged = [
        state_claims(liar, "c1", "n1", [claim(starts=99)]),
        state_claims(liar, "c1", "n3", [claim(starts=99)]),
        SignedClaims(b"x", b"y", b"z"),
    ] * (1 if kind == "forged" else 2000)
    body = {"garbage": b"\xc1 garbage", "forged": encode(forged), "huge": encode(forged), "no id": encode(forged)}[kind]
    report = LedgerReport(b"" if kind == "no id" else b"3" * 16, True, b"", True)
    machines.lies["n3"] = lambda _offer: (ClaimsAnswer(report, True), body)
    async with machines.talking("n1"):
        await machines.up["n1"].publish(claim())
        await asyncio.sleep(0.2)
    assert machines.disks["n1"].outdated == {}
    assert len(machines.up["n1"].ledger.statements()) == 1
    assert (machines.up["n1"].view().others["n3"] is None) == (kind == "no id")


async def test_a_node_that_has_not_looked_at_its_disks_does_not_say_that_the_cluster_is_new(
    machines: Machines,
) -> None:
    machines.disks["n2"].is_formed = None
    with pytest.raises(StoragedError, match="does not know yet"):
        await machines.ask("n1", "n2", ClaimsOffer(None, True))


async def test_a_node_that_sends_many_statements_takes_one_thread(machines: Machines) -> None:
    ledger = machines.up["n3"].ledger
    keep, at_once, most = ledger.keep, 0, 0

    def counted(statement: SignedClaims, claims: NodeClaims) -> bool:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        at_once -= 1
        return keep(statement, claims)

    ledger.keep = counted  # type: ignore[method-assign]
    signer = NodeSigner(machines.own["n2"])
    statements = [state_claims(signer, "c1", "n2", [claim(starts=number, disk="d2")]) for number in range(1, 21)]
    await asyncio.gather(*(machines.ask("n2", "n3", ClaimsOffer(statement)) for statement in statements))
    assert most == 1


# --- versions


async def test_nodes_are_restarted_one_after_the_other_from_a_version_without_claims(machines: Machines) -> None:
    machines.before_claims = {"n2", "n3"}
    async with machines.talking("n1"):
        await machines.up["n1"].publish(claim(starts=8))
        machines.before_claims = {"n3"}
        assert [machines.known(node) for node in ("n2", "n3")] == [None, None]
        machines.up["n1"].on_node("n2", True, b"a new process")
        await until(lambda: machines.known("n2") == claim(starts=8))
        assert machines.known("n3") is None


# --- layouts that name other nodes and disks


def grown(machines: Machines, *more: str) -> Layout:
    """The layout with further nodes, each with a disk; ``machines`` must have made their ledgers."""
    nodes = tuple(NodeEntry(name, "FR/par1/a", "", ("storage",)) for name in more)
    disks = tuple(DiskEntry("d" + name[1:], name, 1) for name in more)
    layout = machines.layout
    return replace(layout, epoch=100, base=1, nodes=layout.nodes + nodes, disks=layout.disks + disks)


def use(machines: Machines, layout: Layout, *names: str) -> None:
    for name in names:
        exchange = machines.up[name]
        assert isinstance(exchange._layouts, KnownLayouts)
        exchange._layouts.learn(layout)
        exchange.follow(layout)


async def test_a_node_that_a_layout_adds_rebuilds_its_ledger_and_counts(tmp_path: Path) -> None:
    machines = Machines(tmp_path, 4)
    three = replace(machines.layout, nodes=machines.layout.nodes[:3], disks=machines.layout.disks[:3])
    for name in ("n1", "n2", "n3", "n4"):
        machines.up[name]._layouts = KnownLayouts(three)
        machines.up[name].follow(three)
        if name != "n4":
            machines.up[name].ledger.count_again(fresh=False)
    machines.layout = three
    async with machines.talking("n1", "n2", "n3"):
        await machines.up["n1"].publish(claim())
        await until(lambda: machines.known("n3") is not None)
        four = grown(machines, "n4")
        use(machines, four, "n1", "n2", "n3", "n4")
        assert machines.up["n1"].view().majority == 3
        async with machines.talking("n4"):
            await until(lambda: machines.up["n4"].ledger.whole and machines.known("n4") == claim())
            await machines.up["n4"].publish(claim(disk="d4", store=OTHER_STORE))
            await until(lambda: all(machines.known(name, "d4") is not None for name in ("n1", "n2", "n3")))
    assert not machines.refusals


async def test_a_node_that_a_layout_removes_counts_no_more_and_its_disks_stay_claimed(tmp_path: Path) -> None:
    machines = Machines(tmp_path, 4)
    machines.formed()
    async with machines.talking("n1", "n2", "n3", "n4"):
        await machines.up["n4"].publish(claim(disk="d4"))
        await until(lambda: all(machines.known(name, "d4") is not None for name in ("n1", "n2", "n3")))
        layout = machines.layout
        three = replace(layout, epoch=100, base=1, nodes=layout.nodes[:3], disks=layout.disks[:3])
        use(machines, three, "n1", "n2", "n3")
        assert set(machines.up["n1"].view().others) == {"n2", "n3"}
        machines.away.add("n4")
        (machines.directory("n3") / LEDGER_FILE).unlink()
    machines.boot("n3")
    use(machines, three, "n3")
    async with machines.talking("n1", "n2", "n3"):
        await until(lambda: machines.known("n3", "d4") == claim(disk="d4"))
    assert not machines.refusals


async def test_what_an_earlier_owner_says_of_a_disk_that_another_node_has_now_is_refused(tmp_path: Path) -> None:
    machines = Machines(tmp_path, 3)
    machines.formed()
    moved = tuple(replace(disk, node="n2") if disk.id == "d1" else disk for disk in machines.layout.disks)
    use(machines, replace(machines.layout, epoch=100, base=1, disks=moved), "n2", "n3")
    signed = state_claims(NodeSigner(machines.own["n1"]), "c1", "n1", [claim()])
    with pytest.raises(StoragedError, match="does not give it disk 'd1'"):
        await machines.ask("n1", "n2", ClaimsOffer(signed))


async def test_a_disk_that_a_layout_drops_is_claimed_while_it_answers_for_partitions_that_move(
    machines: Machines,
) -> None:
    """Without this nobody remembers what it promised since then, and one that was put back would answer."""
    layout = machines.layout
    disks = tuple(disk if disk.id != "d1" else DiskEntry("d9", "n1", 1) for disk in layout.disks)
    dropped = replace(layout, epoch=100, base=1, disks=disks, seeds=("d9", "d2", "d3"))
    async with machines.talking("n1", "n2", "n3"):
        await machines.up["n1"].publish(claim())
        use(machines, dropped, "n1", "n2", "n3")
        machines.disks["n1"].now = {"d1": 7}
        await machines.up["n1"].publish_positions()
        await until(lambda: all(machines.known(name) == claim(position=7) for name in ("n2", "n3")))
    machines.boot("n1")
    use(machines, dropped, "n1")
    async with machines.talking("n1", "n2", "n3"):
        await machines.up["n1"].publish(claim(starts=2, position=7))
        await until(lambda: all(machines.known(name) == claim(starts=2, position=7) for name in ("n2", "n3")))
        with pytest.raises(DiskRolledBack):
            await machines.up["n1"].publish(claim(position=3))
    assert not machines.refusals


async def test_a_node_that_was_removed_opens_its_disks_without_the_others(machines: Machines) -> None:
    layout = machines.layout
    use(machines, replace(layout, epoch=100, base=1, nodes=layout.nodes[1:], disks=layout.disks[1:]), "n1")
    await machines.up["n1"].publish(claim())
    assert machines.known("n1") == claim()


async def test_ledgers_of_nodes_whose_disks_are_all_lost_do_not_count(tmp_path: Path) -> None:
    machines = Machines(tmp_path, 4)
    machines.formed()
    lost = replace(machines.layout, epoch=100, base=1, lost=("d1", "d2"))
    use(machines, lost, "n3", "n4")
    assert machines.up["n3"].view().majority == 2, "n1 and n2 are named still, with disks that give up what they have"
    machines.away.update(("n1", "n2"))
    async with machines.talking("n3", "n4"):
        await machines.up["n3"].publish(claim(disk="d3"))
        assert machines.known("n4", "d3") == claim(disk="d3")


async def test_no_ledger_helps_a_lost_disk_to_take_part_again(machines: Machines) -> None:
    """Its node does not know yet that it is lost."""
    use(machines, replace(machines.layout, epoch=100, base=1, lost=("d1",)), "n2", "n3")
    async with machines.talking("n1", "n2", "n3"):
        publishing = asyncio.create_task(machines.up["n1"].publish(claim()))
        await until(lambda: len(machines.refusals) >= 2)
        assert not publishing.done()
        publishing.cancel()
    assert all("claims disk d1, which is lost for good" in error.message for _, error in machines.refusals)
    use(machines, replace(machines.layout, epoch=100, base=1, lost=("d1",)), "n1")
    assert machines.up["n1"]._state({}) is None, "its node claims it no more"
