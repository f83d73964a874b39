"""Catch-up pulls: a disk that lags adopts what the others agree on, and everything else is settled by a gateway."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from storaged.errors import PeerRefused, ServiceUnavailable
from storaged.maintain.pull import NAMES_A_CALL, Behind, BroughtUp
from storaged.meta import messages
from storaged.meta.names import Ballot, RegisterName, Value, Visibility, object_name
from storaged.objects.records import BucketRecord
from tests.integration.memory_cluster import Cluster, LocalCaller, run

SMALL, LARGE = 5_000, 700_000


def names_of(bucket: BucketRecord, keys: list[bytes]) -> list[RegisterName]:
    return [object_name(bucket.id, bucket.shard_numbers, key) for key in keys]


def held(cluster: Cluster, name: RegisterName) -> dict[str, Ballot | None]:
    found = {disk: cluster.meta(disk).get(name) for disk in cluster.layouts.current.replicas_of(name.partition)}
    return {disk: None if slot is None else slot.ballot for disk, slot in found.items()}


def on(cluster: Cluster, name: RegisterName, node: str) -> str:
    """The replica of a register on this node."""
    layout = cluster.layouts.current
    return next(disk for disk in layout.replicas_of(name.partition) if layout.node_of(disk) == node)


def test_a_disk_that_was_away_adopts_rows_and_copies_without_a_round() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"deleted", os.urandom(SMALL))
        await cluster.pass_s(30)
        await cluster.kill("nb")
        keys = [b"key%d" % number for number in range(30)]
        for number, key in enumerate(keys):
            await cluster.put(bucket, key, os.urandom((300, SMALL)[number % 2]))
        await cluster.objects.delete(bucket, b"deleted")
        await cluster.pass_s(5)
        calls: Counter[str] = Counter()

        async def count(source: str, node: str, method: str, request: object) -> None:
            calls[method] += 1

        cluster.intercept = count
        cluster.maintain()
        cluster.start("nb")
        await cluster.settled()
        assert cluster.differing_registers() == []
        for name in names_of(bucket, [*keys, b"deleted"]):
            assert len(set(held(cluster, name).values())) == 1, "under the ballot of the write"
            slot = cluster.meta(on(cluster, name, "nb")).get(name)
            assert slot is not None
            copies = await cluster.fragments(slot.value.payload) if slot.value.payload else []
            assert not slot.value.payload or on(cluster, name, "nb") in [disk for disk, _ in copies]
        assert cluster.nodes["nb"].maintenance.pull.adopted >= 31 - calls["meta.prepare"] // 3
        assert calls["meta.prepare"] <= 3 * 3, calls

    run(scenario)


def test_one_replica_is_not_believed_and_what_is_not_settled_goes_to_a_gateway() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        [name] = names_of(bucket, [b"half"])
        value = Value(1, b"o" * 16, Visibility.LIVE, b"")
        disks = {node: on(cluster, name, node) for node in ("na", "nb", "nc")}
        at = Ballot(1, cluster.clock.wall_ms() * 1000, "g", b"incarnat")
        await cluster.nodes["na"].replicas[disks["na"]].accept(messages.Accept(disks["na"], name, at, value))
        caller = LocalCaller(cluster, "na", "storage")
        reply, _ = await caller.call("nb", "maintain.behind", Behind((name.pack(),)), BroughtUp)
        assert reply.names == ()
        assert held(cluster, name) == {disks["na"]: at, disks["nb"]: None, disks["nc"]: None}
        await cluster.nodes["nb"].maintenance.pull.bring_up(name)
        assert len(set(held(cluster, name).values())) == 1
        assert at not in held(cluster, name).values(), "a gateway made a round of its own"

    run(scenario)


def test_a_register_that_cannot_be_looked_at_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that has just started does not know yet which partitions have moved."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        names = names_of(bucket, [b"first", b"second"])
        at = Ballot(1, cluster.clock.wall_ms() * 1000, "g", b"incarnat")
        value = Value(1, b"o" * 16, Visibility.LIVE, b"")
        for name in names:
            for node in ("na", "nc"):
                disk = on(cluster, name, node)
                await cluster.nodes[node].replicas[disk].accept(messages.Accept(disk, name, at, value))
        pull = cluster.nodes["nb"].maintenance.pull
        look_and_adopt = pull._look_and_adopt

        async def first_is_not_known(name: RegisterName) -> bool:
            if name == names[0]:
                raise ServiceUnavailable("This node has not read yet which partitions have moved.")
            return await look_and_adopt(name)

        monkeypatch.setattr(pull, "_look_and_adopt", first_is_not_known)
        caller = LocalCaller(cluster, "na", "storage")
        asked = Behind(tuple(name.pack() for name in names))
        reply, _ = await caller.call("nb", "maintain.behind", asked, BroughtUp)
        assert reply.names == (names[1].pack(),)
        assert [held(cluster, name)[on(cluster, name, "nb")] for name in names] == [None, at]

    run(scenario)


@pytest.mark.parametrize("way", ["a promise", "a fence", "something newer"])
def test_a_disk_adopts_nothing_against_its_promises_its_fences_and_what_it_has(way: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        [name] = names_of(bucket, [b"key"])
        disks = {node: on(cluster, name, node) for node in ("na", "nb", "nc")}
        replica = cluster.nodes["nb"].replicas[disks["nb"]]
        now_us = cluster.clock.wall_ms() * 1000
        at, later = (Ballot(1, now_us + ahead, "g", b"incarnat") for ahead in (0, 5_000_000))
        value = Value(1, b"o" * 16, Visibility.LIVE, b"")
        for node in ("na", "nc"):
            await cluster.nodes[node].replicas[disks[node]].accept(messages.Accept(disks[node], name, at, value))
        newer = Value(2, b"n" * 16, Visibility.LIVE, b"newer")
        if way == "a promise":
            await replica.prepare(messages.Prepare(disks["nb"], name, later))
        elif way == "a fence":
            await replica.fence(messages.FenceSet(disks["nb"], bucket.id, b"nonce", False))
        else:
            await replica.accept(messages.Accept(disks["nb"], name, later, newer))
        caller = LocalCaller(cluster, "na", "storage")
        reply, _ = await caller.call("nb", "maintain.behind", Behind((name.pack(),)), BroughtUp)
        assert reply.names == ()
        assert held(cluster, name)[disks["nb"]] == (later if way == "something newer" else None)
        if way == "a promise":
            await cluster.nodes["na"].maintenance.pull.bring_up(name)
            assert len(set(held(cluster, name).values())) == 1

    run(scenario)


def test_names_that_can_not_be_and_too_many_are_refused() -> None:
    async def scenario(cluster: Cluster) -> None:
        caller = LocalCaller(cluster, "na", "storage")
        for names in ((b"short",), (b"n" * 30,) * (NAMES_A_CALL + 1)):
            with pytest.raises(PeerRefused) as refused:
                await caller.call("nb", "maintain.behind", Behind(names), BroughtUp)
            assert refused.value.remote_code == "BAD_MESSAGE"

    run(scenario)
