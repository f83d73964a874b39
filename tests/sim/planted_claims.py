"""Bugs in what the nodes remember of each other's disks.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

CLAIMS = "storaged/cluster/claims.py"
FORGETFUL = "tests/sim/forgetful.py"

CLAIM_BUGS = (
    Planted("any_disk_answers", "no disk is compared", 40, "forgetful", rule="foreign_refused", fast=True),
    Planted(
        "positions_not_compared",
        "a disk that was put back within one start takes part",
        150,
        "forgetful",
        CLAIMS,
        "        or known.position > claim.position\n",
        "",
    ),
    Planted(
        "starts_not_compared",
        "a disk that was put back to an earlier start takes part",
        50,
        "forgetful",
        CLAIMS,
        "        or known.starts > claim.starts\n",
        "",
        fast=True,
    ),
    Planted(
        "stores_not_compared",
        "the disk of another place takes part",
        50,
        "forgetful",
        CLAIMS,
        "        known.store != claim.store\n        or",
        "        ",
        fast=True,
    ),
    Planted(
        "newest_is_the_first",
        "of two claims of a store the starts of the first count",
        50,
        "forgetful",
        CLAIMS,
        "max(one.starts, other.starts)",
        "one.starts",
        fast=True,
    ),
    Planted(
        "one_ledger_is_enough",
        "a disk takes part when its own node's ledger agrees",
        250,
        "forgetful",
        CLAIMS,
        "return (len(self.others) + 1) // 2 + 1",
        "return 1",
    ),
    Planted(
        "blank_ledgers_count",
        "a ledger that was lost counts before it was rebuilt",
        150,
        "forgetful",
        CLAIMS,
        "return not self.silent or whole >= len(self.others) // 2 + 1",
        "return True",
    ),
    Planted(
        "answers_before_it_is_claimed",
        "a disk answers before its start is in a majority of the ledgers",
        40,
        "forgetful",
        FORGETFUL,
        "        if self.world.rules.foreign_refused:\n            await self._claim()\n",
        "",
        fast=True,
    ),
)
