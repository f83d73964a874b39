"""The rules of a layout by which the system partition goes on without a majority of its seed disks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.cluster.certificates import is_enough, seed_nodes, verify_certificate
from storaged.cluster.layout import SYSTEM_PARTITION, Layout, problems_of, weaknesses
from storaged.cluster.moves import changes_between, places_digest
from storaged.cluster.partitions import state_of
from storaged.cluster.succession import check_successor, follows_instead, outranks, recovered_seeds, recovers
from storaged.cluster.voters import is_quorum, lacks_quorum, voting_sets
from storaged.errors import LayoutRefused
from storaged.meta.consensus.quorums import Quorum, View
from tests.worlds.authority import World
from tests.worlds.layouts import History, first

FIVE = ("n1", "n2", "n3", "n4", "n5")
SEVEN = tuple("abcdefg")


def five(**facts: Any) -> Layout:
    """Five nodes, seeds at the first three."""
    return first(FIVE, **facts)


def without(before: Layout, *lost: str, **facts: Any) -> Layout:
    """``before`` as ``cluster recover`` signs it, unnumbered."""
    step = recovered_seeds(before, lost)
    assert step is not None
    disks = tuple(disk for disk in before.disks if disk.id not in lost)
    seeds = {"seeds": step.present, "seeds_next": step.coming, "seeds_step": step.step, "seeds_lost": step.lost}
    return replace(before, **({"disks": disks, "lost": lost, "seeds_recovered": 100} | seeds | facts))


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(World(tmp_path), five())


# --- who counts


def test_lost_disks_do_not_count_and_few_that_are_left_all_have_to_answer() -> None:
    assert voting_sets([("a", "b", "c")], ()) == (("a", "b", "c"),)
    assert voting_sets([("a", "b", "c")], ("a", "b")) == (("c",),)
    assert voting_sets([("a", "b", "c")], ("a",)) == (("b", "c"),), "a majority of two are both"
    assert voting_sets([SEVEN], "abcd") == (("e",), ("f",), ("g",)), "two of three could miss what the third has"
    assert voting_sets([SEVEN], "abc") == (("d",), ("e",), ("f",), ("g",)), "as many as a majority of the whole set"
    assert voting_sets([SEVEN], "ab") == (tuple("cdefg"),)
    assert is_quorum([SEVEN], "abcd", "efg")
    assert not is_quorum([SEVEN], "abcd", "abcdef")
    assert lacks_quorum([("a", "b", "c")], (), "ab")
    assert not lacks_quorum([("a", "b", "c")], "ab", "ab")
    assert lacks_quorum([SEVEN], "abcd", "g"), "one of those that are left goes, too"


@pytest.mark.parametrize("lost", ["abcd", "abc", "abcdef"])
def test_what_a_majority_of_the_whole_set_had_is_found_by_every_quorum_that_is_left(lost: str) -> None:
    view = View.of(1, SEVEN, lost=lost)
    assert view.quorum == Quorum(*voting_sets([SEVEN], lost))
    left = [disk for disk in SEVEN if disk not in lost]
    for disk in left:
        assert not view.quorum.met([other for other in left if other != disk])
    assert view.quorum.met(left)
    assert dict(zip(view.quorum.disks, view.positions, strict=True)) == {disk: SEVEN.index(disk) for disk in left}


# --- which layout recovers


def test_a_recovery_goes_on_from_the_seed_disks_that_are_left(history: History) -> None:
    before, after = history.layouts[0], history.after(without(history.layouts[0], "d1a", "d2a"))
    assert (after.seeds, after.seeds_step, after.seeds_lost) == (("d1a", "d2a", "d3a"), 2, ("d1a", "d2a"))
    assert recovers(after)
    assert not problems_of(after)
    assert any("seed disk d1a, d2a is lost, and not exchanged yet" in text for text in weaknesses(after))
    check_successor(before, history.signed[0].hash, after)
    state = state_of(SYSTEM_PARTITION, None, after, before)
    assert state.voting == (("d3a",),)
    assert state.epoch > state_of(SYSTEM_PARTITION, None, before, before).epoch
    assert "the system partition goes on without seed disks d1a, d2a" in changes_between(before, after)
    assert places_digest(before) != places_digest(after)


def test_the_lost_seed_disks_are_exchanged_one_by_one_afterwards(history: History) -> None:
    history.move(without(history.layouts[0], "d1a", "d1b", "d2a", "d2b"), ["n3"])
    for old in ("d1a", "d2a"):
        before = history.layouts[-1]
        joint, settled = history.exchange(old, before)
        kept = tuple(disk for disk in before.seeds_lost if disk != old)
        history.move(joint, seed_nodes(before, before))
        history.move(replace(settled, seeds_lost=kept), seed_nodes(joint, joint))
    assert history.layouts[-1].seeds_lost == ()
    assert history.layouts[-1].seeds_recovered == 100
    book = history.book(*history.signed)
    assert (book.epoch, book.partition(SYSTEM_PARTITION).voting) == (500, (history.layouts[-1].seeds,))


@pytest.mark.parametrize(
    ("lost", "facts", "said"),
    [
        (("d1a", "d2a"), {"seeds_step": 4}, "does not recover the system partition as the rules say: step 2"),
        (("d1a", "d2a"), {"seeds_lost": ("d1a",)}, "does not recover the system partition as the rules say"),
        (("d1a", "d2a"), {"seeds": ("d3a", "d4a", "d5a")}, "does not recover"),
        (("d1a", "d2a"), {"seeds_recovered": 0}, "does not say that it recovers"),
        (("d1a", "d2a"), {"lost": ("d1a", "d2a", "d3a")}, "gives data to disk d3a"),
        (("d1a", "d2a"), {"lost": ("d1a",)}, "has a quorum of its seed disks"),
        (("d1a", "d2a"), {"disks": five().disks}, "gives data to disk d1a, which it calls lost"),
        (("d1a", "d2a"), {"seeds_step": 0, "seeds_lost": ()}, "does not recover"),
    ],
)
def test_a_recovery_that_breaks_a_rule_is_refused(
    history: History, lost: tuple[str, ...], facts: dict[str, Any], said: str
) -> None:
    after = history.after(without(history.layouts[0], *lost, **facts))
    with pytest.raises(LayoutRefused, match=said):
        check_successor(history.layouts[0], history.signed[0].hash, after)


def test_nothing_is_recovered_while_there_is_a_quorum(history: History) -> None:
    before = history.layouts[0]
    assert recovered_seeds(before, ("d1a", "d4a")) is None
    assert recovered_seeds(before, ("d1a", "d2a", "d3a")) is None, "nothing is left"
    after = replace(before, lost=("d1a",), seeds_lost=("d1a",), seeds_step=2, seeds_recovered=100)
    disks = tuple(disk for disk in before.disks if disk.id != "d1a")
    with pytest.raises(LayoutRefused, match="has a quorum of its seed disks"):
        check_successor(before, history.signed[0].hash, history.after(replace(after, disks=disks)))


def test_no_layout_says_later_that_it_was_recovered_or_brings_a_lost_seed_disk_back(history: History) -> None:
    history.move(without(history.layouts[0], "d1a", "d2a"), ["n3"])
    before, hash_ = history.layouts[-1], history.signed[-1].hash
    for facts, said in (
        ({"seeds_recovered": 0}, "says that a layout did"),
        ({"seeds_lost": ()}, "lost seed disks are those of layout 100"),
        ({"seeds_lost": ("d1a",)}, "lost seed disks are those of layout 100"),
        ({"lost": ()}, "no longer says that disks are lost"),
    ):
        with pytest.raises(LayoutRefused, match=said):
            check_successor(before, hash_, history.after(replace(before, **facts)))
    joint = replace(before, seeds_next=("d1b", "d2a", "d3a"), seeds_step=3)
    check_successor(before, hash_, history.after(joint))
    worse = replace(joint, seeds_next=("d1a", "d2a", "d4a"))
    with pytest.raises(LayoutRefused, match="seed disks change one at a time"):
        check_successor(before, hash_, history.after(replace(worse, seeds_next=("d4a", "d1a", "d3a"))))


@pytest.mark.parametrize(
    ("lost", "wanted"),
    [
        (("d1a", "d2a"), (("d4a", "d2a", "d3a"), (), 2, ("d2a",))),  # the coming set has all that are left
        (("d2a", "d4a"), (("d1a", "d2a", "d3a"), (), 2, ("d2a",))),  # the coming set alone has no quorum
        (("d2a", "d3a"), (("d1a", "d2a", "d3a"), ("d4a", "d2a", "d3a"), 3, ("d2a", "d3a"))),  # each has one
    ],
)
def test_seed_disks_are_lost_while_one_is_exchanged(history: History, lost: tuple[str, ...], wanted: Any) -> None:
    joint, _ = history.exchange("d1a", replace(history.layouts[0], disks=five().disks[2:]))
    joint = replace(joint, seeds_next=("d4a", "d2a", "d3a"))
    history.move(joint)
    before = history.layouts[-1]
    after = history.after(without(before, *lost, seeds_recovered=200))
    assert (after.seeds, after.seeds_next, after.seeds_step, after.seeds_lost) == wanted
    check_successor(before, history.signed[-1].hash, after)
    assert seed_nodes(before, after) == {f"n{disk[1]}" for disk in {"d1a", "d2a", "d3a", "d4a"} - set(lost)}


# --- who has to accept it


def verified(history: History, layout: Layout, names: Collection[str]) -> None:
    certificate = history.world.authority.certificate
    verify_certificate(history.accepted(layout, names), layout, history.layouts[0], certificate)


def test_all_seed_disks_that_are_left_accept_a_recovery_and_lost_ones_do_not_count(tmp_path: Path) -> None:
    wide = replace(five(), seeds=("d1a", "d2a", "d3a", "d4a", "d5a"))
    history = History(World(tmp_path), wide)
    after = history.after(without(wide, "d1a", "d2a", "d3a"))
    verified(history, after, ["n4", "n5"])
    for names, said in (
        (["n4"], "do not have all seed disks that are left"),
        (["n1", "n2", "n3"], "n1 has no seed disk"),
        (["n4", "n5", "n1"], "n1 has no seed disk"),
    ):
        with pytest.raises(LayoutRefused, match=said):
            verified(history, after, names)
    assert not is_enough(wide, replace(after, lost=wide.seeds), []), "nobody is no quorum"


def test_a_recovery_takes_the_place_of_a_layout_without_one_and_of_one_that_loses_fewer(history: History) -> None:
    before = replace(history.layouts[0], seeds=("d1a", "d2a", "d3a", "d4a", "d5a"))
    few = replace(without(before, "d1a", "d2a", "d3a"), epoch=100, predecessor=b"p")
    more = replace(without(before, "d1a", "d2a", "d3a", "d4a"), epoch=200, predecessor=b"p", seeds_recovered=200)
    assert outranks(few, ())
    assert outranks(more, few.seeds_lost)
    assert not outranks(few, few.seeds_lost), "of two that lose the same, the first one that was accepted"
    assert not outranks(few, more.seeds_lost)
    assert not outranks(before, ())
    assert follows_instead(few, more)
    assert not follows_instead(few, replace(more, predecessor=b"q"))
    assert not follows_instead(few, replace(more, epoch=50))
    assert not follows_instead(before, few), "who uses a decided layout stays with it"
