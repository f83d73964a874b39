"""Tries mutants: which tests and seeds reach a line, and which of them notice that it was changed.

Imports the program. ``try_inside`` does it for mutants of functions, in children of one process, ``try_imported`` for
one that was changed as it was imported.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase, settings

from tests.sim.changing import ROOT, in_child, resolve
from tests.sim.mutants import CPU_S_MAX, MUTANT_S_MAX, Log, Mutant, changed_functions
from tests.sim.planted import PLAYS

CONSENSUS = str(ROOT / "storaged/meta/consensus")

TESTS = (
    "tests/unit/test_bounds.py",
    "tests/unit/test_change_ends.py",
    "tests/unit/test_register.py",
    "tests/unit/test_register_edges.py",
    "tests/unit/test_quorums.py",
    "tests/unit/test_rounds.py",
    "tests/unit/test_looks.py",
    "tests/unit/test_chosen_watch.py",
    "tests/unit/test_refused_attempts.py",
    "tests/unit/test_reader_lies.py",
    "tests/unit/test_create.py",
    "tests/unit/test_replica.py",
    "tests/unit/test_change_shell.py",
    "tests/unit/test_state_diagrams.py",
    "tests/unit/test_joint_quorums.py",
    "tests/unit/test_floors.py",
    "tests/unit/test_accepts.py",
    "tests/unit/test_registers_client.py",
    "tests/property/test_reader.py",
    "tests/property/test_proposer.py",
    "tests/unit/test_overtaking.py",
    "tests/property/test_overtaking.py",
    "tests/sim/test_lost_copies.py",
)
FIRST_TESTS = TESTS[:12]
"""Of a mutant that is changed as it is imported."""

SEEDS = {
    "ring": 30,
    "hostile": 16,
    "small": 10,
    "listing": 3,
    "buckets": 3,
    "bursts": 1,
    "object lies": 4,
    "moving": 4,
    "expunging": 4,
}
"""From the first one on, of each play."""

OUTSIDE_SEEDS = {"ring": 8, "hostile": 4, "small": 2, "listing": 1, "moving": 1}
"""Of a mutant that is changed as it is imported: each costs a process of its own."""

LEFT_OUT = ("test_the_table_holds_what_the_machine_does_and_nothing_else",)
"""Takes half a minute for every mutant."""

OUTSIDE = "outside of functions"


class Reach(NamedTuple):
    """What a test or a seed costs, and the lines of the consensus that it reaches: (the module's file, line)."""

    cpu_s: float
    wall_s: float
    lines: frozenset[tuple[str, int]]


Notice = Callable[[], str]
"""Says what it notices; empty: nothing."""


def _seed_notices(counts: Mapping[str, int] = SEEDS) -> Iterator[tuple[str, Notice]]:
    for play, count in counts.items():
        for seed in range(1, count + 1):
            yield f"{play} {seed}", lambda play=play, seed=seed: _play(play, seed)  # type: ignore[misc]


def _play(play: str, seed: int) -> str:
    try:
        return str(resolve(PLAYS[play])(seed).violation)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class _Failures:
    """A plugin that keeps what failed."""

    def __init__(self) -> None:
        self.text = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.text = self.text or f"{report.nodeid} ({report.when})"


class Trials:
    """A plugin: instead of running the tests that pytest has collected, it tries mutants on them."""

    def __init__(self, mutants: Sequence[Mutant], log: Log, reach: Path | None, *, seeds: bool) -> None:
        self._seeds = seeds
        self._mutants, self._log, self._reach_file = mutants, log, reach
        self._notices: dict[str, Notice] = {}
        self._reach: dict[str, Reach] = {}
        self._killers: Counter[tuple[str, str]] = Counter()
        """How often something has noticed a mutant of a function."""
        self.outside: list[Mutant] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        failures = _Failures()
        session.config.pluginmanager.register(failures)
        for item in session.items:
            if item.name in LEFT_OUT:
                continue
            _without_shrinking(item)
            self._notices[item.nodeid] = lambda item=item: _run(item, failures)  # type: ignore[misc]
        if self._seeds:
            self._notices |= dict(_seed_notices())
            for play in SEEDS:
                resolve(PLAYS[play])
        self._reach = self._measured()
        for mutant in self._mutants:
            outcome = in_child(lambda mutant=mutant: self._try(mutant), limit_s=MUTANT_S_MAX)  # type: ignore[misc]
            name, died = outcome.value or ("", outcome.error)
            if name == OUTSIDE:
                self.outside.append(mutant)
                continue
            if name:
                self._killers[_function_of(mutant), name] += 1
            self._log.add(mutant, died)
        return True

    def _measured(self) -> dict[str, Reach]:
        if self._reach_file is not None and self._reach_file.exists():
            return dict(pickle.loads(self._reach_file.read_bytes()))
        outcome = in_child(self._measure)
        assert not outcome.error, outcome.error
        print("left out:", *(self._notices.keys() - outcome.value.keys()))
        if self._reach_file is not None:
            self._reach_file.write_bytes(pickle.dumps(outcome.value))
        return dict(outcome.value)

    def _measure(self) -> dict[str, Reach]:
        reach = {}
        with _silent():
            for name, notice in self._notices.items():
                lines: set[tuple[str, int]] = set()
                began, wall = time.process_time(), time.monotonic()
                if not _traced(notice, lines):  # a test that fails while it is traced is left out
                    cpu_s, wall_s = time.process_time() - began, time.monotonic() - wall
                    reach[name] = Reach(cpu_s, wall_s, frozenset(lines))
        return reach

    def _try(self, mutant: Mutant) -> tuple[str, str]:
        """Which test or seed notices it, and what it says. In a child."""
        limit = int(time.process_time() + CPU_S_MAX + 8)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        if not replaced_functions(mutant):
            return OUTSIDE, ""
        first, last = mutant.lines
        lines = {(Path(mutant.path).name, line) for line in range(first, last + 1)}
        reaching = [name for name, reach in self._reach.items() if name in self._notices and reach.lines & lines]
        function = _function_of(mutant)
        spent = 0.0
        with _silent():
            for name in sorted(reaching, key=lambda name: (-self._killers[function, name], self._reach[name].wall_s)):
                spent += self._reach[name].cpu_s
                if noticed := self._notices[name]():
                    return name, noticed
                if spent > CPU_S_MAX:
                    break
        return "", ""


def _function_of(mutant: Mutant) -> str:
    return f"{mutant.path} {mutant.text.partition(':')[0]}"


def _without_shrinking(item: pytest.Item) -> None:
    """That a property fails is enough: to find a small example takes minutes."""
    test = getattr(item, "obj", None)
    its = getattr(test, "_hypothesis_internal_use_settings", None)
    if its is not None:
        test._hypothesis_internal_use_settings = settings(its, phases=(Phase.explicit, Phase.generate))  # type: ignore[union-attr]


def _run(item: pytest.Item, failures: _Failures) -> str:
    failures.text = ""
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
    return failures.text


def _traced(work: Notice, lines: set[tuple[str, int]]) -> str:
    files: dict[CodeType, str] = {}

    def on_line(frame: FrameType, _event: str, _argument: Any) -> Any:
        lines.add((files[frame.f_code], frame.f_lineno))
        return on_line

    def on_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(CONSENSUS):
            return None
        files[code] = os.path.basename(code.co_filename)
        return on_line

    sys.settrace(on_call)
    try:
        return work()
    finally:
        sys.settrace(None)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """For the rest of this process."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    yield


def replaced_functions(mutant: Mutant) -> bool:
    """Changes them in memory. False: the mutant is outside of functions."""
    changed = changed_functions(mutant)
    if changed is None:
        return False
    path = str(ROOT / mutant.path)
    replaced = set()
    gc.unfreeze()  # pytest's objects were frozen when all tests were known, and frozen ones are not among all objects
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename == path:
            place = function.__code__.co_qualname, function.__code__.co_firstlineno
            if place in changed:
                function.__code__ = changed[place]
                replaced.add(place)
    assert replaced == set(changed), f"{mutant.name}: {set(changed) - replaced} is not in memory"
    return True


def _pytest(tests: Sequence[str], plugins: Sequence[object]) -> int:
    os.environ["STORAGED_TESTS"] = "fast"
    options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=1", "-p", "no:timeout")
    return int(pytest.main([*options, *tests], plugins=list(plugins)))


def try_inside(
    mutants: Sequence[Mutant], log: Log, tests: Sequence[str], reach: Path | None
) -> tuple[dict[str, str], list[Mutant]]:
    """What noticed each of them, and those that are outside of functions. ``tests``: files that are tried without
    seeds; otherwise all.
    """
    trials = Trials(mutants, log, reach, seeds=not tests)
    failed = _pytest(tests or TESTS, [trials])
    assert not failed, f"pytest ended with {failed}"
    return log.died, trials.outside


def try_imported(tests: Sequence[str]) -> str:
    """What notices the mutant that this process has imported."""
    failures = _Failures()
    seeds = {} if tests else dict(_seed_notices(OUTSIDE_SEEDS))
    first = [name for name in seeds if name.startswith("ring ")][:4]
    with _silent():
        for name in first:
            if noticed := seeds[name]():
                return f"{name}: {noticed}"
        if _pytest(tests or FIRST_TESTS, [failures]):
            return failures.text or "tests"
        for name, notice in seeds.items():
            if noticed := notice():
                return f"{name}: {noticed}"
    return ""
