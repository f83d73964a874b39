"""What operators, thieves and accidents do to the directories of a node that is down; each of it can be undone.

``Shelf`` puts directories aside and takes copies. An ``Alteration`` is one such thing, with the code that ``status``
must give for each disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from storaged.node.ledger import Ledger
from tests.chaos.control import pid_of
from tests.cluster import Cluster

NODES = ("n1", "n2", "n3")
DISKS = ("d1", "d2")

CLOCKS = Path(__file__).parent / "clocks"

BLANK, FOREIGN, ROLLED_BACK = "DISK_BLANK", "DISK_FOREIGN", "DISK_ROLLED_BACK"


@dataclass(frozen=True)
class Alteration:
    """``codes``: by the id of a disk, what ``status`` must say; empty where the node gets well by itself. ``undo``
    makes everything as it was. ``left_alone``: directories in which the node may change nothing.
    """

    name: str
    node: str
    codes: Mapping[str, str]
    do: Callable[[], None]
    undo: Callable[[], None]
    left_alone: tuple[Path, ...] = ()


@dataclass
class Copy:
    """A copy of a disk, or of a node's directory (``disk`` is empty). ``taken``: on the monotonic clock."""

    node: str
    disk: str
    path: Path
    taken: float = field(default_factory=time.monotonic)

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.taken


def clocks_beside(cluster: Cluster) -> Path:
    """Before the cluster starts: its nodes get clocks that can be moved. Returns the folder for them."""
    folder = cluster.directory.parent / "clocks"
    folder.mkdir()
    cluster.more_environment = {"PYTHONPATH": str(CLOCKS), "STORAGED_CHAOS_CLOCKS": str(folder)}
    return folder


class Shelf:
    """A folder beside the cluster, on the same file system."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._folder = cluster.directory.parent / "shelf"
        self._folder.mkdir()
        self._count = 0

    def directory(self, node: str, disk: str = "") -> Path:
        return self._cluster.directory / node / disk

    def disk_id(self, node: str, disk: str) -> str:
        document = tomllib.loads((self.directory(node) / "config.toml").read_text())
        return next(str(entry["id"]) for entry in document["disks"] if entry["directory"] == disk)

    def positions(self, readers: Sequence[str], node: str, disk: str) -> list[tuple[int, int]]:
        """(starts, position) of a disk in the ledgers of ``readers``; (0, 0) where a ledger has none."""
        disk_id = self.disk_id(node, disk)
        claims = [Ledger(self.directory(reader)).claimed(disk_id).only for reader in readers]
        return [(claim.starts, claim.position) if claim is not None else (0, 0) for claim in claims]

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._folder).free

    def copy(self, node: str, disk: str = "") -> Copy:
        """A copy of a disk, or of a whole node, that is not running."""
        found = Copy(node, disk, self._place())
        _copy(self.directory(node, disk), found.path)
        if not disk:
            for name in DISKS:  # a disk may be a link to a mounted file system
                if (found.path / name).is_symlink():
                    (found.path / name).unlink()
                    _copy(self.directory(node, name), found.path / name)
        return found

    def copy_running(self, node: str, disk: str = "") -> Copy:
        """The same of a running node: it is stopped meanwhile, so that the copy is of one moment."""
        with standing_still(pid_of(self._cluster, node)):
            time.sleep(0.2)  # the kernel ends the writes that it has
            return self.copy(node, disk)

    def drop(self, copy: Copy) -> None:
        shutil.rmtree(copy.path)

    # --- alterations

    def wiped(self, node: str, disk: str, *, mounted: bool = True) -> Alteration:
        """The disk is empty; not ``mounted``: its directory is not even there."""
        here, aside = self.directory(node, disk), self._place()

        def do() -> None:
            here.rename(aside)
            if mounted:
                here.mkdir(mode=0o700)

        def undo() -> None:
            _remove(here)
            aside.rename(here)

        codes = {self.disk_id(node, disk): BLANK}
        return Alteration("wipe" if mounted else "unmount", node, codes, do, undo, (here,))

    def put_back(self, copy: Copy, *, name: str) -> Alteration:
        """An earlier copy takes the place of the disk, or of the node's directory. Uses the copy up."""
        here = self.directory(copy.node, copy.disk)
        disks = (copy.disk,) if copy.disk else DISKS
        codes = {self.disk_id(copy.node, disk): ROLLED_BACK for disk in disks}
        return Alteration(name, copy.node, codes, *self._exchange(here, copy), (here,) if copy.disk else ())

    def of_another(self, node: str, disk: str, copy: Copy) -> Alteration:
        """A copy of another disk is in the place of this one. Uses the copy up."""
        here = self.directory(node, disk)
        codes = {self.disk_id(node, disk): FOREIGN}
        return Alteration("disk of another node", node, codes, *self._exchange(here, copy), (here,))

    def _exchange(self, here: Path, copy: Copy) -> tuple[Callable[[], None], Callable[[], None]]:
        """What puts a copy into the place of a directory, and what puts the directory back."""
        aside = self._place()

        def do() -> None:
            here.rename(aside)
            copy.path.rename(here)

        def undo() -> None:
            _remove(here)
            aside.rename(here)

        return do, undo

    def swapped(self, node: str) -> Alteration:
        """The two disks of a node have each other's place."""
        first, second = (self.directory(node, disk) for disk in DISKS)
        aside = self._place()

        def swap() -> None:
            first.rename(aside)
            second.rename(first)
            aside.rename(second)

        codes = {self.disk_id(node, disk): FOREIGN for disk in DISKS}
        return Alteration("swap", node, codes, swap, swap, (first, second))

    def without_ledger(self, node: str) -> Alteration:
        """The node gets well by itself: nothing is to be undone."""
        return Alteration("ledger lost", node, {}, lambda: self.lose_ledger(node), lambda: None)

    def lose_ledger(self, node: str) -> None:
        (self.directory(node) / "disks.json").unlink()

    def exchange_for_copy(self, node: str, disk: str) -> None:
        """Of a node that is down: a complete copy of the disk, made after its last use, is as good as the disk."""
        here, copy = self.directory(node, disk), self.copy(node, disk)
        if here.is_symlink():
            self.drop(copy)
            return
        shutil.rmtree(here)
        copy.path.rename(here)

    def move_to(self, node: str, disk: str, mounted: Path) -> None:
        """Of a node that is down: the disk moves to a file system that is mounted elsewhere; a link is left."""
        here, aside = self.directory(node, disk), self._place()
        here.rename(aside)
        subprocess.run(["cp", "-a", "--sparse=always", f"{aside}/.", mounted], check=True, capture_output=True)
        here.symlink_to(mounted)
        shutil.rmtree(aside)

    def _place(self) -> Path:
        self._count += 1
        return self._folder / f"{self._count:04d}"


def _copy(source: Path, target: Path) -> None:
    """With its holes, times and modes; ``source`` may be a link to a directory."""
    target.mkdir()
    subprocess.run(["cp", "-a", "--sparse=always", f"{source}/.", target], check=True, capture_output=True)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=not path.exists())


def fingerprint(directory: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of change of all files."""
    return {
        str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """A process is stopped inside the block (SIGSTOP): it hangs, its connections stay."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
