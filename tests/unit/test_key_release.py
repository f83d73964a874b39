"""The policy is asked at every release of a key, also of one that this process has in its memory."""

from __future__ import annotations

import pytest

from storaged.cluster.policy import KeyHolder, Policy
from storaged.errors import KeyReleaseRefused
from storaged.keys import create_keyring
from tests.unit.test_keyring import BUCKET, CREDENTIAL, FRANCE, Rig

OTHER = b"o" * 16


@pytest.fixture
def material(tmp_path):
    return create_keyring(tmp_path / "keyring", CREDENTIAL)


def refusals(rig: Rig) -> list[str]:
    return [fields["rule"] for kind, fields in rig.entries if kind == "key.refused"]


async def test_a_gateway_in_germany_is_not_given_the_key_of_a_french_bucket(material):
    paris = Rig(material)
    await paris.keyring.create_bucket_key(BUCKET, ("FR",))
    await paris.keyring.bucket_key(BUCKET, ("FR",))
    frankfurt = Rig(material, holder=KeyHolder("DE", "HU", 0, 2**50))
    frankfurt.registers.values = paris.registers.values
    with pytest.raises(
        KeyReleaseRefused, match="Rule bucket countries: this gateway is in DE, and the bucket is bound to FR"
    ) as caught:
        await frankfurt.keyring.bucket_key(BUCKET, ("FR",))
    assert (caught.value.status, caught.value.code, caught.value.details) == (
        503,
        "ServiceUnavailable",
        {"Rule": "bucket countries"},
    )
    assert frankfurt.registers.reads == 0
    assert frankfurt.entries == [
        (
            "key.refused",
            {
                "target": "bucket-id:" + BUCKET.hex(),
                "keyring": material.keyring_id.hex(),
                "bucket": BUCKET.hex(),
                "outcome": "refused ServiceUnavailable",
                "rule": "bucket countries",
                "reason": "this gateway is in DE, and the bucket is bound to FR",
            },
        )
    ]
    with pytest.raises(KeyReleaseRefused):
        await frankfurt.keyring.create_bucket_key(OTHER, ("FR",))
    assert len(frankfurt.registers.values) == 1


async def test_a_key_in_memory_is_forgotten_when_a_layout_that_refuses_it_comes_into_force(material):
    rig = Rig(material)
    for bucket in (BUCKET, OTHER):
        await rig.keyring.create_bucket_key(bucket, ())
        await rig.keyring.bucket_key(bucket, ())
    assert rig.keyring.try_bucket_key(BUCKET, ()) is not None
    rig.keyring.set_policy(Policy.of(["DE"]), FRANCE)
    assert rig.keyring.statistics().buckets_cached == 0
    assert rig.keyring.try_bucket_key(BUCKET, ()) is None
    with pytest.raises(KeyReleaseRefused, match="cluster countries"):
        await rig.keyring.bucket_key(BUCKET, ())
    rig.keyring.set_policy(Policy.of(["DE"], ["FR"]), KeyHolder("DE", "HU", 0, 2**50))
    with pytest.raises(KeyReleaseRefused, match="cluster jurisdictions: HU"):
        await rig.keyring.bucket_key(BUCKET, ())
    rig.keyring.set_policy(None, FRANCE)
    with pytest.raises(KeyReleaseRefused, match="policy is not known"):
        await rig.keyring.bucket_key(BUCKET, ())
    rig.keyring.set_policy(Policy(), FRANCE)
    assert (await rig.keyring.bucket_key(BUCKET, ())).version == 1
    assert refusals(rig) == ["cluster countries", "cluster jurisdictions", "policy"]


async def test_a_key_in_memory_is_kept_when_what_changed_allows_it_too(material):
    rig = Rig(material)
    await rig.keyring.create_bucket_key(BUCKET, ("FR",))
    key = await rig.keyring.bucket_key(BUCKET, ("FR",))
    rig.keyring.set_policy(Policy.of(["FR"]), FRANCE)
    assert rig.keyring.try_bucket_key(BUCKET, ("FR",)) is key
    assert rig.registers.reads == 1


async def test_a_bucket_record_with_other_countries_is_judged_again_although_its_key_is_in_memory(material):
    rig = Rig(material)
    await rig.keyring.create_bucket_key(BUCKET, ())
    key = await rig.keyring.bucket_key(BUCKET, ())
    assert rig.keyring.try_bucket_key(BUCKET, ("FR",)) is None
    assert await rig.keyring.bucket_key(BUCKET, ("FR",)) is key
    assert rig.keyring.try_bucket_key(BUCKET, ("FR",)) is key
    with pytest.raises(KeyReleaseRefused):
        await rig.keyring.bucket_key(BUCKET, ("DE",))
    assert rig.keyring.statistics().buckets_cached == 0


async def test_no_key_is_released_with_a_certificate_that_is_not_valid_now(material):
    rig = Rig(material)
    now_ms = rig.clock.wall_ms()
    rig.keyring.set_policy(Policy(), KeyHolder("FR", "FR", now_ms, now_ms + 10_000))
    await rig.keyring.create_bucket_key(BUCKET, ())
    await rig.keyring.bucket_key(BUCKET, ())
    sealed = rig.keyring.seal_secret(b"secret", [])
    rig.clock.now = 9.0
    assert rig.keyring.try_bucket_key(BUCKET, ()) is not None
    rig.clock.now = 10.0
    assert rig.keyring.try_bucket_key(BUCKET, ()) is None
    with pytest.raises(KeyReleaseRefused, match="certificate validity: this gateway's certificate has expired"):
        await rig.keyring.bucket_key(BUCKET, ())
    with pytest.raises(KeyReleaseRefused):
        rig.keyring.open_secret(sealed, [])
    assert rig.keyring.statistics().buckets_cached == 0
    rig.clock.now = -1.0
    with pytest.raises(KeyReleaseRefused, match="not valid yet"):
        await rig.keyring.bucket_key(BUCKET, ())


async def test_a_refusal_that_is_met_again_and_again_is_audited_once_a_minute(material):
    rig = Rig(material)
    for _ in range(5):
        with pytest.raises(KeyReleaseRefused):
            await rig.keyring.bucket_key(BUCKET, ("DE",))
    assert refusals(rig) == ["bucket countries"]
    rig.clock.now += 60.0
    with pytest.raises(KeyReleaseRefused):
        await rig.keyring.bucket_key(BUCKET, ("DE",))
    assert len(refusals(rig)) == 2


async def test_a_policy_that_changes_while_the_register_is_read_counts(material):
    rig = Rig(material)
    await rig.keyring.create_bucket_key(BUCKET, ())
    read = rig.registers.read

    async def meanwhile(path):
        rig.keyring.set_policy(Policy.of(["DE"]), FRANCE)
        return await read(path)

    rig.registers.read = meanwhile
    with pytest.raises(KeyReleaseRefused):
        await rig.keyring.bucket_key(BUCKET, ())
    assert rig.keyring.try_bucket_key(BUCKET, ()) is None
