"""Lets one command at a time work on the folder of an authority.

A command reads the list of nodes, changes it, and writes it back. Two at the same time would lose the change of one,
and could sign two layouts with one number. The lock is that of ``authority.crt``, which no command ever replaces. It
needs no write access, and ends with the command or its process.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import click

from storaged.errors import FolderInUse

LOCKED_NAME = "authority.crt"
WAIT_S = 10.0
POLL_S = 0.05
_HELD = f"{__name__}.held"


def lock_folder(directory: Path) -> None:
    """Locks the folder until the running command ends; outside of a command it does nothing. Raises FolderInUse."""
    context = click.get_current_context(silent=True)
    if context is None:
        return
    held: set[Path] = context.meta.setdefault(_HELD, set())
    place = directory.resolve()
    if place in held:
        return
    try:
        descriptor = os.open(place / LOCKED_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # it is no authority, and the command says so
    context.find_root().call_on_close(lambda: os.close(descriptor))
    until = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise FolderInUse(f"another command has been working on {directory} for {WAIT_S:.0f} s") from None
            time.sleep(POLL_S)
        else:
            held.add(place)
            return
