"""Finds the cluster that a command is about, and the nodes that it names.

A directory belongs to a trial cluster (it has ``dev.json``) or to one node (it has ``config.toml`` or ``admin.sock``).
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
from storaged.errors import AdminNotAllowed, AmbiguousName, NotATrialCluster, NotRunning, SeveralClusters

KNOWN_MAX = 32
"""Directories of trial clusters that are recorded for a user."""


class NodeName(NamedTuple):
    """A node as the command line names it. ``location`` is FR/par2/b.

    A rack's name means its storage nodes. A gateway is the client's side of the cluster and stays up.
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


def known_directories() -> list[Path]:
    """Directories of this user's trial clusters that still exist, the one started last first."""
    try:
        lines = (state_directory() / "directory").read_text().splitlines()
    except OSError:
        return []
    return [Path(line) for line in dict.fromkeys(lines) if line and Path(line).is_dir()]


def record_default(directory: Path) -> None:
    """Puts this cluster first in the list that commands without --dir choose from.

    Does nothing where the home directory cannot be written: STORAGED_DIR serves the same purpose.
    """
    try:
        place = state_directory()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = [directory.absolute(), *(path for path in known_directories() if path != directory.absolute())]
        replace_file(place / "directory", "".join(f"{path}\n" for path in known[:KNOWN_MAX]).encode())
    except OSError:
        pass


def default_directory() -> Path:
    """The trial cluster that runs; when none does, the one that ran last.

    Raises NotRunning when there never was one. Raises SeveralClusters when more than one runs: the user may not mean
    the one that started last.
    """
    known = known_directories()
    if not known:
        raise NotRunning("no cluster is named, and none was started on this machine")
    running = [path for path in known if running_pid(path) is not None]
    if len(running) > 1:
        raise SeveralClusters("several trial clusters run: " + ", ".join(sorted(map(str, running))))
    return (running or known)[0]


def find_directory(given: str | None) -> Path:
    """The directory of --dir or STORAGED_DIR, else the default one.

    Raises NotRunning when it holds no cluster, AdminNotAllowed, and the errors of ``default_directory``.
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
    """The beginning of a command about ``directory``, for hints: with --dir unless it is the default in this shell."""
    try:
        named = os.environ.get("STORAGED_DIR")
        default = Path(named).expanduser().absolute() if named else default_directory()
    except (NotRunning, SeveralClusters):
        default = None
    return "storaged" if default == directory.absolute() else f"storaged --dir {shlex.quote(str(directory))}"


def read_dev(directory: Path) -> dict[str, Any] | None:
    """The document of ``storaged dev`` about its cluster; None when the directory is a single node's."""
    try:
        found: dict[str, Any] = json.loads((directory / "dev.json").read_text())
    except FileNotFoundError:
        return None
    return found


def require_dev(directory: Path) -> dict[str, Any]:
    """``read_dev``. Raises NotATrialCluster for the directory of a single node."""
    found = read_dev(directory)
    if found is None:
        raise NotATrialCluster(f"{directory} holds no cluster of `storaged dev`")
    return found


def nodes_of(dev: dict[str, Any]) -> list[NodeName]:
    return [NodeName(node["name"], node["rack"], tuple(node["roles"])) for node in dev["nodes"]]


def gateway_directory(directory: Path) -> Path:
    """The directory of the node whose admin socket answers for the cluster."""
    dev = read_dev(directory)
    if dev is None:
        return directory
    return next(directory / node.name for node in nodes_of(dev) if "gateway" in node.roles)
