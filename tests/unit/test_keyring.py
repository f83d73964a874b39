"""The keyring file, its backups, and the key service on top."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
import weakref
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from storaged.cluster.policy import KeyHolder, Policy
from storaged.errors import (
    FileExists,
    KeyringDamaged,
    KeyringMismatch,
    KeyringUnavailable,
    OperatorError,
    ServiceUnavailable,
    WrongPassphrase,
)
from storaged.keys import (
    Argon2Cost,
    Credential,
    Keyring,
    Passphrase,
    StoredRegister,
    backup,
    create_keyring,
    keyring_id_of,
    open_keyring,
    restore,
)
from storaged.keys.bucketkey import WRAPPED_KEY_BYTES, BucketKeyRecord
from storaged.keys.keyfile import ARGON2_COST
from storaged.keys.ports import KeyringPorts
from storaged.objects.ports import WRAPPED_KEY_BYTES as PORT_WRAPPED_KEY_BYTES
from storaged.objects.ports import BucketKey, KeyService, SealBroken, pack_context
from storaged.wire import decode, encode

CHEAP = Argon2Cost(memory_kib=64, passes=1, lanes=1)
SECRET = Passphrase("correct horse", CHEAP)
CREDENTIAL = Credential(b"c" * 32)
BUCKET = bytes(range(16))


class Registers:
    """A dict with compare-and-set; ``failure`` is raised by reads, ``refusing`` by changes. ``sequences`` of what was
    written once are 1.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.sequences: dict[str, int] = {}
        self.gone: set[str] = set()
        self.reads = 0
        self.failure: Exception | None = None
        self.refusing: Exception | None = None

    def kept(self, path: str) -> StoredRegister | None:
        return StoredRegister(self.sequences.get(path, 1), self.values[path]) if path in self.values else None

    async def read(self, path: str) -> StoredRegister | None:
        self.reads += 1
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        return self.kept(path)

    async def change(self, path, update) -> StoredRegister | None:
        if self.refusing is not None:
            raise self.refusing
        change = update(self.kept(path))
        if change is not None:
            self.forge(path, change.body)
            (self.gone.add if change.gone else self.gone.discard)(path)
        return self.kept(path)

    async def scan(self, prefix: str):
        for path in sorted(self.values):
            if path.startswith(prefix) and path not in self.gone:
                yield path, self.kept(path)

    def forge(self, path: str, body: bytes) -> None:
        """As anybody may write who has no keys."""
        self.sequences[path] = self.sequences.get(path, 1) + 1 if path in self.values else 1
        self.values[path] = body


class Copies:
    """``KeyCopies`` in memory; ``failure`` is raised by ``keep``."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.reports: list[tuple[bytes, str, bool]] = []
        self.failure: Exception | None = None

    async def get(self, bucket_id: bytes) -> bytes | None:
        return self.held.get(bucket_id)

    async def keep(self, bucket_id: bytes, copy: bytes) -> None:
        if self.failure is not None:
            raise self.failure
        self.held[bucket_id] = copy

    async def forget(self, bucket_ids) -> None:
        for bucket_id in bucket_ids:
            self.held.pop(bucket_id, None)

    async def every(self) -> dict[bytes, bytes]:
        return dict(self.held)

    def report(self, bucket_id: bytes, damage: str, repaired: bool) -> None:
        if damage:
            self.reports.append((bucket_id, damage, repaired))


class HandClock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall_ms(self) -> int:
        return 1_700_000_000_000 + int(self.now * 1000)


FRANCE = KeyHolder("FR", "FR", 0, 2**50)


class Rig:
    def __init__(self, material, *, registers=None, copies=None, clock=None, **options) -> None:
        self.registers, self.copies, self.clock = registers or Registers(), copies or Copies(), clock or HandClock()
        self.entries = []
        options = {"policy": Policy(), "holder": FRANCE} | options
        self.keyring = Keyring(material, KeyringPorts(self.registers, self.copies, self.audit, self.clock), **options)

    async def audit(self, kind, fields) -> None:
        self.entries.append((kind, dict(fields)))


@pytest.fixture
def material(tmp_path):
    return create_keyring(tmp_path / "keyring", CREDENTIAL)


@pytest.fixture
def rig(material):
    return Rig(material)


def same_keys(one, other) -> bool:
    return (one.epochs, one.record_key, one.secret_key) == (other.epochs, other.record_key, other.secret_key)


# --- the file


@pytest.mark.parametrize("protection", [SECRET, CREDENTIAL], ids=["passphrase", "credential"])
def test_a_keyring_opens_again_with_the_same_keys_and_only_its_owner_can_read_the_file(tmp_path, protection):
    path = tmp_path / "keyring"
    made = create_keyring(path, protection)
    opened = open_keyring(path, protection, expected_id=made.keyring_id)
    assert same_keys(made, opened)
    assert keyring_id_of(path) == opened.keyring_id == made.keyring_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert made.newest.epoch == 1
    assert opened.backed_up_epoch < opened.newest.epoch


def test_no_key_is_in_the_file_in_the_clear(material):
    text = material.path.read_text()
    blob = base64.b64decode(json.loads(text)["sealed"])
    for key in (material.record_key, material.secret_key, material.newest.key, CREDENTIAL.secret):
        assert key not in blob
        assert base64.b64encode(key).decode() not in text
        assert key.hex() not in text


def test_the_default_cost_of_a_guess_is_256_mib_and_three_passes():
    assert ARGON2_COST == (262144, 3, 4)


@pytest.mark.parametrize(
    "protection", [Passphrase("Correct horse", CHEAP), CREDENTIAL], ids=["passphrase", "credential"]
)
def test_a_wrong_passphrase_is_named_as_such(tmp_path, protection):
    path = tmp_path / "keyring"
    create_keyring(path, SECRET)
    with pytest.raises(WrongPassphrase):
        open_keyring(path, protection)


def test_a_wrong_credential_is_named_as_such(material):
    with pytest.raises(WrongPassphrase, match="credential does not open"):
        open_keyring(material.path, Credential(b"d" * 32))


def test_a_passphrase_opens_however_its_accents_were_typed(tmp_path):
    made = create_keyring(tmp_path / "keyring", Passphrase("caf\u00e9", CHEAP))
    assert open_keyring(tmp_path / "keyring", Passphrase("cafe\u0301")).keyring_id == made.keyring_id


def test_an_empty_passphrase_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(WrongPassphrase, match="empty"):
        create_keyring(tmp_path / "keyring", Passphrase("", CHEAP))
    assert not (tmp_path / "keyring").exists()


def test_opening_a_missing_keyring_makes_none(tmp_path):
    with pytest.raises(KeyringMismatch, match="There is no keyring"):
        open_keyring(tmp_path / "keyring", SECRET)
    assert list(tmp_path.iterdir()) == []


def test_another_clusters_keyring_is_a_mismatch_even_before_its_passphrase_is_tried(tmp_path):
    create_keyring(tmp_path / "keyring", SECRET)
    with pytest.raises(KeyringMismatch, match="this cluster was created with " + "ab" * 16):
        open_keyring(tmp_path / "keyring", Passphrase("wrong"), expected_id=b"\xab" * 16)


def test_creating_never_overwrites(material):
    before = material.path.read_bytes()
    with pytest.raises(FileExists):
        create_keyring(material.path, CREDENTIAL)
    assert material.path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_an_operators_error(tmp_path):
    with pytest.raises(OperatorError, match="cannot be written"):
        create_keyring(tmp_path / "missing" / "keyring", CREDENTIAL)


def test_every_altered_byte_of_the_sealed_body_is_refused(material):
    fields = json.loads(material.path.read_text())
    sealed = base64.b64decode(fields["sealed"])
    for at in range(len(sealed)):
        broken = bytearray(sealed)
        broken[at] ^= 1
        material.path.write_text(json.dumps(fields | {"sealed": base64.b64encode(broken).decode()}))
        with pytest.raises((WrongPassphrase, KeyringDamaged)) as caught:
            open_keyring(material.path, CREDENTIAL)
        assert caught.type is (KeyringDamaged if at >= 64 else WrongPassphrase)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"keyring_id": "00" * 16}, WrongPassphrase),
        ({"keyring_id": "00"}, KeyringDamaged),
        ({"format": "zip"}, KeyringDamaged),
        ({"version": 2}, KeyringDamaged),
        ({"sealed": 5}, KeyringDamaged),
        ({"sealed": "%%%"}, KeyringDamaged),
        ({"protection": {}}, KeyringDamaged),
    ],
    ids=str,
)
def test_an_altered_head_is_refused(material, change, error):
    material.path.write_text(json.dumps(json.loads(material.path.read_text()) | change))
    with pytest.raises(error):
        open_keyring(material.path, CREDENTIAL)


@pytest.mark.parametrize(
    "change",
    [
        {"memory_kib": 2**40},
        {"memory_kib": 2**20 + 4},
        {"passes": 0},
        {"passes": 17},
        {"lanes": 17},
        {"lanes": 1000},
        {"kdf": "md5"},
        {"memory_kib": 4},
        {"passes": "x"},
    ],
    ids=str,
)
def test_a_forged_file_cannot_ask_for_absurd_work(tmp_path, change):
    path = tmp_path / "keyring"
    create_keyring(path, SECRET)
    fields = json.loads(path.read_text())
    fields["protection"] |= change
    path.write_text(json.dumps(fields))
    with pytest.raises(KeyringDamaged):
        open_keyring(path, SECRET)


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b"\xff\xfe", b"{}" + b" " * 2**20])
def test_what_is_no_keyring_is_said_to_be_none(tmp_path, content):
    path = tmp_path / "keyring"
    path.write_bytes(content)
    with pytest.raises(KeyringDamaged):
        open_keyring(path, SECRET)


def test_a_credential_file_is_made_once_with_32_random_bytes(tmp_path):
    path = tmp_path / "credential"
    made = Credential.create(path)
    assert Credential.load(path) == made
    assert len(made.secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExists):
        Credential.create(path)
    path.write_bytes(b"short")
    with pytest.raises(KeyringMismatch, match="5 bytes instead of 32"):
        Credential.load(path)
    with pytest.raises(KeyringMismatch, match="cannot be read"):
        Credential.load(tmp_path / "none")


def test_secrets_are_in_no_repr(material):
    shown = repr((material, SECRET, CREDENTIAL, material.newest, dict(material.epochs), material.body))
    for secret in (material.newest.key, material.record_key, material.secret_key, b"correct horse", CREDENTIAL.secret):
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown


# --- backup and restore


def test_a_backup_restores_the_same_keys_under_its_own_passphrase(tmp_path, material):
    saved, target = tmp_path / "backup", tmp_path / "restored"
    backup(material, saved, "far away", cost=CHEAP)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    restored = restore(saved, "far away", target, expected_id=material.keyring_id)
    assert same_keys(restored, material)
    assert same_keys(open_keyring(target, Passphrase("far away")), material)
    assert json.loads(target.read_text())["protection"]["memory_kib"] == CHEAP.memory_kib


def test_a_restored_keyring_may_have_another_protection(tmp_path, material):
    backup(material, tmp_path / "backup", "far away", cost=CHEAP)
    restore(tmp_path / "backup", "far away", tmp_path / "restored", protection=Credential(b"n" * 32))
    assert same_keys(open_keyring(tmp_path / "restored", Credential(b"n" * 32)), material)


def test_the_keyring_remembers_that_it_was_backed_up(tmp_path, material):
    assert open_keyring(material.path, CREDENTIAL).backed_up_epoch == 0
    backup(material, tmp_path / "backup", "far away", cost=CHEAP)
    assert material.backed_up_epoch == material.newest.epoch
    reopened = open_keyring(material.path, CREDENTIAL)
    assert reopened.backed_up_epoch == reopened.newest.epoch
    assert same_keys(reopened, material)
    assert stat.S_IMODE(material.path.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "keyring"]


def test_neither_backup_nor_restore_overwrites(tmp_path, material):
    occupied = tmp_path / "occupied"
    occupied.write_text("mine")
    with pytest.raises(FileExists):
        backup(material, occupied, "far away", cost=CHEAP)
    assert material.backed_up_epoch < material.newest.epoch
    backup(material, tmp_path / "backup", "far away", cost=CHEAP)
    with pytest.raises(FileExists):
        restore(tmp_path / "backup", "far away", occupied)
    assert occupied.read_text() == "mine"


def test_a_restore_that_fails_leaves_nothing(tmp_path, material):
    backup(material, tmp_path / "backup", "far away", cost=CHEAP)
    with pytest.raises(WrongPassphrase):
        restore(tmp_path / "backup", "near", tmp_path / "restored")
    with pytest.raises(KeyringMismatch):
        restore(tmp_path / "backup", "far away", tmp_path / "restored", expected_id=bytes(16))
    assert not (tmp_path / "restored").exists()


# --- the service


def test_it_is_the_key_service_that_objects_ask_for(rig):
    service: KeyService = rig.keyring
    assert service is rig.keyring
    assert WRAPPED_KEY_BYTES == PORT_WRAPPED_KEY_BYTES


async def test_a_bucket_key_is_committed_before_its_creation_returns_and_its_wraps_open_after_a_restart(rig, material):
    await rig.keyring.create_bucket_key(BUCKET, ())
    assert list(rig.registers.values) == ["key/" + BUCKET.hex()]
    key: BucketKey = await rig.keyring.bucket_key(BUCKET, ())
    wrapped = key.wrap(b"d" * 32, pack_context(b"", [b"bucket", b"key"]))
    assert len(wrapped) == WRAPPED_KEY_BYTES
    again = Rig(open_keyring(material.path, CREDENTIAL))
    again.registers.values = rig.registers.values
    reopened = await again.keyring.bucket_key(BUCKET, (), 1)
    assert reopened.unwrap(wrapped, pack_context(b"", [b"bucket", b"key"])) == b"d" * 32
    assert reopened.version == 1


async def test_a_wrap_opens_only_in_its_own_context_whole_and_unaltered(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    key = await rig.keyring.bucket_key(BUCKET, ())
    wrapped = key.wrap(b"d" * 32, pack_context(b"", [b"ab", b"c"]))
    for context in ([b"a", b"bc"], [b"ab"], [b"ab", b"c", b""], [b"abc"]):
        with pytest.raises(SealBroken):
            key.unwrap(wrapped, pack_context(b"", context))
    for at in range(len(wrapped)):
        broken = bytearray(wrapped)
        broken[at] ^= 0x80
        with pytest.raises(SealBroken):
            key.unwrap(bytes(broken), pack_context(b"", [b"ab", b"c"]))
    for length in (0, 63, 64, 111, 113):
        with pytest.raises(SealBroken):
            key.unwrap((wrapped + b"x")[:length], pack_context(b"", [b"ab", b"c"]))
    with pytest.raises(ValueError, match="32 bytes"):
        key.wrap(b"short", pack_context(b"", []))


async def test_list_fields_open_in_their_context_only_and_differ_each_time(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    key = await rig.keyring.bucket_key(BUCKET, ())
    sealed = key.seal_list(b"etag", pack_context(b"", [b"k", b"v"]))
    assert len(sealed) == 12 + 4 + 16
    assert sealed != key.seal_list(b"etag", pack_context(b"", [b"k", b"v"]))
    assert key.open_list(sealed, pack_context(b"", [b"k", b"v"])) == b"etag"
    for broken, context in (
        (sealed, [b"kv"]),
        *((sealed[:length], [b"k", b"v"]) for length in range(len(sealed))),
        (bytes([sealed[0] ^ 1]) + sealed[1:], [b"k", b"v"]),
    ):
        with pytest.raises(SealBroken):
            key.open_list(broken, pack_context(b"", context))
        with pytest.raises(SealBroken):
            key.open_lists([sealed, broken], [pack_context(b"", [b"k", b"v"]), pack_context(b"", context)])
    assert key.open_lists([sealed, sealed], [pack_context(b"", [b"k", b"v"])] * 2) == [b"etag"] * 2


async def test_a_key_under_another_buckets_name_does_not_open(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    other = bytes(16)
    rig.registers.values["key/" + other.hex()] = rig.registers.values["key/" + BUCKET.hex()]
    with pytest.raises(KeyringUnavailable, match="that of another"):
        await rig.keyring.bucket_key(other, ())
    assert rig.entries[-1][0] == "key.refused"


async def test_another_keyring_opens_no_bucket_key_and_makes_no_new_one(rig, tmp_path):
    await rig.keyring.create_bucket_key(BUCKET, ())
    stranger = Rig(create_keyring(tmp_path / "other", CREDENTIAL))
    stranger.registers.values = rig.registers.values
    before = dict(rig.registers.values)
    with pytest.raises(KeyringUnavailable):
        await stranger.keyring.bucket_key(BUCKET, ())
    with pytest.raises(KeyringUnavailable):
        await stranger.keyring.create_bucket_key(BUCKET, ())
    assert stranger.registers.values == before


async def test_an_unknown_bucket_or_version_or_epoch_or_a_broken_record_is_unavailable_and_says_which(rig):
    with pytest.raises(KeyringUnavailable, match="No key is kept"):
        await rig.keyring.bucket_key(BUCKET, ())
    await rig.keyring.create_bucket_key(BUCKET, ())
    with pytest.raises(KeyringUnavailable, match="no key of version 2; its newest is 1"):
        await rig.keyring.bucket_key(BUCKET, (), 2)
    path = "key/" + BUCKET.hex()
    entry = decode(rig.registers.values[path], BucketKeyRecord).versions[0]
    later = type(entry)(entry.version, 9, entry.created_ms, entry.wrapped)
    for value, message in (
        (encode(BucketKeyRecord(BUCKET, (later,))), "under epoch 9"),
        (b"\xc1", "cannot be read"),
        (encode(BucketKeyRecord(BUCKET, ())), "No key"),
    ):
        rig.registers.forge(path, value)
        rig.copies.held.clear()
        rig.clock.now += 1e6
        with pytest.raises(KeyringUnavailable, match=message):
            await rig.keyring.bucket_key(BUCKET, ())


async def test_creating_again_after_an_unknown_outcome_keeps_the_key(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    before = dict(rig.registers.values)
    await rig.keyring.create_bucket_key(BUCKET, ())
    assert rig.registers.values == before


async def test_keys_are_cached_for_their_time_and_audited_on_release_only(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    for _ in range(3):
        await rig.keyring.bucket_key(BUCKET, ())
    assert rig.registers.reads == 1
    assert [kind for kind, _ in rig.entries] == ["key.create", "key.release"]
    rig.clock.now = 300.0
    await rig.keyring.bucket_key(BUCKET, ())
    assert rig.registers.reads == 2
    assert [kind for kind, _ in rig.entries] == ["key.create", "key.release", "key.release"]
    facts = {"keyring": rig.keyring.statistics().keyring_id, "bucket": BUCKET.hex(), "versions": "1"}
    assert rig.entries[-1][1] == {"target": f"bucket-id:{BUCKET.hex()}", "outcome": "done", **facts}


async def test_a_key_whose_release_cannot_be_audited_is_not_released(material):
    registers = Registers()
    failing = False

    async def audit(kind, fields):
        if failing:
            raise OSError("disk full")

    keyring = Keyring(material, KeyringPorts(registers, Copies(), audit, HandClock()), policy=Policy(), holder=FRANCE)
    await keyring.create_bucket_key(BUCKET, ())
    failing = True
    with pytest.raises(OSError, match="disk full"):
        await keyring.bucket_key(BUCKET, ())
    assert keyring.statistics().buckets_cached == 0


async def test_a_thousand_who_ask_at_once_cause_one_read(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    keys = await asyncio.gather(*(rig.keyring.bucket_key(BUCKET, ()) for _ in range(1000)))
    assert rig.registers.reads == 1
    assert len(set(map(id, keys))) == 1


async def test_those_who_wait_share_the_failure_and_the_next_asks_again(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    rig.registers.failure = ServiceUnavailable("no majority")
    answers = await asyncio.gather(*(rig.keyring.bucket_key(BUCKET, ()) for _ in range(10)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ServiceUnavailable] * 10
    assert rig.registers.reads == 1
    rig.registers.failure = None
    assert (await rig.keyring.bucket_key(BUCKET, ())).version == 1


async def test_a_cancelled_reader_leaves_the_others_their_key(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    first = asyncio.ensure_future(rig.keyring.bucket_key(BUCKET, ()))
    second = asyncio.ensure_future(rig.keyring.bucket_key(BUCKET, ()))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).version == 1
    assert first.cancelled()


async def test_a_key_that_expired_is_forgotten_when_another_is_released(material):
    rig = Rig(material)
    first, second = bytes(16), bytes([1]) * 16
    for bucket in (first, second):
        await rig.keyring.create_bucket_key(bucket, ())
    held = weakref.ref(await rig.keyring.bucket_key(first, ()))
    assert held() is not None
    rig.clock.now = 301.0
    await rig.keyring.bucket_key(second, ())
    assert held() is None
    assert rig.keyring.statistics().buckets_cached == 1


async def test_the_cache_is_bounded(material):
    rig = Rig(material, buckets_cached_max=3)
    for number in range(10):
        bucket = bytes([number]) * 16
        await rig.keyring.create_bucket_key(bucket, ())
        await rig.keyring.bucket_key(bucket, ())
    assert rig.keyring.statistics().buckets_cached == 3


def test_authenticators_bind_context_and_message(rig):
    tag = rig.keyring.authenticate([b"bucket/a", b"7"], b"record")
    assert len(tag) == 32
    assert rig.keyring.verify([b"bucket/a", b"7"], b"record", tag)
    for context, message in (
        ([b"bucket/a"], b"record"),
        ([b"bucket/a", b"8"], b"record"),
        ([b"bucket/a", b"7"], b"recorD"),
        ([b"bucket/a7"], b"record"),
    ):
        assert not rig.keyring.verify(context, message, tag)
    assert not rig.keyring.verify([b"bucket/a", b"7"], b"record", tag[:-1])
    assert not rig.keyring.verify([b"bucket/a", b"7"], b"record", b"")


def test_what_it_signs_verifies_by_its_public_key_alone(rig):
    public = Ed25519PublicKey.from_public_bytes(rig.keyring.public_signer())
    public.verify(rig.keyring.sign_public(b"message"), b"message")
    with pytest.raises(InvalidSignature):
        public.verify(rig.keyring.sign_public(b"message"), b"another")
    rig.keyring.close()
    for refused in (rig.keyring.public_signer, lambda: rig.keyring.sign_public(b"message")):
        with pytest.raises(KeyringUnavailable):
            refused()


def test_secrets_open_only_for_the_register_they_were_sealed_for(rig):
    sealed = rig.keyring.seal_secret(b"s3 secret", [b"user/AKIA1"])
    assert b"s3 secret" not in sealed
    assert rig.keyring.open_secret(sealed, [b"user/AKIA1"]) == b"s3 secret"
    with pytest.raises(SealBroken):
        rig.keyring.open_secret(sealed, [b"user/AKIA2"])


async def test_a_closed_keyring_answers_nothing_not_even_from_its_cache(rig):
    await rig.keyring.create_bucket_key(BUCKET, ())
    await rig.keyring.bucket_key(BUCKET, ())
    sealed = rig.keyring.seal_secret(b"s", [])
    rig.keyring.close()
    with pytest.raises(KeyringUnavailable):
        await rig.keyring.bucket_key(BUCKET, ())
    with pytest.raises(KeyringUnavailable):
        await rig.keyring.create_bucket_key(BUCKET, ())
    for call in (
        lambda: rig.keyring.authenticate([], b""),
        lambda: rig.keyring.open_secret(sealed, []),
        lambda: rig.keyring.material,
    ):
        with pytest.raises(KeyringUnavailable):
            call()
    assert rig.keyring.statistics().closed


async def test_one_backup_covers_buckets_created_after_it(tmp_path, rig, material):
    backup(material, tmp_path / "backup", "far away", cost=CHEAP)
    await rig.keyring.create_bucket_key(BUCKET, ())
    wrapped = (await rig.keyring.bucket_key(BUCKET, ())).wrap(b"d" * 32, pack_context(b"", []))
    os.remove(material.path)
    again = Rig(restore(Path(tmp_path / "backup"), "far away", tmp_path / "restored"))
    again.registers.values = rig.registers.values
    assert (await again.keyring.bucket_key(BUCKET, ())).unwrap(wrapped, pack_context(b"", [])) == b"d" * 32
