"""Accepts of one turn of the loop in one message: what is sent, what the node does with it, and what becomes of what
can't be begun at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from storaged.cluster.ports import Call, EncodedCall, OnReply, PeerIdentity
from storaged.cluster.rpc.faults import to_head
from storaged.errors import DiskUnusable, InvalidRequest, PeerRefused, PeerTimeout, PeerUnreachable, SlowDown
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.register import Verdict
from storaged.meta.messages import Accept, AcceptReply, Accepts, AcceptsReply, Create, Prepare
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage.small_copies import PlainCopies
from storaged.meta.transport import accept_batching as accepts_module
from storaged.meta.transport.accept_batching import (
    ACCEPTS_MAX,
    ALONE_MAX,
    ENCODED_BYTES_MAX,
    JOINED_COPY_BYTES_MAX,
    TOGETHER_MAX,
    AcceptBatcher,
)
from storaged.meta.transport.replicas import RemoteReplica, ReplicaHost
from storaged.units import MIB
from storaged.wire import Buffer, Message, decode, encode
from tests.doubles.meta_store import MemoryMetaStore

pytestmark = pytest.mark.virtual_time

SCOPE = b"s" * 16
FIRST = encode(Accept("", RegisterName(Table.OBJECT, SCOPE, 0, b"k"), Ballot(1, 1, "", b""), Value(1, b"", 2, b"")))[:1]


def name_of(number: int) -> RegisterName:
    return RegisterName(Table.OBJECT, SCOPE, 3, b"key %d" % number)


def ballot(counter: int) -> Ballot:
    return Ballot(1, counter, "gw", b"incarnat")


def value(body: bytes = b"v", payload: bytes = b"") -> Value:
    return Value(1, b"o" * 16, Visibility.LIVE, body, payload)


def tail_of(request: Accept | Prepare) -> bytes:
    return encode(request)[2:]


# --- who asks


class Wire:
    """A ``cluster.ports.TryCaller`` that keeps what it is given to send. ``full``: it takes nothing."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes, bytes, OnReply]] = []
        self.full = False
        self.timeouts: list[float] = []

    async def call(self, *_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("a try_call is enough")

    def try_call(self, *_arguments: Any, **_options: Any) -> bool:
        raise AssertionError("it is encoded already")

    def encoded_call(
        self,
        _node: str,
        method: str,
        _reply: type[Message],
        start: bytes,
        *,
        urgent: bool = False,
        followed: bool = False,
    ) -> EncodedCall:
        def try_call(rest: bytes, then: OnReply, body: Sequence[Buffer], timeout_s: float) -> bool:
            self.timeouts.append(timeout_s)
            if not self.full:
                self.sent.append((method, start + rest, b"".join(body), then))
            return not self.full

        return try_call


class Asking:
    def __init__(self) -> None:
        self.wire = Wire()
        accepts = AcceptBatcher(self.wire, "n")
        self.replicas = {disk: RemoteReplica(self.wire, "n", disk, accepts=accepts) for disk in ("d0", "d1")}
        self.heard: dict[int, list[Any]] = {}

    def ask(self, number: int, disk: str = "d0", kind: type[Accept] = Accept, copy: bytes = b"") -> bool:
        request = kind("", name_of(number), ballot(number + 1), value(b"%d" % number), header=b"h" if copy else b"")
        told = self.heard.setdefault(number, [])
        body = [copy[:2], copy[2:]] if copy else []
        return self.replicas[disk].try_call_encoded(
            kind, FIRST, tail_of(request), lambda answer, _bulk: told.append(answer), body, 1.0
        )

    def fill(self) -> int:
        """So many are on their way, each by itself."""
        for number in range(1000, 1000 + ALONE_MAX + 1):
            assert self.ask(number)
        count = len(self.wire.sent)
        assert {method for method, *_ in self.wire.sent} == {"meta.accept"}
        self.wire.sent.clear()
        return count


async def turn() -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_one_that_has_no_company_leaves_at_once_by_itself() -> None:
    asking = Asking()
    asking.ask(1, kind=Create, copy=b"copy")
    [(method, head, body, then)] = asking.wire.sent
    assert method == "meta.create"
    assert decode(head, Create) == Create("d0", name_of(1), ballot(2), value(b"1"), header=b"h")
    assert body == b"copy"
    then(AcceptReply(0), memoryview(b""))
    assert asking.heard[1] == [AcceptReply(0)]


async def test_those_of_a_turn_travel_together_and_each_is_told_its_own() -> None:
    asking = Asking()
    asking.fill()
    asking.ask(1, "d0", Create, b"one copy")
    asking.ask(2, "d1")
    asking.ask(3, "d1", Create, b"another")
    assert not asking.wire.sent
    await turn()
    [(method, head, body, then)] = asking.wire.sent
    assert method == "meta.accepts"
    assert decode(head, Accepts) == Accepts(
        [
            Accept("d0", name_of(1), ballot(2), value(b"1"), header=b"h"),
            Accept("d1", name_of(2), ballot(3), value(b"2")),
            Accept("d1", name_of(3), ballot(4), value(b"3"), header=b"h"),
        ],
        [8, 0, 7],
        [True, False, True],
    )
    assert body == b"one copyanother"
    replies = [AcceptReply(0, copy_synced=True), AcceptReply(1), AcceptReply(7)]
    then(AcceptsReply([*replies], {}), memoryview(b""))
    assert [asking.heard[number] for number in (1, 2, 3)] == [[reply] for reply in replies]


async def test_the_first_of_a_long_turn_leave_before_it_ends() -> None:
    asking = Asking()
    asking.fill()
    for number in range(2 * TOGETHER_MAX + 1):
        asking.ask(number)
    assert [len(decode(head, Accepts).accepts) for _method, head, _body, _then in asking.wire.sent] == [
        TOGETHER_MAX
    ] * 2
    await turn()
    assert [len(decode(head, Accepts).accepts) for _method, head, _body, _then in asking.wire.sent] == [
        TOGETHER_MAX
    ] * 2 + [1]


async def test_a_large_copy_goes_by_itself_and_is_not_joined_with_others() -> None:
    asking = Asking()
    asking.fill()
    asking.ask(1, copy=bytes(JOINED_COPY_BYTES_MAX))
    asking.ask(2, copy=bytes(JOINED_COPY_BYTES_MAX + 1))
    [(method, head, body, _then)] = asking.wire.sent
    assert (method, decode(head, Accept).name, len(body)) == ("meta.accept", name_of(2), JOINED_COPY_BYTES_MAX + 1)
    await turn()
    assert [(method, len(body)) for method, _head, body, _then in asking.wire.sent[1:]] == [
        ("meta.accepts", JOINED_COPY_BYTES_MAX)
    ]


async def test_prepares_go_by_themselves() -> None:
    asking = Asking()
    asking.fill()
    prepare = Prepare("", name_of(1), ballot(1))
    assert asking.replicas["d0"].try_call_encoded(
        Prepare, encode(prepare)[:1], tail_of(prepare), lambda *_: None, (), 1.0
    )
    assert [method for method, *_ in asking.wire.sent] == ["meta.prepare"]


async def test_when_what_was_out_has_been_answered_the_next_is_alone_again() -> None:
    asking = Asking()
    for number in range(ALONE_MAX + 1):
        asking.ask(number)
    for _method, _head, _body, then in asking.wire.sent:
        then(AcceptReply(0), memoryview(b""))
    asking.wire.sent.clear()
    asking.ask(100)
    assert [method for method, *_ in asking.wire.sent] == ["meta.accept"]


async def test_what_was_not_begun_is_asked_again_by_itself() -> None:
    asking = Asking()
    asking.fill()
    asking.ask(1, "d0", Create, b"copy")
    asking.ask(2, "d1")
    await turn()
    [(_method, _head, _body, then)] = asking.wire.sent
    asking.wire.sent.clear()
    then(AcceptsReply([None, AcceptReply(0)], {}), memoryview(b""))
    assert asking.heard[2] == [AcceptReply(0)]
    assert not asking.heard[1]
    [(method, head, body, then)] = asking.wire.sent
    assert (method, body) == ("meta.create", b"copy")
    assert decode(head, Create).name == name_of(1)
    then(PeerTimeout("late"), memoryview(b""))
    assert isinstance(asking.heard[1][0], PeerTimeout)


@pytest.mark.parametrize("again", [False, True])
async def test_without_a_connection_everybody_is_told(again: bool) -> None:
    asking = Asking()
    asking.fill()
    asking.ask(1)
    asking.ask(2)
    if again:
        await turn()
        asking.wire.full = True
        asking.wire.sent[0][3](AcceptsReply([None, None], {}), memoryview(b""))
    else:
        asking.wire.full = True
        await turn()
    assert all(isinstance(asking.heard[number][0], PeerUnreachable) for number in (1, 2))


async def test_one_alone_that_would_have_to_wait_is_left_to_a_task() -> None:
    asking = Asking()
    asking.wire.full = True
    assert not asking.ask(1)
    asking.wire.full = False
    assert asking.fill() == ALONE_MAX + 1, "what was not sent is not on its way"


async def test_an_answer_that_does_not_fit_is_an_error_to_everybody() -> None:
    asking = Asking()
    asking.fill()
    asking.ask(1)
    asking.ask(2)
    await turn()
    asking.wire.sent[0][3](AcceptsReply([AcceptReply(0)], {}), memoryview(b""))
    assert all(isinstance(asking.heard[number][0], PeerRefused) for number in (1, 2))


async def test_an_error_of_one_is_told_to_that_one_and_nothing_is_sent_again() -> None:
    asking = Asking()
    asking.fill()
    asking.ask(1)
    asking.ask(2)
    await turn()
    then = asking.wire.sent[0][3]
    asking.wire.sent.clear()
    then(AcceptsReply([None, AcceptReply(0)], {0: to_head(DiskUnusable("broken"))}), memoryview(b""))
    assert isinstance(asking.heard[1][0], DiskUnusable)
    assert asking.heard[2] == [AcceptReply(0)]
    assert not asking.wire.sent


async def test_a_mistake_of_one_who_asked_is_not_the_others() -> None:
    asking = Asking()
    asking.fill()

    class Mistaken(list[Any]):
        def append(self, _answer: Any) -> None:
            raise RuntimeError

    asking.heard[1] = Mistaken()
    asking.ask(1)
    asking.ask(2)
    await turn()
    asking.wire.sent[0][3](AcceptsReply([AcceptReply(0), AcceptReply(1)], {}), memoryview(b""))
    assert asking.heard[2] == [AcceptReply(1)]


async def test_a_message_waits_as_long_as_the_most_patient_of_those_in_it() -> None:
    asking = Asking()
    asking.fill()
    for number, timeout_s in ((1, 0.001), (2, 5.0), (3, 1.0)):
        request = Accept("", name_of(number), ballot(1), value())
        assert asking.replicas["d0"].try_call_encoded(Accept, FIRST, tail_of(request), lambda *_: None, (), timeout_s)
    await turn()
    assert asking.wire.timeouts[-1] == 5.0


async def test_a_message_does_not_grow_beyond_a_frame_and_a_large_request_goes_by_itself() -> None:
    asking = Asking()
    asking.fill()
    most = Value(1, b"o" * 16, Visibility.LIVE, bytes(ENCODED_BYTES_MAX - 1024))
    for number in range(TOGETHER_MAX + 1):
        request = Accept("", name_of(number), ballot(1), most)
        assert asking.replicas["d0"].try_call_encoded(Accept, FIRST, tail_of(request), lambda *_: None, (), 1.0)
    large = Accept("", name_of(99), ballot(1), Value(1, b"o" * 16, Visibility.LIVE, bytes(ENCODED_BYTES_MAX)))
    assert asking.replicas["d0"].try_call_encoded(Accept, FIRST, tail_of(large), lambda *_: None, (), 1.0)
    await turn()
    told = [
        (method, len(decode(bytes(head), Accepts).accepts) if method == "meta.accepts" else 1)
        for method, head, _body, _then in asking.wire.sent
    ]
    assert sorted(told) == [("meta.accept", 1), ("meta.accepts", 1), ("meta.accepts", 16)]
    assert all(len(head) <= MIB for _method, head, _body, _then in asking.wire.sent)


# --- who answers


class Host:
    """Two disks of one node, whose syncs wait for ``gates``."""

    def __init__(self) -> None:
        self.gates = {disk: asyncio.Event() for disk in ("d0", "d1")}
        self.kept: dict[str, dict[bytes, bytes]] = {disk: {} for disk in self.gates}
        self.stores = {disk: MemoryMetaStore(sync=gate.wait) for disk, gate in self.gates.items()}
        self.replicas = {
            disk: LocalReplica(disk, store, copies=self._copies(disk)) for disk, store in self.stores.items()
        }
        self.method = ReplicaHost(self.replicas, lambda: 1_000).methods()["meta.accepts"]
        self.answers: list[Any] = []

    def _copies(self, disk: str) -> PlainCopies:
        async def keep(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
            self.kept[disk][header] = b"".join(bytes(piece) for piece in body)

        async def load(_data_id: bytes) -> None:
            return None

        return PlainCopies(self.stores[disk], keep, load)

    async def ready(self) -> None:
        """High-water ballots are on disk."""
        for disk, replica in self.replicas.items():
            self.gates[disk].set()
            await replica.prepare(Prepare(disk, name_of(999), ballot(1)))
            self.gates[disk].clear()

    def begin(self, accepts: list[Accept], copies: Sequence[bytes] = (), creates: Sequence[bool] = ()) -> None:
        sizes = [len(copy) for copy in copies] or [0] * len(accepts)
        request = Accepts(accepts, sizes, list(creates) or [False] * len(accepts))
        call = Call(PeerIdentity("gw", "FR", "s", "r", ("gateway",)), memoryview(b"".join(copies)), 0.0)
        assert self.method.try_start is not None
        assert self.method.try_start(decode(encode(request), Accepts), call, self.answers.append)

    async def verdicts(self) -> list[int | None]:
        for _ in range(20):
            await asyncio.sleep(0)
        [answer] = self.answers
        assert isinstance(answer, AcceptsReply)
        return [None if reply is None else reply.verdict for reply in answer.replies]


async def test_it_is_answered_when_all_of_it_is_on_disk() -> None:
    host = Host()
    await host.ready()
    copies = [b"copy one", b"", b"copy three"]
    host.begin(
        [
            Accept("d0", name_of(1), ballot(2), value(payload=b"D" * 16), header=b"h1"),
            Accept("d0", name_of(2), ballot(2), value()),
            Accept("d1", name_of(3), ballot(2), value(payload=b"E" * 16), header=b"h3"),
        ],
        copies,
    )
    host.gates["d0"].set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not host.answers
    host.gates["d1"].set()
    assert await host.verdicts() == [0, 0, 0]
    assert [reply.copy_synced for reply in host.answers[0].replies] == [True, False, True]
    assert host.kept == {"d0": {b"h1": b"copy one"}, "d1": {b"h3": b"copy three"}}
    assert all(host.stores[disk].get(name_of(number)) for disk, number in (("d0", 1), ("d0", 2), ("d1", 3)))


async def test_a_disk_that_hangs_holds_up_the_others_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepts_module, "TOGETHER_S", 0.01)
    host = Host()
    await host.ready()
    host.gates["d0"].set()
    before = host.replicas["d1"].statistics().accepts
    host.begin([Accept("d0", name_of(1), ballot(2), value()), Accept("d1", name_of(2), ballot(2), value())])
    await asyncio.sleep(0.05)
    assert await host.verdicts() == [0, None]
    again = asyncio.create_task(host.replicas["d1"].accept(Accept("d1", name_of(2), ballot(2), value())))
    await asyncio.sleep(0)
    host.gates["d1"].set()
    assert (await again).verdict == Verdict.OK
    assert await host.verdicts() == [0, None]
    assert host.replicas["d1"].statistics().accepts == before + 1, "it is not written twice"


async def test_each_is_judged_by_itself_and_as_what_it_is() -> None:
    host = Host()
    await host.ready()
    for gate in host.gates.values():
        gate.set()
    await host.replicas["d0"].accept(Accept("d0", name_of(1), ballot(5), value()))
    await host.replicas["d0"].prepare(Prepare("d0", name_of(2), ballot(50)))
    requests = [Accept("d0", name_of(number), ballot(10), value()) for number in (1, 2, 3)]
    host.begin([*requests, Accept("d0", name_of(1), ballot(11), value())], (), [True, True, True, False])
    assert await host.verdicts() == [Verdict.HELD, Verdict.PREEMPTED, Verdict.OK, Verdict.OK]


async def test_what_cannot_be_begun_at_once_is_told_so_and_the_rest_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    await host.ready()
    host.begin([Accept("d0", name_of(1), ballot(2), value())])

    def no_room(_size: int, _accepts: int) -> None:
        raise SlowDown

    monkeypatch.setattr(host.replicas["d1"]._writes, "check_room", no_room)
    host.begin(
        [
            Accept("d0", name_of(1), ballot(3), value(b"behind another")),
            Accept("d1", name_of(2), ballot(3), value()),
            Accept("d9", name_of(3), ballot(3), value()),
            Accept("d0", name_of(4), ballot(3), value()),
        ]
    )
    host.gates["d0"].set()
    for _ in range(20):
        await asyncio.sleep(0)
    answered = [
        answer.replies for answer in host.answers if isinstance(answer, AcceptsReply) and len(answer.replies) == 4
    ]
    assert [[None if reply is None else reply.verdict for reply in four] for four in answered] == [
        [None, None, None, 0]
    ]
    errors = {place: head.code for answer in host.answers for place, head in answer.errors.items()}
    assert errors == {1: "SlowDown", 2: "DISK_UNUSABLE"}


async def test_a_disk_that_fails_fails_only_what_is_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    await host.ready()
    for gate in host.gates.values():
        gate.set()

    def refuses(*_: object) -> None:
        raise DiskUnusable("broken")

    monkeypatch.setattr(host.stores["d0"], "post", refuses)
    host.begin([Accept("d0", name_of(1), ballot(2), value()), Accept("d1", name_of(2), ballot(2), value())])
    assert await host.verdicts() == [None, 0]


@pytest.mark.parametrize(
    ("accepts", "sizes", "creates", "body"),
    [
        (0, [], [], b""),
        (ACCEPTS_MAX + 1, [0] * (ACCEPTS_MAX + 1), [False] * (ACCEPTS_MAX + 1), b""),
        (2, [1], [False, False], b"x"),
        (2, [1, 0], [False], b"x"),
        (2, [2, -1], [False, False], b"x"),
        (1, [2], [False], b"x"),
        (1, [0], [False], b"x"),
    ],
)
async def test_a_message_that_does_not_fit_together_is_refused_whole(
    accepts: int, sizes: list[int], creates: list[bool], body: bytes
) -> None:
    host = Host()
    request = Accepts([Accept("d0", name_of(number), ballot(2), value()) for number in range(accepts)], sizes, creates)
    call = Call(PeerIdentity("gw", "FR", "s", "r", ("gateway",)), memoryview(body), 0.0)
    assert host.method.try_start is not None
    with pytest.raises(InvalidRequest):
        host.method.try_start(request, call, host.answers.append)
    with pytest.raises(InvalidRequest):
        await host.method.handler(request, call)
    assert not host.answers
    assert all(host.stores["d0"].get(name_of(number)) is None for number in range(accepts))


async def test_it_is_answered_to_who_calls_it_by_a_task() -> None:
    host = Host()
    await host.ready()
    for gate in host.gates.values():
        gate.set()
    call = Call(PeerIdentity("gw", "FR", "s", "r", ("gateway",)), memoryview(b""), 0.0)
    reply = await host.method.handler(Accepts([Accept("d0", name_of(1), ballot(2), value())], [0], [False]), call)
    assert reply == AcceptsReply([AcceptReply(0, ballot(2))], {})
