"""Which cluster a command is about, and how its nodes are named.

A directory is either that of a trial cluster (it has ``dev.json``), or of one node (``config.toml`` or ``admin.sock``
in it).
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from storaged.admin.place import LOCK_NAME, SOCKET_NAME, running_pid
from storaged.durable import replace_file
from storaged.errors import AdminNotAllowed, AmbiguousName, NotRunning, SeveralClusters

REMEMBERED_MAX = 32
"""Trial clusters whose directories are kept for a user."""


class NodeName(NamedTuple):
    """A node as the command line knows it: ``location`` is FR/par2/b. A gateway is not taken down with a rack: it is
    the client's side of the cluster.
    """

    name: str
    location: str
    roles: tuple[str, ...]

    @property
    def path(self) -> tuple[str, ...]:
        return (*self.location.split("/"), self.name)


def resolve(text: str, nodes: Sequence[NodeName]) -> list[NodeName]:
    """The nodes that NODE|RACK means: a node's name, or one or several components of exactly one rack's path (``par2``,
    ``b``, ``FR/par2/b``, ``n2``).

    Raises AmbiguousName when it names nothing, or more than one rack or node.
    """
    exact = [node for node in nodes if node.name == text]
    if exact:
        return exact
    wanted = tuple(part for part in text.strip("/").split("/") if part)
    matches: dict[tuple[str, ...], list[NodeName]] = {}
    for node in nodes:
        path = node.path
        for start in range(len(path) - len(wanted) + 1):
            end = start + len(wanted)
            if wanted and path[start:end] == wanted:
                if end == len(path):
                    matches.setdefault(path, []).append(node)
                elif "storage" in node.roles:
                    matches.setdefault(path[:3], []).append(node)
    if len(matches) == 1:
        return next(iter(matches.values()))
    if not matches:
        known = ", ".join(sorted({node.location for node in nodes} | {node.name for node in nodes}))
        raise AmbiguousName(f"no node or rack is named {text!r}; there are: {known}")
    raise AmbiguousName(f"{text!r} names more than one: {', '.join(sorted('/'.join(path) for path in matches))}")


def state_directory() -> Path:
    """Where this user's default cluster is recorded (XDG base directory specification)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "storaged"


def remembered() -> list[Path]:
    """Directories of this user's trial clusters that still exist, the one started last first."""
    try:
        lines = (state_directory() / "directory").read_text().splitlines()
    except OSError:
        return []
    return [Path(line) for line in dict.fromkeys(lines) if line and Path(line).is_dir()]


def record_default(directory: Path) -> None:
    """Puts this cluster first in the list that commands without --dir choose from.

    A home that cannot be written is no reason to fail: STORAGED_DIR does the same.
    """
    try:
        place = state_directory()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = [directory.absolute(), *(path for path in remembered() if path != directory.absolute())]
        replace_file(place / "directory", "".join(f"{path}\n" for path in known[:REMEMBERED_MAX]).encode())
    except OSError:
        pass


def default_directory() -> Path:
    """The trial cluster that runs; when none does, the one that ran last.

    Raises NotRunning when there never was one, SeveralClusters when more than one runs: the one started last need not
    be
    the one that is meant.
    """
    known = remembered()
    if not known:
        raise NotRunning("no cluster is named, and none was started on this machine")
    running = [path for path in known if running_pid(path) is not None]
    if len(running) > 1:
        raise SeveralClusters("several trial clusters run: " + ", ".join(sorted(map(str, running))))
    return (running or known)[0]


def find_directory(given: str | None) -> Path:
    """--dir or STORAGED_DIR, else the default. Raises NotRunning when it holds no cluster, or what
    ``default_directory`` raises.
    """
    directory = Path(given).expanduser().absolute() if given else default_directory()
    try:
        found = any((directory / name).exists() for name in ("dev.json", "config.toml", SOCKET_NAME, LOCK_NAME))
    except PermissionError:
        raise AdminNotAllowed(f"{directory} may not be read by this user") from None
    if not found:
        raise NotRunning(f"{directory} holds no cluster and no node")
    return directory


def command_for(directory: Path) -> str:
    """How a command about ``directory`` begins, for hints: with --dir, unless this shell's commands mean it already."""
    try:
        named = os.environ.get("STORAGED_DIR")
        meant = Path(named).expanduser().absolute() if named else default_directory()
    except (NotRunning, SeveralClusters):
        meant = None
    return "storaged" if meant == directory.absolute() else f"storaged --dir {shlex.quote(str(directory))}"


def read_dev(directory: Path) -> dict[str, Any] | None:
    """What ``storaged dev`` keeps about its cluster, or None when the directory is a single node's."""
    try:
        found: dict[str, Any] = json.loads((directory / "dev.json").read_text())
    except FileNotFoundError:
        return None
    return found


def nodes_of(dev: dict[str, Any]) -> list[NodeName]:
    return [NodeName(node["name"], node["rack"], tuple(node["roles"])) for node in dev["nodes"]]


def gateway_directory(directory: Path) -> Path:
    """The node directory whose admin socket answers for the cluster."""
    dev = read_dev(directory)
    if dev is None:
        return directory
    return next(directory / node.name for node in nodes_of(dev) if "gateway" in node.roles)
