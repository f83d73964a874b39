"""The first process's side of a gateway's workers, over small programs that stand for the others."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest

from storaged.config import S3Section
from storaged.errors import AuditUnwritable, OperatorError, PortInUse
from storaged.node.shares import BUFFER_BYTES_MIN, shared_limits, shared_out
from storaged.node.workers import FirstProcess, Workers
from storaged.objects.plane import ObjectLimits
from storaged.observe import Metrics
from storaged.s3.http.limits import Limits
from storaged.s3.http.listen import listen
from tests.patience import GUARD_S

WORKER = """
import json, os, signal, socket, sys, time
behaviour, options = sys.argv[1], dict(zip(sys.argv[3::2], sys.argv[4::2]))
door, talk = (socket.socket(fileno=int(options[name])) for name in ("--door", "--talk"))
lines = talk.makefile("rb")
assert json.loads(lines.readline())["pid"] == os.getppid() == int(options["--parent"])
say = lambda **message: talk.sendall(json.dumps(message).encode() + b"\\n")
if behaviour == "fails":
    sys.exit(3)
if behaviour == "is late":
    assert json.loads(lines.readline())["do"] == "reload"
say(tell="ready")
if behaviour == "audits":
    for number, kind in enumerate(("fine", "refused", "broken")):
        say(tell="audit", id=number, kind=kind, fields={})
        said = json.loads(lines.readline())
        assert (said["do"], said["id"], bool(said["error"])) == ("done", number, kind != "fine"), said
    say(tell="note", kind="over", fields={})
if behaviour == "babbles":
    talk.sendall(b"what?\\n")
if behaviour == "does not end":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(tell="note", kind="deaf", fields={})
while behaviour == "has no descriptors":
    door.recv(1)
    door.send(b"n")
while behaviour != "takes none":
    _, descriptors, _, _ = socket.recv_fds(door, 1, 1)
    if not descriptors:
        break
    door.send(b"t")
    with socket.socket(fileno=descriptors[0]) as client:
        client.sendall(b"worker")
time.sleep(60)
"""


@contextlib.asynccontextmanager
async def gateway(behaviour: str) -> AsyncIterator[tuple[Workers, list[str], int]]:
    """Workers of two processes that ``listen``, the audit entries and notes they passed on, and the port."""
    told: list[str] = []

    async def adopt(connection: socket.socket) -> None:
        connection.sendall(b"first")
        connection.close()

    async def no_keys(_told: Mapping[str, Any]) -> str:
        return ""

    class Log:
        """The audit log of the first process."""

        async def append(self, kind: str, /, **_fields: Any) -> None:
            told.append(kind)
            if kind == "refused":
                raise AuditUnwritable("the disk is full")
            if kind == "broken":
                raise ValueError("a defect")

        def note(self, kind: str, /, **_fields: Any) -> None:
            told.append(kind)

        def refused(self, kind: str, code: str, /, **_fields: Any) -> None:
            raise AssertionError("workers count refusals themselves")

    workers = Workers(
        "config.toml",
        2,
        b"\1" * 8,
        Metrics(),
        FirstProcess(adopt, Log(), lambda _kind, _key: None, no_keys),
        remembers_s=1.0,
        command=(sys.executable, "-c", WORKER, behaviour),
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers.listen("127.0.0.1", port)
    try:
        yield workers, told, port
    finally:
        await workers.close()


async def answer(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await asyncio.wait_for(reader.read(), GUARD_S)
    finally:
        writer.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GUARD_S):
        while not condition():  # noqa: ASYNC110  (processes, which set no event)
            await asyncio.sleep(0.01)


async def test_clients_are_served_in_turn_by_both_processes() -> None:
    async with gateway("serves") as (workers, _, port):
        await workers.start()
        assert workers.serving == 2
        answers = [await answer(port) for _ in range(6)]
        assert sorted(answers) == [b"first"] * 3 + [b"worker"] * 3
        assert answers[:2] != answers[1:3]


async def test_a_connection_that_a_dead_worker_had_not_taken_is_served_by_another() -> None:
    async with gateway("takes none") as (workers, _, port):
        await workers.start()
        asked = [asyncio.create_task(answer(port)) for _ in range(4)]
        await until(lambda: sum(one.done() for one in asked) == 2)
        await asyncio.sleep(0.1)
        assert sum(one.done() for one in asked) == 2
        workers._others[0].signal(signal.SIGKILL)
        assert [await one for one in asked] == [b"first"] * 4


async def test_a_worker_that_hangs_is_killed_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storaged.node.workers.METRICS_EVERY_S", 0.05)
    monkeypatch.setattr("storaged.node.workers.HANGS_S", 0.3)
    async with gateway("serves") as (workers, _, _port):
        await workers.start()
        first = workers._others[0].process
        assert first is not None
        running = asyncio.create_task(workers.run())  # the program never answers what it is asked for its metrics
        assert await asyncio.wait_for(first.wait(), GUARD_S) == -signal.SIGKILL
        await until(lambda: workers._others[0].process not in (None, first))
        running.cancel()


async def test_what_a_worker_asks_to_be_audited_is_and_it_is_told_of_a_refusal() -> None:
    async with gateway("audits") as (workers, told, _port):
        await workers.start()
        await until(lambda: "over" in told)
        assert told == ["fine", "refused", "broken", "over"]


async def test_a_connection_that_a_worker_cannot_receive_is_served_by_another() -> None:
    async with gateway("has no descriptors") as (workers, _, port):
        await workers.start()
        assert [await answer(port) for _ in range(6)] == [b"first"] * 6


async def test_a_worker_that_is_not_understood_is_killed_and_started_again() -> None:
    async with gateway("babbles") as (workers, _, _port):
        await workers.start()
        first = workers._others[0].process
        assert first is not None
        assert await asyncio.wait_for(first.wait(), GUARD_S) == -signal.SIGKILL
        await until(lambda: workers._others[0].process not in (None, first))


async def test_a_worker_that_does_not_end_is_waited_for_no_longer_than_it_may_take_and_then_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with gateway("does not end") as (workers, told, _port):
        await workers.start()
        await until(lambda: "deaf" in told)
        process = workers._others[0].process
        assert process is not None
        monkeypatch.setattr("storaged.node.workers.ENDING_S", 0.2)
        await asyncio.wait_for(workers.drain(0.1), GUARD_S)
        assert process.returncode is None
        monkeypatch.undo()
        await workers.close()
        assert process.returncode == -signal.SIGKILL


async def test_a_name_with_two_addresses_is_listened_to_at_both(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: both)
    listeners = listen("both", 0)
    monkeypatch.undo()
    ports = {listener.getsockname()[1] for listener in listeners}
    assert len(ports) == 1
    for listener in listeners:
        with socket.create_connection(listener.getsockname()):
            listener.accept()[0].close()
    with pytest.raises(PortInUse):
        listen("127.0.0.2", ports.pop())
    for listener in listeners:
        listener.close()


async def test_a_name_is_listened_to_where_the_machine_can_and_once_at_an_address_that_it_has_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    strange = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))
    make = socket.socket

    def without_ipv6(family: int = -1, *rest: Any, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return make(family, *rest, **options)

    for names in ([here, here], [strange, here], [here, strange]):
        with monkeypatch.context() as patched:
            patched.setattr(socket, "getaddrinfo", lambda *_args, names=names, **_options: names)
            patched.setattr(socket, "socket", without_ipv6)
            (listener,) = listen("name", 0)
        assert listener.getsockname()[0] == "127.0.0.1"
        listener.close()
    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", lambda *_args, **_options: [strange])
        patched.setattr(socket, "socket", without_ipv6)
        with pytest.raises(OSError, match="not supported"):
            listen("name", 0)


def test_processes_share_what_one_may_hold_and_take() -> None:
    whole, quarter, many = (shared_out(ObjectLimits(), count) for count in (1, 4, 64))
    assert whole == ObjectLimits()
    for pool in ("fill_buffer_bytes_max", "put_buffer_bytes_max", "get_buffer_bytes_max"):
        assert getattr(quarter, pool) == max(getattr(whole, pool) // 4, BUFFER_BYTES_MIN)
        assert getattr(many, pool) == BUFFER_BYTES_MIN, "a large transfer finds room in any process"
    assert (quarter.opened_bytes_max, many.opened_bytes_max) == (
        whole.opened_bytes_max // 4,
        whole.opened_bytes_max // 64,
    )
    assert (quarter.listed_bytes_max, many.listed_bytes_max) == (
        whole.listed_bytes_max // 4,
        whole.listed_bytes_max // 64,
    )
    one, each = Limits(), shared_limits(10, S3Section(workers=4))
    assert shared_limits(one.requests_max, S3Section()) == one
    assert each.requests_max == 3, "ten are never fewer"
    assert 4 * each.connections_max >= one.connections_max
    assert 4 * each.whole_bytes_max == one.whole_bytes_max


async def test_a_gateway_whose_worker_does_not_come_up_does_not_start() -> None:
    async with gateway("fails") as (workers, _, _port):
        with pytest.raises(OperatorError, match="worker 2 did not start"):
            await workers.start()


async def test_a_gateway_serves_without_a_worker_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storaged.node.workers.START_S", 0.05)
    async with gateway("is late") as (workers, _, port):
        await workers.start()
        assert workers.serving == 1
        assert [await answer(port) for _ in range(3)] == [b"first"] * 3
        await until(lambda: workers._others[0].process is not None)
        workers.reload()  # it waits for this
        await until(lambda: workers.serving == 2)
        assert sorted([await answer(port) for _ in range(2)]) == [b"first", b"worker"]


async def test_nothing_is_left_of_workers_that_do_not_end_in_time() -> None:
    async with gateway("takes none") as (workers, _, port):
        await workers.start()
        process = workers._others[0].process
        assert process is not None
        await workers.close()
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection("127.0.0.1", port)
