"""The ring under a nemesis: no violation with the rules, and a violation soon without any one of them.

``STORAGED_SIM_SEEDS=10000`` plays more. A failure names the seed; ``python -m tests.sim --first SEED --seeds 1`` (with
``--hostile``) plays it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from storaged.meta.consensus.register import RULES
from tests.sim.hostile import run_hostile
from tests.sim.scenario import run_seed

SEEDS = int(os.environ.get("STORAGED_SIM_SEEDS", "100"))
FIRST_SEED = int(os.environ.get("STORAGED_SIM_FIRST", "1"))

SEED_BUDGETS = {
    "sync_before_answer": 100,
    "promises_survive_restart": 1200,
    "read_same_ballot": 200,
    "replay_confirmed": 200,
    "failed_condition_settles": 200,
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

HOSTILE_SEEDS = int(os.environ.get("STORAGED_SIM_HOSTILE_SEEDS", "40"))

HOSTILE_BUDGETS = {
    "far_by_majority": (1, 50),
    "lone_ballot_does_not_lead": (1, 100),
    "unproved_set_aside": (1, 200),
    "system_by_gateways": (1, 120),
    "own_ballots": (101, 900),
    "known_epochs": (1, 250),
    "fences_reported": (1, 50),
}
"""As ``SEED_BUDGETS``, of the rules that ``hostile`` shows: the first seed, and how many."""


@pytest.mark.timeout(0)
def test_with_its_rules_the_ring_is_linearizable_whatever_fails() -> None:
    done = unknown = operations = 0
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        found = run_seed(seed)
        assert not found.violation, f"seed {seed}: {found.violation} ({', '.join(found.faults)})"
        done += found.operations - found.refused
        unknown += found.unknown
        operations += found.operations
    assert done > operations // 2, "most operations must get through, or nothing was tested"
    print(f"{SEEDS} seeds, {operations} operations, {unknown} of unknown outcome, no violation")


@pytest.mark.timeout(0)
def test_a_liar_clocks_and_storage_nodes_break_nothing() -> None:
    for seed in range(FIRST_SEED, FIRST_SEED + HOSTILE_SEEDS):
        found = run_hostile(seed)
        assert not found.violation, f"hostile seed {seed}: {found.violation} ({', '.join(found.faults)})"


@pytest.mark.parametrize("rule", HOSTILE_BUDGETS)
def test_without_one_of_its_rules_a_liar_is_caught(rule: str) -> None:
    rules = replace(RULES, **{rule: False})
    first, budget = HOSTILE_BUDGETS[rule]
    assert any(run_hostile(seed, rules).violation for seed in range(first, first + budget)), (
        f"without {rule} nothing was noticed"
    )


@pytest.mark.parametrize("rule", SEED_BUDGETS)
def test_without_one_of_its_rules_the_ring_is_caught(rule: str) -> None:
    rules = replace(RULES, **{rule: False})
    for seed in range(1, SEED_BUDGETS[rule] + 1):
        found = run_seed(seed, rules)
        if found.violation:
            print(f"without {rule}: caught after {seed} seeds: {found.violation}")
            return
    pytest.fail(f"without {rule} nothing was noticed in {SEED_BUDGETS[rule]} seeds")


def test_every_rule_has_a_budget() -> None:
    assert set(SEED_BUDGETS) | set(HOSTILE_BUDGETS) == set(RULES.__dataclass_fields__)


def test_a_seed_plays_the_same_in_every_process() -> None:
    root = Path(__file__).resolve().parents[2]
    outputs = []
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "tests.sim", "--seeds", "3", "--first", "5", "--trace"]
        played = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        outputs.append([line for line in played.stdout.splitlines() if line.startswith("seed ")])
    assert len(outputs[0]) == 3
    assert outputs[0] == outputs[1]
