"""What every ``KeyService`` and its bucket keys do. A body's test subclasses the suite and gives a ``keys`` fixture."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from storaged.errors import KeyringUnavailable
from storaged.objects.ports import WRAPPED_KEY_BYTES, BucketKey, KeyService, SealBroken, pack_context

BUCKET = b"bucket of a key."
OTHER = b"bucket of no key"
CONTEXT = pack_context(b"", [b"bucket", b"object"])
ANOTHER_CONTEXT = pack_context(b"", [b"bucketo", b"bject"])
DEK = bytes(range(32))


class KeyServiceSuite:
    async def created(self, keys: KeyService) -> BucketKey:
        await keys.create_bucket_key(BUCKET, ())
        return await keys.bucket_key(BUCKET, ())

    async def test_a_bucket_has_a_key_once_it_was_made_and_the_same_when_it_is_made_again(
        self, keys: KeyService
    ) -> None:
        with pytest.raises(KeyringUnavailable):
            await keys.bucket_key(BUCKET, ())
        assert keys.try_bucket_key(BUCKET, ()) is None
        key = await self.created(keys)
        assert key.version == 1
        wrapped = key.wrap(DEK, CONTEXT)
        assert (await self.created(keys)).unwrap(wrapped, CONTEXT) == DEK

    async def test_a_key_that_was_released_is_in_memory(self, keys: KeyService) -> None:
        key = await self.created(keys)
        for version in (0, 1):
            held = keys.try_bucket_key(BUCKET, (), version)
            assert held is not None
            assert held.unwrap(key.wrap(DEK, CONTEXT), CONTEXT) == DEK
        assert keys.try_bucket_key(OTHER, ()) is None

    async def test_a_version_that_is_not_there_is_refused(self, keys: KeyService) -> None:
        await self.created(keys)
        with pytest.raises(KeyringUnavailable):
            await keys.bucket_key(BUCKET, (), 2)
        assert keys.try_bucket_key(BUCKET, (), 2) is None

    async def test_a_wrapped_key_opens_in_its_context_alone(self, keys: KeyService) -> None:
        key = await self.created(keys)
        wrapped = key.wrap(DEK, CONTEXT)
        assert len(wrapped) == WRAPPED_KEY_BYTES
        assert key.unwrap(wrapped, CONTEXT) == DEK
        assert key.wrap(DEK, CONTEXT) != wrapped
        changed = bytes([wrapped[0] ^ 1]) + wrapped[1:]
        for sealed, context in ((wrapped, ANOTHER_CONTEXT), (changed, CONTEXT), (wrapped[:40], CONTEXT)):
            with pytest.raises(SealBroken):
                key.unwrap(sealed, context)

    async def test_list_fields_open_in_their_contexts_alone(self, keys: KeyService) -> None:
        key = await self.created(keys)
        fields = [b"", b"one", b"two" * 100]
        contexts = [pack_context(b"", [b"%d" % number]) for number in range(3)]
        sealed = [key.seal_list(field, context) for field, context in zip(fields, contexts, strict=True)]
        assert [len(one) for one in sealed] == [12 + len(field) + 16 for field in fields]
        assert [key.open_list(one, context) for one, context in zip(sealed, contexts, strict=True)] == fields
        assert key.open_lists(sealed, contexts) == fields
        assert key.open_lists([], []) == []
        with pytest.raises(SealBroken):
            key.open_list(sealed[1], contexts[0])
        with pytest.raises(SealBroken):
            key.open_list(b"short", contexts[0])
        with pytest.raises(SealBroken):
            key.open_lists(sealed, contexts[::-1])

    async def test_a_key_ends_with_its_bucket_and_is_destroyed_by_the_nonce_of_its_end(self, keys: KeyService) -> None:
        await self.created(keys)
        assert list(await keys.ended_bucket_keys()) == []
        assert not await keys.destroy_bucket_key(BUCKET, b"n" * 16)
        for _ in range(2):
            await keys.end_bucket_key(BUCKET, "photos", b"n" * 16, [0, 3])
            [ended] = await keys.ended_bucket_keys()
            assert (ended.bucket_id, ended.end.name, ended.end.nonce, ended.end.shards) == (
                BUCKET,
                "photos",
                b"n" * 16,
                (0, 3),
            )
        assert not await keys.destroy_bucket_key(BUCKET, b"o" * 16)
        await keys.bucket_key(BUCKET, ())
        assert await keys.destroy_bucket_key(BUCKET, b"n" * 16)
        assert not await keys.destroy_bucket_key(BUCKET, b"n" * 16)
        assert list(await keys.ended_bucket_keys()) == []
        assert keys.try_bucket_key(BUCKET, ()) is None
        with pytest.raises(KeyringUnavailable):
            await keys.bucket_key(BUCKET, ())

    async def test_a_late_end_takes_no_note_of_a_later_attempt_away(self, keys: KeyService) -> None:
        """Else the key would wait for ever for a final fence that the replicas refuse."""
        await self.created(keys)
        for nonce in (b"2" * 16, b"1" * 16):
            await keys.end_bucket_key(BUCKET, "photos", nonce, [0])
            [ended] = await keys.ended_bucket_keys()
            assert ended.end.nonce == b"2" * 16
        await keys.end_bucket_key(BUCKET, "photos", b"3" * 16, [0])
        [ended] = await keys.ended_bucket_keys()
        assert ended.end.nonce == b"3" * 16

    async def test_a_message_is_authenticated_with_its_context(self, keys: KeyService) -> None:
        tag = keys.authenticate([b"a", b"bc"], b"message")
        assert len(tag) == 32
        assert keys.verify([b"a", b"bc"], b"message", tag)
        assert not keys.verify([b"ab", b"c"], b"message", tag)
        assert not keys.verify([b"a", b"bc"], b"massage", tag)
        assert not keys.verify([b"a", b"bc"], b"message", tag[:-1])

    async def test_what_is_signed_is_verified_with_the_public_key(self, keys: KeyService) -> None:
        public = Ed25519PublicKey.from_public_bytes(keys.public_signer())
        public.verify(keys.sign_public(b"message"), b"message")
        with pytest.raises(InvalidSignature):
            public.verify(keys.sign_public(b"message"), b"massage")

    async def test_a_secret_opens_in_its_context_alone(self, keys: KeyService) -> None:
        sealed = keys.seal_secret(b"secret", [b"user", b"anne"])
        assert len(sealed) == 12 + 6 + 16
        assert keys.open_secret(sealed, [b"user", b"anne"]) == b"secret"
        for context in ([b"usera", b"nne"], [b"user", b"carl"]):
            with pytest.raises(SealBroken):
                keys.open_secret(sealed, context)
        assert keys.seal_secret(b"secret", [b"user", b"anne"]) != sealed
