"""``python -m tests.sim --planted [NAME ...] [--fast]``: plants bugs in the program, one at a time, and says how many
seeds it takes to notice each.

A bug is a rule that is switched off (``rule``), or another text in a module. It has a budget of seeds: one that is not
noticed within it fails the run. Lists of bugs are plain data, and named in ``PLANTED``: who adds a rule adds its bug.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from tests.sim.changing import ROOT, change_imports, in_child, module_of, resolve

PLAYS = {
    "ring": "tests.sim.scenario:run_seed",
    "files": "tests.sim.scenario:run_on_files",
    "hostile": "tests.sim.hostile:run_hostile",
    "listing": "tests.sim.listing:run_listing",
    "buckets": "tests.sim.buckets:run_buckets",
    "forgetful": "tests.sim.forgetful:run_forgetful",
    "collecting": "tests.sim.collecting:run_collecting",
    "collecting floors": "tests.sim.collecting_floors:run_collecting_floors",
    "orphans": "tests.property.test_creates_of_fragments:run_orphans",
    "collecting moves": "tests.sim.collecting_moves:run_collecting_moves",
    "hiding": "tests.sim.hiding:run_hiding",
    "small": "tests.sim.small:run_small",
    "bursts": "tests.sim.bursts:run_bursts",
    "flicker": "tests.sim.flicker:run_flicker",
    "moving": "tests.sim.partitions:run_moving",
    "layouts": "tests.sim.layouts:run_layouts",
    "expunging": "tests.sim.expunging:run_expunging",
    "recovering": "tests.sim.recovering:run_recovering",
    "recovering system": "tests.sim.recovering_system:run_recovering_system",
    "sparing system": "tests.sim.sparing_system:run_sparing_system",
    "object lies": "tests.sim.object_lies:run_object_lies",
    "versions": "tests.sim.versions:run_versions",
    "lending": "tests.sim.lending:run_lending",
    "lenders": "tests.sim.lenders:run_lenders",
    "lenders moves": "tests.sim.lenders_moves:run_lenders_moves",
    "renaming": "tests.sim.renaming:run_renaming",
    "names": "tests.sim.names:run_names",
    "events": "tests.sim.events:run_events",
    "races": "tests.sim.races:run_races",
    "stale": "tests.sim.stale:run_stale",
    "stale versions": "tests.sim.stale:run_stale_versions",
    "lifecycle": "tests.sim.lifecycle:run_lifecycle",
    "inventories": "tests.sim.inventories:run_inventories",
}
"""What may notice a bug: each plays a seed, and says what was violated."""


@dataclass(frozen=True)
class Planted:
    """``old`` is ``new`` in the module at ``path``; or the switch ``rule`` is off. ``play``: of PLAYS. ``budget``:
    seeds from ``first`` on, about five times what it takes. ``fast``: it is part of the suite of tests.

    ``tests``: seeds would need too long, and a test or a file of them has to notice it instead. ``open``: nothing has
    shown it yet; it is planted by ``--open`` alone. ``why`` no seed shows it: what covers it, or what would have to
    come together. An open one without that is a debt.
    """

    name: str
    what: str
    budget: int
    play: str = "ring"
    path: str = ""
    old: str = ""
    new: str = ""
    rule: str = ""
    first: int = 1
    fast: bool = False
    tests: str = ""
    open: bool = False
    why: str = ""


@dataclass
class Caught:
    seeds: int = 0
    violation: str = ""


def planted() -> tuple[Planted, ...]:
    return tuple(bug for place in PLANTED for bug in resolve(place))


PLANTED = (
    "tests.sim.planted_collecting:COLLECTOR_BUGS",
    "tests.sim.planted_rules:RULE_BUGS",
    "tests.sim.planted_consensus:CONSENSUS_BUGS",
    "tests.sim.planted_overtaking:OVERTAKING_BUGS",
    "tests.sim.planted_stores:STORE_BUGS",
    "tests.sim.planted_claims:CLAIM_BUGS",
    "tests.sim.planted_moving:MOVING_BUGS",
    "tests.sim.planted_layouts:LAYOUT_BUGS",
    "tests.sim.planted_floors:FLOOR_BUGS",
    "tests.sim.planted_membership:MEMBERSHIP_BUGS",
    "tests.sim.planted_packets:PACKET_BUGS",
    "tests.sim.planted_recovery:RECOVERY_BUGS",
    "tests.sim.planted_system_recovery:SYSTEM_RECOVERY_BUGS",
    "tests.sim.planted_sparing:SPARING_BUGS",
    "tests.sim.planted_versions:VERSION_BUGS",
    "tests.sim.planted_events:EVENT_BUGS",
    "tests.sim.planted_lending:LENDING_BUGS",
    "tests.sim.planted_lenders:LENDER_BUGS",
    "tests.sim.planted_fences:FENCE_BUGS",
    "tests.sim.planted_renaming:RENAMING_BUGS",
    "tests.sim.planted_lifecycle:LIFECYCLE_BUGS",
    "tests.sim.planted_lifecycle:LIFECYCLE_PLAY_BUGS",
    "tests.sim.planted_races:RACE_BUGS",
    "tests.sim.planted_inventories:INVENTORY_BUGS",
)
"""Lists of bugs. They must not import the program."""


def text_change(bug: Planted, source: str) -> str:
    assert source.count(bug.old) == 1, f"{bug.name}: its text is {source.count(bug.old)} times in {bug.path}, not once"
    return source.replace(bug.old, bug.new)


def applies(bug: Planted) -> bool:
    """Whether its text is in the module, once."""
    return not bug.path or (ROOT / bug.path).read_text().count(bug.old) == 1


def hunt(bug: Planted) -> Caught:
    """In a process that has not imported the program."""
    if bug.path:
        change_imports({bug.path: lambda source: text_change(bug, source)})
    if bug.tests:
        return Caught(0, _dies_by_tests(bug.tests))
    play = resolve(PLAYS[bug.play])
    rules = resolve("storaged.meta.consensus.register:Rules")(**({bug.rule: False} if bug.rule else {}))
    if bug.path:
        assert module_of(bug.path) in sys.modules, f"{bug.name}: nothing imports {bug.path}"
    found = Caught()
    for seed in range(bug.first, bug.first + bug.budget):
        found.seeds += 1
        try:
            found.violation = play(seed, rules).violation
        except Exception as error:
            found.violation = f"{type(error).__name__}: {error}"
        if found.violation:
            break
    return found


def _dies_by_tests(tests: str) -> str:
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        failed = resolve("pytest:main")(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", tests])
    return next((line for line in told.getvalue().splitlines() if line.startswith("FAILED")), "tests") if failed else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim --planted", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="bugs; all of them if none is named")
    parser.add_argument("--fast", action="store_true", help="those that the suite of tests plants")
    parser.add_argument("--open", action="store_true", help="those that no seed has shown yet")
    parser.add_argument("--list", action="store_true", help="print them, and plant none")
    options = parser.parse_args(arguments)
    bugs = [
        bug
        for bug in planted()
        if (bug.name in options.names if options.names else bug.open == options.open) and (bug.fast or not options.fast)
    ]
    if options.list:
        for bug in bugs:
            print(f"{bug.name}: {bug.what} ({bug.play}, {bug.budget} seeds)")
        return 0
    missed = 0
    for bug in sorted(bugs, key=lambda bug: not bug.path):
        if not bug.path and not bug.tests:
            resolve(PLAYS[bug.play])  # the program is imported once for all rules, after the bugs that change its text
        outcome = in_child(lambda bug=bug: hunt(bug))  # type: ignore[misc]
        found = outcome.value or Caught()
        if found.violation and bug.tests:
            result = f"caught by tests ({outcome.cpu_s:.1f} s): {found.violation[:80]}"
        elif found.violation:
            result = f"caught after {found.seeds} of {bug.budget} seeds ({outcome.cpu_s:.1f} s): {found.violation[:80]}"
        else:
            missed += 1
            result = f"NOT caught: {outcome.error or f'{found.seeds} seeds showed nothing'} ({outcome.cpu_s:.1f} s)"
        print(f"{bug.name}: {result}", flush=True)
    still_open = sum(bug.open and not bug.why for bug in planted())
    print(f"{len(bugs)} bugs planted, {missed} not caught; {still_open} bugs are open (--open) and unexplained")
    return 1 if missed or not bugs else 0


if __name__ == "__main__":
    sys.exit(main())
