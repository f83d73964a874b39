"""What goes through a worker's door."""

from __future__ import annotations

import asyncio
import socket

from storaged.node.leader import Leader
from storaged.node.workers import Worker


async def test_of_a_storm_of_connections_all_are_given_up_by_the_process_that_accepted_them() -> None:
    """Its descriptor would keep a connection open that the worker has closed."""
    door, its_door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    talk, its_talk = socket.socketpair()
    door.setblocking(False)
    worker = Worker(2, [], {}, lambda *_: None, lambda _: None)
    worker._door, worker.serving = door, True
    leader = Leader(2, its_door.detach(), its_talk.detach())
    taken = 0

    async def adopt(connection: socket.socket) -> None:
        nonlocal taken
        taken += 1
        connection.close()

    leader.take_connections(adopt)
    client, accepted = socket.socketpair()
    left = 700
    while left:
        if worker.hand(accepted.dup()):
            left -= 1
        else:
            await asyncio.sleep(0)
    async with asyncio.timeout(5):
        while taken < 700:  # noqa: ASYNC110 - it happens on the other side of a socket
            await asyncio.sleep(0)
        asyncio.get_running_loop().add_reader(door, worker._taken)
        while worker._handed:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    asyncio.get_running_loop().remove_reader(door)
    await leader.close()
    for each in (door, talk, client, accepted):
        each.close()
