"""When a disk is slow or hung, and what its callers get; threads that belong to one disk."""

from __future__ import annotations

import asyncio
import threading

import pytest

from storaged.disk_health import HUNG, HUNG_LONG_S, HUNG_S, JOBS_MAX, OK, SLOW, SLOW_S, WELL_S, DiskHealth, DiskThreads
from storaged.errors import DiskUnusable, SlowDown
from tests.patience import GUARD_S
from tests.worlds.authority import until


class Time:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def health(time: Time) -> DiskHealth:
    return DiskHealth("d", now_s=time)


def seen(health: DiskHealth) -> str:
    health.look()
    return health.state


def test_the_oldest_operation_decides_and_a_disk_that_answered_late_stays_slow_for_a_while(
    health: DiskHealth, time: Time
) -> None:
    changes: list[tuple[str, str]] = []
    health.on_change = lambda changed, before: changes.append((before, changed.state))
    first = health.begin("a sync")
    assert seen(health) == OK
    time.now_s += SLOW_S * 1.01
    health.end(health.begin("a read"))
    assert seen(health) == SLOW
    time.now_s += HUNG_S
    assert seen(health) == HUNG
    assert (health.hung, health.hung_count) == (True, 1)
    assert health.reason == "a sync has not ended for 5 s"
    with pytest.raises(DiskUnusable, match="Disk d hangs: a sync"):
        health.check()
    health.end(first)
    health.end(first)
    assert (seen(health), health.hung, health.reason) == (SLOW, False, "")
    health.check()
    time.now_s += WELL_S
    assert seen(health) == OK
    assert changes == [(OK, SLOW), (SLOW, HUNG), (HUNG, SLOW), (SLOW, OK)]
    assert health.longest_s == pytest.approx(SLOW_S + HUNG_S, rel=0.01)


async def test_those_who_wait_are_told_when_the_disk_begins_to_hang(health: DiskHealth, time: Time) -> None:
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(4)]
    for future, may_fail in zip(futures, (None, lambda: True, lambda: False, None), strict=True):
        health.fail_when_hung(future, may_fail)
    futures[3].set_result("in time")
    health.begin("a write")
    time.now_s += HUNG_S
    health.look()
    await asyncio.sleep(0)
    for future in futures[:2]:
        with pytest.raises(DiskUnusable, match="hangs"):
            future.result()
    assert not futures[2].done()
    assert futures[3].result() == "in time"
    assert list(health._waiting) == [futures[2]]


async def test_work_that_outlasts_a_hang_goes_on_without_its_caller(health: DiskHealth, time: Time) -> None:
    may_end, ended = asyncio.Event(), asyncio.Event()

    async def work() -> int:
        await may_end.wait()
        ended.set()
        return 7

    waiting = asyncio.create_task(health.unless_hung(work()))
    await asyncio.sleep(0)
    token = health.begin("a write")
    time.now_s += HUNG_S
    health.look()
    with pytest.raises(DiskUnusable, match="hangs"):
        await waiting
    health.end(token)
    health.look()
    may_end.set()
    await asyncio.wait_for(ended.wait(), GUARD_S)
    assert await health.unless_hung(work()) == 7


async def test_work_of_a_disk_that_hangs_keeps_its_own_threads_and_is_given_up(health: DiskHealth, time: Time) -> None:
    may_end = threading.Event()
    threads = DiskThreads(health, 2, "reads")
    stuck = [threads.start(lambda: may_end.wait(GUARD_S)) for _ in range(5)]
    await until(lambda: len(health._begun) == 2)
    assert threading.active_count() >= 3
    time.now_s += HUNG_S
    health.look()
    assert not health.hung, "such work may take long"
    time.now_s += HUNG_LONG_S
    health.look()
    results = await asyncio.gather(*stuck, return_exceptions=True)
    assert [type(result) for result in results] == [DiskUnusable] * 5
    may_end.set()
    assert await threads.run(lambda: 3) == 3
    assert [thread.daemon for thread in threads._threads] == [True] * len(threads._threads)
    threads.shutdown()
    with pytest.raises(DiskUnusable, match="stopped"):
        threads.start(lambda: None)


async def test_threads_take_so_many_jobs_and_no_more_and_raise_what_a_job_raises(health: DiskHealth) -> None:
    may_end = threading.Event()
    threads = DiskThreads(health, 1, "reads")
    first = threads.start(lambda: may_end.wait(GUARD_S))
    await until(lambda: bool(health._begun))
    waiting = [threads.start(lambda: 1) for _ in range(JOBS_MAX)]
    with pytest.raises(SlowDown):
        threads.start(lambda: 1)
    may_end.set()
    assert await first
    assert await asyncio.gather(*waiting) == [1] * JOBS_MAX
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)
    threads.shutdown()


async def test_short_work_shows_early_that_the_disk_hangs(health: DiskHealth, time: Time) -> None:
    may_end = threading.Event()
    threads = DiskThreads(health, 1, "reads")
    reading = asyncio.create_task(threads.run_short(lambda: may_end.wait(GUARD_S)))
    await until(lambda: len(health._begun) == 2)
    time.now_s += HUNG_S
    health.look()
    assert health.reason == "a read has not ended for 5 s"
    with pytest.raises(DiskUnusable):
        await reading
    may_end.set()
    threads.shutdown()


# --- what is reported


def test_the_worst_of_what_was_noted_is_reported(health: DiskHealth) -> None:
    assert health.finding() == ("ok", "")
    health.note("space", "full", "1 MiB is free")
    health.note("fragments", "read-only", "EIO")
    assert health.finding() == ("read-only", "EIO")
    health.note("fragments", "full", "no room for the index")
    assert health.finding().state == "full"
    health.clear("fragments")
    health.clear("fragments")
    assert health.finding() == ("full", "1 MiB is free")
    health.clear("space")
    health.room.few = True
    assert health.finding().state == "full"


def test_a_disk_that_hangs_is_reported_so_and_one_that_is_foreign_as_that(health: DiskHealth, time: Time) -> None:
    health.note("fragments", "read-only", "EIO")
    health.begin("a sync")
    time.now_s += HUNG_S
    health.look()
    assert health.finding() == ("hung", "a sync has not ended for 5 s")
    health.note("admission", "foreign", "of another cluster")
    assert health.finding() == ("foreign", "of another cluster")


def test_latency_is_the_mean_of_the_slowest_kind_or_the_age_of_the_oldest_operation(
    health: DiskHealth, time: Time
) -> None:
    def operate(what: str, took_s: float) -> None:
        token = health.begin(what)
        time.now_s += took_s
        health.end(token)

    assert (health.latency_ms(), health.wants_probe) == (0, False)
    for _ in range(40):
        operate("a read", 0.001)
        operate("a sync", 0.2)
    assert 195 <= health.latency_ms() <= 200
    assert health.wants_probe
    for _ in range(20):
        operate("a sync", 0.001)
    assert health.latency_ms() < 10
    operate("a sync", 1.0)
    assert 195 <= health.latency_ms() <= 210, "one slow operation weighs a fifth"
    time.now_s += WELL_S * 1.01
    assert health.latency_ms() == 0, "nobody has used it: nothing is known"
    operate("a sync", 0.001)
    assert health.latency_ms() < 5
    health.begin("a checkpoint", long=True)
    health.begin("a sync")
    time.now_s += 0.7
    assert health.latency_ms() == 700


def test_the_owner_hears_at_once_that_a_disk_is_late(health: DiskHealth, time: Time) -> None:
    changes: list[bool] = []
    health.on_change = lambda found, _before: changes.append(found.late)
    token = health.begin("a sync")
    time.now_s += 0.45
    health.look()
    time.now_s += 0.1
    health.look()
    health.look()
    assert changes == [False, True], "slow at first, then late"
    health.end(token)
    health.look()
    assert not health.late
