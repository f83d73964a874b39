"""Whether a disk may be opened, from what the ledgers know of it. Pure, but for ``is_blank``.

Theory of operation. A disk answers for what it promised in all its earlier starts. So it is opened only with the store
that is claimed for it, and only if that store is no older than claimed; ``LmdbMetaStore.open_or_refuse`` compares. What
is claimed is known when a majority of the ledgers was read. After the opening, and before the disk answers anything,
its new start is claimed at a majority.

    a layout calls it lost for good                 lost
    two stores are claimed, or its store failed     foreign
    a store is claimed, and the disk is blank       blank
    too few ledgers have been read                  waiting
    a store is claimed                              it is opened, if it has this store and is not older
    none is claimed, the node's ledger lets it      it is opened
    none is claimed, and it has a store             foreign; waiting while a new ledger has not heard all others
    none is claimed, and it is blank
        a later layout added it to the cluster      it begins
        the layout in force does not name it        waiting
        otherwise                                   as ``node.forming`` says: it begins, waiting, or blank

A disk that a layout added to a running cluster (``joins``) may begin without all other nodes. A disk that took part is
claimed at a majority of the ledgers, and a majority was read before. A new disk has an id that no disk had before: a
replacement must not have that of the disk which it replaces. When the system partition was recovered, ledgers were
lost, and claims with them: then a disk that was named before may have taken part (``node.opener.place_in``).

No command overrules this: a disk that lost its promises takes no part under its old name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from storaged.cluster.claims import Claimed, DiskClaim, Ledgers
from storaged.errors import DiskForeign, DiskRolledBack
from storaged.node.forming import judge_forming, strangers_of

WAITING = "waiting"
"""The state of a disk that waits for other nodes."""

LOST = "lost"
"""The state of a disk that came back though a layout calls it lost for good."""
LOST_REASON = "a layout calls it lost for good, and the cluster has gone on without what it has"

HINT = "`storaged explain {}` says what to do"


class DiskFacts(NamedTuple):
    """What is known of a disk before it is opened. ``blank``: its directory has no metadata store. ``listed``: this
    node's ledger has an entry for it. ``failure``: why its store failed for good, as this node noted.
    """

    id: str
    blank: bool
    listed: bool
    claimed: Claimed
    failure: str = ""
    named: bool = True
    joins: bool = False
    lost: bool = False


class OwnLedger(NamedTuple):
    """The ledger of this node, as ``node.ledger`` has it. ``formed``: also where a disk of this node has a store; None
    while not all disks were looked at.
    """

    id: bytes
    formed: bool | None
    fresh: bool


class Admitted(NamedTuple):
    """Whether a disk may be opened (``opens``): with the store ``expected``, or with any for None. Else the ``state``
    and ``reason`` in which it is left out, until other nodes change that (``waits``) or for good.

    ``form``: the node begins with this disk, and its other ones. ``joins``: it begins with this disk alone.
    """

    opens: bool
    expected: DiskClaim | None = None
    form: bool = False
    joins: bool = False
    state: str = ""
    reason: str = ""

    @property
    def waits(self) -> bool:
        return self.state == WAITING


def _left_out(state: str, code: str, reason: str) -> Admitted:
    return Admitted(False, state=state, reason=f"{reason}; {HINT.format(code)}")


def admission(disk: DiskFacts, own: OwnLedger, ledgers: Ledgers) -> Admitted:
    """Decides how a disk is opened, by the table above."""
    if disk.lost:
        return _left_out(LOST, "DISK_LOST", LOST_REASON)
    if len(disk.claimed.stores) > 1:
        stores = ", ".join(claim.store.hex() for claim in disk.claimed.stores)
        return _left_out("foreign", "DISK_FOREIGN", f"two metadata stores are claimed for it ({stores})")
    claim = disk.claimed.only
    if disk.failure or (claim is not None and claim.failed):
        reason = disk.failure or "other nodes remember it"
        return _left_out(
            "foreign",
            "DISK_FOREIGN",
            f"its metadata store failed before, as was noted, and is not used again: {reason}",
        )
    if claim is not None and disk.blank:
        reason = "blank: the metadata store that was there is gone, and with it what this disk promised"
        return _left_out("blank", "DISK_BLANK", reason)
    if waits := ledgers.waits_for():
        return _left_out(WAITING, "DISK_WAITS", waits)
    if claim is not None or disk.listed:
        return Admitted(True, claim)
    return _begin_blank(disk, own, ledgers) if disk.blank else _begin_unclaimed(own, ledgers)


def _begin_unclaimed(own: OwnLedger, ledgers: Ledgers) -> Admitted:
    if own.fresh and ledgers.silent:
        reason = (
            "no ledger that was read knows its metadata store, and the ledger of this node is new; no answer yet from"
            f" {', '.join(ledgers.silent)}"
        )
        return _left_out(WAITING, "DISK_WAITS", reason)
    reason = "a metadata store is there that no ledger knows: it is of another disk or cluster, or an old one"
    return _left_out("foreign", "DISK_FOREIGN", reason)


def _begin_blank(disk: DiskFacts, own: OwnLedger, ledgers: Ledgers) -> Admitted:
    if disk.joins:
        return Admitted(True, joins=True)
    if not disk.named:
        return _left_out(WAITING, "DISK_WAITS", "blank: no layout in force gives it to this node yet")
    if own.formed:
        return _left_out("blank", "DISK_BLANK", "blank: this node has been in use, and has no record of the disk")
    if own.formed is None:
        return _left_out(WAITING, "DISK_HUNG", "blank: it waits until the other disks of this node answer")
    verdict = judge_forming(own.id, ledgers.others)
    if verdict.begin:
        return Admitted(True, form=True)
    if verdict.waits:
        return _left_out(WAITING, "DISK_WAITS", f"blank: {verdict.reason}")
    return _left_out("blank", "DISK_BLANK", f"blank: {verdict.reason}")


def outdated_error(known: DiskClaim, shown: DiskClaim) -> DiskForeign:
    """Why a disk that shows a store takes no part, from a claim that outdates it."""
    if known.store != shown.store:
        return DiskForeign(
            f"disk {shown.disk} has metadata store {shown.store.hex()}; the ledgers know {known.store.hex()} there"
        )
    if known.failed and not shown.failed:
        return DiskForeign(f"the metadata store of disk {shown.disk} failed before, as the ledgers know")
    return DiskRolledBack(
        f"disk {shown.disk} was put back to an older state: it shows start {shown.starts} and position"
        f" {shown.position}; the ledgers know start {known.starts} and position {known.position}"
    )


def may_begin_unclaimed(own: OwnLedger, ledgers: Ledgers, disks: Iterable[DiskFacts]) -> list[str] | None:
    """The disks that begin with the store that they have, although no ledger knows it: all ledgers were lost. None
    while that can't be known: some node does not answer.

    A node that was formed with an earlier ledger of this one would know the store of a disk that took part.
    """
    if not own.fresh or ledgers.silent or not ledgers.whole:
        return None
    if strangers_of(own.id, ledgers.others):
        return []
    return [disk.id for disk in disks if not (disk.blank or disk.listed or disk.claimed.stores)]


def is_blank(directory: Path) -> bool:
    """Whether a disk's directory has no metadata store. Raises OSError when the disk does not answer."""
    try:
        return not (directory / "meta" / "data.mdb").stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return True
