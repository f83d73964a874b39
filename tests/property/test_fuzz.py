"""The targets of ``tests.fuzz``: the corpus in the tree is right and cheap, and each target notices a bug."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from storaged.s3 import headers
from tests.fuzz import corpus, driver
from tests.fuzz.__main__ import add, new_total
from tests.fuzz.bounds import cost_of, peak_of, steps_of
from tests.fuzz.mutator import Mutator
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

TRIED_MAX = 600
"""Inputs after which a planted bug must have been noticed. Nearly all are noticed by the first ones, the seeds."""
COUNTED = 3
"""The longest inputs of a target are those whose cost is counted: counting takes twenty times as long as running."""
CORPUS_BYTES_MAX = 1_000_000

every_target = pytest.mark.parametrize("name", sorted(TARGETS))


def inputs_of(target: Target) -> list[bytes]:
    return [*target.seeds, *corpus.load(target.name)]


@every_target
def test_all_inputs_of_the_corpus_are_right(name: str) -> None:
    """A target raises when what an input did was not right."""
    assert corpus.load(name), "it has no corpus"
    for data in inputs_of(TARGETS[name]):
        TARGETS[name].run(data)


@every_target
def test_the_longest_inputs_cost_no_more_than_their_length_allows(name: str) -> None:
    target = TARGETS[name]
    for data in sorted(inputs_of(target), key=len)[-COUNTED:]:
        cost = cost_of(lambda data=data: target.run(data))  # type: ignore[misc]
        assert cost.steps <= target.steps + target.steps_a_byte * len(data), data
        assert cost.peak_bytes <= target.peak_bytes + target.peak_a_byte * len(data), data


@every_target
def test_a_bug_that_is_planted_is_noticed(name: str) -> None:
    target = TARGETS[name]
    mutator = Mutator(name, inputs_of(target), target.tokens, target.size_max)
    with target.plant.planted():
        assert any(_fails(target, mutator.input(number)) for number in range(TRIED_MAX)), "the oracle is blind"
    target.run(target.seeds[0])


def _fails(target: Target, data: bytes) -> bool:
    try:
        target.run(data)
    except Exception:
        return True
    return False


@every_target
def test_a_target_says_what_it_makes_sure_of(name: str) -> None:
    assert len((TARGETS[name].run.__doc__ or "").split()) >= 10


def test_the_corpus_is_small_and_has_no_file_without_a_target() -> None:
    files = list(corpus.FOLDER.glob("*"))
    assert {path.stem for path in files} <= TARGETS.keys()
    assert sum(path.stat().st_size for path in files) <= CORPUS_BYTES_MAX


def test_an_input_is_a_function_of_its_number() -> None:
    one, other = (Mutator("x", [b"seed", b"other"], [b"token"], 100) for _ in range(2))
    found = [one.input(number) for number in range(200)]
    assert found == [other.input(number) for number in reversed(range(200))][::-1]
    assert found[:2] == [b"seed", b"other"]
    assert len(set(found)) > 100


def test_a_run_goes_on_after_a_finding_and_keeps_its_shortest_input() -> None:
    def fails(data: bytes) -> None:
        assert b"!" not in data

    target = Target("x", fails, (b"a!bc", b"!", b"d"), TARGETS["range"].plant)
    run = driver.Run(target)
    for data in target.seeds:
        run.execute(data)
    report = run.report()
    assert report["executions"] == 3
    assert [finding["input"] for finding in report["findings"].values()] == ["!"]
    total = new_total()
    for _ in range(2):
        add(total, {"seconds": 1.5, "cpu_seconds": 1.0, "targets": {"x": report}}, "own")
    assert (total["executions"], total["seconds"]) == (6, 3.0)
    assert total["targets"]["x"]["executions"] == 6
    assert len(total["findings"]) == 1


def test_our_own_engine_runs_each_target_from_the_number_it_is_told() -> None:
    ran: list[bytes] = []
    target = Target("x", ran.append, (b"0", b"1", b"2"), TARGETS["range"].plant)
    driver.mutate(driver.Run(target), 1, lambda: len(ran) == 5)
    assert ran[:2] == [b"1", b"2"]
    assert len(ran) == 5


def test_what_a_corpus_keeps_is_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "FOLDER", tmp_path)
    corpus.save("x", [bytes(range(256)), b"", b'\n"\\'])
    assert corpus.load("x") == [b"", b'\n"\\', bytes(range(256))]
    assert corpus.load("y") == []


@contextmanager
def _kept(name: str, value: Any) -> Iterator[None]:
    before = getattr(headers, name)
    setattr(headers, name, value)
    try:
        yield
    finally:
        setattr(headers, name, before)


def test_costs_are_counted_and_not_timed() -> None:
    short, long = ({"x-amz-tagging": "&".join(f"a{at}=b" for at in range(count))} for count in (1, 9))
    assert steps_of(lambda: headers.new_meta(short)) == steps_of(lambda: headers.new_meta(short))
    assert steps_of(lambda: headers.new_meta(short)) < steps_of(lambda: headers.new_meta(long))
    with _kept("storage_class", lambda found: bytes(1_000_000).decode()):
        assert peak_of(lambda: headers.new_meta(short)) >= 1_000_000
    assert peak_of(lambda: headers.new_meta(short)) < 100_000
