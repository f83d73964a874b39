"""Keeps a cut-off LMDB file from ending the process.

LMDB reads its file through a memory map, where a page beyond the file's end is no error but SIGBUS: one cut-off file
would end a node with all its disks. So a file that is shorter than its own header says is extended with zeros before a
page of it is read. A page of zeros has no type, and LMDB refuses it as corrupted if a tree leads to it. A healthy file
is not harmed: a page at the end that was allocated and freed again may never have been written, and no tree leads
there.
"""

from __future__ import annotations

import os
from pathlib import Path

import lmdb


def extend_to_last_page(environment: lmdb.Environment, directory: Path) -> None:
    """Call this before the first transaction of an environment that was just opened in ``directory``. Raises
    OSError.
    """
    wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    path = directory / "data.mdb"
    if path.stat().st_size < wanted:
        os.truncate(path, wanted)
