"""The ring under a nemesis: no violation with the rules, and a violation soon without any one of them.

``STORAGED_SIM_SEEDS=10000`` plays more. A failure names the seed; ``python -m tests.sim --first SEED --seeds 1`` (with
``--play``) plays it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.sim import liveness_moving
from tests.sim.buckets import run_buckets
from tests.sim.bursts import run_bursts
from tests.sim.collecting import run_collecting
from tests.sim.collecting_moves import run_collecting_moves
from tests.sim.expunging import run_expunging
from tests.sim.flicker import run_flicker
from tests.sim.forgetful import run_forgetful
from tests.sim.happened import LEAST, SEEDS_MIN, Happened
from tests.sim.hiding import run_hiding
from tests.sim.hostile import run_hostile
from tests.sim.inventories import run_inventories
from tests.sim.layouts import run_layouts
from tests.sim.lenders import run_lenders
from tests.sim.lenders_moves import run_lenders_moves
from tests.sim.lending import run_lending
from tests.sim.lifecycle import run_lifecycle
from tests.sim.listing import run_listing
from tests.sim.liveness import FAULTS, broken, run_liveness
from tests.sim.liveness_moving import MOVING_FAULTS, run_moving_liveness
from tests.sim.mutants import all_mutants, changed_functions, survivors
from tests.sim.names import run_names
from tests.sim.object_lies import run_object_lies
from tests.sim.partitions import run_moving
from tests.sim.planted import PLAYS
from tests.sim.races import run_races
from tests.sim.recovering import run_recovering
from tests.sim.recovering_system import run_recovering_system
from tests.sim.renaming import run_renaming
from tests.sim.scenario import run_seed
from tests.sim.small import run_small
from tests.sim.sparing_system import run_sparing_system
from tests.sim.stale import run_stale, run_stale_versions
from tests.sim.versions import run_versions
from tests.sim.workload import Verdicts

ROOT = Path(__file__).resolve().parents[2]
SEEDS = int(os.environ.get("STORAGED_SIM_SEEDS", "40"))
FIRST_SEED = int(os.environ.get("STORAGED_SIM_FIRST", "1"))
HOSTILE_SEEDS = int(os.environ.get("STORAGED_SIM_HOSTILE_SEEDS", "20"))
LISTING_SEEDS = int(os.environ.get("STORAGED_SIM_LISTING_SEEDS", "15"))
BUCKET_SEEDS = int(os.environ.get("STORAGED_SIM_BUCKET_SEEDS", "8"))
MOVING_SEEDS = int(os.environ.get("STORAGED_SIM_MOVING_SEEDS", "25"))
BURST_SEEDS = int(os.environ.get("STORAGED_SIM_BURST_SEEDS", "6"))
SMALL_SEEDS = int(os.environ.get("STORAGED_SIM_SMALL_SEEDS", "15"))
COLLECTING_SEEDS = int(os.environ.get("STORAGED_SIM_COLLECTING_SEEDS", "3"))
FORGETFUL_SEEDS = int(os.environ.get("STORAGED_SIM_FORGETFUL_SEEDS", "20"))
FLICKER_SEEDS = int(os.environ.get("STORAGED_SIM_FLICKER_SEEDS", "20"))
EXPUNGING_SEEDS = int(os.environ.get("STORAGED_SIM_EXPUNGING_SEEDS", "12"))
RECOVERING_SEEDS = int(os.environ.get("STORAGED_SIM_RECOVERING_SEEDS", "8"))
LAYOUT_SEEDS = int(os.environ.get("STORAGED_SIM_LAYOUT_SEEDS", "10"))
LONG_SEEDS = int(os.environ.get("STORAGED_SIM_LONG_SEEDS", "2"))
OBJECT_LIES_SEEDS = int(os.environ.get("STORAGED_SIM_OBJECT_LIES_SEEDS", "10"))


def sound(play: Callable[[int], Verdicts], seeds: int) -> Iterator[Verdicts]:
    """What each seed showed. Fails at the first violation."""
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        found = play(seed)
        assert not found.violation, f"{play.__name__} {seed}: {found.violation} ({', '.join(found.faults)})"
        yield found


@pytest.mark.timeout(0)
def test_with_its_rules_the_ring_is_linearizable_whatever_fails() -> None:
    done = unknown = operations = 0
    for found in sound(run_seed, SEEDS):
        done += found.operations - found.refused
        unknown += found.unknown
        operations += found.operations
    assert done > operations // 2, "most operations must get through, or nothing was tested"
    print(f"{SEEDS} seeds, {operations} operations, {unknown} of unknown outcome, no violation")


@pytest.mark.timeout(0)
def test_a_liar_clocks_and_storage_nodes_break_nothing() -> None:
    assert list(sound(run_hostile, HOSTILE_SEEDS))


@pytest.mark.timeout(0)
def test_one_replica_that_lies_about_objects_changes_and_hides_none_while_both_others_agree() -> None:
    assert list(sound(run_object_lies, OBJECT_LIES_SEEDS))


@pytest.mark.timeout(0)
def test_rounds_of_which_each_replica_hears_another_part_break_nothing() -> None:
    assert list(sound(run_flicker, FLICKER_SEEDS))


@pytest.mark.timeout(0)
def test_every_page_of_a_list_is_a_linearizable_read_of_the_keys_it_spans() -> None:
    assert list(sound(run_listing, LISTING_SEEDS))


@pytest.mark.timeout(0)
def test_small_objects_are_neither_undone_nor_damaged_whatever_becomes_of_copies() -> None:
    assert list(sound(run_small, SMALL_SEEDS))


@pytest.mark.timeout(0)
def test_many_keys_that_change_in_one_turn_do_not_get_each_others_answers() -> None:
    sizes: Counter[int] = Counter()
    for found in sound(run_bursts, BURST_SEEDS):
        sizes.update(found.accepts_a_message)
    together = sum(size * count for size, count in sizes.items() if size > 1)
    assert together > sum(size * count for size, count in sizes.items()) // 5, sorted(sizes.items())


@pytest.mark.timeout(0)
def test_partitions_move_while_gateways_work_whatever_fails() -> None:
    assert list(sound(run_moving, MOVING_SEEDS))


@pytest.mark.timeout(0)
def test_layouts_have_one_history_and_the_system_partition_moves_whatever_fails() -> None:
    assert sum(found.done["layouts"] for found in sound(run_layouts, LAYOUT_SEEDS)) >= LAYOUT_SEEDS


@pytest.mark.timeout(0)
def test_rows_of_deleted_keys_go_while_gateways_work_whatever_fails() -> None:
    assert sum(found.done["expunged"] for found in sound(run_expunging, EXPUNGING_SEEDS)) >= EXPUNGING_SEEDS


@pytest.mark.timeout(0)
def test_partitions_that_lost_a_majority_go_on_with_all_that_is_left() -> None:
    recovered: Counter[str] = Counter()
    for found in sound(run_recovering, RECOVERING_SEEDS):
        recovered.update(found.done)
    assert recovered["recovered"] >= RECOVERING_SEEDS
    assert recovered["recovered joint"]


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "play",
    [
        run_collecting_moves,
        run_hiding,
        run_recovering_system,
        run_sparing_system,
        run_versions,
        run_races,
        run_stale,
        run_stale_versions,
        run_lifecycle,
        run_inventories,
        run_lending,
        run_lenders,
        run_lenders_moves,
        run_renaming,
        run_names,
    ],
)
def test_of_plays_that_take_long_a_few_seeds_are_played(play: Callable[[int], Verdicts]) -> None:
    assert list(sound(play, LONG_SEEDS))


def test_a_key_of_the_play_of_lifecycle_may_have_more_versions_than_a_record_takes() -> None:
    assert not run_lifecycle(731_054).violation


def test_a_play_in_which_nothing_happens_fails() -> None:
    idle, busy = Happened(), Happened()
    for seed in range(SEEDS_MIN):
        idle.add(Verdicts(seed, operations=40, refused=39, seconds=4.0, done={"steps": 10}))
        busy.add(Verdicts(seed, operations=40, refused=2, seconds=4.0))
    assert "operations were acknowledged a virtual minute, fewer than 300" in idle.too_little("moving")
    assert busy.too_little("moving") == "0 steps in 20 seeds, fewer than 6 a seed"
    assert not busy.too_little("ring")
    assert {"moving", "layouts"} <= LEAST.keys() <= PLAYS.keys()


@pytest.mark.timeout(0)
def test_buckets_are_deleted_whatever_fails() -> None:
    assert list(sound(run_buckets, BUCKET_SEEDS))


@pytest.mark.parametrize("seed", [9004011, 9006017])
def test_a_bucket_opens_although_one_disk_takes_no_writes_any_more(seed: int) -> None:
    """Its fence is lifted at all other disks, and the record keeps its nonce for the one."""
    assert not run_buckets(seed).violation


@pytest.mark.timeout(0)
def test_a_disk_that_forgot_what_it_promised_answers_nothing_and_all_others_take_part() -> None:
    assert list(sound(run_forgetful, FORGETFUL_SEEDS))


@pytest.mark.timeout(0)
def test_the_collector_deletes_what_nothing_refers_to_and_nothing_else() -> None:
    assert list(sound(run_collecting, COLLECTING_SEEDS))


def test_every_survivor_that_is_listed_is_a_mutant_and_has_a_reason() -> None:
    listed = survivors()
    assert sorted(listed.keys() - {mutant.name for mutant in all_mutants()}) == []
    assert [name for name, reason in listed.items() if not reason] == []


def test_a_mutant_changes_the_code_of_its_function_alone() -> None:
    inside = next(mutant for mutant in all_mutants(["quorums"]) if "Quorum.met: if len(disks)" in mutant.text)
    assert [name for name, _ in changed_functions(inside) or ()] == ["Quorum.met"]
    outside = next(mutant for mutant in all_mutants(["change"]) if "CARRY_TRIES" in mutant.text)
    assert changed_functions(outside) is None


PLAYER = """
import sys
from tests.sim.playing import main
for line in sys.stdin:
    print("end", main(line.split()), flush=True)
"""


@pytest.fixture(scope="module")
def players() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that differ in the order of their sets. All tests use the same ones: to start one takes as long as to
    play a seed.
    """
    command, pipe, started = [sys.executable, "-c", PLAYER], subprocess.PIPE, list[subprocess.Popen[str]]()
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        )
    yield started
    for player in started:
        player.communicate()
    assert [player.returncode for player in started] == [0] * len(started)


def digests(player: subprocess.Popen[str], play: str, seeds: int) -> list[str]:
    assert player.stdin is not None
    assert player.stdout is not None
    player.stdin.write(f"--play {play} --seeds {seeds} --first 5 --trace\n")
    printed = list[str]()
    for line in player.stdout:
        if line.startswith("end "):
            assert line == "end 0\n", printed
            return [line for line in printed if line.startswith("seed ")]
        printed.append(line)
    raise AssertionError(f"the process has ended: {printed}")


@pytest.mark.parametrize(
    "play",
    [
        "ring",
        "buckets",
        "events",
        "races",
        "stale",
        "lifecycle",
        "inventories",
        "versions",
        "lending",
        "lenders",
        "renaming",
        "names",
    ],
)
def test_a_seed_plays_the_same_in_every_process(play: str, players: list[subprocess.Popen[str]]) -> None:
    """Also of plays with an object plane: it seals records with nonces, and has sets of disks."""
    seeds = 4 if play == "ring" else 2
    one, other = (digests(player, play, seeds) for player in players)
    assert len(one) == seeds
    assert one == other


@pytest.mark.parametrize("fault", FAULTS)
def test_with_one_fault_at_a_time_operations_go_on(fault: str) -> None:
    found = run_liveness(fault)
    assert not broken(fault, found), broken(fault, found)


@pytest.mark.parametrize("fault", MOVING_FAULTS)
def test_with_one_fault_at_a_time_partitions_reach_their_places_and_operations_go_on(fault: str) -> None:
    found = run_moving_liveness(fault)
    assert not liveness_moving.broken(fault, found), liveness_moving.broken(fault, found)


def test_the_liveness_of_a_seed_is_the_same_in_every_run() -> None:
    fault = "a gateway dies"
    assert run_liveness(fault) == run_liveness(fault)
