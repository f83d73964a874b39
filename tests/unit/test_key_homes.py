"""A bucket's key has two homes, the ring and each gateway's copies: what one of them lost the other gives back, and
what was destroyed stays so."""

from __future__ import annotations

import msgspec
import pytest

from storaged.cluster.policy import KeyHolder
from storaged.errors import KeyringUnavailable, ServiceUnavailable
from storaged.ids import system_entropy
from storaged.keys import backup, create_keyring, open_backup
from storaged.keys.bucketkey import DESTROYED, BucketKeyRecord, KeyCopy, Vault, WrappedBucketKey
from storaged.keys.homes import judge
from storaged.objects.ports import pack_context
from storaged.wire import decode, encode
from tests.unit.test_keyring import BUCKET, CHEAP, CREDENTIAL, Rig

OTHER = b"o" * 16
CONTEXT = pack_context(b"", [b"bucket", b"key"])
NONCE = b"n" * 16


@pytest.fixture
def material(tmp_path):
    return create_keyring(tmp_path / "keyring", CREDENTIAL)


@pytest.fixture
def rig(material):
    return Rig(material)


def path_of(bucket_id: bytes) -> str:
    return "key/" + bucket_id.hex()


def record_of(rig: Rig, bucket_id: bytes = BUCKET) -> BucketKeyRecord:
    return decode(rig.registers.values[path_of(bucket_id)], BucketKeyRecord)


def kinds(rig: Rig) -> list[str]:
    return [
        f"{kind} {fields.get('outcome', '').split()[0]}"
        for kind, fields in rig.entries
        if kind not in ("key.create", "key.release")
    ]


def restarted(rig: Rig, material, *, copies: bool = True, **options) -> Rig:
    """Another process of the same gateway, or with ``copies`` False another gateway, over the same ring."""
    again = Rig(material, registers=rig.registers, clock=rig.clock, **options)
    if copies:
        again.copies.held = rig.copies.held
    return again


def forged_destroyed(rig: Rig) -> bytes:
    return encode(BucketKeyRecord(BUCKET, (), DESTROYED))


def destroyed_with_a_guessed_tag(rig: Rig) -> bytes:
    return encode(BucketKeyRecord(BUCKET, (), DESTROYED, authenticator=b"t" * 32))


def flipped(rig: Rig) -> bytes:
    body = bytearray(rig.registers.values[path_of(BUCKET)])
    body[body.index(record_of(rig).versions[0].wrapped) + 80] ^= 1
    return bytes(body)


def another_epoch(rig: Rig) -> bytes:
    record = record_of(rig)
    return encode(msgspec.structs.replace(record, versions=(msgspec.structs.replace(record.versions[0], epoch=9),)))


def another_version(rig: Rig) -> bytes:
    record = record_of(rig)
    return encode(
        msgspec.structs.replace(
            record, versions=(msgspec.structs.replace(record.versions[0], version=2),), authenticator=b""
        )
    )


DAMAGE = {
    "emptied": lambda rig: b"",
    "not a record": lambda rig: b"\xc1",
    "no versions": lambda rig: encode(BucketKeyRecord(BUCKET, ())),
    "another bucket's": lambda rig: rig.registers.values[path_of(OTHER)],
    "a flipped bit": flipped,
    "an epoch that is not": another_epoch,
    "another version number": another_version,
    "said to be destroyed": forged_destroyed,
    "said to be destroyed, with a tag": destroyed_with_a_guessed_tag,
    "an unknown state": lambda rig: encode(BucketKeyRecord(BUCKET, record_of(rig).versions, "sleeping")),
    "an older one of its own": lambda rig: rig.registers.values[path_of(BUCKET)],
}
OPENS = {"an older one of its own"}


@pytest.mark.parametrize("name", DAMAGE)
async def test_a_register_that_was_overwritten_is_reported_and_restored_from_the_gateways_copy(rig, material, name):
    for bucket in (BUCKET, OTHER):
        await rig.keyring.create_bucket_key(bucket, ())
    wrapped = (await rig.keyring.bucket_key(BUCKET, ())).wrap(b"d" * 32, CONTEXT)
    rig.registers.forge(path_of(BUCKET), DAMAGE[name](rig))
    again = restarted(rig, material)
    key = await again.keyring.bucket_key(BUCKET, ())
    assert key.unwrap(wrapped, CONTEXT) == b"d" * 32
    assert [(bucket, mended) for bucket, _, mended in again.copies.reports] == [(BUCKET, True)]
    assert kinds(again) == ["key.restore intent", "key.restore done"]
    kept = rig.registers.kept(path_of(BUCKET))
    judged = judge(Vault(material, system_entropy), BUCKET, kept, ())
    assert (judged.damage, judged.repair_ring, len(judged.keys)) == ("", False, 1)
    for _ in range(2):  # and it stays so
        healed = restarted(rig, material, copies=False)
        assert (await healed.keyring.bucket_key(BUCKET, ())).unwrap(wrapped, CONTEXT) == b"d" * 32
        assert healed.copies.reports == []
    assert rig.registers.kept(path_of(BUCKET)) == kept


@pytest.mark.parametrize("name", DAMAGE)
async def test_a_gateway_without_a_copy_refuses_reports_and_overwrites_nothing(rig, material, name):
    for bucket in (BUCKET, OTHER):
        await rig.keyring.create_bucket_key(bucket, ())
    rig.registers.forge(path_of(BUCKET), DAMAGE[name](rig))
    before = rig.registers.values[path_of(BUCKET)]
    stranger = restarted(rig, material, copies=False)
    if name in OPENS:
        assert (await stranger.keyring.bucket_key(BUCKET, ())).version == 1
        return
    with pytest.raises(KeyringUnavailable):
        await stranger.keyring.bucket_key(BUCKET, ())
    assert [(bucket, mended) for bucket, _, mended in stranger.copies.reports] == [(BUCKET, False)]
    assert kinds(stranger) == ["key.refused refused"]
    assert rig.registers.values[path_of(BUCKET)] == before


async def test_a_record_of_old_without_authenticator_is_read_and_gets_one_at_its_next_touch(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    old = encode([BUCKET, [[1, 1, entry.created_ms, entry.wrapped] for entry in record_of(rig).versions]])
    rig.registers.values[path_of(BUCKET)] = old
    stranger = restarted(rig, material, copies=False)
    assert (await stranger.keyring.bucket_key(BUCKET, ())).version == 1
    assert len(record_of(rig).authenticator) == 32
    assert (stranger.copies.reports, kinds(stranger), list(stranger.copies.held)) == ([], [], [BUCKET])


async def test_stripping_the_authenticator_hides_no_lost_version(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    vault = Vault(material, system_entropy)
    both = (*record_of(rig).versions, vault.wrap_new(BUCKET, 2, 1))
    rig.copies.held[BUCKET] = encode(KeyCopy(BUCKET, both))
    rig.registers.forge(path_of(BUCKET), encode(BucketKeyRecord(BUCKET, both[:1])))
    assert (await rig.keyring.bucket_key(BUCKET, ())).version == 2
    assert record_of(rig).versions == both
    assert "lacks version 2" in rig.copies.reports[0][1]


async def test_two_homes_with_different_keys_release_none_and_neither_is_overwritten(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    other = encode(KeyCopy(BUCKET, (Vault(material, system_entropy).wrap_new(BUCKET, 1, 1),)))
    rig.copies.held[BUCKET] = other
    before = dict(rig.registers.values)
    with pytest.raises(KeyringUnavailable, match="in the ring is another than this gateway's copy"):
        await rig.keyring.bucket_key(BUCKET, ())
    assert (rig.registers.values, rig.copies.held[BUCKET]) == (before, other)
    assert [mended for _, _, mended in rig.copies.reports] == [False]


async def test_an_authentic_record_of_an_epoch_that_this_keyring_lacks_is_no_damage_and_is_left_as_it_is(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    newer = WrappedBucketKey(2, 2, 1, b"w" * 112)
    record = Vault(material, system_entropy).sign(BucketKeyRecord(BUCKET, (*record_of(rig).versions, newer)), 2)
    rig.registers.forge(path_of(BUCKET), encode(record))
    with pytest.raises(KeyringUnavailable, match="under epoch 2"):
        await rig.keyring.bucket_key(BUCKET, ())
    assert record_of(rig) == record
    assert rig.copies.reports == []


async def test_a_bucket_key_whose_copy_cannot_be_kept_is_not_acknowledged(rig):
    rig.copies.failure = KeyringUnavailable("the disk is full")
    with pytest.raises(KeyringUnavailable, match="disk is full"):
        await rig.keyring.create_bucket_key(BUCKET, ())
    rig.copies.failure = None
    await rig.keyring.create_bucket_key(BUCKET, ())
    assert decode(rig.copies.held[BUCKET], KeyCopy).versions == record_of(rig).versions


async def test_a_key_that_is_there_is_released_although_no_copy_of_it_can_be_kept(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    stranger = restarted(rig, material, copies=False)
    stranger.copies.failure = KeyringUnavailable("the disk is full")
    assert (await stranger.keyring.bucket_key(BUCKET, ())).version == 1


async def test_a_key_is_released_from_its_copy_while_the_ring_takes_no_changes_and_mended_later(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    rig.registers.forge(path_of(BUCKET), b"")
    rig.registers.refusing = ServiceUnavailable("no majority")
    again = restarted(rig, material)
    assert (await again.keyring.bucket_key(BUCKET, ())).version == 1
    assert [mended for _, _, mended in again.copies.reports] == [False]
    rig.registers.refusing = None
    await again.keyring.reconcile_copies({})
    assert [mended for _, _, mended in again.copies.reports] == [False, True]
    assert len(record_of(rig).versions) == 1


# --- looking after them without a request


async def test_looking_after_keys_mends_those_that_nobody_asked_for_and_copies_those_that_the_policy_allows(
    rig, material
):
    for bucket in (BUCKET, OTHER):
        await rig.keyring.create_bucket_key(bucket, ())
    rig.registers.forge(path_of(BUCKET), b"")
    frankfurt = restarted(rig, material, copies=False, holder=KeyHolder("DE", "DE", 0, 2**50))
    await frankfurt.keyring.reconcile_copies({OTHER: ("FR",)})
    assert frankfurt.copies.held == {}
    await frankfurt.keyring.reconcile_copies({OTHER: ("DE", "FR")})
    assert list(frankfurt.copies.held) == [OTHER]
    reads = rig.registers.reads
    await rig.keyring.reconcile_copies({BUCKET: (), OTHER: ()})
    assert len(record_of(rig).versions) == 1
    assert rig.registers.reads == reads + 1
    assert [kind for kind, _ in frankfurt.entries if kind == "key.release"] == []


# --- the end


async def test_a_key_is_destroyed_only_after_its_end_was_noted_and_then_for_every_gateway(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    other = restarted(rig, material, copies=False)
    for keyring in (rig.keyring, other.keyring):
        await keyring.bucket_key(BUCKET, ())
    assert not await rig.keyring.destroy_bucket_key(BUCKET, NONCE)
    assert await rig.keyring.ended_bucket_keys() == []
    await rig.keyring.end_bucket_key(BUCKET, "photos", NONCE, range(16))
    noted = rig.registers.values[path_of(BUCKET)]
    await other.keyring.end_bucket_key(BUCKET, "photos", NONCE, range(16))
    assert rig.registers.values[path_of(BUCKET)] == noted
    [(bucket_id, end)] = await other.keyring.ended_bucket_keys()
    assert (bucket_id, end.name, end.nonce, end.shards, end.since_ms) == (
        BUCKET,
        "photos",
        NONCE,
        tuple(range(16)),
        rig.clock.wall_ms(),
    )
    assert (await other.keyring.bucket_key(BUCKET, ())).version == 1
    assert not await rig.keyring.destroy_bucket_key(BUCKET, b"another nonce")
    assert await rig.keyring.destroy_bucket_key(BUCKET, NONCE)
    assert not await rig.keyring.destroy_bucket_key(BUCKET, NONCE)
    assert rig.copies.held == {}
    assert rig.keyring.statistics().buckets_cached == 0
    assert (record_of(rig).state, record_of(rig).versions, rig.registers.gone) == (DESTROYED, (), {path_of(BUCKET)})
    for keyring in (rig.keyring, restarted(rig, material).keyring):
        with pytest.raises(KeyringUnavailable, match="is destroyed"):
            await keyring.bucket_key(BUCKET, ())
    assert list(other.copies.held) == [BUCKET]
    await other.keyring.reconcile_copies({})
    assert other.copies.held == {}
    assert other.keyring.statistics().buckets_cached == 0
    assert (record_of(rig).state, other.copies.reports) == (DESTROYED, [])
    assert [kind for kind in kinds(rig) if kind == "key.destroy done"] == ["key.destroy done"]


async def test_the_marker_of_a_destroyed_key_counts_for_its_own_register_and_sequence_only(rig, material):
    for bucket in (BUCKET, OTHER):
        await rig.keyring.create_bucket_key(bucket, ())
    await rig.keyring.end_bucket_key(OTHER, "photos", NONCE, range(16))
    await rig.keyring.destroy_bucket_key(OTHER, NONCE)
    marker = record_of(rig, OTHER)
    for forged in (marker, msgspec.structs.replace(marker, bucket_id=BUCKET)):
        rig.registers.forge(path_of(BUCKET), encode(forged))
        again = restarted(rig, material)
        assert (await again.keyring.bucket_key(BUCKET, ())).version == 1
        assert [mended for _, _, mended in again.copies.reports] == [True]


async def test_a_key_that_is_destroyed_while_another_gateway_is_about_to_mend_it_stays_destroyed(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    await rig.keyring.end_bucket_key(BUCKET, "photos", NONCE, range(16))
    old = msgspec.structs.replace(record_of(rig), authenticator=b"")
    other = restarted(rig, material, copies=False)
    authentic, rig.registers.values[path_of(BUCKET)] = rig.registers.values[path_of(BUCKET)], encode(old)
    change = rig.registers.change

    async def meanwhile(path, update):
        rig.registers.change = change
        rig.registers.values[path] = authentic
        assert await rig.keyring.destroy_bucket_key(BUCKET, NONCE)
        return await change(path, update)

    rig.registers.change = meanwhile
    await other.keyring.bucket_key(BUCKET, ())
    assert record_of(rig).state == DESTROYED
    await other.keyring.reconcile_copies({})
    assert other.copies.held == {}


async def test_an_end_that_no_keyring_noted_is_not_believed(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    await rig.keyring.end_bucket_key(BUCKET, "photos", NONCE, range(16))
    ended = record_of(rig)
    for forged in (msgspec.structs.replace(ended, authenticator=b""), ended):
        rig.registers.forge(path_of(BUCKET), encode(forged))
        assert await rig.keyring.ended_bucket_keys() == []
        assert not await rig.keyring.destroy_bucket_key(BUCKET, NONCE)
    assert (await rig.keyring.bucket_key(BUCKET, ())).version == 1


async def test_an_end_that_cannot_be_noted_is_refused_so_that_the_bucket_is_not_deleted_yet(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    rig.registers.refusing = ServiceUnavailable("no majority")
    with pytest.raises(ServiceUnavailable):
        await rig.keyring.end_bucket_key(BUCKET, "photos", NONCE, range(16))


# --- backups


async def test_a_backup_has_every_bucket_key_and_brings_them_back_when_ring_and_copies_are_lost(
    rig, material, tmp_path
):
    buckets = [bytes([number]) * 16 for number in range(40)]
    wrapped = []
    for bucket in buckets:
        await rig.keyring.create_bucket_key(bucket, ())
        wrapped.append((await rig.keyring.bucket_key(bucket, ())).wrap(b"d" * 32, CONTEXT))
    rig.registers.forge(path_of(buckets[0]), b"")  # only this gateway's copy has it
    del rig.copies.held[buckets[1]]  # only the ring has it
    found = await rig.keyring.homes.inventory()
    assert (len(found.copies), found.lost) == (40, [])
    backup(material, tmp_path / "backup", "far away", found.copies, now_ms=7, cost=CHEAP)
    for bucket in buckets:
        rig.registers.forge(path_of(bucket), b"")
    saved = open_backup(tmp_path / "backup", "far away")
    assert (saved.has_bucket_keys, saved.material.backed_up_ms) == (True, 7)
    fresh = restarted(rig, material, copies=False)
    with pytest.raises(KeyringUnavailable):
        await fresh.keyring.bucket_key(buckets[5], ())
    restored = {copy.bucket_id: encode(copy) for copy in saved.bucket_keys}
    assert await fresh.keyring.homes.import_copies(restored) == 40
    for bucket, sealed in zip(buckets, wrapped, strict=True):
        assert (await fresh.keyring.bucket_key(bucket, ())).unwrap(sealed, CONTEXT) == b"d" * 32
        assert record_of(rig, bucket).authenticator
    assert await fresh.keyring.homes.import_copies(restored) == 0


async def test_a_restore_brings_back_no_key_that_was_destroyed(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    saved = dict(rig.copies.held)
    await rig.keyring.end_bucket_key(BUCKET, "photos", NONCE, range(16))
    await rig.keyring.destroy_bucket_key(BUCKET, NONCE)
    await rig.keyring.homes.import_copies(saved)
    assert (rig.copies.held, record_of(rig).state) == ({}, DESTROYED)
    assert (await rig.keyring.homes.inventory()).copies == []


async def test_an_inventory_names_the_buckets_whose_key_is_lost_and_passes_over_what_no_gateway_wrote(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    rig.registers.forge(path_of(BUCKET), b"junk")
    rig.registers.forge("key/not-a-bucket", b"junk")
    found = await restarted(rig, material, copies=False).keyring.homes.inventory()
    assert (found.copies, found.lost) == ([], [BUCKET])


async def test_a_closed_keyring_keeps_no_key_that_opens_anything(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    homes = rig.keyring.homes
    rig.keyring.close()
    with pytest.raises(KeyringUnavailable):
        await rig.keyring.reconcile_copies({})
    assert (await homes.settle(BUCKET, keep=False)).keys == {}
