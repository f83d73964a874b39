"""Whether a disk may be opened, and what an operator's word does: ``admission`` is pure, the rest are the files that
it is asked with.

A disk that this node has no record of, or whose store is gone, is not used before an operator says so (``storaged
accept-blank``), unless the cluster is new (``node.forming``). The word is a file in the node's directory that is used
up by the next opening of that disk, and of no other.
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
    """How a disk is opened. ``expected``: the identity that its metadata store must have; None: it may have any, or
    be blank. ``accepted``: by an operator."""

    expected: bytes | None = None
    accepted: bool = False


class Admitted(NamedTuple):
    """``opening`` of a disk that may be opened, or else the ``state`` and the ``reason`` in which it waits. ``form``:
    the node begins with this disk."""

    opening: Opening | None
    form: bool = False
    state: str = ""
    reason: str = ""


def admission(ledger: Ledger, disk_id: str, blank: bool, forming: Verdict) -> Admitted:
    """``blank``: there is no metadata store in the disk's directory. ``forming``: whether this node may begin with
    blank disks."""
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
    """Whether no metadata store is in a disk's directory. Raises OSError for a disk that doesn't say."""
    try:
        return not (directory / "meta" / "data.mdb").stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return True


# --- an operator's word


def write_acceptance(node_directory: Path, disk_id: str, now_ms: int) -> None:
    """The disk is accepted at its next opening. Raises OSError."""
    content = {"disk": disk_id, "uid": os.getuid(), "time_ms": now_ms}
    replace_file(node_directory / (ACCEPTANCE + disk_id), json.dumps(content).encode() + b"\n")


def take_acceptance(node_directory: Path, disk_id: str) -> int | None:
    """The user id of the operator who accepted the disk; None when it was not accepted. It stays until
    ``drop_acceptance``.
    """
    try:
        content = json.loads((node_directory / (ACCEPTANCE + disk_id)).read_bytes())
        return int(content["uid"]) if content["disk"] == disk_id else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # not what the command writes
        return None


def drop_acceptance(node_directory: Path, disk_id: str) -> None:
    """It is used up, or was not needed."""
    path = node_directory / (ACCEPTANCE + disk_id)
    if path.exists():
        path.unlink(missing_ok=True)
        sync_path(node_directory)
