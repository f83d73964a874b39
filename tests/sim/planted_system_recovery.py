"""Bugs in how the system partition goes on after its majority was lost. Plain data: imports nothing of the program."""

from __future__ import annotations

from tests.sim.planted import Planted

_ACCEPTING = "storaged/node/accepting.py"
_OPENER = "storaged/node/opener.py"
_CERTIFICATES = "storaged/cluster/certificates.py"
_EXCHANGE = "storaged/node/ledger_exchange.py"
_LAYOUTS = "storaged/cluster/layouts.py"
_PARTITIONS = "storaged/cluster/partitions.py"
_SUCCESSION = "storaged/cluster/succession.py"
_VOTERS = "storaged/cluster/voters.py"

SYSTEM_RECOVERY_BUGS = (
    Planted(
        "old_seed_counts",
        "a lost seed disk counts in the quorums of the recovered system partition",
        5,
        "recovering system",
        _PARTITIONS,
        "        seeds, coming, lost = current.seeds, current.seeds_next, current.seeds_lost\n",
        "        seeds, coming, lost = current.seeds, current.seeds_next, ()\n",
        fast=True,
    ),
    Planted(
        "lost_disk_is_opened",
        "a disk that is lost for good takes part when it comes back",
        10,
        "recovering system",
        _OPENER,
        "    if disk in layout.lost:\n",
        "    if False:\n",
    ),
    Planted(
        "lost_disk_is_claimed",
        "ledgers keep what a lost disk claims anew, before its node knows that it is lost",
        60,
        "recovering system",
        _EXCHANGE,
        "            check_not_lost(claims, self._layouts.current)\n",
        "",
    ),
    Planted(
        "ledgers_of_lost_nodes_count",
        "the ledgers of nodes whose disks are all lost are needed for a majority",
        5,
        "recovering system",
        _EXCHANGE,
        "{disk.node for disk in layout.disks if disk.id not in layout.lost}",
        '{node.name for node in layout.nodes if "storage" in node.roles}',
    ),
    Planted(
        "living_majority_is_given_up",
        "a node accepts a recovery though the system partition has a quorum",
        5,
        "recovering system",
        _ACCEPTING,
        "        elif reason := await self.may_recover(layout):\n",
        '        elif reason := "":\n',
    ),
    Planted(
        "two_recoveries",
        "a node accepts a recovery although it has accepted another one of the same disks",
        40,
        "recovering system",
        _SUCCESSION,
        "    return recovers(after) and set(seeds_lost) < set(after.seeds_lost)\n",
        "    return recovers(after)\n",
    ),
    Planted(
        "promise_stops_recovery",
        "a node that has promised a layout accepts no recovery any more",
        60,
        "recovering system",
        _SUCCESSION,
        "    return recovers(after) and set(seeds_lost) < set(after.seeds_lost)\n",
        "    return False\n",
    ),
    Planted(
        "dead_layout_is_pending",
        "a layout that was decided before the recovery stops all later ones",
        60,
        "recovering system",
        _LAYOUTS,
        "        if before is None or before is self._current or follows_instead(self.current, layout):\n",
        "        if True:\n",
    ),
    Planted(
        "some_that_are_left_accept",
        "one of the seed disks that are left is enough for a recovery",
        1,
        path=_CERTIFICATES,
        old="        return bool(left) and left <= accepted\n",
        new="        return bool(left & accepted)\n",
        tests="tests/unit/test_system_recovery.py",
        why="with three seed disks mostly one is left; gateways ask the nodes in one order, so the first one decides",
    ),
    Planted(
        "majority_of_few_is_enough",
        "of three seed disks of seven that are left two are a quorum",
        1,
        path=_VOTERS,
        old="        if 2 < len(left) < len(disks) and len(left) <= len(disks) // 2 + 1:\n",
        new="        if False:\n",
        tests="tests/unit/test_system_recovery.py",
        why="the play has three seed disks",
    ),
)
