"""A few power cuts, so that the suite stays quick: ``python -m tests.power_cuts`` makes many."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.meta.store_ports import RowDamaged
from tests.power_cuts.faulty import LyingPlay
from tests.power_cuts.planted import PLANTED, PLANTED_ON_FAILING, Plant
from tests.power_cuts.runs import Outcome, run, run_seed
from tests.sim.file_disk import directory_for_files
from tests.worlds.lmdb_calls import unavailable

CUTS = int(os.environ.get("STORAGED_POWER_CUTS", "240"))
SEEDS_MAX = 200
"""That may pass until a mistake is found."""

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=f"LMDB's calls can't be replaced here: {unavailable()}")


def test_no_power_cut_loses_what_was_acknowledged_or_brings_back_what_was_deleted() -> None:
    outcome = run(0, CUTS)
    assert not outcome.failures, outcome.failures[0]
    happened = outcome.happened
    for what in ("ends in a call", "ends in a call of LMDB", "killed in a call", "kills", "ends", "checkpoints"):
        assert happened[what], f"no history had: {what}"
    assert happened["copies restored"], "no start found a small copy in the redo log"
    assert happened["torn bytes"], "no start found a torn record"


def test_a_seed_plays_again_what_it_played() -> None:
    first, again = run(5, 20), run(5, 20)
    assert (first.happened, first.failures) == (again.happened, again.failures)


@pytest.mark.slow
def test_a_drive_that_fails_serves_nothing_that_was_never_written() -> None:
    """A lying one is played by the command only: what LMDB does with damaged pages may depend on the memory around."""
    outcome = run(0, CUTS // 2, drive="failing")
    assert not outcome.failures, outcome.failures[0]
    assert outcome.happened["cuts after a fault"]
    assert outcome.happened["rebuilt"], "no index was made again"


@pytest.fixture
def lied_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingPlay]:
    """The play of a disk with some fragments, whose drive has not lied so far."""
    with directory_for_files() as place:
        play = LyingPlay(1, Path(place))
        with play.attached():
            play.start()
            for _ in range(5):
                play.fragments.write()
            play.fragments.sync()
            monkeypatch.setattr(play.rng, "random", lambda: 0.5)  # acts on records
            yield play


def test_a_drive_that_begins_to_lie_while_its_disk_is_checked_may_lose_what_it_had(lied_to: LyingPlay) -> None:
    lied_to.power.faults.other_reads = 1.0
    lied_to.check()
    assert lied_to.power.harmed
    assert not lied_to.keeps_all


def test_a_drive_that_has_not_lied_so_far_must_have_all(lied_to: LyingPlay) -> None:
    lied_to.fragments.engine.delete(list(lied_to.fragments.written))
    with pytest.raises(AssertionError, match="lost"):
        lied_to.check()


def test_damaged_pages_refuse_a_request_only_after_the_drive_lied(
    lied_to: LyingPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged() -> None:
        raise RowDamaged("a damaged page")

    monkeypatch.setattr(lied_to.records, "act", damaged)
    with pytest.raises(RowDamaged):
        lied_to.act()
    lied_to.power.harmed.append("a write went elsewhere")
    lied_to.act()
    assert lied_to.happened["requests refused"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_power_cuts_find_a_planted_mistake(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    _assert_noticed(plant, monkeypatch, drive="sound")


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTED_ON_FAILING, ids=lambda plant: plant.__name__)
def test_plays_of_a_drive_that_fails_find_a_planted_mistake(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    _assert_noticed(plant, monkeypatch, drive="failing")


def _assert_noticed(plant: Plant, monkeypatch: pytest.MonkeyPatch, *, drive: str) -> None:
    plant(monkeypatch)
    outcome = Outcome()
    with directory_for_files() as place:
        for seed in range(SEEDS_MAX):
            run_seed(seed, Path(place) / "seed", outcome, drive=drive)
            if outcome.failures:
                return
    pytest.fail(f"{outcome.cuts} power cuts did not notice")
