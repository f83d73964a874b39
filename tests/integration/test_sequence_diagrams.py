"""The sequence diagrams in storaged/README.md show what a running cluster does.

Each diagram is read as a pattern: an arrow is one or more calls, ``loop`` repeats what it holds, ``par`` has its arrows
in any order. The calls of one request, as far as the diagram draws them, must match the whole pattern.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import botocore.auth  # type: ignore[import-untyped]
import pytest
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]

import storaged
from storaged.clock import SystemClock
from storaged.cluster.ports import EncodedCall, OnReply
from storaged.fragments.remote import StoreDirectory
from storaged.meta.names import object_name
from storaged.objects.system.users import UserService
from storaged.s3.app import S3App
from storaged.s3.context import Endpoint
from storaged.s3.http.connection import Connection
from storaged.wire import Buffer, Message, decode
from tests.integration.call_trace import Arrow, CallTrace
from tests.integration.memory_cluster import WHO, Cluster, LocalCaller, run

README = Path(storaged.__file__).parent / "README.md"
ACCESS, SECRET, REGION = "ACCESS", "secret/key", "eu-fr-1"
SMALL, ONE_BLOCK, LARGE = os.urandom(4096), os.urandom(300_000), os.urandom(3 << 20)

DIAGRAMS = ("PUT small", "PUT one block", "PUT large", "GET one window", "GET large", "repair", "move")
"""In the order of the README."""

_ARROW = re.compile(r"(\w+)->>(\w+): (\w+)")


def diagram(name: str) -> list[str]:
    drawn = re.findall(r"```mermaid\nsequenceDiagram\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(drawn) == len(DIAGRAMS)
    return [line.strip() for line in drawn[DIAGRAMS.index(name)].splitlines()]


def pattern_of(lines: list[str]) -> tuple[str, dict[Arrow, str]]:
    """The diagram as a regular expression, and the letter that stands for each arrow."""
    letters: dict[Arrow, str] = {}
    pattern, together = "", False
    for line in lines:
        if found := _ARROW.fullmatch(line):
            letter = letters.setdefault(Arrow(*found.groups()), chr(ord("a") + len(letters)))
            pattern += letter if together else f"{letter}+"
        elif line.startswith("par "):
            pattern, together = pattern + "[", True
        elif line.startswith("loop "):
            pattern += "("
        elif line == "end":
            pattern, together = pattern + ("]+" if together else ")+"), False
        else:
            assert line.startswith(("participant ", "and", "Front-->>Loop: ")), line
    return pattern, letters


def check(name: str, trace: CallTrace) -> None:
    pattern, letters = pattern_of(diagram(name))
    calls = [arrow for arrow in trace.arrows if arrow in letters]
    for arrow in letters:
        assert arrow in calls, f"{name}: nothing makes the call {arrow}"
    text = "".join(letters[arrow] for arrow in calls)
    assert re.fullmatch(pattern, text), f"{name}: {pattern} does not match {text} of {letters}"


class Client:
    """Sends requests to an S3 front without a socket."""

    def __init__(self, app: S3App) -> None:
        self.written = b""
        self._connection = Connection(app.open())
        self._connection.connection_made(self)  # type: ignore[arg-type]

    async def request(self, method: str, body: bytes = b"", key: str = "key") -> bytes:
        """The answer to a request for an object."""
        request = AWSRequest(method, f"http://127.0.0.1/bucket/{key}", data=body)
        botocore.auth.S3SigV4Auth(Credentials(ACCESS, SECRET), "s3", REGION).add_auth(request)
        lines = [f"{method} /bucket/{key} HTTP/1.1", "Host: 127.0.0.1"]
        lines += [f"{name}: {value}" for name, value in request.headers.items()]
        lines += [f"Content-Length: {len(body)}"] * (method == "PUT")
        self.written = b""
        rest = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        while rest:
            room = self._connection.get_buffer(-1)
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            self._connection.buffer_updated(count)
            rest = rest[count:]
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        return self.written

    # what a connection asks of its transport

    def write(self, data: bytes) -> None:
        self.written += data

    def get_extra_info(self, name: str) -> object:
        return ("127.0.0.1", 1) if name == "peername" else None

    def set_write_buffer_limits(self, high: int) -> None: ...

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...

    def abort(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class TryingCaller(LocalCaller):
    """Makes calls for those who have no task, too."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster, "gateway", "gateway")
        self._calls: list[asyncio.Task[None]] = []

    def try_call(self, *_what: Any, **_how: Any) -> bool:
        raise AssertionError("reads are encoded")

    def encoded_call(
        self,
        node: str,
        method: str,
        reply: type[Message],
        prefix: bytes,
        *,
        urgent: bool = False,
        followed: bool = False,
    ) -> EncodedCall:
        async def ask(rest: bytes, on_reply: OnReply, body: Sequence[Buffer]) -> None:
            request = decode(prefix + rest, self._cluster.nodes[node].methods[method].request)
            on_reply(*await self.call(node, method, request, reply, body=body))

        def begin(rest: bytes, on_reply: OnReply, body: Sequence[Buffer], timeout_s: float) -> bool:
            self._calls.append(asyncio.create_task(ask(rest, on_reply, body)))
            return True

        return begin


def with_client(steps: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.bucket()
        plane = cluster.gateway.plane
        plane.stores = StoreDirectory(plane.layouts, TryingCaller(cluster), {})
        users = UserService(cluster.gateway.plane)
        await users.add("client", access_key=ACCESS, secret_key=SECRET, user_id=WHO.user_id)
        app = S3App(cluster.objects, cluster.buckets, users, Endpoint(REGION), clock=SystemClock(), entropy=os.urandom)
        client = Client(app)
        await asyncio.sleep(0)
        for number in range(4):  # then user, bucket and its key are in memory, and new keys are likely to be new
            assert (await client.request("PUT", SMALL, f"other{number}")).startswith(b"HTTP/1.1 200 ")
        try:
            await steps(client)
        finally:
            await app.close(0.1)

    run(scenario)


@pytest.mark.parametrize(("name", "body"), [("PUT small", SMALL), ("PUT one block", ONE_BLOCK), ("PUT large", LARGE)])
def test_a_put_is_as_drawn(name: str, body: bytes) -> None:
    async def steps(client: Client) -> None:
        with CallTrace() as trace:
            answer = await client.request("PUT", body)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        check(name, trace)

    with_client(steps)


@pytest.mark.parametrize(("name", "body"), [("GET one window", ONE_BLOCK), ("GET large", LARGE)])
def test_a_get_is_as_drawn(name: str, body: bytes) -> None:
    async def steps(client: Client) -> None:
        assert (await client.request("PUT", body)).startswith(b"HTTP/1.1 200 OK\r\n")
        with CallTrace() as trace:
            answer = await client.request("GET")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(body)
        check(name, trace)

    with_client(steps)


def test_a_repair_is_as_drawn() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"key", os.urandom(300_000))
        name, layout = object_name(bucket.id, bucket.shard_numbers, b"key"), cluster.layouts.current
        maintenance = cluster.nodes[layout.node_of(layout.replicas_of(name.partition)[0])].maintenance
        await maintenance.repair.round()  # walks the records once
        fragment, disk = next(iter((await cluster.places(bucket, b"key"))[0].fragments))
        await cluster.store(disk).delete([fragment])
        maintenance.check.hint(name.pack())
        with CallTrace() as trace:
            await maintenance.repair.round()
        assert await cluster.is_whole(bucket, b"key")
        check("repair", trace)

    run(scenario)


def test_a_move_is_as_drawn() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"key", os.urandom(300_000))
        name, layout = object_name(bucket.id, bucket.shard_numbers, b"key"), cluster.layouts.current
        leader, *_ = layout.replicas_of(name.partition)
        repair = cluster.nodes[layout.node_of(leader)].maintenance.repair
        await repair.round()  # walks the records once
        disks = (await cluster.places(bucket, b"key"))[0].disks
        lost = next(disk for disk in disks if layout.node_of(disk) != layout.node_of(leader))
        cluster.lose_disk(lost)
        await repair.round()  # sees that the disk is away
        await cluster.pass_s(cluster.limits.recode_delay_s)
        repair.check.hint(name.pack())
        with CallTrace() as trace:
            await repair.round()
            await repair.relocator.ask_due()
            await repair.round()
        assert all(lost not in place.disks for place in await cluster.places(bucket, b"key"))
        check("move", trace)

    run(scenario, disks_per_node=3)
