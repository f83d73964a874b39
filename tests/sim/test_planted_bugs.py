"""Bugs that are planted in the ring are noticed: here those that are noticed soon, by ``python -m tests.sim --planted``
all of them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from storaged.meta.consensus.register import RULES
from tests.sim.planted import applies, planted

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(0)
def test_bugs_that_are_planted_are_noticed() -> None:
    """In a process of its own, since modules are changed as they are imported."""
    command = [sys.executable, "-m", "tests.sim", "--planted", "--fast"]
    played = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert played.returncode == 0, played.stdout + played.stderr
    print(played.stdout)


def test_every_rule_has_a_budget() -> None:
    assert {bug.rule for bug in planted() if bug.rule} == set(RULES.__dataclass_fields__)


def test_every_planted_bug_is_one() -> None:
    """Its text is in the program still, once."""
    assert [bug.name for bug in planted() if not applies(bug)] == []
    names = [bug.name for bug in planted()]
    assert len(names) == len(set(names))
