"""A disk that was away gets the rows that it missed first, however long a walk over all records takes."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from storaged.errors import PeerUnreachable
from storaged.maintain.health import Finding
from storaged.meta.listing.merge import SUM_TRIES
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
                elif wants <= {Want.STAMPS, Want.ALL}:
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
