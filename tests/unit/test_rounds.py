"""What one request to several replicas is on the wire, and to those of the same process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from storaged.cluster.ports import EncodedCall, OnReply
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.register import Verdict
from storaged.meta.messages import Accept, AcceptReply, Create, Prepare, Read
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.ports import Replica
from storaged.meta.storage.small_copies import PlainCopies
from storaged.meta.store_ports import Slot
from storaged.meta.transport.calls import Fanout, TaskPool
from storaged.meta.transport.replicas import RemoteReplica
from storaged.wire import Buffer, Message, encode
from tests.doubles.meta_store import MemoryMetaStore

NAME = RegisterName(Table.OBJECT, b"s" * 16, 3, b"key")
BALLOT = Ballot(1, 10**15, "gw", b"incarnat")
VALUE = Value(1, b"o" * 16, Visibility.LIVE, b"body", b"d" * 16)
NEXT = BALLOT._replace(counter=BALLOT.counter + 1)
DISKS = ("d", "0" * 16, "x" * 40)


def test_verdicts_keep_their_numbers_for_nodes_of_other_versions() -> None:
    assert {verdict.name: int(verdict) for verdict in Verdict} == {
        "OK": 0,
        "PREEMPTED": 1,
        "EPOCH": 2,
        "FENCED": 3,
        "CONFLICT": 4,
        "DAMAGED": 5,
        "UNSTORED": 6,
        "HELD": 7,
        "AHEAD": 8,
        "NEWER": 9,
        "FULL": 10,
    }


class Wire:
    """A ``cluster.ports.TryCaller`` that keeps what it is given to send."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, bytes, Sequence[Buffer]]] = []

    async def call(self, *_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("a try_call is enough")

    def try_call(self, *_arguments: Any, **_options: Any) -> bool:
        raise AssertionError("it is encoded already")

    def encoded_call(
        self,
        node: str,
        method: str,
        _reply: type[Message],
        start: bytes,
        *,
        urgent: bool = False,
        followed: bool = False,
    ) -> EncodedCall:
        def try_call(rest: bytes, _then: OnReply, body: Sequence[Buffer], _timeout_s: float) -> bool:
            self.sent.append((node, method, start + rest, body))
            return True

        return try_call


class Directory:
    def __init__(self, wire: Wire) -> None:
        self._replicas = {disk: RemoteReplica(wire, "n" + disk, disk) for disk in DISKS}

    def replica(self, disk_id: str) -> Replica:
        return self._replicas[disk_id]


@pytest.mark.parametrize(
    ("request_", "method", "headers"),
    [
        (Prepare("", NAME, BALLOT), "meta.prepare", ()),
        (Prepare("", NAME, BALLOT, b"nonce"), "meta.prepare", ()),
        (Accept("", NAME, BALLOT, VALUE), "meta.accept", ()),
        (Accept("", NAME, BALLOT, VALUE, b"nonce", True), "meta.accept", ()),
        (Accept("", NAME, BALLOT, VALUE), "meta.accept", (b"h", b"i" * 100, b"j" * 300)),
        (Accept("", NAME, BALLOT, VALUE, b"nonce", True), "meta.accept", (b"h", b"", b"j" * 70_000)),
        (Accept("", NAME, BALLOT, VALUE, check=b"c" * 8), "meta.accept", (b"h", b"i" * 100, b"j" * 300)),
        (Create("", NAME, BALLOT, VALUE, check=b"c" * 8), "meta.create", (b"h", b"i", b"")),
        (Read("", NAME, 7), "meta.read", ()),
        (Read("", NAME, 7, False, True, b"d" * 16), "meta.read", ()),
    ],
)
def test_each_replica_is_sent_the_request_with_its_own_disk_and_header(
    request_: Prepare | Accept | Read, method: str, headers: Sequence[bytes]
) -> None:
    wire = Wire()
    fanout = Fanout(Directory(wire), TaskPool())
    bodies = [[b"payload %d" % index] for index in range(len(headers))]
    for _ in range(2):  # what a replica remembers of the first time serves the second
        wire.sent.clear()
        fanout.send(request_, DISKS, lambda *_: None, timeout_s=1.0, fragments=list(zip(headers, bodies, strict=True)))
        for index, disk in enumerate(DISKS):
            changes = {"disk": disk, "header": headers[index]} if headers else {"disk": disk}
            expected = encode(msgspec.structs.replace(request_, **changes))
            assert wire.sent[index] == ("n" + disk, method, expected, bodies[index] if headers else ())
        assert len(wire.sent) == len(DISKS)


class Here:
    """Three replicas of this process, and the copies that they were given."""

    def __init__(self) -> None:
        self.kept: dict[str, list[tuple[bytes, bytes]]] = {disk: [] for disk in DISKS}
        self.stores = {disk: MemoryMetaStore() for disk in DISKS}
        self.replicas = {
            disk: LocalReplica(disk, store, copies=self._copies(disk, store)) for disk, store in self.stores.items()
        }

    def _copies(self, disk: str, store: MemoryMetaStore) -> PlainCopies:
        async def keep(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
            self.kept[disk].append((header, b"".join(body)))

        async def load(_data_id: bytes) -> None:
            return None

        return PlainCopies(store, keep, load)

    def replica(self, disk_id: str) -> Replica:
        return self.replicas[disk_id]


async def test_replicas_of_this_process_share_a_request_and_each_keeps_its_own_copy() -> None:
    here, pool = Here(), TaskPool()
    fanout = Fanout(here, pool)
    heard: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def ask(
        request: Prepare | Accept, disks: Sequence[str], fragments: Sequence[tuple[bytes, Sequence[Buffer]]] = ()
    ) -> None:
        fanout.send(
            request, disks, lambda disk, answer, _: heard.put_nowait((disk, answer)), timeout_s=1.0, fragments=fragments
        )

    async def answers(count: int) -> list[tuple[str, Any]]:
        return [await heard.get() for _ in range(count)]

    ask(Prepare("", NAME, BALLOT), DISKS)  # the first promises wait for a high-water ballot on disk
    assert {disk: answer.verdict for disk, answer in await answers(3)} == dict.fromkeys(DISKS, Verdict.OK)
    copies = [(b"header %d" % index, [b"pay", b"load %d" % index]) for index in range(len(DISKS))]
    ask(Accept("", NAME, BALLOT, VALUE), DISKS, copies)
    ask(Prepare("", NAME, NEXT), DISKS[:1])
    assert heard.empty()
    found = await answers(4)
    assert here.kept == {disk: [(header, b"".join(body))] for disk, (header, body) in zip(DISKS, copies, strict=True)}
    assert {disk: answer.copy_synced for disk, answer in found if isinstance(answer, AcceptReply)} == dict.fromkeys(
        DISKS, True
    )
    [promise] = [answer for _, answer in found if not isinstance(answer, AcceptReply)]
    assert (promise.accepted, promise.value) == (BALLOT, VALUE)  # it waited for what was on its way
    assert [store.get(NAME) for store in here.stores.values()] == [Slot(NAME, BALLOT, VALUE, True)] * 3
    await pool.close()
