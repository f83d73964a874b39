"""A disk that was away gets the rows that it missed first, however long a walk over all records takes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from typing import Any

import pytest

from storaged.errors import PeerUnreachable
from storaged.maintain.health import Finding
from storaged.meta.names import RegisterName, Value
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

    run(scenario)


def test_a_restart_that_nobody_noticed_waits_for_no_walk_that_is_under_way() -> None:
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
