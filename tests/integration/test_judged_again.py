"""Registers that were judged while a disk was away, slow or silent for a moment are judged again: no walk begins
because of that, and the next one by the clock comes an hour later.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from typing import Any

import pytest

from storaged.errors import PeerRefused, PeerUnreachable, ServiceUnavailable
from storaged.maintain.health import Finding
from storaged.maintain.service import HINT_TRIES
from storaged.meta.names import RegisterName, Value, object_name
from storaged.wire import Message
from tests.integration.memory_cluster import Cluster, StorageNode, run
from tests.integration.test_maintain_cluster import LARGE, filled
from tests.integration.test_maintain_pages import many

SOON_S = 120.0
"""Far less than the pause between walks."""


def test_a_disk_that_is_away_for_a_moment_within_a_walk_leaves_nothing_below_target() -> None:
    async def scenario(cluster: Cluster) -> None:
        await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        moments = False
        for node in cluster.nodes.values():
            walker = node.maintenance.check.walker
            judge = walker.judge_rows

            async def judge_meanwhile(
                rows: Iterable[tuple[RegisterName, Value]], judge: Any = judge, **options: bool
            ) -> list[Finding]:
                if moments:
                    cluster.alive.disks_down |= {"b0", "b1"}
                found: list[Finding] = await judge(rows, **options)
                cluster.alive.disks_down.clear()
                return found

            walker.judge_rows = judge_meanwhile  # type: ignore[method-assign]
            node.maintenance.check.request_walk()
        moments = True
        await cluster.pass_s(3)
        moments = False
        await cluster.pass_s(SOON_S)
        assert await cluster.counts() == (0, 0, True)

    run(scenario)


@pytest.mark.parametrize("every_s", [1, 7])
def test_a_disk_that_comes_and_goes_all_the_time_leaves_repair_half_of_the_time(every_s: int) -> None:
    """Each change of the disks asks for a walk, and stopped repair after each object until that walk was over."""
    walk_s, count = 60.0, 30

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for index in range(count):
            await cluster.put(bucket, b"k%d" % index, os.urandom(LARGE))
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        walking = 0.0
        for node in cluster.nodes.values():
            check = node.maintenance.check
            walk_ranges = check._walk_ranges

            async def slow(failures: list[str], walk_ranges: Any = walk_ranges) -> None:
                nonlocal walking
                await asyncio.sleep(walk_s)
                walking += walk_s
                await walk_ranges(failures)

            check._walk_ranges = slow  # type: ignore[method-assign]
        for index in range(count):
            for place in await cluster.places(bucket, b"k%d" % index):
                fragment, disk = next(where for where in place.fragments if where[1].startswith("c"))
                await cluster.store(disk).delete([fragment])
        for _ in range(1200 // (2 * every_s)):
            cluster.alive.disks_down.add("b0")
            await cluster.pass_s(every_s)
            cluster.alive.disks_down.clear()
            await cluster.pass_s(every_s)
        assert walking / len(cluster.nodes) < 0.6 * 1200 + walk_s
        whole = [await cluster.is_whole(bucket, b"k%d" % index) for index in range(count)]
        assert all(whole), f"{whole.count(False)} of {count} are not repaired"

    run(scenario)


@pytest.mark.parametrize("what", ["slow", "read_only"])
def test_what_is_written_while_a_disk_is_slow_gets_its_target_when_it_is_well(what: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        left_out: set[str] = getattr(cluster.alive, what)
        left_out.add("b0")
        await cluster.put(bucket, b"meanwhile", os.urandom(LARGE))
        assert {str(place.profile) for place in await cluster.places(bucket, b"meanwhile")} == {"3+2"}
        await cluster.pass_s(SOON_S)
        below, _, counted = await cluster.counts()
        assert counted
        assert below >= 1
        [(reason, _)] = [one for status in await cluster.statuses() for one in status.unrepaired]
        assert "can't hold 4+2" in reason
        left_out.clear()
        assert await cluster.settled() == (0, 0)
        assert await cluster.is_whole(bucket, b"meanwhile")

    run(scenario)


def test_while_the_next_walk_waits_for_long_findings_are_judged_again_all_the_same() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        cluster.alive.read_only.add("b0")
        await cluster.put(bucket, b"meanwhile", os.urandom(LARGE))
        await cluster.pass_s(SOON_S)
        assert not await cluster.is_whole(bucket, b"meanwhile")
        began = []
        for node in cluster.nodes.values():
            check = node.maintenance.check
            check.request_walk()
            check._rested_at = cluster.clock.monotonic() + 3 * SOON_S  # as long as the last walk took
            began.append((check, check.job.started))
        cluster.alive.read_only.clear()
        await cluster.pass_s(SOON_S)
        assert all(check.job.started == started for check, started in began)
        assert await cluster.is_whole(bucket, b"meanwhile")

    run(scenario)


def leader_of(cluster: Cluster, name: RegisterName) -> StorageNode:
    """The node that is responsible for a register while all disks can be read."""
    return cluster.nodes[cluster.layouts.current.node_of(cluster.layouts.partition(name.partition).present[0])]


def test_a_disk_that_does_not_answer_a_hint_is_asked_again() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        name = object_name(bucket.id, bucket.shard_numbers, b"large-0")
        other = next(node for node in cluster.nodes if node != leader_of(cluster, name).name)

        async def silent(_caller: str, node: str, method: str, _request: Message) -> None:
            if method == "fragment.stat" and node == other:
                raise PeerUnreachable("the connection broke")

        cluster.intercept = silent
        cluster.gateway.maintain.hint(name)
        await cluster.pass_s(5)
        assert await cluster.counts() == (1, 0, True)
        assert any(status.busy for status in await cluster.statuses())
        cluster.intercept = None
        await cluster.pass_s(SOON_S)
        assert await cluster.counts() == (0, 0, True)

    run(scenario)


def test_a_disk_that_never_answers_is_asked_seldom_and_named() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        name, asked = object_name(bucket.id, bucket.shard_numbers, b"large-0"), 0
        other = next(node for node in cluster.nodes if node != leader_of(cluster, name).name)

        async def silent(_caller: str, node: str, method: str, _request: Message) -> None:
            nonlocal asked
            if method == "fragment.stat" and node == other:
                asked += 1
                raise PeerUnreachable("the connection broke")

        cluster.intercept = silent
        cluster.gateway.maintain.hint(name)
        await cluster.pass_s(600)
        assert 10 <= asked < 100
        statuses = await cluster.statuses()
        assert not any(status.busy for status in statuses)
        [(reason, count)] = [one for status in statuses for one in status.unrepaired]
        assert count == 1
        assert f"{other[1:]}0" in reason
        assert "did not answer" in reason

    run(scenario)


def test_a_disk_that_never_answers_keeps_no_other_from_being_judged_again() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        name = object_name(bucket.id, bucket.shard_numbers, b"large-0")
        leader = leader_of(cluster, name)
        other = next(node for node in cluster.nodes if node != leader.name)
        check, limits = leader.maintenance.check, leader.context.limits
        silent = [b"%03d" % number for number in range(2 * limits.hints_concurrent_max)]
        for key in (*silent, b"zzz"):
            one = RegisterName(name.table, name.scope, name.shard, key).pack()
            check.queue.set(one, Finding(one, 1, False, False, False, 0, unheard=(f"{other[1:]}0",)))
        looked: list[bytes] = []

        async def judge(name: RegisterName, _value: Value | None) -> None:
            looked.append(name.key)
            if name.key == b"zzz":
                check.queue.set(name.pack(), None)
            else:
                check.walker.pages.unanswered += 1

        check.judge = judge  # type: ignore[method-assign]
        await cluster.pass_s(SOON_S)
        assert looked.count(b"zzz") == 1
        assert len(looked) < SOON_S

    run(scenario)


def test_a_failed_repair_is_named_with_what_failed_and_how_often() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 2)
        for key in (b"large-0", b"large-1"):
            name = object_name(bucket.id, bucket.shard_numbers, key)
            leader = leader_of(cluster, name)
            for place in await cluster.places(bucket, key):
                fragment, disk = next(where for where in place.fragments if where[1] not in leader.meta)
                await cluster.store(disk).delete([fragment])

        async def refuse(_caller: str, _node: str, method: str, _request: Message) -> None:
            if method == "fragment.write":
                raise PeerRefused("the disk is tired", "TIRED")

        cluster.intercept = refuse
        cluster.maintain()
        await cluster.pass_s(SOON_S)
        found = [one for status in await cluster.statuses() for one in status.unrepaired]
        assert {reason for reason, _ in found} == {"the disk is tired"}
        assert sum(count for _, count in found) == 2
        cluster.intercept = None
        await cluster.pass_s(2 * SOON_S)
        assert await cluster.counts() == (0, 0, True)
        assert not any(status.unrepaired for status in await cluster.statuses())

    run(scenario)


def test_a_hint_that_a_node_does_not_take_is_sent_again_and_not_for_ever() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        place = (await cluster.places(bucket, b"large-0"))[0]
        fragment, disk = next(iter(place.fragments))
        hints = 0

        async def silent(_caller: str, _node: str, method: str, _request: Message) -> None:
            nonlocal hints
            if method == "maintain.hint":
                hints += 1
                if hints <= silences:
                    raise PeerUnreachable("the connection broke")

        silences, cluster.intercept = 3, silent
        await cluster.store(disk).delete([fragment])
        name = object_name(bucket.id, bucket.shard_numbers, b"large-0")
        cluster.gateway.maintain.hint(name)
        await cluster.pass_s(30)
        assert hints >= 4
        assert cluster.holds(disk, fragment)
        hints, silences = 0, 10 * HINT_TRIES
        cluster.gateway.maintain.hint(name)
        await cluster.pass_s(60)
        assert hints == HINT_TRIES
        assert not cluster.gateway.maintain.busy

    run(scenario)


def test_moves_that_waited_too_long_for_a_gateway_are_not_the_last_ones() -> None:
    """A node whose moves all became too old has to ask again, or it would recode nothing for ever."""

    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.alive.read_only.add("b0")
        await cluster.put(bucket, b"meanwhile", os.urandom(LARGE))
        await cluster.gateway.stop_answering()
        cluster.maintain()
        cluster.alive.read_only.clear()
        await cluster.pass_s(SOON_S)
        assert any(node.maintenance.repair.relocator.away for node in cluster.nodes.values())
        await cluster.leap(cluster.limits.orphan_age_ms / 4000)
        await cluster.pass_s(SOON_S)
        cluster.new_gateway("h")
        await cluster.pass_s(10 * SOON_S)
        assert await cluster.counts() == (0, 0, True)
        assert await cluster.is_whole(bucket, b"meanwhile")

    run(scenario)


def test_a_record_whose_pages_cannot_be_read_now_is_not_taken_for_whole() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await many(cluster, bucket)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        name = object_name(bucket.id, bucket.shard_numbers, b"many")
        leader = leader_of(cluster, name)
        leader.maintenance.check.queue.set(name.pack(), Finding(name.pack(), 1, True, False, False, 1))
        pages = leader.context.pages

        class NoMajority:
            async def get_page(self, *_: Any) -> bytes:
                raise ServiceUnavailable("no replica answers")

            def __getattr__(self, wanted: str) -> Any:
                return getattr(pages, wanted)

        leader.context.pages = NoMajority()  # type: ignore[assignment]
        cluster.gateway.maintain.hint(name)
        await cluster.pass_s(5)
        assert (await cluster.counts())[::2] == (1, False)
        leader.context.pages = pages
        await cluster.pass_s(SOON_S)
        assert await cluster.counts() == (0, 0, True)

    run(scenario)
