"""The key of a deleted bucket, in a whole cluster with a real keyring: it goes after the last fragment, and from every
gateway.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from storaged.cluster.policy import Policy
from storaged.errors import KeyringUnavailable
from storaged.keys import Keyring, KeyringPorts, create_keyring
from storaged.keys.bucketkey import DESTROYED, BucketKeyRecord
from storaged.meta.names import Change, system_name
from storaged.node.housekeeping import tidy
from storaged.node.keyhome import RingRegisters
from storaged.wire import decode
from tests.integration.memory_cluster import Cluster, Gateway, run
from tests.unit.test_keyring import CREDENTIAL, FRANCE, Copies

FORMS = {b"inline": 10, b"small": 5_000, b"large": 2_500_000}
MATERIAL = create_keyring(Path(tempfile.mkdtemp()) / "keyring", CREDENTIAL)
AUDITED: list[str] = []


async def audit(kind: str, fields: Mapping[str, str]) -> None:
    AUDITED.append(f"{kind} {fields['outcome']}")


def with_keyring(cluster: Cluster, gateway: Gateway) -> tuple[Keyring, Copies]:
    copies = Copies()
    keyring = Keyring(
        MATERIAL,
        KeyringPorts(RingRegisters(gateway.ring, gateway.scanner), copies, audit, cluster.clock),
        policy=Policy(),
        holder=FRANCE,
    )
    signs: Any = keyring  # as this cluster's storage nodes believe
    signs.sign_public, signs.public_signer = cluster.keys.sign_public, cluster.keys.public_signer
    gateway.plane.keys = keyring
    return keyring, copies


def test_it_goes_after_the_last_fragment_and_from_every_gateway() -> None:
    async def scenario(cluster: Cluster) -> None:
        AUDITED.clear()
        keyring, copies = with_keyring(cluster, cluster.gateway)
        other = cluster.new_gateway("h")
        elsewhere, its_copies = with_keyring(cluster, other)
        cluster.maintain()
        kept = await cluster.bucket("kept")
        bucket = await cluster.bucket("gone")
        for form, size in FORMS.items():
            await cluster.put(bucket, form, os.urandom(size))
            assert await other.objects.head(bucket, form)
        await elsewhere.bucket_key(kept.id, ())
        for form in FORMS:
            await cluster.objects.delete(bucket, form)
        await cluster.buckets.delete(bucket)
        plane = cluster.gateway.plane
        delay_s = plane.limits.retire_delay_ms / 1000
        await cluster.pass_s(1)  # what was deleted comes on the disks' garbage lists
        await cluster.kill("nb")
        await cluster.leap(delay_s + 60)
        await tidy(plane, cluster.buckets)
        assert sorted(copies.held) == sorted([bucket.id, kept.id]), "a disk is away, which may have something of it"
        cluster.start("nb")
        await cluster.leap(60)
        for _ in range(20):
            if not [one for one in await cluster.fragments() if one]:
                break
            await cluster.leap(600)
        assert await cluster.fragments() == []
        await tidy(plane, cluster.buckets)
        assert list(copies.held) == [kept.id]
        assert AUDITED[-2:] == ["key.destroy intent", "key.destroy done"]
        await tidy(other.plane, other.buckets)
        assert list(its_copies.held) == [kept.id]
        for each in (keyring, elsewhere):
            with pytest.raises(KeyringUnavailable, match="is destroyed"):
                await each.bucket_key(bucket.id, ())
            assert (await each.bucket_key(kept.id, ())).version == 1
        found = await RingRegisters(other.ring, other.scanner).read("key/" + bucket.id.hex())
        assert found is not None
        assert decode(found.body, BucketKeyRecord).state == DESTROYED

    run(scenario)


def test_a_register_that_was_overwritten_is_mended_for_all_gateways() -> None:
    async def scenario(cluster: Cluster) -> None:
        keyring, _ = with_keyring(cluster, cluster.gateway)
        bucket = await cluster.bucket()
        data = os.urandom(5_000)
        await cluster.put(bucket, b"key", data)
        await cluster.gateway.plane.registers.change(
            system_name("key/" + bucket.id.hex()),
            lambda _value: Change(b""),
        )
        await keyring.reconcile_copies({})
        other = cluster.new_gateway("h")
        with_keyring(cluster, other)
        stream = await other.objects.get(bucket, b"key")
        assert b"".join([bytes(piece) async for piece in stream.chunks()]) == data

    run(scenario)
