"""What a node remembers of its disks outside of them: ``disks.json`` in the node's directory.

Theory of operation. A disk can't say of itself that it is blank, another one, or failed: the part that would say so is
missing. So the node keeps, for each disk, which metadata store it had, how often that store was started, and whether
one of its stores failed. A disk is used only when it agrees. The ledger is synced before the disk answers anything.

A ledger has an id of its own, made with it. It records whether this node was *formed*: whether any of its disks ever
took part in a cluster. Id and record together reveal a server that was built anew: its ledger is new, and the other
nodes were formed with an older one (``node.forming``).

An entry with an empty store means that the disk may begin with the store that it has, or with a blank one: at the first
start of a cluster, or because an operator accepted it. The entry is used up when the disk's store is recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from storaged.durable import replace_file
from storaged.errors import OperatorError
from storaged.ids import Entropy, system_entropy

LEDGER_FILE = "disks.json"
LEDGER_ID_BYTES = 16
VERSION = 2
REASON_CHARS_MAX = 500


class DiskRecord(msgspec.Struct, omit_defaults=True):
    """The entry of a disk. ``store``: the identity of its metadata store (store id and starts, hexadecimal); empty for
    a disk that may begin.

    ``failed``: why a store failed, by store (``meta``, ``fragments``).
    """

    store: str = ""
    failed: dict[str, str] = {}


class _Document(msgspec.Struct):
    """The file. ``nodes``: the ids of the other nodes' ledgers when this node was formed.

    ``places``: the digest of where replicas and disks lie in the layout that this node uses (``cluster.moves``); empty
    before one was recorded.
    """

    version: int
    ledger: str
    formed: bool
    nodes: dict[str, str]
    disks: dict[str, DiskRecord]
    places: str = ""


class Ledger:
    """The ledger of one node. Every change is durable when its call returns. Usable in any thread.

    Raises OperatorError for a file that can't be read: a node that does not know what it had must not begin anew.
    """

    def __init__(self, node_directory: Path, *, entropy: Entropy = system_entropy) -> None:
        self._path = node_directory / LEDGER_FILE
        self._lock = threading.Lock()
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            self._known = _Document(VERSION, entropy(LEDGER_ID_BYTES).hex(), False, {}, {})
            self._save()
            return
        self._known = self._read(content, entropy)

    def _read(self, content: bytes, entropy: Entropy) -> _Document:
        try:
            known = msgspec.json.decode(content)
            if "version" not in known:  # the file before it had versions: disk -> identity
                stores = msgspec.convert(known, dict[str, str])
                disks = {disk: DiskRecord(store) for disk, store in stores.items()}
                return _Document(VERSION, entropy(LEDGER_ID_BYTES).hex(), True, {}, disks)
            if known["version"] != VERSION:
                raise OperatorError(f"{self._path} is of version {known['version']}; this program knows {VERSION}.")
            return msgspec.convert(known, _Document)
        except (msgspec.MsgspecError, TypeError) as error:
            raise OperatorError(
                f"{self._path} can't be read: {error}. Put it back from a copy; without it this node does not know"
                " which disks it had."
            ) from None

    @property
    def id(self) -> bytes:
        return bytes.fromhex(self._known.ledger)

    @property
    def formed(self) -> bool:
        """Whether a disk of this node took part in the cluster, or may have."""
        return self._known.formed

    def goes_by(self, places: bytes) -> bool:
        """Whether this node has used a layout with this digest. The first digest is recorded."""
        with self._lock:
            if not self._known.places:
                self._known.places = places.hex()
                self._save()
            return self._known.places == places.hex()

    def node(self, name: str) -> bytes:
        """The id of another node's ledger when this node was formed; empty when it is unknown."""
        return bytes.fromhex(self._known.nodes.get(name, ""))

    def knows(self, disk_id: str) -> bool:
        """Whether the disk has an entry: it was in use, or may begin."""
        return disk_id in self._known.disks

    def identity(self, disk_id: str) -> bytes | None:
        """The identity of the disk's metadata store at its last start; None for a disk that was never in use here, or
        may begin.
        """
        record = self._known.disks.get(disk_id)
        return bytes.fromhex(record.store) if record is not None and record.store else None

    def failure(self, disk_id: str, store: str) -> str:
        """Why the disk's ``store`` (``meta`` or ``fragments``) failed for good; empty when it did not."""
        record = self._known.disks.get(disk_id)
        return record.failed.get(store, "") if record is not None else ""

    def form(self, nodes: Mapping[str, bytes], blank: Iterable[str]) -> None:
        """Records that this node takes part from now on, and that its ``blank`` disks may begin. ``nodes``: the ids of
        the other nodes' ledgers.
        """
        with self._lock:
            self._known.formed = True
            self._known.nodes |= {name: ledger.hex() for name, ledger in nodes.items()}
            for disk in blank:
                self._known.disks.setdefault(disk, DiskRecord())
            self._save()

    def accept(self, disk_id: str) -> None:
        """Lets the disk begin with the store that it has, as an operator accepted it."""
        with self._lock:
            self._known.formed = True
            self._known.disks[disk_id] = DiskRecord()
            self._save()

    def record(self, disk_id: str, identity: bytes) -> None:
        """Records a start of the disk's store, before the disk answers anything."""
        with self._lock:
            self._known.formed = True
            self._known.disks.setdefault(disk_id, DiskRecord()).store = identity.hex()
            self._save()

    def note_failed(self, disk_id: str, store: str, reason: str) -> None:
        """Records that one of the disk's stores failed for good. Raises OSError."""
        with self._lock:
            self._known.disks.setdefault(disk_id, DiskRecord()).failed[store] = (
                reason[:REASON_CHARS_MAX] or "no reason is known"
            )
            self._save()

    def _save(self) -> None:
        replace_file(self._path, msgspec.json.format(msgspec.json.encode(self._known), indent=2) + b"\n")
