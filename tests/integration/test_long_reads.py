"""Downloads that last longer than deleted or replaced data stays."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from storaged.errors import PeerRefused, PeerUnreachable, ServiceUnavailable
from storaged.maintain.context import MaintainLimits
from storaged.maintain.holds import KEYS_A_CALL, LEASE_S, REASON, RENEW_S, Hold
from storaged.wire import Buffer
from tests.integration.memory_cluster import WHO, Cluster, run
from tests.integration.test_maintain_collect import collect, upload_parts

DELAY_S = 60.0
COLLECT_S = MaintainLimits().collect_interval_s
BLOCK = 12 * 65_520
DATA = os.urandom(4 * BLOCK)


async def opened(cluster: Cluster, bucket: Any, key: bytes) -> tuple[Any, AsyncIterator[Buffer], bytes]:
    """A download that has its first piece."""
    stream = await cluster.objects.get(bucket, key)
    chunks = stream.chunks()
    return stream, chunks, bytes(await anext(chunks))


async def pass_s(cluster: Cluster, seconds: float) -> None:
    """Every node collects as often as in the program."""
    for _ in range(math.ceil(seconds / COLLECT_S)):
        await cluster.pass_s(COLLECT_S)
        await collect(cluster)


async def rest_of(chunks: AsyncIterator[Buffer]) -> bytes:
    return b"".join([bytes(chunk) async for chunk in chunks])


async def all_before_an_error(chunks: AsyncIterator[Buffer]) -> tuple[bytes, str]:
    got = bytearray()
    try:
        async for chunk in chunks:
            got += chunk
    except ServiceUnavailable as error:
        return bytes(got), error.message
    return bytes(got), ""


@pytest.mark.parametrize("replaced", [True, False])
def test_a_download_longer_than_the_delay_gets_every_byte_and_then_the_data_goes(replaced: bool) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", DATA)
        data_id = (await cluster.entry(bucket, b"k")).data_id
        stream, chunks, first = await opened(cluster, bucket, b"k")
        if replaced:
            await cluster.put(bucket, b"k", b"else")
        else:
            await cluster.objects.delete(bucket, b"k")
        await pass_s(cluster, 10 * DELAY_S)
        assert await cluster.fragments(data_id)
        assert any(node.maintenance.collector.waiting()[REASON] for node in cluster.nodes.values())
        assert first + await rest_of(chunks) == DATA
        await stream.close()
        await pass_s(cluster, LEASE_S + 60)
        assert await cluster.fragments(data_id) == []
        assert cluster.gateway.plane.long_reads.keys() == []

    run(scenario, retire_delay_ms=int(DELAY_S * 1000))


def test_a_slow_download_stops_collection_for_a_bounded_time_and_then_ends_without_a_wrong_byte() -> None:
    hold_s = 300.0

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", DATA)
        data_id = (await cluster.entry(bucket, b"k")).data_id
        stream, chunks, first = await opened(cluster, bucket, b"k")
        await cluster.objects.delete(bucket, b"k")
        await pass_s(cluster, DELAY_S + hold_s - 30)
        assert await cluster.fragments(data_id)
        await pass_s(cluster, 90)
        assert await cluster.fragments(data_id) == []
        got, error = await all_before_an_error(chunks)
        assert re.search(r"replaced or deleted while it was read.*limits\.read_hold_s", error)
        assert len(first + got) < len(DATA)
        assert DATA.startswith(first + got)
        await stream.close()

    run(scenario, retire_delay_ms=int(DELAY_S * 1000), limits=MaintainLimits(read_hold_s=hold_s))


def test_a_download_holds_nothing_on_a_disk_without_room() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", DATA)
        data_id = (await cluster.entry(bucket, b"k")).data_id
        stream, _, _ = await opened(cluster, bucket, b"k")
        await cluster.objects.delete(bucket, b"k")
        for node in cluster.nodes.values():
            for store in node.fragments.values():
                store.refuse("full")
        await pass_s(cluster, 2 * DELAY_S)
        assert await cluster.fragments(data_id) == []
        await stream.close()

    run(scenario, retire_delay_ms=int(DELAY_S * 1000))


def test_a_gateway_that_dies_holds_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        other = cluster.new_gateway("h")
        await cluster.put(bucket, b"k", DATA)
        data_id = (await cluster.entry(bucket, b"k")).data_id
        stream = await other.objects.get(bucket, b"k")
        await cluster.objects.delete(bucket, b"k")
        await pass_s(cluster, 3 * DELAY_S)
        assert await cluster.fragments(data_id)
        await stream.close()
        await other.close()
        await pass_s(cluster, LEASE_S + 60)
        assert await cluster.fragments(data_id) == []

    run(scenario, retire_delay_ms=int(DELAY_S * 1000))


def test_the_pages_of_an_object_of_many_parts_are_held_too() -> None:
    """Each part is read when its turn comes, and its entry is on a page that no record names any more."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, parts, whole = await upload_parts(cluster, bucket, b"k", dict.fromkeys(range(1, 301), 2_000))
        await cluster.objects.complete(bucket, b"k", upload_id, parts, owner=WHO.user_id)
        stream, chunks, first = await opened(cluster, bucket, b"k")
        await cluster.objects.delete(bucket, b"k")
        await pass_s(cluster, 3 * DELAY_S)
        assert sum([await node.maintenance.page_sweep.once() for node in cluster.nodes.values()]) == 0
        assert first + await rest_of(chunks) == whole
        await stream.close()
        await cluster.pass_s(LEASE_S + 1)
        assert sum([await node.maintenance.page_sweep.once() for node in cluster.nodes.values()]) > 0

    limits = MaintainLimits(orphan_age_ms=-1, drop_delay_s=0.01, orphan_interval_s=1e9)
    run(scenario, retire_delay_ms=int(DELAY_S * 1000), inline_sealed_bytes_max=100, small_bytes_max=100, limits=limits)


@pytest.mark.parametrize("silent_s", [RENEW_S, 1e9])
def test_a_silent_node_delays_no_other_however_many_names_there_are(silent_s: float) -> None:
    """With a wait for it between the messages, what the others hold would have ended before it was named again."""

    async def scenario(cluster: Cluster) -> None:
        names = [b"%016d" % number for number in range(10 * KEYS_A_CALL)]
        heard: dict[str, list[float]] = {}
        silent: list[object] = []

        async def note(_source: str, node: str, method: str, request: object) -> None:
            if method != "maintain.hold":
                return
            if node == "nc":
                silent.append(request)
                await asyncio.sleep(silent_s)
                raise PeerUnreachable("it does not answer")
            assert isinstance(request, Hold)
            if names[-1] in request.keys:
                heard.setdefault(node, []).append(asyncio.get_running_loop().time())

        cluster.intercept = note
        holding = asyncio.get_running_loop().create_task(cluster.gateway.maintain.run_holds(lambda: names))
        await cluster.pass_s(100)
        holding.cancel()
        for node in ("na", "nb"):
            renewed = heard[node]
            assert max(after - before for before, after in itertools.pairwise(renewed)) < LEASE_S / 2
            assert len(cluster.nodes[node].maintenance.holds) == len(names)
        assert len(silent) <= 100 / RENEW_S, "it is asked no more often than it would be if it answered"

    run(scenario)


def test_names_that_cannot_be_are_refused() -> None:
    async def scenario(cluster: Cluster) -> None:
        method = cluster.nodes["na"].methods["maintain.hold"]
        for keys in ((b"",), (bytes(33),), (bytes(16),) * (KEYS_A_CALL + 1)):
            call: Any = None
            with pytest.raises(PeerRefused):
                await method.handler(Hold(keys), call)

    run(scenario)
