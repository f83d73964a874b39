"""What one request to several replicas is on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from storaged.cluster.ports import Line, Then
from storaged.meta.messages import Accept, Prepare, Read
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.meta.ports import Ballot, Replica
from storaged.meta.remote import RemoteReplica
from storaged.meta.rounds import Courier, TaskPool
from storaged.wire import Buffer, Message, encode

NAME = RegisterName(Table.OBJECT, b"s" * 16, 3, b"key")
BALLOT = Ballot(1, 10**15, "gw", b"incarnat")
VALUE = Value(1, b"o" * 16, Visibility.LIVE, b"body", b"d" * 16)
DISKS = ("d", "0" * 16, "x" * 40)


class Wire:
    """A ``cluster.ports.Poster`` that keeps what it is given to send."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, bytes, Sequence[Buffer]]] = []

    async def call(self, *_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("a post is enough")

    def post(self, *_arguments: Any, **_options: Any) -> bool:
        raise AssertionError("it is encoded already")

    def line(self, node: str, method: str, _reply: type[Message], start: bytes) -> Line:
        wire = self

        class Kept:
            def post(self, rest: bytes, _then: Then, body: Sequence[Buffer], _timeout_s: float) -> bool:
                wire.sent.append((node, method, start + rest, body))
                return True

        return Kept()


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
        (Read("", NAME, 7), "meta.read", ()),
        (Read("", NAME, 7, False, True, b"d" * 16), "meta.read", ()),
    ],
)
def test_each_replica_is_sent_the_request_with_its_own_disk_and_header(
    request_: Prepare | Accept | Read, method: str, headers: Sequence[bytes]
) -> None:
    wire = Wire()
    courier = Courier(Directory(wire), TaskPool())
    bodies = [[b"payload %d" % index] for index in range(len(headers))]
    for _ in range(2):  # what a replica remembers of the first time serves the second
        wire.sent.clear()
        courier.ask_each(request_, DISKS, lambda *_: None, timeout_s=1.0, fragments=list(zip(headers, bodies, strict=True)))
        for index, disk in enumerate(DISKS):
            changes = {"disk": disk, "header": headers[index]} if headers else {"disk": disk}
            expected = encode(msgspec.structs.replace(request_, **changes))
            assert wire.sent[index] == ("n" + disk, method, expected, bodies[index] if headers else ())
        assert len(wire.sent) == len(DISKS)
