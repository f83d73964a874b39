"""A change that is awaited and one that is made by callbacks send the same requests when they get the same answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.errors import PeerUnreachable
from storaged.meta import messages
from storaged.meta.client import RingClient
from storaged.meta.consensus.register import Verdict
from storaged.meta.names import ZERO_BALLOT, Ballot, Change, RegisterName, Table, Value, Visibility
from storaged.meta.ports import Outcome, SmallCopies
from storaged.wire import Buffer, encode
from tests.doubles.layouts import Places
from tests.patience import GUARD_S
from tests.worlds.ring_client import ring_client

DISKS = ("a", "b", "c")
NAME = RegisterName(Table.OBJECT, b"s" * 16, 0, b"key")
NOW_MS = 1_700_000_000_000
FOUND = Value(3, b"another's change", Visibility.LIVE, b"found")
COPIES = SmallCopies(b"D" * 16, [(b"header", [b"payload"])] * 3, lambda disks: len(disks) >= 2)


class Clock:
    def wall_ms(self) -> int:
        return NOW_MS

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


class Layouts(Places):
    def __init__(self) -> None:
        nodes = tuple(NodeEntry("n" + disk, f"FR/site/{disk}", "", ("storage",)) for disk in DISKS)
        self.current = Layout("test", 1, nodes, tuple(DiskEntry(disk, "n" + disk, 1) for disk in DISKS), DISKS)

    def at(self, epoch: int) -> Layout:
        return self.current


class Script:
    """Replicas that give the answers of a seed, whatever they are asked, and accept everything in the end."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._left = self._random.randrange(12)
        self.sent: list[tuple[str, bytes]] = []

    def replica(self, disk: str) -> Any:
        return self

    def _verdict(self, of: Sequence[Verdict]) -> Verdict | None:
        """None: no answer."""
        self._left -= 1
        chance = self._random.random()
        if self._left < 0 or chance < 0.5:
            return Verdict.OK
        return None if chance < 0.65 else self._random.choice(of)

    def _ballot(self) -> Ballot:
        return Ballot(1, NOW_MS * 1000 + self._random.randrange(50), "other", b"12345678")

    async def prepare(self, request: messages.Prepare, *, timeout_s: float) -> messages.PrepareReply:
        self.sent.append((request.disk, encode(request)))
        verdict = self._verdict((Verdict.PREEMPTED, Verdict.DAMAGED, Verdict.EPOCH))
        if verdict is None:
            raise PeerUnreachable("It is away.")
        if verdict is Verdict.OK and self._random.random() < 0.3:
            return messages.PrepareReply(verdict, request.ballot, Ballot(1, 5, "other", b"12345678"), FOUND)
        return messages.PrepareReply(verdict, request.ballot if verdict is Verdict.OK else self._ballot(), ZERO_BALLOT)

    async def accept(
        self, request: messages.Accept, body: Sequence[Buffer] = (), *, timeout_s: float
    ) -> messages.AcceptReply:
        self.sent.append((request.disk, encode(request)))
        verdict = self._verdict((Verdict.PREEMPTED, Verdict.HELD, Verdict.UNSTORED))
        if verdict is None:
            raise PeerUnreachable("It is away.")
        return messages.AcceptReply(verdict, self._ballot(), copy_synced=bool(request.header))


def update(value: Value | None) -> Change:
    return Change((value.body if value is not None else b"") + b"changed", payload=b"D" * 16)


def put(_value: Value | None) -> Change:
    return Change(b"put", payload=b"D" * 16)


async def played(seed: int, change: Callable[[RingClient], Any]) -> tuple[list[tuple[str, bytes]], str]:
    """What was sent, in order, and the outcome."""
    script = Script(seed)
    client = ring_client(Layouts(), script, node="g", clock=Clock(), entropy=bytes, jitter=lambda: 0.0, hedge_s=5.0)
    try:
        outcome: Any = await asyncio.wait_for(change(client), GUARD_S)
    except Exception as error:
        outcome = error
    sent = list(script.sent)
    await client.close()
    return sent, repr(outcome)


@pytest.mark.parametrize("regardless", [False, True])
@pytest.mark.parametrize("small", [None, COPIES])
async def test_both_ways_to_make_a_change_send_the_same(regardless: bool, small: SmallCopies | None) -> None:
    made = put if regardless else update

    async def awaited(client: RingClient) -> Outcome:
        return await client.change(NAME, made, small=small, regardless=regardless)

    async def called_back(client: RingClient) -> Outcome:
        told: asyncio.Future[Outcome | Exception] = asyncio.get_running_loop().create_future()
        assert client.try_change(NAME, made, told.set_result, small=small, regardless=regardless)
        outcome = await told
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    for seed in range(150):
        assert await played(seed, awaited) == await played(seed, called_back), f"seed {seed}"


class OneRefusesOneHangs:
    """Of three replicas one takes everything, one refuses the first accept or prepare, and one never answers."""

    def __init__(self, refuses: type[messages.Prepare] | type[messages.Accept]) -> None:
        self._refuses: type | None = refuses

    def replica(self, disk: str) -> Any:
        return self

    async def _verdict(self, request: messages.Prepare | messages.Accept, timeout_s: float) -> Verdict:
        if request.disk == "c":
            await asyncio.sleep(timeout_s)
            raise PeerUnreachable("It does not answer.")
        if request.disk == "b" and self._refuses is not None and type(request) is self._refuses:
            self._refuses = None
            return Verdict.PREEMPTED
        return Verdict.OK

    async def prepare(self, request: messages.Prepare, *, timeout_s: float) -> messages.PrepareReply:
        verdict = await self._verdict(request, timeout_s)
        promised = Ballot(1, request.ballot.counter + 5, "other", b"12345678")
        return messages.PrepareReply(verdict, request.ballot if verdict is Verdict.OK else promised, ZERO_BALLOT)

    async def accept(
        self, request: messages.Accept, body: Sequence[Buffer] = (), *, timeout_s: float
    ) -> messages.AcceptReply:
        verdict = await self._verdict(request, timeout_s)
        return messages.AcceptReply(verdict, Ballot(1, request.ballot.counter + 5, "other", b"12345678"))


@pytest.mark.parametrize("refuses", [messages.Prepare, messages.Accept])
async def test_a_replica_that_hangs_does_not_hold_up_a_change_that_another_one_has_refused(
    refuses: type[messages.Prepare] | type[messages.Accept],
) -> None:
    client = ring_client(Layouts(), OneRefusesOneHangs(refuses), node="me", clock=Clock(), jitter=lambda: 0.5)
    began = Clock().monotonic()
    for body in (b"first", b"second"):  # the second time the replica that hangs is asked last
        await client.change(NAME, lambda _value, body=body: Change(body))  # type: ignore[misc]
    took_s = Clock().monotonic() - began
    await client.close()
    assert took_s < 2.0, f"it took {took_s:.1f} s, and a call may take 5 s"
