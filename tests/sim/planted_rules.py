"""The rules of the consensus, each switched off in turn. Every switch of ``Rules`` has its place here.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_RING = {
    "sync_before_answer": 100,
    "promises_survive_restart": 4000,
    "read_same_ballot": 200,
    "differing_settled": 200,
    "failed_condition_settles": 300,
    "retry_by_lineage": 100,
    "refused_by_all": 150,
    "ballots_unique": 1200,
    "foreign_refused": 500,
    "fence_by_epoch": 200,
    "copies_travel": 400,
    "create_into_nothing": 100,
    "counters_bounded": 100,
    "created_follows_overtaken": 1000,
}
"""How many seeds a run without the rule may take to show it; about five times what it took when this was written."""

_HOSTILE = {
    "far_by_majority": (1, 50),
    "lone_ballot_does_not_lead": (1, 100),
    "unproved_set_aside": (1, 200),
    "values_by_gateways": (1, 120),
    "own_ballots": (1, 200),
    "known_epochs": (18, 250),
    "fences_reported": (1, 50),
}
"""As ``_RING``, of the rules that ``hostile`` shows: the first seed, and how many."""

_SMALL = {
    "chosen_by_bit": 100,
    "older_needs_minority": 100,
    "older_at_once": 200,
    "older_as_new_change": 200,
    "errors_no_damage": 500,
}
"""As ``_RING``, of the rules that ``small`` shows."""

_STALE = {"creates_spare_history": 40}
"""As ``_RING``, of the rule that ``stale`` shows."""

_SLOW = {
    "chosen_by_bit",
    "older_needs_minority",
    "own_ballots",
    "ballots_unique",
    "copies_travel",
    "failed_condition_settles",
    "fence_by_epoch",
    "refused_by_all",
    "promises_survive_restart",
    "created_follows_overtaken",
    "errors_no_damage",
    "older_at_once",
    "older_as_new_change",
}

_AUTHORITY = "storaged/meta/authority.py"
_JUDGE = "        for row in self._contents:"
AUTHORITY_BUGS = (
    Planted(
        "never_by_storage_nodes",
        "a storage node may prepare, and write NEVER where the acceptor has accepted nothing",
        3000,
        "hostile",
        _AUTHORITY,
        _JUDGE,
        "        if ballot.epoch == 1 and (isinstance(request, Prepare) or request.value.sequence == 0):\n"
        "            return OK\n" + _JUDGE,
        first=101,
    ),
    Planted(
        "adopts_what_one_replica_says",
        "a disk that lags adopts the newest that any replica reports",
        200,
        "hostile",
        "storaged/meta/consensus/looks.py",
        "    found = look.quorum.agreed(look.held)\n",
        "    found = max(look.held.values(), key=lambda held: held.ballot, default=None)\n",
    ),
)
"""Of what a caller may ask of an acceptor."""

_COPIES_WITH_ROWS = Planted(
    "copies_with_rows",
    "an acceptor writes a row whose copy it does not have",
    0,
    "small",
    "storaged/meta/consensus/acceptor.py",
    "    if not copied and ballot != acceptor.accepted and rules.copies_with_rows:\n        return Verdict.UNSTORED\n",
    "",
    rule="copies_with_rows",
    tests="tests/unit/test_register.py",
    why="Rules 23 and 24 do not count such a row, and the copy of the record before it, which has the same data, can be"
    " read from a replica that has it. So two copies of three have to be lost, which is more than these runs lose.",
)

_SCANS_AFTER_FENCE = Planted(
    "scans_after_fence",
    "a bucket counts as empty where replicas say so that have no fence yet",
    0,
    "buckets",
    "storaged/meta/acceptor/rows.py",
    "            and self._rules.scans_after_fence\n",
    "            and False\n",
    rule="scans_after_fence",
    tests="tests/unit/test_replica.py",
    why="An accept must be on its way to one of two disks while a gateway looks there, and the look must miss the other"
    " disk: about one of 2,000 seeds of `buckets` did.",
)

_TWO_SAY_EMPTY = Planted(
    "two_of_three_say_that_a_bucket_is_empty",
    "a bucket that is deleted counts as empty where two replicas agree, one of which lies and one lags",
    0,
    path="storaged/meta/listing/agreement.py",
    old="        if query.after_fence and _may_show(query, rows) and _differ(answers, rows):\n",
    new="        if False:\n",
    tests="tests/unit/test_meta_listing.py",
)

RULE_BUGS = (
    *AUTHORITY_BUGS,
    _SCANS_AFTER_FENCE,
    _TWO_SAY_EMPTY,
    _COPIES_WITH_ROWS,
    *(Planted(rule, f"without {rule}", budget, rule=rule, fast=rule not in _SLOW) for rule, budget in _RING.items()),
    *(
        Planted(rule, f"without {rule}", budget, "small", rule=rule, fast=rule not in _SLOW)
        for rule, budget in _SMALL.items()
    ),
    *(
        Planted(rule, f"without {rule}", budget, "stale", rule=rule, fast=rule not in _SLOW)
        for rule, budget in _STALE.items()
    ),
    *(
        Planted(rule, f"without {rule}", budget, "hostile", rule=rule, first=first, fast=rule not in _SLOW)
        for rule, (first, budget) in _HOSTILE.items()
    ),
)
