"""What this process sees of disks, and which of them it leaves out for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from storaged.cluster.disk_view import DiskView
from storaged.cluster.disks_seen import DOUBT_MAX_S, DOUBT_S, LATE_S, STRIKES, STRIKES_S, UNRESPONSIVE_S, DisksSeen
from storaged.cluster.ports import DiskStatus
from storaged.errors import DiskUnusable, NoSuchKey, PeerTimeout
from tests.doubles.layouts import KnownLayouts, layout_of

DISKS = ("a0", "a1", "b0", "b1", "c0", "c1")


class Time:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return int(self.now_s * 1000)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def seen(time: Time) -> DisksSeen:
    return DisksSeen(time)


class World:
    """A gateway beside the six disks of ``layout_of``, each with the state and latency that a test gives it."""

    def __init__(self, seen: DisksSeen) -> None:
        self.layouts = KnownLayouts(layout_of())
        self.own: Sequence[DiskStatus] = ()
        self.view = DiskView("gateway", lambda: self.own, self.layouts, seen)  # type: ignore[arg-type]
        self.found = {disk: DiskStatus(disk, f"/{disk}", "ok", latency_ms=5) for disk in DISKS}
        self.down: set[str] = set()
        self.tell()

    def tell(self, disk: str = "", state: str = "ok", *, latency_ms: int = 5, few: bool = False) -> None:
        if disk:
            self.found[disk] = DiskStatus(disk, f"/{disk}", state, latency_ms=latency_ms, few=few)
        homes = self.layouts.current.disk_by_id
        nodes = {homes[name].node for name in DISKS}
        self.view.take(
            [
                (node, node not in self.down, [self.found[name] for name in DISKS if homes[name].node == node])
                for node in sorted(nodes)
            ]
        )

    def used_for(self, disk: str) -> str:
        """Reads, writes and whether it is prompt, as letters."""
        view = self.view
        asked = view.disk_readable(disk), view.disk_writable(disk), view.disk_prompt(disk)
        return "".join(letter for letter, yes in zip("rwp", asked, strict=True) if yes)


@pytest.fixture
def world(seen: DisksSeen) -> World:
    return World(seen)


@pytest.mark.parametrize(
    ("state", "used_for"), [("ok", "rwp"), ("full", "rp"), ("read-only", "rp"), ("hung", ""), ("unreadable", "")]
)
def test_a_state_decides_what_a_disk_is_used_for(world: World, state: str, used_for: str) -> None:
    world.tell("b0", state)
    assert world.used_for("b0") == used_for
    assert world.used_for("a0") == "rwp"
    assert world.view.why_away("b0", lambda _node: True) == ("" if used_for else state)


def test_a_disk_whose_node_is_silent_is_used_for_nothing(world: World) -> None:
    world.down.add(world.layouts.current.node_of("b0"))
    world.tell()
    assert world.used_for("b0") == ""
    assert world.view.why_away("b0", lambda _node: False) == "unreachable"


def test_a_slow_disk_is_left_out_until_it_is_as_quick_as_the_others(world: World, seen: DisksSeen) -> None:
    world.tell("c1", latency_ms=700)
    assert world.used_for("c1") == "rw"
    assert [disk.state for disk in world.view.shown([world.found["c1"], world.found["a0"]])] == ["slow", "ok"]
    assert "700 ms" in world.view.shown([world.found["c1"]])[0].reason
    assert seen.last(DISKS) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert seen.last(("c1", "a0")) == ["a0", "c1"]
    world.tell("c1", latency_ms=100)
    assert world.used_for("c1") == "rw", "it is well below half of the bound"
    world.tell("c1", latency_ms=20)
    assert world.used_for("c1") == "rwp"
    assert seen.last(("c1", "a0")) == ["c1", "a0"]


def test_replicas_of_disks_that_do_not_vote_are_asked_last(world: World, seen: DisksSeen) -> None:
    world.tell("a0", "hung")
    world.tell("a1", "full")
    assert seen.last(("a0", "a1", "b0")) == ["a1", "b0", "a0"]
    world.tell("a0")
    assert seen.last(("a0", "a1", "b0")) == ["a0", "a1", "b0"]


def test_when_more_than_a_third_seems_slow_none_is_left_out(world: World, seen: DisksSeen) -> None:
    for disk in ("a0", "b0"):
        seen.late(disk, 1.0)
    assert [disk for disk in DISKS if not world.view.disk_prompt(disk)] == ["a0", "b0"]
    seen.late("c0", 1.0)
    assert all(map(world.view.disk_prompt, DISKS))


def test_own_disks_are_judged_with_the_others(world: World) -> None:
    world.own = [DiskStatus("own", "/own", "ok", latency_ms=9000)]
    assert world.used_for("own") == "rw"
    world.own = [DiskStatus("own", "/own", "hung", latency_ms=9000)]
    assert world.used_for("own") == ""


def test_a_full_disk_is_known_as_full_by_the_same_set_until_something_changes(world: World) -> None:
    world.tell("a0", "full", few=True)
    full = world.view.disks_full()
    assert full == {"a0"}
    world.tell("a1", latency_ms=6)
    assert world.view.disks_full() is full
    assert not world.view.disk_takes_rows("a0")
    assert world.view.disk_takes_rows("a1")


# --- what is seen


def test_one_call_that_is_very_late_or_three_in_a_row_make_a_disk_doubted(seen: DisksSeen, time: Time) -> None:
    changes: list[int] = []
    seen.on_change = lambda: changes.append(len(seen.doubted))
    seen.late("a0", LATE_S)
    assert set(seen.doubted) == {"a0"}
    for number in range(STRIKES):
        assert "b0" not in seen.doubted, number
        seen.late("b0", 0.06)
    assert set(seen.doubted) == {"a0", "b0"}
    assert changes == [1, 2]
    time.now_s += DOUBT_S
    assert seen.expire()
    assert not seen.doubted
    assert not seen.expire()


def test_an_answer_or_a_pause_ends_a_row_of_strikes(seen: DisksSeen, time: Time) -> None:
    for _ in range(2 * STRIKES):
        seen.late("a0", 0.06)
        seen.answered("a0")
    for _ in range(2 * STRIKES):
        seen.late("b0", 0.06)
        time.now_s += STRIKES_S
    assert not seen.doubted


def test_a_disk_that_is_late_again_is_doubted_for_longer_up_to_a_bound(seen: DisksSeen, time: Time) -> None:
    lengths = []
    for _ in range(8):
        seen.late("a0", 1.0)
        seen.late("a0", 1.0)  # of the same time
        lengths.append(seen.doubted["a0"] - time.now_s)
        time.now_s = seen.doubted["a0"]
        seen.expire()
    assert lengths == [2, 4, 8, 16, 32, DOUBT_MAX_S, DOUBT_MAX_S, DOUBT_MAX_S]
    time.now_s += 10 * DOUBT_MAX_S
    seen.late("a0", 1.0)
    assert seen.doubted["a0"] - time.now_s == DOUBT_S


def test_replicas_that_did_not_answer_are_asked_last_for_a_while(seen: DisksSeen, time: Time) -> None:
    seen.saw("a", PeerTimeout("late"))
    time.now_s += 1
    seen.saw("b", DiskUnusable("gone"))
    seen.saw("c", NoSuchKey())
    assert seen.last(("a", "b", "c")) == ["c", "a", "b"]
    assert not seen.doubted
    time.now_s += UNRESPONSIVE_S - 0.5
    assert seen.last(("a", "b", "c")) == ["a", "c", "b"]
