"""How much room the rows of one store have: free pages in LMDB's file, and free space of its disk and its map."""

from __future__ import annotations

import os

from storaged.disk_room import Bound, reserve_of
from storaged.meta.storage.state import StoreState


def look_for_room(state: StoreState) -> None:
    """Sets the room in the disk's health. In a thread: the file system may not answer. It reads no page of LMDB, which
    may have left memory: a disk that hangs would hold the interpreter.
    """
    try:
        space = os.statvfs(state.directory)
    except OSError:
        return  # the fragment store finds out, and the disk is read-only then
    room, pages = state.health.room, state.pages
    pending_bytes = room.taken_bytes - state.taken_applied
    room.look(
        (
            Bound(
                pages.unused_bytes + space.f_bavail * space.f_frsize,
                reserve_of(space.f_blocks * space.f_frsize, room.reserve_bytes),
            ),
            Bound(pages.unused_bytes + pages.left_bytes, reserve_of(pages.map_bytes, None)),
        ),
        pending_bytes,
    )
