"""What a node remembers of the disks of the cluster, outside of them: ``disks.json`` in the node's directory.

Theory of operation. A disk can't say of itself that it is blank, another one, older than it was, or failed: the part
that would say so is missing. So each node keeps a *ledger*. For its own disks it records which metadata store each had,
how often that was started, how far its redo log went, and whether a store failed. For all disks of the cluster it keeps
what their nodes claim (``cluster.claims``). A disk answers only after a majority of the ledgers agrees.

A ledger has an id of its own, made with it. It records whether this node was *formed*: whether any of its disks ever
took part in a cluster. Id and record together reveal a server that was built anew: its ledger is new, and the other
nodes were formed with an older one (``node.forming``).

A new ledger is *blank*: it may replace one that was lost, so it does not count in a majority until it is rebuilt from
others (``whole``). It is *fresh* until all other nodes have answered since it was made.

An entry with an empty store means that the disk may begin with the store that it has, or with a blank one: at the first
start of a cluster. The entry is used up when the disk's store is recorded.
"""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import msgspec

from storaged.cluster.claims import (
    STORE_ID_BYTES,
    ClaimBook,
    Claimed,
    DiskClaim,
    NodeClaims,
    SignedClaims,
    newest,
)
from storaged.durable import replace_file
from storaged.errors import OperatorError
from storaged.ids import Entropy, system_entropy
from storaged.wire import MALFORMED, decode, encode

LEDGER_FILE = "disks.json"
LEDGER_ID_BYTES = 16
VERSION = 3
REASON_CHARS_MAX = 500


class DiskRecord(msgspec.Struct, omit_defaults=True):
    """The entry of a disk of this node. ``store``: the identity of its metadata store (store id and starts,
    hexadecimal); empty for a disk that may begin. ``position``: a group of its redo log that is durable.

    ``failed``: why a store failed, by store (``meta``, ``fragments``).
    """

    store: str = ""
    failed: dict[str, str] = {}
    position: int = 0


class _Document(msgspec.Struct):
    """The file. ``nodes``: the ids of the other nodes' ledgers when this node was formed.

    ``places``: the digest of where replicas and disks lie in the layout that this node uses (``cluster.moves``); empty
    before one was recorded. ``statements``: encoded SignedClaims, base64.
    """

    version: int
    ledger: str
    formed: bool
    nodes: dict[str, str]
    disks: dict[str, DiskRecord]
    places: str = ""
    whole: bool = False
    fresh: bool = False
    statements: list[str] = []


class Ledger:
    """The ledger of one node. Every change is durable when its call returns, unless it says otherwise. Usable in any
    thread; a call that only reads does not wait for a disk.

    Raises OperatorError for a file that can't be read: a node that does not know what it had must not begin anew.
    """

    def __init__(self, node_directory: Path, *, entropy: Entropy = system_entropy) -> None:
        self._path = node_directory / LEDGER_FILE
        self._lock = threading.Lock()
        """Guards ``_known`` and ``_book``."""
        self._saving = threading.Lock()
        """Held while the file is written. Take it before ``_lock``."""
        self._changes = self._urgent = self._saved = 0
        """Changes so far; of them the last that must be durable before its call returns, and the last in the file."""
        self.problem = ""
        """Why it could not be written the last time; empty when it could."""
        self._book = ClaimBook()
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            self._known = _Document(VERSION, entropy(LEDGER_ID_BYTES).hex(), False, {}, {}, fresh=True)
            self._save()
            return
        self._known = self._read(content, entropy)

    def _read(self, content: bytes, entropy: Entropy) -> _Document:
        try:
            known = msgspec.json.decode(content)
            if "version" not in known:  # the file before it had versions: disk -> identity
                stores = msgspec.convert(known, dict[str, str])
                disks = {disk: DiskRecord(store) for disk, store in stores.items()}
                return _Document(VERSION, entropy(LEDGER_ID_BYTES).hex(), True, {}, disks, whole=True)
            if known["version"] not in (2, VERSION):
                raise OperatorError(
                    f"{self._path} is of version {known['version']}; this program knows 2 and {VERSION}."
                    " A newer program wrote it, and nothing was changed. Start this node with that program again."
                )
            found = msgspec.convert(known, _Document)
            if known["version"] == 2:  # of one that took part it counts: it has all that was kept in those days
                found.version, found.whole, found.fresh = VERSION, found.formed, not found.formed
            for statement in found.statements:
                signed = decode(base64.b64decode(statement), SignedClaims)
                self._book.add(signed, decode(signed.payload, NodeClaims))
            return found
        except (*MALFORMED, TypeError, binascii.Error) as error:
            raise OperatorError(
                f"{self._path} can't be read: {error}. Put it back from a copy, or remove it: a node without a ledger"
                " rebuilds it from those of the other nodes."
            ) from None

    # --- reading

    @property
    def id(self) -> bytes:
        return bytes.fromhex(self._known.ledger)

    @property
    def formed(self) -> bool:
        """Whether a disk of this node took part in the cluster, or may have."""
        return self._known.formed

    @property
    def whole(self) -> bool:
        """Whether this ledger counts in a majority."""
        return self._known.whole

    @property
    def fresh(self) -> bool:
        """Whether some other node has not answered yet since this ledger was made."""
        return self._known.fresh

    def node(self, name: str) -> bytes:
        """The id of another node's ledger when this node was formed; empty when it is unknown."""
        return bytes.fromhex(self._known.nodes.get(name, ""))

    def knows(self, disk_id: str) -> bool:
        """Whether the disk has an entry: it was in use, or may begin."""
        return disk_id in self._known.disks

    def failure(self, disk_id: str, store: str) -> str:
        """Why the disk's ``store`` (``meta`` or ``fragments``) failed for good; empty when it did not."""
        record = self._known.disks.get(disk_id)
        return record.failed.get(store, "") if record is not None else ""

    def recorded(self, disk_id: str) -> DiskClaim | None:
        """What this node recorded of a disk of its own; None for a disk that was never in use here, or may begin."""
        record = self._known.disks.get(disk_id)
        if record is None or not record.store:
            return None
        identity = bytes.fromhex(record.store)
        starts = int.from_bytes(identity[STORE_ID_BYTES:], "big")
        return DiskClaim(disk_id, identity[:STORE_ID_BYTES], starts, record.position, bool(record.failed.get("meta")))

    def claimed(self, disk_id: str) -> Claimed:
        """What is known of a disk: by this node's own record, and by all claims."""
        with self._lock:
            stores = {claim.store: claim for claim in self._book.of(disk_id).stores}
        own = self.recorded(disk_id)
        if own is not None:
            stores[own.store] = newest(stores[own.store], own) if own.store in stores else own
        return Claimed(tuple(stores.values()))

    def statements(self, node: str = "") -> tuple[SignedClaims, ...]:
        """The statements of one node, or of all."""
        with self._lock:
            return self._book.statements(node)

    def has(self, statement: SignedClaims) -> bool:
        with self._lock:
            return statement in self._book

    # --- writing

    def goes_by(self, places: bytes, earlier: Container[bytes] = ()) -> bool:
        """Whether this node has used a layout with this digest, or one with an ``earlier`` digest, which the node
        followed. The digest is recorded.
        """
        known = self._known.places
        if known and known != places.hex() and bytes.fromhex(known) not in earlier:
            return False
        if known != places.hex():
            self.move_to(places)
        return True

    def move_to(self, places: bytes) -> None:
        """Records the digest of a layout that this node uses from now on."""
        with self._lock:
            self._known.places = places.hex()
        self._save()

    def form(self, nodes: Mapping[str, bytes], may_begin: Iterable[str]) -> None:
        """Records that this node takes part from now on, and that the disks ``may_begin`` with what they have.
        ``nodes``: the ids of the other nodes' ledgers.
        """
        with self._lock:
            self._known.formed = True
            self._known.nodes |= {name: ledger.hex() for name, ledger in nodes.items()}
            for disk in may_begin:
                self._known.disks.setdefault(disk, DiskRecord())
        self._save()

    def count_again(self, *, fresh: bool) -> None:
        """Records that this ledger is rebuilt. ``fresh``: some other node has not answered yet."""
        with self._lock:
            self._known.whole = True
            self._known.fresh = self._known.fresh and fresh
        self._save()

    def record(self, claim: DiskClaim, statement: tuple[SignedClaims, NodeClaims] | None = None) -> None:
        """Records a start of a disk of this node, before it answers anything. ``statement``: this node's own with it,
        where there are other nodes.
        """
        with self._lock:
            self._known.formed = True
            record = self._known.disks.setdefault(claim.disk, DiskRecord())
            record.store = (claim.store + claim.starts.to_bytes(8, "big")).hex()
            record.position = claim.position
            if statement is not None:
                self._book.add(*statement)
        self._save()

    def note_positions(self, positions: Mapping[str, int]) -> bool:
        """Takes newer positions of this node's disks, durable at the next ``flush``. Returns whether one was newer."""
        changed = False
        with self._lock:
            for disk, position in positions.items():
                record = self._known.disks.get(disk)
                if record is not None and record.store and record.position < position:
                    record.position = position
                    changed = True
            self._changes += changed
        return changed

    def keep(self, statement: SignedClaims, claims: NodeClaims) -> bool:
        """Takes in a verified statement. Newer positions alone are durable at the next ``flush``, all else when the
        call returns. Returns False for a statement with something that this ledger knows to be out of date.
        """
        with self._lock:
            if self._book.objections(claims):
                return False
            starts = self._book.starts_in(claims)
            self._changes += self._book.add(statement, claims)
            if starts:
                self._urgent = self._changes
            urgent = self._urgent
        if self._saved < urgent:  # also where another call took it in, and has not saved it yet
            self._save()
        return True

    def merge(self, statements: Iterable[tuple[SignedClaims, NodeClaims]]) -> bool:
        """Takes in verified statements of other ledgers, also those that contradict what this one has: a disk of which
        two stores are claimed takes no part. Returns whether anything was new. Durable at the next ``flush``.
        """
        with self._lock:
            changed = [self._book.add(statement, claims) for statement, claims in statements]
            self._changes += any(changed)
        return any(changed)

    def note_failed(self, disk_id: str, store: str, reason: str) -> None:
        """Records that one of the disk's stores failed for good. Raises OSError."""
        with self._lock:
            self._known.disks.setdefault(disk_id, DiskRecord()).failed[store] = (
                reason[:REASON_CHARS_MAX] or "no reason is known"
            )
        self._save()

    def flush(self) -> None:
        """Makes durable what was taken in before. Raises OSError."""
        if self._saved < self._changes or self.problem:
            self._save()

    def _save(self) -> None:
        with self._saving:
            with self._lock:
                self._known.statements = [
                    base64.b64encode(encode(signed)).decode() for signed in self._book.statements()
                ]
                content = msgspec.json.format(msgspec.json.encode(self._known), indent=2) + b"\n"
                changes = self._changes
            try:
                replace_file(self._path, content)
            except OSError as error:  # it may name no file; a disk that waits for this names it to the operator
                reason = f"the ledger can't be written: {error.strerror}"
                self.problem = f"{reason}: {self._path}"
                raise OSError(error.errno, reason, str(self._path)) from error
            self._saved, self.problem = changes, ""
