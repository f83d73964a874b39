"""Whether a disk may be opened, and the files by which an operator accepts one. ``admission`` is pure.

A disk that this node has no record of, or whose store is gone, is used only when the cluster is new (``node.forming``)
or an operator accepts it (``storaged accept-blank``). The acceptance is a file in the node's directory. The next
opening of that disk uses it up.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from storaged.durable import replace_file, sync_path
from storaged.node.forming import Verdict
from storaged.node.ledger import Ledger

ACCEPTANCE = "accept-blank-"
HINT = "`storaged explain DISK_BLANK` says what to do"


class Opening(NamedTuple):
    """How a disk is opened. ``expected``: the identity that its metadata store must have; None allows any, and a blank
    one.

    ``accepted``: an operator accepted it.
    """

    expected: bytes | None = None
    accepted: bool = False


class Admitted(NamedTuple):
    """The ``opening`` of a disk that may be opened, or the ``state`` and ``reason`` in which it waits.

    ``form``: the node begins with this disk.
    """

    opening: Opening | None
    form: bool = False
    state: str = ""
    reason: str = ""


def admission(ledger: Ledger, disk_id: str, blank: bool, forming: Verdict) -> Admitted:
    """Decides how a disk is opened. ``blank``: its directory has no metadata store. ``forming``: whether this node may
    begin with blank disks.
    """
    expected = ledger.identity(disk_id)
    if expected is not None:
        if blank:
            reason = f"the metadata store that was there is gone, and with it what this disk promised; {HINT}"
            return Admitted(None, state="foreign", reason=reason)
        return Admitted(Opening(expected))
    if ledger.knows(disk_id):
        return Admitted(Opening())
    if not blank:
        reason = f"a metadata store is there that this node has no record of, so that it may be an old one; {HINT}"
        return Admitted(None, state="foreign", reason=reason)
    if forming.begin:
        return Admitted(Opening(), form=True)
    reason = forming.reason or "this node has been in use, and has no record of the disk"
    return Admitted(None, state="blank", reason=f"blank: {reason}; {HINT}")


def is_blank(directory: Path) -> bool:
    """Whether a disk's directory has no metadata store. Raises OSError when the disk does not answer."""
    try:
        return not (directory / "meta" / "data.mdb").stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return True


# --- an operator's word


def write_acceptance(node_directory: Path, disk_id: str, now_ms: int) -> None:
    """Accepts the disk for its next opening. Raises OSError."""
    content = {"disk": disk_id, "uid": os.getuid(), "time_ms": now_ms}
    replace_file(node_directory / (ACCEPTANCE + disk_id), json.dumps(content).encode() + b"\n")


def take_acceptance(node_directory: Path, disk_id: str) -> int | None:
    """The user id of the operator who accepted the disk; None when nobody did. It stays until ``drop_acceptance``."""
    try:
        content = json.loads((node_directory / (ACCEPTANCE + disk_id)).read_bytes())
        return int(content["uid"]) if content["disk"] == disk_id else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # the command does not write such a file
        return None


def drop_acceptance(node_directory: Path, disk_id: str) -> None:
    """Removes the acceptance after use, or when it was not needed."""
    path = node_directory / (ACCEPTANCE + disk_id)
    if path.exists():
        path.unlink(missing_ok=True)
        sync_path(node_directory)
