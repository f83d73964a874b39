"""A further worker's side of a gateway of several processes: what comes through its door, and what it asks the first
process for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from storaged.errors import AuditUnwritable
from storaged.node.leader import Leader
from storaged.node.worker import NOT_TAKEN, TAKEN, Worker
from storaged.observe import Metrics
from tests.patience import GUARD_S


class Doorway(NamedTuple):
    """A worker that gets its connections from the first process, and that process's side of it. ``given``: what came
    back; ``taken``: what the worker adopted, and closed.
    """

    worker: Worker
    door: socket.socket
    accepted: socket.socket
    given: list[socket.socket]
    taken: list[int]


@contextlib.asynccontextmanager
async def doorway() -> AsyncIterator[Doorway]:
    with contextlib.ExitStack() as stack:
        door, its_door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        talk, its_talk = socket.socketpair()
        client, accepted = socket.socketpair()
        for each in (door, talk, client, accepted):
            stack.enter_context(each)
        door.setblocking(False)
        given: list[socket.socket] = []
        taken: list[int] = []
        worker = Worker(2, [], {}, lambda *_: None, given.append, 1.0)
        worker._door, worker.serving = door, True
        leader = Leader(2, its_door.detach(), its_talk.detach())

        async def adopt(connection: socket.socket) -> None:
            taken.append(connection.fileno())
            connection.close()

        leader.take_connections(adopt)
        try:
            yield Doorway(worker, door, accepted, given, taken)
        finally:
            await leader.close()


async def test_of_a_storm_of_connections_all_are_given_up_by_the_process_that_accepted_them() -> None:
    """Its descriptor would keep a connection open that the worker has closed."""
    async with doorway() as (worker, door, accepted, given, taken):
        handed = [accepted.dup() for _ in range(700)]
        for connection in handed:
            while not worker.try_hand(connection):  # noqa: ASYNC110
                await asyncio.sleep(0)
        async with asyncio.timeout(GUARD_S):
            while len(taken) < 700:  # noqa: ASYNC110 - it happens on the other side of a socket
                await asyncio.sleep(0)
            asyncio.get_running_loop().add_reader(door, worker._on_answers)
            while worker._handed:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        asyncio.get_running_loop().remove_reader(door)
        assert len(taken) == 700
        assert [connection.fileno() for connection in handed] == [-1] * 700
        assert not given


async def test_a_connection_for_which_a_worker_has_no_descriptor_goes_to_another_process() -> None:
    """The kernel delivers the byte without the descriptor then."""
    async with doorway() as (worker, door, accepted, given, _):
        first, second = accepted.dup(), accepted.dup()
        assert worker.try_hand(first)
        door.send(b"c")
        worker._handed.append(second)
        async with asyncio.timeout(GUARD_S):
            while worker._handed:
                worker._on_answers()
                await asyncio.sleep(0.01)
        assert first.fileno() == -1
        assert given == [second]
        assert second.fileno() != -1
        assert TAKEN != NOT_TAKEN
        second.close()


@contextlib.asynccontextmanager
async def talking() -> AsyncIterator[tuple[Leader, asyncio.StreamReader, asyncio.StreamWriter, asyncio.Task[None]]]:
    """A worker that has heard who the first process is, and the first process's end of their talk."""
    door, its_door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    talk, its_talk = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=talk)
    writer.write(json.dumps({"do": "hello", "pid": 7, "incarnation": "0102030405060708"}).encode() + b"\n")
    leader = Leader(2, its_door.detach(), its_talk.detach())
    await leader.open()
    assert (leader.pid, leader.incarnation) == (7, bytes(range(1, 9)))

    stopping = asyncio.Event()
    serving = asyncio.create_task(leader.serve(Metrics().registry, lambda kind, key: None, asyncio.Event(), stopping))
    try:
        yield leader, reader, writer, serving
    finally:
        writer.close()
        await asyncio.wait_for(serving, GUARD_S)
        assert stopping.is_set(), "a worker ends with the first process"
        await leader.close()
        door.close()


async def test_what_the_first_process_cannot_audit_the_worker_refuses() -> None:
    async with talking() as (leader, reader, writer, _):
        entry = asyncio.create_task(leader.append("key.release", bucket="b"))
        asked = json.loads(await asyncio.wait_for(reader.readline(), GUARD_S))
        assert (asked["tell"], asked["kind"], asked["fields"]) == ("audit", "key.release", {"bucket": "b"})
        writer.write(json.dumps({"do": "done", "id": asked["id"], "error": "the disk is full"}).encode() + b"\n")
        with pytest.raises(AuditUnwritable, match="the disk is full"):
            await asyncio.wait_for(entry, GUARD_S)


async def test_refusals_are_counted_in_the_worker_and_its_first_process_hears_of_few() -> None:
    async with talking() as (leader, reader, _writer, _):
        for number in range(1000):
            leader.refused("s3.refused", "AccessDenied", actor="address:10.0.0.7", target=f"/b/{number}")
        leader._tell_refusals(all_of_them=True)
        leader.note("end")
        told = [json.loads(await asyncio.wait_for(reader.readline(), GUARD_S)) for _ in range(3)]
        assert [
            (one["tell"], one["kind"], one["fields"].get("outcome"), one["fields"].get("repeated")) for one in told
        ] == [
            ("note", "s3.refused", "refused AccessDenied", None),
            ("note", "s3.refused", "refused AccessDenied", 999),
            ("note", "end", None, None),
        ]


async def test_nothing_waits_for_a_first_process_that_has_ended() -> None:
    async with talking() as (leader, reader, writer, serving):
        waiting = asyncio.create_task(leader.append("key.release"))
        await asyncio.wait_for(reader.readline(), GUARD_S)
        writer.close()
        with pytest.raises(AuditUnwritable, match="has ended"):
            await asyncio.wait_for(waiting, GUARD_S)
        await asyncio.wait_for(serving, GUARD_S)
        with pytest.raises(AuditUnwritable, match="has ended"):
            await leader.append("key.release")


@pytest.mark.parametrize(("parent", "code"), [("os.getppid()", 0), ("os.getppid() + 1", 1), ("1", 0)])
def test_a_process_ends_at_once_when_who_started_it_has_ended_already(parent: str, code: int) -> None:
    """A first process whose pid is 1, as a container's is, is none that has ended."""
    program = f"""
import os, signal
from storaged.node.process import end_with
parent = {parent}
if parent == 1:
    os.getppid = lambda: 1
end_with(parent, signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ, check=False
    )
    assert done.returncode == code, done.stderr
    assert ("has ended" in done.stderr) == bool(code)
