"""Clients that change one key through several gateway processes: figures in virtual time.

``python -m tests.sim.hot`` plays the same for longer and prints all of it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sim.hot import FAULTS, Figures, Load, play

SEED, SECONDS = 1, 6.0

UNKNOWN_MAX = 0.01
LEAST_OF_MEAN = 1 / 3
LEAST_OF_ONE_PROCESS = 0.8


def _play(load: Load, seconds: float = SECONDS) -> Figures:
    figures = play(SEED, replace(load, seconds=seconds))
    assert not figures.wrong, figures
    return figures


@pytest.fixture(scope="module")
def one_process() -> Figures:
    return _play(Load(1))


@pytest.mark.parametrize(
    "load",
    [Load(2), Load(4), Load(8), Load(8, workers=4), Load(8, skew_ms=5000)],
    ids=lambda load: str(load).replace(" ", "-"),
)
def test_writers_of_one_key_are_served_as_well_through_many_processes(load: Load, one_process: Figures) -> None:
    figures = _play(load)
    assert figures.per_second >= LEAST_OF_ONE_PROCESS * one_process.per_second, figures
    assert figures.unknown < UNKNOWN_MAX, figures
    assert figures.slowest >= LEAST_OF_MEAN, figures


def test_reads_of_a_hot_key_delay_no_writer_and_are_not_delayed() -> None:
    figures = _play(Load(8, reads=0.9))
    assert figures.per_second >= LEAST_OF_ONE_PROCESS * _play(Load(1, reads=0.9)).per_second, figures
    assert figures.unknown < UNKNOWN_MAX, figures
    assert max(figures.read_waits) < 1.0, figures


def test_of_all_who_create_a_key_one_succeeds() -> None:
    figures = _play(Load(8, creators=True))
    assert figures.done.total() == 1
    assert figures.errors == {"PreconditionFailed": 63}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_and_lies_about_turns_cost_time_alone(fault: str, one_process: Figures) -> None:
    figures = _play(Load(8, fault=fault), 12.0)
    assert figures.per_second >= 0.25 * one_process.per_second, figures
    assert figures.slowest >= LEAST_OF_MEAN, figures
    assert max(figures.waits) < 10.0, figures
    assert figures.unknown < 3 * UNKNOWN_MAX, figures


def test_figures_are_the_same_for_a_seed() -> None:
    assert _play(Load(4)).trace == _play(Load(4)).trace
