"""The table of a disk's states: a finding more never makes a disk more trusted; comparison finds the slow ones."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.admin.status import _DISK_PROBLEMS
from storaged.disk_states import (
    ALL,
    AWAY,
    DRAINING,
    FINE,
    LAST,
    NO,
    NONE,
    OK,
    SLOW,
    SLOW_MS,
    SLOW_TIMES,
    STATES,
    YES,
    Finding,
    Rights,
    left_out,
    of,
    outliers,
    worst,
)

REPORTED = [state for state in STATES if state not in (SLOW, DRAINING, AWAY)]
"""What a node says of its own disks."""

states = st.sampled_from([*STATES, "a state of a later version"])
latencies = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.integers(0, 100_000), max_size=20)


def used_for(found: list[str]) -> Rights:
    return of(worst([Finding(state, state) for state in found]).state).rights


@given(st.lists(st.sampled_from(REPORTED), max_size=5), st.sampled_from(REPORTED))
def test_a_finding_more_never_makes_a_disk_more_trusted(found: list[str], more: str) -> None:
    assert all(now <= then for now, then in zip(used_for([*found, more]), used_for(found), strict=True))


@given(st.lists(st.sampled_from(REPORTED), min_size=1, max_size=4))
def test_the_worst_finding_says_all_that_others_need_to_know(found: list[str]) -> None:
    reported = worst([Finding(state, state) for state in found])
    assert reported.state in found
    assert used_for(found) == Rights(*map(min, zip(*(of(state).rights for state in found), strict=True)))


@given(states)
def test_a_state_of_another_version_is_trusted_with_nothing_and_reported_before_all(state: str) -> None:
    assert of("of tomorrow").rights == NONE
    assert worst([Finding(state), Finding("of tomorrow")]).state in ("of tomorrow", "a state of a later version")


def test_without_findings_a_disk_is_fine() -> None:
    assert worst([]) == FINE
    assert used_for([]) == of(OK).rights == ALL


def test_the_table_says_what_each_state_is_used_for() -> None:
    used = {state: "".join("nly"[trust] for trust in known.rights) for state, known in STATES.items()}
    away = ["hung", "checking", "failed", "unreadable", "index-damaged", "waiting", "blank", "rolled-back"]
    assert used == {
        "ok": "yyy",
        "slow": "lll",
        "draining": "yny",
        "full": "yny",
        "read-only": "yny",
    } | dict.fromkeys([*away, "damaged", "foreign", "lost", AWAY], "nnn")
    assert (NO, LAST, YES) == (0, 1, 2)


def test_each_problem_of_the_table_is_one_that_status_and_explain_know() -> None:
    assert {state.problem for state in STATES.values() if state.problem} == set(_DISK_PROBLEMS)
    assert all(kind.hint and kind.__doc__ for kind in _DISK_PROBLEMS.values())


@given(latencies, st.frozensets(st.text("abcdefgh", min_size=1, max_size=2)))
def test_only_a_disk_that_is_much_slower_than_the_median_is_slow(
    latency_ms: dict[str, int], before: frozenset[str]
) -> None:
    slow = outliers(latency_ms, before)
    assert slow <= latency_ms.keys()
    assert len(slow) <= len(latency_ms) // 2
    for disk in slow:
        others = [took for other, took in latency_ms.items() if other != disk]
        assert latency_ms[disk] * 2 >= SLOW_MS
        assert len([took for took in others if took * SLOW_TIMES <= 2 * latency_ms[disk] + 1]) * 2 >= len(others) - 1


@given(st.integers(3, 40), st.integers(0, 10_000))
def test_where_all_are_alike_none_is_slow(count: int, took_ms: int) -> None:
    assert not outliers({str(number): took_ms for number in range(count)})


@pytest.mark.parametrize(("took_ms", "is_slow", "stays"), [(149, False, True), (150, True, True), (74, False, False)])
def test_a_slow_disk_stays_slow_until_it_is_well(took_ms: int, is_slow: bool, stays: bool) -> None:
    found = {"a": 5, "b": 6, "c": 7, "d": took_ms}
    assert (outliers(found) == {"d"}) is is_slow
    assert (outliers(found, frozenset("d")) == {"d"}) is stays


def test_two_disks_can_not_be_compared() -> None:
    assert not outliers({"a": 1, "b": 100_000})


@given(st.frozensets(st.integers(0, 50).map(str)), st.integers(0, 51))
def test_at_most_a_third_is_left_out(doubted: frozenset[str], usable: int) -> None:
    found = left_out(doubted, usable)
    assert found in (doubted, frozenset())
    assert len(found) * 3 <= usable
    if len(doubted) * 3 <= usable:
        assert found == doubted


def test_findings_are_ordered_from_the_mildest_to_the_gravest() -> None:
    for mild, grave in itertools.pairwise(STATES):
        assert worst([Finding(grave), Finding(mild)]).state == grave
