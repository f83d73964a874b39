"""Storage nodes act on a bucket's countries only where a gateway signed them: forged records make honest repair move
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from storaged.cluster import issuing
from storaged.cluster.identity import Identity, NodeSigner, authority_of
from storaged.cluster.signers import (
    STATEMENT_LABEL,
    Signers,
    SignerStatement,
    is_signed,
    publish,
    signer_id,
    signer_path,
    state_signer,
)
from storaged.errors import CertificateRefused, DataDamaged, ServiceUnavailable
from storaged.keys.signing import signing_key
from storaged.maintain.context import MaintainLimits
from storaged.meta.names import Ballot, Change, RegisterName, Value, object_name, system_name
from storaged.meta.store_ports import Slot, StoreBatch
from storaged.node.housekeeping import check_records
from storaged.objects.configuration.kinds import TAGGING, Tags
from storaged.objects.records import BucketRecord, ObjectRecord, decode_object, encode_object
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.public import public_bytes
from storaged.objects.system.users import UserService
from storaged.wire import decode, encode
from tests.doubles.keys import SIGNING_KEY
from tests.integration.memory_cluster import WHO, Cluster, run
from tests.worlds.authority import World as AuthorityWorld
from tests.worlds.objects import World

LARGE = 300_000
DELAY_S = MaintainLimits().recode_delay_s
MIXED = {"a": "FR/par1/a", "b": "FR/par2/b", "c": "FR/lyo1/c", "d": "DE/fra/d"}
NAME = system_name("bucket/bucket")


async def french(cluster: Cluster) -> tuple[BucketRecord, list[bytes]]:
    bucket = await cluster.buckets.create(WHO, "bucket", region="r", countries=("FR",))
    keys = [b"large-%d" % number for number in range(6)]
    for key in keys:
        await cluster.put(bucket, key, os.urandom(LARGE))
    return bucket, keys


async def countries_in_use(cluster: Cluster) -> set[str]:
    return {cluster.layouts.current.country_of(disk) for disk, _ in await cluster.fragments()}


async def refused(cluster: Cluster) -> dict[str, str]:
    return dict(pair for status in await cluster.statuses() for pair in status.records_refused)


async def forge(cluster: Cluster, forged: Callable[[bytes], bytes]) -> bytes:
    """As one hostile node would: a whole round of the ring, with a body of its own. The body that was there."""
    kept = []

    def update(value: Value | None) -> Change:
        assert value is not None
        kept.append(value.body)
        return Change(forged(value.body))

    await cluster.gateway.ring.change(NAME, update)
    return kept[-1]


def changed(**fields: object) -> Callable[[bytes], bytes]:
    return lambda body: encode(msgspec.structs.replace(decode(body, BucketRecord), **fields))


FORGED = {
    "countries": changed(countries=("DE",)),
    "no countries": changed(countries=()),
    "no countries and no signature": changed(countries=(), signature=b"", signer=b""),
    "another signer": changed(countries=(), signer=bytes(16)),
    "a signature that is none": changed(countries=(), signature=b"short"),
    "other shards": changed(shard_list=bytes(range(16))),
    "the same record, at another sequence number": lambda body: body,
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_records_make_honest_repair_move_nothing(what: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        await french(cluster)
        assert await countries_in_use(cluster) == {"FR"}
        cluster.maintain()
        await cluster.settled()
        await forge(cluster, FORGED[what])
        before = await cluster.fragments()
        await cluster.kill("na")
        await cluster.leap(DELAY_S + 60)
        await cluster.pass_s(120)
        assert await cluster.fragments() == before
        assert list(await refused(cluster)) == ["bucket/bucket"]

    run(scenario, racks=MIXED)


def test_a_record_that_a_gateway_signed_is_repaired_inside_its_countries() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, keys = await french(cluster)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("na")
        await cluster.leap(DELAY_S + 60)
        await cluster.pass_s(120)
        profiles = {str(place.profile) for key in keys for place in await cluster.places(bucket, key)}
        assert "2+2" in profiles
        assert await countries_in_use(cluster) == {"FR"}
        assert await refused(cluster) == {}

    run(scenario, racks=MIXED)


def test_an_object_whose_record_names_a_disk_outside_the_countries_is_brought_inside() -> None:
    """Where fragments are lies in the clear, and is not authenticated: a storage node may say that they belong
    elsewhere.
    """

    async def scenario(cluster: Cluster) -> None:
        bucket, keys = await french(cluster)
        name = object_name(bucket.id, bucket.shard_numbers, keys[0])

        def elsewhere(value: Value | None) -> Change:
            assert value is not None
            (version,) = decode_object(value.body).versions
            entry = version.parts[0]
            runs = tuple(msgspec.structs.replace(run, moved={0: "d0", 1: "d1"}) for run in entry.runs)
            parts = (msgspec.structs.replace(entry, runs=runs),)
            return Change(
                encode_object(ObjectRecord((msgspec.structs.replace(version, parts=parts),))), payload=value.payload
            )

        await cluster.gateway.ring.change(name, elsewhere)
        cluster.maintain()
        await cluster.pass_s(300)
        assert await countries_in_use(cluster) == {"FR"}
        places = await cluster.places(bucket, keys[0])
        assert not any("d0" in place.disks or "d1" in place.disks for place in places)
        assert await cluster.is_whole(bucket, keys[0])

    run(scenario, racks=MIXED)


def test_a_record_from_before_it_was_signed_is_looked_after_once_a_gateway_has_signed_it() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, keys = await french(cluster)

        def unsigned(body: bytes) -> bytes:
            """Authentic at the sequence number that it will have."""
            record = msgspec.structs.replace(decode(body, BucketRecord), signature=b"", signer=b"", authenticator=b"")
            tag = cluster.keys.authenticate((NAME.pack(), (2).to_bytes(8, "big")), encode(record))
            return encode(msgspec.structs.replace(record, authenticator=tag))

        await forge(cluster, unsigned)
        cluster.buckets.forget("bucket")
        assert (await cluster.buckets.get("bucket")).signature == b"", "it is as authentic as before"
        place = (await cluster.places(bucket, keys[0]))[0]
        fragment, disk = next(place.fragments)
        await cluster.store(disk).delete([fragment])
        cluster.maintain()
        await cluster.pass_s(60)
        assert not cluster.holds(disk, fragment)
        assert "is not signed" in (await refused(cluster))["bucket/bucket"]
        await check_records(cluster.buckets, UserService(cluster.objects.plane))
        await cluster.pass_s(60)
        assert cluster.holds(disk, fragment)
        assert await refused(cluster) == {}
        assert await cluster.buckets.sign_unsigned(await cluster.buckets.every_bucket()) == 0

    run(scenario, racks=MIXED)


async def test_a_record_that_can_not_be_written_now_keeps_no_other_from_being_signed() -> None:
    world = World(None)
    buckets = BucketService(world.plane())
    for name in ("first", "second"):
        made = await buckets.create(WHO, name, region="r")
        register = system_name(f"bucket/{name}")
        value = world.ring.values[register]
        bare = msgspec.structs.replace(made, signature=b"", signer=b"", authenticator=b"")
        tag = world.keys.authenticate((register.pack(), (1).to_bytes(8, "big")), encode(bare))
        world.ring.values[register] = msgspec.structs.replace(
            value, body=encode(msgspec.structs.replace(bare, authenticator=tag))
        )
    change = world.ring.change

    async def stopped(name: RegisterName, *arguments: Any, **named: Any) -> Any:
        if name == system_name("bucket/first"):
            raise ServiceUnavailable
        return await change(name, *arguments, **named)

    world.ring.change = stopped  # type: ignore[method-assign]
    assert await buckets.sign_unsigned(await buckets.every_bucket()) == 1
    assert [record.signer == SIGNER for record in await buckets.every_bucket()] == [False, True]


def test_neither_an_older_record_of_the_bucket_nor_anothers_takes_its_place() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await french(cluster)
        other = await cluster.bucket("other")
        first = {disk: cluster.meta(disk).get(NAME) for disk in cluster.layouts.current.seeds}
        await cluster.buckets.configure(bucket, TAGGING, lambda _: Tags({"a": "b"}))
        cluster.maintain()
        await cluster.settled()
        node = cluster.nodes["na"]
        buckets = node.maintenance.check.walker.buckets
        assert buckets.countries_of(bucket.id) == ("FR",)
        body = await forge(cluster, lambda _body: encode(msgspec.structs.replace(other, name="bucket")))
        await buckets.refresh(node.context)
        assert not buckets.is_verified(bucket.id)
        assert buckets.is_verified(other.id)
        await forge(cluster, lambda _body: body)
        await buckets.refresh(node.context)
        assert "not what its signer signed" in buckets.refused["bucket/bucket"]
        for (
            disk,
            slot,
        ) in first.items():  # a majority that presents a whole row of the past, with a signature that holds
            assert slot is not None
            late = Ballot(1, 1 << 60, "n", b"incarnat")
            await cluster.meta(disk).commit(StoreBatch([Slot(NAME, late, slot.value)]))
        await buckets.refresh(node.context)
        assert "older than one that was seen" in buckets.refused["bucket/bucket"]
        with pytest.raises(KeyError):
            buckets.countries_of(bucket.id)

    run(scenario, racks=MIXED)


def test_no_bucket_is_taken_to_be_gone_while_a_record_is_not_believed() -> None:
    """Its row may have been overwritten: then its id is in no record."""

    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await french(cluster)
        await cluster.bucket("other")
        collector = cluster.nodes["na"].maintenance.collector
        await forge(cluster, changed(id=b"x" * 16))
        assert not await collector._judge.is_gone(bucket.id)
        assert not await collector._judge.is_gone(b"y" * 16)

    run(scenario, racks=MIXED)


# --- who signs


class Paths:
    """System registers by path."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}

    async def read(self, path: str) -> bytes | None:
        return self.bodies.get(path)

    async def write(self, path: str, body: bytes) -> None:
        self.bodies[path] = body


PUBLIC = SIGNING_KEY.public_key().public_bytes_raw()
SIGNER = signer_id(PUBLIC)


@pytest.fixture
def world(tmp_path: Path) -> AuthorityWorld:
    return AuthorityWorld(tmp_path)


async def learnt(
    node: Identity, authority: x509.Certificate, *, cluster: str = "c1", spoil: Callable[[bytes], bytes] = bytes
) -> str:
    """Why a storage node does not believe what ``node`` states; empty when it does."""
    paths = Paths()
    await paths.write(signer_path(SIGNER), spoil(encode(state_signer(NodeSigner(node), "c1", PUBLIC))))
    try:
        key = await Signers(paths.read, authority, cluster).key(SIGNER)
    except CertificateRefused as error:
        return error.message
    assert is_signed(key, b"message", SIGNING_KEY.sign(b"message"))
    assert not is_signed(key, b"message", SIGNING_KEY.sign(b"massage"))
    return ""


async def test_a_gateway_of_the_cluster_certifies_the_signing_key_and_nobody_else_does(
    world: AuthorityWorld, tmp_path: Path
) -> None:
    gateway, storage = world.node("gw", ("gateway",)), world.node("n1")
    authority = authority_of(storage)
    assert await learnt(gateway, authority) == ""
    assert await learnt(world.node("both", ("gateway", "storage")), authority) == ""
    assert "no gateway" in await learnt(storage, authority)
    strangers = AuthorityWorld(tmp_path / "other")
    assert await learnt(strangers.node("gw", ("gateway",)), authority)
    assert await learnt(gateway, authority, cluster="c2")
    assert await learnt(world.forged(world.node("gw2", ("gateway",)), cluster="c2"), authority)
    assert await learnt(world.forged(world.node("gw3", ("gateway",)), country="US"), authority)


async def test_a_certificate_that_has_expired_since_still_certifies(world: AuthorityWorld) -> None:
    storage = world.node("n1")
    old = issuing.issue(
        world.authority, world.directory / "old", name="old", location="FR/par1/a", roles=("gateway",), days=-1
    )
    assert await learnt(old, authority_of(storage)) == ""


async def test_a_statement_that_was_altered_is_refused(world: AuthorityWorld) -> None:
    gateway, authority = world.node("gw", ("gateway",)), authority_of(world.node("n1"))
    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    body = encode(state_signer(NodeSigner(gateway), "c1", PUBLIC))
    whole = decode(body, SignerStatement)
    for spoilt in (
        b"",
        b"\xc1",
        encode([1, 2]),
        encode(msgspec.structs.replace(whole, public=stranger)),
        encode(msgspec.structs.replace(whole, certificate=b"noise")),
        encode(msgspec.structs.replace(whole, signature=whole.signature[:-1])),
        encode(state_signer(NodeSigner(gateway), "c1", b"short")),
        encode(state_signer(NodeSigner(gateway), "c2", PUBLIC)),
    ):
        assert await learnt(gateway, authority, spoil=lambda _body, spoilt=spoilt: spoilt)


async def test_a_gateway_writes_its_statement_where_there_is_no_good_one(world: AuthorityWorld) -> None:
    gateway, storage = world.node("gw", ("gateway",)), world.node("n1")
    paths, signer = Paths(), NodeSigner(gateway)
    authority = authority_of(gateway)

    async def publishes() -> bool:
        return await publish(paths.read, paths.write, signer, authority, "c1", PUBLIC)

    assert [await publishes(), await publishes()] == [True, False]
    good = paths.bodies[signer_path(SIGNER)]
    for spoilt in (b"", b"noise", encode(state_signer(NodeSigner(storage), "c1", PUBLIC))):
        paths.bodies[signer_path(SIGNER)] = spoilt
        assert await publishes()
        assert decode(paths.bodies[signer_path(SIGNER)], SignerStatement).public == decode(good, SignerStatement).public


async def test_a_statement_that_replicas_hold_differently_is_written_again_and_stops_no_other_record(
    world: AuthorityWorld,
) -> None:
    gateway = world.node("gw", ("gateway",))
    paths, authority = Paths(), authority_of(gateway)

    async def conflicting(_path: str) -> bytes | None:
        raise DataDamaged("Two replicas hold different values.")

    with pytest.raises(CertificateRefused):
        await Signers(conflicting, authority, "c1").key(SIGNER)
    assert await publish(conflicting, paths.write, NodeSigner(gateway), authority, "c1", PUBLIC)
    assert await Signers(paths.read, authority, "c1").key(SIGNER)


def test_the_signature_is_over_every_field_that_a_storage_node_acts_on() -> None:
    record = BucketRecord("photos", b"i" * 16, "owner", 1, "active", 3, "r", ("FR",), "4+2", shard_list=b"\1\2\3")
    signed = public_bytes("c1", 7, record)
    assert (
        public_bytes(
            "c1", 7, msgspec.structs.replace(record, tags=b"t", region="s", authenticator=b"a", signature=b"s")
        )
        == signed
    )
    for other in (
        public_bytes("c2", 7, record),
        public_bytes("c1", 8, record),
        *(
            public_bytes("c1", 7, msgspec.structs.replace(record, **{field: value}))
            for field, value in {
                "name": "photo", "id": b"j" * 16, "owner": "o", "state": "deleting", "countries": ("DE",), "profile": "2+1",  # noqa: E501
                "shard_list": b"\1\2\4",
            }.items()
        ),
    ):  # fmt: skip
        assert other != signed
    assert not signed.startswith(STATEMENT_LABEL)


async def test_every_record_that_a_gateway_writes_is_signed() -> None:
    world = World(None)
    buckets = BucketService(world.plane())
    made = await buckets.create(WHO, "photos", region="r", countries=("FR",))
    for _ in range(2):
        value = world.ring.values[system_name("bucket/photos")]
        record = decode(value.body, BucketRecord)
        assert record.signer == SIGNER
        assert is_signed(SIGNING_KEY.public_key(), public_bytes("test", value.sequence, record), record.signature)
        await buckets.configure(made, TAGGING, lambda _: Tags({"a": "b"}))


def test_the_signing_key_follows_from_the_keyring_and_signs_as_the_format_says() -> None:
    """The vector of FORMATS.md, section Public parts."""
    key = signing_key(bytes(range(1, 33)))
    public = key.public_key().public_bytes_raw()
    record = BucketRecord(
        "photos", bytes(range(0xA0, 0xB0)), "o", 0, "active", 3, "r", ("FR",), "4+2", shard_list=b"\x05\x21\xfe"
    )
    assert public.hex() == "b6c2f9d260d2a7c3646492102f2a2b9d5209267385d6c45a1bc7c60e64588bf1"
    assert signer_id(public).hex() == "a23119b63220c51d5002ee26e7e708ef"
    assert (
        key.sign(public_bytes("eu-1", 7, record)).hex()
        == "44a39b1d15ab95457a35b7f1830c74bda8cd4b09f34f744abddc2dec7422546d9d8a91274e2ef11ba758ed9cd1d15d5801d27170ba5496d3973ce8eb4bb07a06"  # noqa: E501
    )
    assert signing_key(bytes(32)).public_key().public_bytes_raw() != public
