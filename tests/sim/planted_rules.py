"""The rules of the consensus, each switched off in turn. Every switch of ``Rules`` has its place here.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_RING = {
    "sync_before_answer": 100,
    "promises_survive_restart": 1200,
    "read_same_ballot": 200,
    "replay_confirmed": 200,
    "failed_condition_settles": 300,
    "retry_by_lineage": 100,
    "ballots_unique": 200,
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
    "system_by_gateways": (1, 120),
    "own_ballots": (150, 300),
    "known_epochs": (1, 250),
    "fences_reported": (1, 50),
}
"""As ``_RING``, of the rules that ``hostile`` shows: the first seed, and how many."""

_SLOW = {"promises_survive_restart", "created_follows_overtaken", "own_ballots"}

RULE_BUGS = (
    *(Planted(rule, f"without {rule}", budget, rule=rule, fast=rule not in _SLOW) for rule, budget in _RING.items()),
    *(
        Planted(rule, f"without {rule}", budget, "hostile", rule=rule, first=first, fast=rule not in _SLOW)
        for rule, (first, budget) in _HOSTILE.items()
    ),
)
