"""Bugs in how partitions go on after a majority of their disks is lost. Plain data: imports nothing of the program."""

from __future__ import annotations

from tests.sim.planted import Planted

_PARTITIONS = "storaged/cluster/partitions.py"
_QUORUMS = "storaged/meta/consensus/quorums.py"

RECOVERY_BUGS = (
    Planted(
        "recovered_from_one_set",
        "a joint partition of which each set has a disk of its own goes on from one of the two alone",
        30,
        "recovering",
        _PARTITIONS,
        "    stays = any(set(disks) - set(left[number]) for disks in left)\n",
        "    stays = False\n",
    ),
    Planted(
        "recovered_set_counts_lost_disks",
        "lost disks count in the quorums of a recovered partition",
        5,
        "recovering",
        _QUORUMS,
        "        quorum = Quorum(*(voting_sets(sets, lost) if lost else sets))\n",
        "        quorum = Quorum(*sets)\n",
    ),
)
