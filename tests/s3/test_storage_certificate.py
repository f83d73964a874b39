"""Somebody has the certificate and the layout of one storage node, and a running cluster before him."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from storaged.cluster import identity
from storaged.cluster.layouts import LayoutBook, LayoutFiles
from storaged.cluster.ports import PeerChecks
from storaged.cluster.rpc import RpcPool, authority
from storaged.errors import PeerRefused
from storaged.meta import messages
from storaged.meta.client import RingClient, RingSettings
from storaged.meta.consensus.register import Verdict
from storaged.meta.names import Ballot, RegisterName, Value, Visibility, system_name
from storaged.meta.transport.replicas import ReplicaDirectory
from storaged.objects.records import BucketRecord
from storaged.wire import decode
from tests.cluster import Cluster


class Thief:
    """Only files of ``n1``: its identity and its layouts."""

    def __init__(self, cluster: Cluster) -> None:
        place = cluster.directory / "n1"
        own = identity.load_identity(place / "identity")
        self.layouts = LayoutBook(own.administration, own.cluster, known=LayoutFiles(place / "layouts").load())
        nodes = self.layouts.current.node_by_name
        self.pool = RpcPool(
            own, addresses=lambda node: nodes[node].address or None, checks=PeerChecks(lambda _peer: None)
        )
        self.replicas = ReplicaDirectory(self.layouts, self.pool)
        self.ring = RingClient(self.layouts, self.replicas, RingSettings("n1", gateway=False))

    async def force(self, name: RegisterName, value: Value, node: str = "n1") -> set[str]:
        """What every replica answers to a prepare and an accept under a high ballot."""
        at = Ballot(self.layouts.current.epoch, time.time_ns() // 1000 + 5_000_000, node, os.urandom(8))
        told = set()
        for disk in self.layouts.current.replicas_of(name.partition):
            replica = self.replicas.replica(disk)
            told.add(await _answer(replica.prepare(messages.Prepare(disk, name, at))))
            told.add(await _answer(replica.accept(messages.Accept(disk, name, at, value, identity=True))))
        return told

    async def call(self, method: str, request: Any, reply: Any) -> str:
        try:
            await self.pool.call("n2", method, request, reply)
        except PeerRefused as error:
            return error.remote_code
        return "answered"


async def _answer(asking: Awaitable[messages.PrepareReply | messages.AcceptReply]) -> str:
    try:
        return Verdict((await asking).verdict).name
    except PeerRefused as error:
        return error.remote_code


def as_thief(cluster: Cluster, work: Callable[[Thief], Awaitable[None]]) -> None:
    async def run() -> None:
        thief = Thief(cluster)
        await thief.pool.start()
        try:
            await work(thief)
        finally:
            await thief.ring.close()
            await thief.pool.close()

    asyncio.run(run())


def test_one_storage_certificate_writes_no_user_key_bucket_or_cluster_and_sets_no_fence(cluster: Cluster) -> None:
    async def work(thief: Thief) -> None:
        user = system_name("user/" + cluster.settings["access_key"])
        bucket_name = system_name("bucket/" + cluster.settings["bucket"])
        bucket = (await thief.ring.read(bucket_name)).value
        assert bucket is not None
        bucket_id = decode(bucket.body, BucketRecord).id
        key, cluster_record = system_name("key/" + bucket_id.hex()), system_name("cluster")
        before = {name: (await thief.ring.read(name)).value for name in (user, bucket_name, key, cluster_record)}
        forged = Value(99, os.urandom(16), Visibility.LIVE, b"forged")
        for name, value in before.items():
            assert value is not None
            assert await thief.force(name, forged) == {"ROLE_REFUSED"}
            assert await thief.force(name, value) == {"ROLE_REFUSED"}
            assert await thief.force(name, value, "gateway") == {"ROLE_REFUSED"}
        disk = next(disk.id for disk in thief.layouts.current.disks if disk.node == "n2")
        assert (
            await thief.call("meta.fence", messages.FenceSet(disk, bucket_id, b"\xff" * 16, True), messages.FenceReply)
            == "ROLE_REFUSED"
        )
        assert (
            await thief.call("meta.unfence", messages.FenceLift(disk, bucket_id, b"\xff" * 16), messages.FenceReply)
            == "ROLE_REFUSED"
        )
        assert {name: (await thief.ring.read(name)).value for name in before} == before

    as_thief(cluster, work)
    cluster.wait_until(lambda: "ROLE_REFUSED" in audited(cluster, "n2"), 90, "the refusal in the audit log of n2")
    assert cluster.status()["verdict"] == "HEALTHY"


def audited(cluster: Cluster, node: str) -> str:
    return "".join(file.read_text() for file in sorted((cluster.directory / node).rglob("audit-*.jsonl")))


def test_methods_that_are_not_for_storage_nodes_are_refused_by_a_running_node(cluster: Cluster) -> None:
    async def work(thief: Thief) -> None:
        for method, row in authority.METHODS.items():
            if "storage" not in row.callers:
                assert await thief.call(method, messages.EpochFence("d", 1), messages.EpochReply) == "ROLE_REFUSED", (
                    method
                )

    as_thief(cluster, work)


def test_the_command_prints_what_each_role_may_call(cluster: Cluster) -> None:
    told = cluster.run("cluster", "methods").stdout
    assert all(name in told for name in authority.METHODS)
