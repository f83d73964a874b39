"""A disk that was away gets the rows that it missed first, however long a walk over all records takes."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable
from math import inf
from typing import Any

import pytest

from storaged.errors import PeerUnreachable
from storaged.maintain.check import GIVE_WAY_S, GIVE_WAY_S_MAX
from storaged.maintain.health import Finding
from storaged.meta.listing.comparing import SUM_TRIES
from storaged.meta.names import RegisterName, Table, Value
from storaged.meta.storage.scan import Want
from tests.integration.memory_cluster import Cluster, run
from tests.integration.test_maintain_cluster import SMALL, assert_whole, filled

JUDGING_S = 3600.0
SOON_S = 10.0


def judge_slowly(cluster: Cluster) -> None:
    """As where there are a great many records."""
    for node in cluster.nodes.values():
        walker = node.maintenance.check.walker
        judge = walker.judge_rows

        async def slow(
            rows: Iterable[tuple[RegisterName, Value]], judge: Any = judge, **options: bool
        ) -> list[Finding]:
            await asyncio.sleep(JUDGING_S)
            found: list[Finding] = await judge(rows, **options)
            return found

        walker.judge_rows = slow  # type: ignore[method-assign]


def test_what_a_node_missed_waits_for_no_walk() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        judge_slowly(cluster)
        await cluster.kill("nc")
        await cluster.pass_s(SOON_S)  # the others have noticed, and are walking
        for index in range(40):
            objects[b"missed-%d" % index] = os.urandom(SMALL)
            await cluster.put(bucket, b"missed-%d" % index, objects[b"missed-%d" % index])
        await cluster.objects.delete(bucket, b"inline-0")
        del objects[b"inline-0"]
        cluster.start("nc")
        judge_slowly(cluster)
        assert cluster.differing_registers()
        await cluster.pass_s(SOON_S)
        assert cluster.differing_registers() == []
        await assert_whole(cluster, bucket, objects)
        assert not (await cluster.counts())[2]  # the walk has not ended
        jobs = [job for status in await cluster.statuses() for job in status.jobs if job.name == "catch-up"]
        assert {job.node for job in jobs} == set(cluster.nodes)
        assert {job.state for job in jobs} == {"done"}

    run(scenario)


def test_an_unnoticed_restart_waits_for_no_walk_that_is_under_way() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        judge_slowly(cluster)
        for node in cluster.nodes.values():
            node.maintenance.check.request_walk()
        await cluster.pass_s(SOON_S)
        await cluster.kill("nc")
        for index in range(5):
            await cluster.put(bucket, b"missed-%d" % index, b"2")
        cluster.start("nc")
        assert cluster.differing_registers()
        await cluster.pass_s(SOON_S)
        assert cluster.differing_registers() == []

    run(scenario)


@pytest.mark.parametrize("failures", [1, 3])
def test_what_can_not_be_brought_up_at_once_is_tried_again_without_a_walk(failures: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        judge_slowly(cluster)
        await cluster.kill("nc")
        await cluster.pass_s(SOON_S)
        for index in range(5):
            await cluster.put(bucket, b"missed-%d" % index, b"2")
        refused: set[str] = set()
        left = failures

        async def refuse(source: str, node: str, method: str, request: object) -> None:
            nonlocal left
            if method == "maintain.hint":  # by hints a node brings up the rows that it leads, without a scan
                raise PeerUnreachable("a broken line")
            if "nc" in (source, node) and method == "meta.scan" and left:
                refused.add(source)
                raise PeerUnreachable("a broken line")

        cluster.intercept = refuse
        cluster.start("nc")
        judge_slowly(cluster)
        await cluster.pass_s(1.5 * left)
        assert refused
        assert cluster.differing_registers()
        left = 0
        await cluster.pass_s(SOON_S)
        assert cluster.differing_registers() == []

    run(scenario)


def test_a_directory_of_buckets_that_can_not_be_read_at_once_is_read_again_without_a_walk() -> None:
    async def scenario(cluster: Cluster) -> None:
        await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        judge_slowly(cluster)
        await cluster.kill("nc")
        await cluster.pass_s(SOON_S)
        bucket = await cluster.bucket("of which only gateways know")
        for index in range(20):
            await cluster.put(bucket, b"missed-%d" % index, b"2")
        refused = 0

        async def refuse(source: str, node: str, method: str, request: Any) -> None:
            nonlocal refused
            if method == "meta.scan" and request.table == Table.SYSTEM and refuses:
                refused += 1
                raise PeerUnreachable("a broken line")

        refuses, cluster.intercept = True, refuse
        cluster.start("nc")
        judge_slowly(cluster)
        await cluster.pass_s(2)
        assert refused
        assert cluster.differing_registers()
        refuses = False
        await cluster.pass_s(SOON_S)
        assert cluster.differing_registers() == []

    run(scenario)


def test_what_a_node_did_not_miss_costs_a_message_for_all_ranges_of_a_bucket_and_table() -> None:
    async def scenario(cluster: Cluster) -> None:
        await filled(cluster, 2)
        buckets = [await cluster.bucket(f"other-{number}") for number in range(5)]
        for bucket in buckets:
            for index in range(20):
                await cluster.put(bucket, b"k%d" % index, b"1")
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        await cluster.kill("nc")
        await cluster.put(buckets[2], b"missed", b"2")
        await cluster.pass_s(2 * SOON_S)  # the walk of the others has ended
        cluster.start("nc")
        judge_slowly(cluster)
        asked: Counter[tuple[int, bytes, str]] = Counter()
        differing: set[tuple[int, bytes, int]] = set()

        async def count(source: str, node: str, method: str, request: Any) -> None:
            if method == "meta.scan" and request.table != Table.SYSTEM:
                wants = {ask.want for ask in request.shards}
                if wants == {Want.SUM}:
                    asked[request.table, request.scope, f"{source} {request.disk}"] += 1
                elif wants <= {Want.PIECES, Want.ALL}:
                    differing.update((request.table, request.scope, ask.shard) for ask in request.shards)

        cluster.intercept = count
        for node in cluster.nodes.values():
            node.maintenance.check.catch_up.request()
        await cluster.pass_s(SOON_S)
        assert cluster.differing_registers() == []
        assert {scope for _, scope, _ in differing} == {buckets[2].id}
        assert len(differing) == 1
        passes = 4  # each node sees the others come one after the other, and gets a request
        assert max(asked.values()) <= passes * SUM_TRIES

    run(scenario)


def test_a_walk_gives_way_to_passes_of_other_nodes_for_a_while() -> None:
    async def scenario(cluster: Cluster) -> None:
        await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        await cluster.pass_s(2 * GIVE_WAY_S)
        node = cluster.nodes["nb"]
        asked_until, loop = cluster.clock.monotonic() + 20.0, asyncio.get_running_loop()

        class Asked:
            """As while another node compares its rows with those of this one."""

            @property
            def compared_at(self) -> float:
                return loop.time() if cluster.clock.monotonic() < asked_until else asked_until

        job, node.host = node.maintenance.check.job, Asked()  # type: ignore[assignment]
        for seconds, done in ((20.0, "done"), (1e6, "running")):
            asked_until = cluster.clock.monotonic() + seconds
            node.maintenance.check.request_walk()
            await cluster.pass_s(20.0 - 1.0)
            assert (job.state, job.done) == ("running", 0)
            await cluster.pass_s(10.0)
            assert job.state == done
        await cluster.pass_s(GIVE_WAY_S_MAX)
        assert job.state == "done"

    run(scenario)


def test_a_node_gives_way_only_while_another_one_compares_rows_with_it() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        nodes = list(cluster.nodes.values())

        def compared() -> list[float]:
            return [node.host.compared_at for node in nodes]

        assert set(compared()) == {-inf}, "walks and sums do not count"
        await cluster.kill("nc")
        for index in range(20):
            await cluster.put(bucket, b"missed-%d" % index, b"2")
        cluster.start("nc")
        await cluster.pass_s(SOON_S)
        assert cluster.differing_registers() == []
        before = compared()
        assert min(before) > -inf
        for node in nodes:
            node.maintenance.check.request_walk()
            node.maintenance.check.catch_up.request()
        await cluster.pass_s(SOON_S)
        assert compared() == before

    run(scenario)


def test_a_walk_waits_for_replicas_that_are_slow_and_is_complete() -> None:
    async def scenario(cluster: Cluster) -> None:
        await filled(cluster, 1)

        async def slow(source: str, node: str, method: str, _request: object) -> None:
            if method == "meta.scan" and node != source:
                await asyncio.sleep({"na": 0.0, "nb": 0.1, "nc": 0.5}.get(node, 0.0))

        cluster.intercept = slow
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        for node in cluster.nodes.values():
            assert not [line for line in node.log if "a replica did not answer" in line]

    run(scenario)


async def write_while(cluster: Cluster, objects: dict[bytes, bytes], prefix: bytes, count: int = 12) -> None:
    """Writes objects, and deletes one."""
    bucket = await cluster.buckets.get("bucket")
    for index in range(count):
        key = prefix + b"-%d" % index
        objects[key] = os.urandom(SMALL)
        await cluster.put(bucket, key, objects[key])
    key = prefix + b"-0"
    await cluster.objects.delete(bucket, key)
    del objects[key]


def start_slowly(cluster: Cluster, *nodes: str) -> None:
    cluster.start(*nodes)
    judge_slowly(cluster)


def test_nodes_that_are_away_one_after_the_other_each_get_what_they_missed() -> None:
    """As in an upgrade, each only until it serves again, not until it has caught up."""

    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        judge_slowly(cluster)
        for turn in range(2):
            for name in list(cluster.nodes):
                await cluster.kill(name)
                await cluster.pass_s(2.0)
                await write_while(cluster, objects, b"%d-%s" % (turn, name.encode()))
                start_slowly(cluster, name)
                await cluster.pass_s(2.0)
        await cluster.pass_s(SOON_S)
        assert cluster.differing_registers() == []
        await assert_whole(cluster, bucket, objects)

    run(scenario)


def test_a_node_that_comes_back_while_another_one_is_away_gets_what_a_majority_has() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        judge_slowly(cluster)
        await cluster.kill("nc")
        await write_while(cluster, objects, b"without nc")
        start_slowly(cluster, "nc")
        await cluster.kill("nb")
        assert cluster.differing_registers()
        await cluster.pass_s(SOON_S)
        await write_while(cluster, objects, b"without nb")
        held = {disk.id: cluster.rows(disk.id) for disk in cluster.layouts.current.disks if disk.node != "nb"}
        names = {name for rows in held.values() for name in rows}
        for name in names:
            disks = cluster.layouts.partition(RegisterName.unpack(name).partition).present
            assert len({held[disk].get(name) for disk in disks if disk in held}) == 1, "what nc missed it has now"
        start_slowly(cluster, "nb")
        await cluster.pass_s(SOON_S)
        assert cluster.differing_registers() == []
        await assert_whole(cluster, bucket, objects)

    run(scenario)


@pytest.mark.parametrize("interrupted", ["nc", "na", "nb"])
def test_a_pass_that_a_restart_interrupts_is_done_after_it(interrupted: str) -> None:
    """Of the node that was away, or of one that has what it missed."""

    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        judge_slowly(cluster)
        await cluster.kill("nc")
        await cluster.pass_s(SOON_S)
        await write_while(cluster, objects, b"missed", 40)
        settled = 0

        async def slow(source: str, node: str, method: str, _request: object) -> None:
            nonlocal settled
            if method in ("maintain.behind", "meta.read") and cluster.nodes[source].maintenance.check.catch_up.busy:
                settled += 1
                await asyncio.sleep(0.3)

        cluster.intercept = slow
        start_slowly(cluster, "nc")
        while not settled:  # a pass sets no event
            await cluster.pass_s(0.05)
        await cluster.pass_s(0.1)
        assert cluster.differing_registers()
        await cluster.kill(interrupted)
        cluster.intercept = None
        await cluster.pass_s(1.0)
        start_slowly(cluster, interrupted)
        await cluster.pass_s(SOON_S)
        assert cluster.differing_registers() == []
        await assert_whole(cluster, bucket, objects)

    run(scenario)
