"""How much room the rows of one store have: free pages in LMDB's file, and free space of its disk and its map."""

from __future__ import annotations

import os

from storaged.disk_room import Bound, reserve_of
from storaged.meta.storage.state import StoreState


def look_for_room(state: StoreState) -> None:
    """Sets the room in the disk's health. In a thread: the file system may not answer."""
    try:
        space = os.statvfs(state.directory)
    except OSError:
        return  # the fragment store finds out, and the disk is read-only then
    environment, room = state.environment, state.health.room
    pending_bytes = room.taken_bytes - state.taken_applied
    page_bytes: int = environment.stat()["psize"]
    with environment.begin() as transaction:
        information = environment.info()
        tables = [environment.stat(), *(transaction.stat(database) for database in state.databases.values())]
    used = sum(table["branch_pages"] + table["leaf_pages"] + table["overflow_pages"] for table in tables)
    pages = information["last_pgno"] + 1
    unused_bytes = max(0, pages - used) * page_bytes
    map_bytes: int = information["map_size"]
    room.look(
        (
            Bound(
                unused_bytes + space.f_bavail * space.f_frsize,
                reserve_of(space.f_blocks * space.f_frsize, room.reserve_bytes),
            ),
            Bound(unused_bytes + map_bytes - pages * page_bytes, reserve_of(map_bytes, None)),
        ),
        pending_bytes,
    )
