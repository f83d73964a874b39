"""Whether a node that has never taken part may begin with blank disks. Pure.

Theory of operation. A blank disk answers "nothing was written here" to every question. That is right only while the
cluster is new. On a server that was built anew it makes the ring forget what the old server promised and accepted. The
node itself can't tell the two apart, as its own records are gone. The other nodes can: when each was formed, it
recorded which ledgers (``node.ledger``) the other nodes had.

    another node was formed with another ledger of this node    this server was built anew: its blank disks never begin
    another node was formed with this very ledger               this node was there and has not begun yet: begin
    all others answer, and none was formed                      the cluster is new: begin
    otherwise, some don't answer                                wait for them
    otherwise                                                   the cluster does not know these disks: never begin

A node that is formed records that, with the others' ledgers, before any of its disks answers. The only node of a
cluster has no other to ask, and begins: it can't notice that its whole machine was replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from storaged.cluster.ports import LedgerReport


class Verdict(NamedTuple):
    """The decision: ``begin``, or the ``reason`` against it, in words for an operator. ``waits``: other nodes may still
    change it.
    """

    begin: bool
    reason: str = ""
    waits: bool = False


def strangers_of(own: bytes, others: Mapping[str, LedgerReport | None]) -> list[str]:
    """The nodes that were formed with another ledger of this node than ``own``."""
    return sorted(
        name
        for name, report in others.items()
        if report is not None and report.formed and report.yours and report.yours != own
    )


def judge_forming(own: bytes, others: Mapping[str, LedgerReport | None]) -> Verdict:
    """Decides whether this node may begin. ``own``: the id of its ledger. ``others``: the reports of all other storage
    nodes of the layout, None for one that does not answer.
    """
    if strangers := strangers_of(own, others):
        return Verdict(
            False,
            f"the cluster has been formed with other disks of this server (says {', '.join(strangers)}): it was built"
            " anew, or its directory is gone",
        )
    formed = {name: report for name, report in others.items() if report is not None and report.formed}
    if any(report.yours == own for report in formed.values()):
        return Verdict(True)
    silent = sorted(name for name, report in others.items() if report is None)
    if formed:
        away = f"; no answer yet from {', '.join(silent)}" if silent else ""
        reason = f"the cluster has been formed without these disks (says {', '.join(sorted(formed))}){away}"
        return Verdict(False, reason, waits=bool(silent))  # the first node that was formed knows all ledgers
    if silent:
        return Verdict(
            False,
            f"a new cluster begins when all its storage nodes are there; no answer yet from {', '.join(silent)}",
            waits=True,
        )
    return Verdict(True)


def ids_of(others: Mapping[str, LedgerReport | None]) -> dict[str, bytes]:
    """The ids of the other nodes' ledgers, as far as they answer."""
    return {name: report.id for name, report in others.items() if report is not None}
