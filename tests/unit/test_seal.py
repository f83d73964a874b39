"""Sealing against published vectors, and against everything that must not open."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from storaged.keys.bucketkey import BUCKET_KEY_LABEL, FieldBox, UnwrappedBucketKey, Vault, wrap_context
from storaged.keys.keyfile import Argon2Cost, Credential, Passphrase, _unlock
from storaged.keys.keyring import SECRET_LABEL
from storaged.objects.code.seal import META_LABEL, PartSealer, part_key, seal_part
from storaged.objects.ports import SealBroken, pack_context
from storaged.sov1 import HEADER_BYTES, Opener, open_message, seal_message

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "seal.json").read_text())
DEK, DATA_ID, SALT = b"k" * 32, b"i" * 16, b"s" * 24


def hexed(value):
    return [bytes.fromhex(one) for one in value] if isinstance(value, list) else bytes.fromhex(value)


def packed(context: list[str]) -> bytes:
    return pack_context(b"", [bytes.fromhex(field) for field in context])


def pattern(size: int) -> bytes:
    return bytes(7 * i % 256 for i in range(size))


def sealed_part(plain: bytes, chunk_bytes: int = 4096) -> tuple[bytes, bytearray]:
    sealer = PartSealer(DEK, DATA_ID, 1, chunk_bytes, SALT)
    out = bytearray(len(plain) + 16 * (len(plain) // (chunk_bytes - 16) + 1))
    assert sealer.seal_block(0, plain, memoryview(out), last=True) == len(out)
    return sealer.header, out


# --- vectors


@pytest.mark.parametrize(
    "vector", VECTORS["parts"], ids=lambda vector: f"{vector['plaintext_pattern']} bytes in {vector['chunk_bytes']}"
)
def test_parts_are_sealed_bit_by_bit_as_documented(vector):
    plain, chunks = pattern(vector["plaintext_pattern"]), hexed(vector["chunks"])
    dek, data_id, number = hexed(vector["dek"]), hexed(vector["data_id"]), vector["part_number"]
    sealer = PartSealer(dek, data_id, number, vector["chunk_bytes"], hexed(vector["salt"]))
    assert sealer.header == hexed(vector["header"])
    step = vector["chunk_bytes"] - 16
    assert [sealer.seal(i, plain[i * step : (i + 1) * step]) for i in range(len(chunks))] == chunks
    opener = Opener(part_key(dek, hexed(vector["header"]), data_id, number), len(plain))
    assert b"".join(opener.open(i, chunk) for i, chunk in enumerate(chunks)) == plain


def test_metadata_is_sealed_as_documented():
    vector = VECTORS["metadata"]
    sealed = seal_message(
        hexed(vector["dek"]), META_LABEL, packed(vector["context"]), hexed(vector["plaintext"]), hexed(vector["salt"])
    )
    assert sealed == hexed(vector["sealed"])
    assert open_message(hexed(vector["dek"]), META_LABEL, packed(vector["context"]), sealed) == hexed(
        vector["plaintext"]
    )


def test_data_keys_and_list_fields_are_sealed_as_documented():
    vector = VECTORS["wrapped_key"]
    key = UnwrappedBucketKey(1, hexed(vector["bucket_key"]), lambda count: hexed(vector["salt"])[:count])
    assert key.wrap(hexed(vector["dek"]), packed(vector["context"])) == hexed(vector["wrapped"])
    assert key.unwrap(hexed(vector["wrapped"]), packed(vector["context"])) == hexed(vector["dek"])
    vector = VECTORS["list_field"]
    key = UnwrappedBucketKey(1, hexed(vector["bucket_key"]), lambda count: hexed(vector["nonce"])[:count])
    assert key.seal_list(hexed(vector["plaintext"]), packed(vector["context"])) == hexed(vector["sealed"])
    assert key.open_list(hexed(vector["sealed"]), packed(vector["context"])) == hexed(vector["plaintext"])


def test_bucket_keys_secrets_and_authenticators_are_made_as_documented():
    vector = VECTORS["wrapped_bucket_key"]
    context = wrap_context(hexed(vector["keyring_id"]), hexed(vector["bucket_id"]), 1, 1)
    assert open_message(hexed(vector["epoch_key"]), BUCKET_KEY_LABEL, context, hexed(vector["wrapped"])) == hexed(
        vector["bucket_key"]
    )
    vector = VECTORS["secret"]
    box = FieldBox(hexed(vector["secret_key"]), SECRET_LABEL, lambda count: hexed(vector["nonce"])[:count])
    assert box.seal(hexed(vector["plaintext"]), packed(vector["context"])) == hexed(vector["sealed"])
    vector = VECTORS["authenticator"]
    newest = type("E", (), {"epoch": 1})()
    fields = {"keyring_id": bytes(16), "newest": newest, "epochs": {}, "record_key": hexed(vector["record_key"])}
    vault = Vault(type("M", (), fields)(), lambda count: bytes(count))
    assert vault.authenticate(hexed(vector["context"]), hexed(vector["message"])) == hexed(vector["tag"])


def test_a_keyring_is_protected_as_documented():
    vector = VECTORS["keyring_protection"]
    cost = Argon2Cost(vector["memory_kib"], vector["passes"], vector["lanes"])
    salt = "AAECAwQFBgcICQoLDA0ODw=="
    protected = {"kind": "passphrase", "kdf": "argon2id", "salt": salt, **cost._asdict()}
    assert _unlock(protected, Passphrase(vector["passphrase_text"]), Path("f")) == hexed(vector["passphrase_key"])
    assert _unlock({"kind": "credential", "salt": salt}, Credential(hexed(vector["credential"])), Path("f")) == hexed(
        vector["credential_key"]
    )


def test_the_documents_print_the_vectors_as_they_are():
    package = Path(__file__).parents[2] / "storaged"
    printed = "".join("".join(path.read_text().split()) for path in sorted(package.rglob("*.md")))
    wanted = [
        VECTORS["parts"][0]["header"],
        VECTORS["parts"][0]["chunks"][0],
        VECTORS["parts"][1]["chunks"][0],
        VECTORS["list_field"]["list_key"],
    ]
    wanted += [VECTORS["wrapped_key"]["wrapped"], VECTORS["metadata"]["sealed"], VECTORS["list_field"]["sealed"]]
    wanted += [VECTORS["wrapped_bucket_key"]["wrapped"], VECTORS["authenticator"]["tag"]]
    assert [value for value in wanted if value not in printed] == []


# --- what must not open


def test_another_key_data_id_or_part_number_is_refused_by_the_commitment_before_any_chunk():
    header, _ = sealed_part(b"plain")
    for dek, data_id, number in ((b"K" * 32, DATA_ID, 1), (DEK, b"I" * 16, 1), (DEK, DATA_ID, 2)):
        with pytest.raises(SealBroken, match="does not commit") as caught:
            Opener(part_key(dek, header, data_id, number))
        assert caught.value.index is None


def test_a_header_with_any_byte_altered_is_refused():
    header, _ = sealed_part(b"plain")
    for at in range(HEADER_BYTES):
        for flip in (1, 0x80):
            broken = bytearray(header)
            broken[at] ^= flip
            with pytest.raises(SealBroken):
                Opener(part_key(DEK, broken, DATA_ID, 1))
    for length in (0, 63):
        with pytest.raises(SealBroken):
            Opener(part_key(DEK, header[:length], DATA_ID, 1))


def test_a_chunk_with_any_byte_altered_is_refused_and_named():
    header, sealed = sealed_part(pattern(4080 + 30))
    opener = Opener(part_key(DEK, header, DATA_ID, 1), 4110)
    for at in [*range(0, 4096, 97), *range(4096, len(sealed))]:
        broken = bytearray(sealed)
        broken[at] ^= 4
        with pytest.raises(SealBroken) as caught:
            opener.open_block(0, broken, memoryview(bytearray(4110)))
        assert caught.value.index == at // 4096


def test_chunks_do_not_open_in_each_others_places():
    header, sealed = sealed_part(bytes(4080 * 2))
    opener = Opener(part_key(DEK, header, DATA_ID, 1))
    with pytest.raises(SealBroken):
        opener.open(0, memoryview(sealed)[4096:8192])


def test_a_part_cut_at_a_chunks_border_shows_in_its_last_chunk():
    header, sealed = sealed_part(pattern(4080 * 2 + 5))
    for cut in (4096, 8192):
        with pytest.raises(SealBroken):
            open_message(DEK, "x", b"", header + sealed[:cut])
        size = cut // 4096 * 4080
        opener = Opener(part_key(DEK, header, DATA_ID, 1), size)
        with pytest.raises(SealBroken):
            opener.open(cut // 4096, bytes(16))
        with pytest.raises(SealBroken, match="does not fit"):
            opener.open(cut // 4096 - 1, sealed[cut - 4096 : cut - 1])


@pytest.mark.parametrize(("index", "length"), [(-1, 16), (2**32, 16), (0, 15), (0, 4097), (0, 0)])
def test_chunks_that_cannot_be_are_refused(index, length):
    header, _ = sealed_part(b"")
    opener = Opener(part_key(DEK, header, DATA_ID, 1))
    with pytest.raises(SealBroken, match="cannot be"):
        opener.open(index, bytes(length))


def test_a_message_cut_anywhere_is_refused():
    sealed = seal_message(DEK, META_LABEL, b"a", b"some metadata", SALT)
    for length in range(len(sealed)):
        with pytest.raises(SealBroken):
            open_message(DEK, META_LABEL, b"a", sealed[:length])
    with pytest.raises(SealBroken):
        open_message(DEK, META_LABEL, b"a", sealed + b"x")


def test_labels_keep_the_uses_of_one_key_apart():
    sealed = seal_message(DEK, META_LABEL, b"a", b"some metadata", SALT)
    with pytest.raises(SealBroken, match="does not commit"):
        open_message(DEK, "sov.key.v1", b"a", sealed)


# --- what must not be sealed


def test_no_index_is_sealed_twice():
    sealer = PartSealer(DEK, DATA_ID, 1, 4096, SALT)
    sealer.seal(0, bytes(4080))
    sealer.seal(5, bytes(4080))
    for index in (0, 5, 3):
        with pytest.raises(ValueError, match="ascend"):
            sealer.seal(index, bytes(4080))
        with pytest.raises(ValueError, match="ascend"):
            sealer.seal_into(index, bytes(4080), memoryview(bytearray(4096)))


def test_nothing_is_sealed_behind_the_short_chunk_or_beyond_2_32():
    sealer = PartSealer(DEK, DATA_ID, 1, 4096, SALT)
    with pytest.raises(ValueError, match="2\\^32"):
        sealer.seal(2**32, bytes(4080))
    sealer.seal(2**32 - 1, b"short")
    with pytest.raises(ValueError, match="ascend"):
        sealer.seal(2**32, b"")
    sealer = PartSealer(DEK, DATA_ID, 1, 4096, SALT)
    sealer.seal(0, b"short")
    with pytest.raises(ValueError, match="ascend"):
        sealer.seal(1, b"")


def test_a_chunk_too_long_or_a_ragged_block_in_the_middle_is_refused_and_seals_nothing():
    sealer = PartSealer(DEK, DATA_ID, 1, 4096, SALT)
    with pytest.raises(ValueError, match="holds 4080"):
        sealer.seal(0, bytes(4081))
    with pytest.raises(ValueError, match="whole number"):
        sealer.seal_block(0, bytes(4081), memoryview(bytearray(9000)), last=False)
    assert len(sealer.seal(0, bytes(4080))) == 4096


@pytest.mark.parametrize("chunk_bytes", [0, 1024, 4095, 5000, 131072])
def test_odd_chunk_sizes_are_refused(chunk_bytes):
    with pytest.raises(ValueError, match="power of two"):
        PartSealer(DEK, DATA_ID, 1, chunk_bytes, SALT)


def test_keys_ids_and_salts_of_the_wrong_length_are_refused():
    for dek, data_id, salt in ((DEK[1:], DATA_ID, SALT), (DEK, DATA_ID[1:], SALT), (DEK, DATA_ID, SALT[1:])):
        with pytest.raises(ValueError, match="bytes, not"):
            PartSealer(dek, data_id, 1, 4096, salt)


def test_contexts_are_unambiguous():
    packed = {
        pack_context(b"l", fields)
        for fields in ([], [b""], [b"", b""], [b"a", b"b"], [b"ab"], [b"ab", b""], [b"", b"ab"])
    }
    assert len(packed) == 7


@pytest.mark.parametrize("size", [0, 1, 4079, 4080, 16_000, 65_519])
def test_a_part_of_one_chunk_is_sealed_and_opened_in_one_step_as_by_a_sealer_and_an_opener(size):
    plain = pattern(size)
    header, chunk = seal_part(DEK, DATA_ID, 3, plain, SALT)
    chunk_bytes = 1 << header[5]
    sealer = PartSealer(DEK, DATA_ID, 3, chunk_bytes, SALT)
    assert (header, chunk) == (sealer.header, sealer.seal(0, plain))
    assert size < chunk_bytes - 16
    assert chunk_bytes == 4096 or size >= chunk_bytes // 2 - 16
    key = part_key(DEK, header, DATA_ID, 3)
    assert key.open_only(chunk) == key.open_only(memoryview(chunk)) == plain
    for dek, data_id, number in ((b"K" * 32, DATA_ID, 3), (DEK, b"I" * 16, 3), (DEK, DATA_ID, 2)):
        with pytest.raises(SealBroken, match="does not commit"):
            part_key(dek, header, data_id, number)
    with pytest.raises(SealBroken, match="does not open"):
        key.open_only(chunk[:-1] + bytes([chunk[-1] ^ 1]))
    for length in (0, 15):
        with pytest.raises(SealBroken, match="only chunk"):
            key.open_only(bytes(length))


@pytest.mark.parametrize("size", [65_519, 65_520, 65_521, 131_039, 131_040, 200_000])
def test_a_part_that_is_kept_whole_may_have_several_chunks(size):
    plain = os.urandom(size)
    header, sealed = seal_part(DEK, DATA_ID, 1, plain, SALT)
    assert len(sealed) == size + 16 * (size // 65_520 + 1)
    key = part_key(DEK, header, DATA_ID, 1)
    assert key.open_whole(sealed) == key.open_whole(memoryview(sealed)) == plain
    opener = Opener(part_key(DEK, header, DATA_ID, 1), size)
    assert (
        b"".join(opener.open(at // 65_536, sealed[at : at + 65_536]) for at in range(0, len(sealed), 65_536)) == plain
    )
    with pytest.raises(SealBroken, match="does not open"):
        key.open_whole(sealed[:-1] + bytes([sealed[-1] ^ 1]))
    for cut in {*range(0, len(sealed), 65_536), 10, len(sealed) - 16}:  # between chunks, and in them
        if cut < len(sealed):
            with pytest.raises(SealBroken):
                key.open_whole(sealed[:cut])
    swapped = sealed[65_536:131_072] + sealed[:65_536] + sealed[131_072:]
    if swapped != sealed:
        with pytest.raises(SealBroken):
            key.open_whole(swapped)


def test_what_fills_a_chunk_is_no_part_of_one_chunk():
    header, sealed = sealed_part(bytes(4080))
    with pytest.raises(SealBroken, match="only chunk"):
        part_key(DEK, header, DATA_ID, 1).open_only(sealed[:4096])


@pytest.mark.parametrize("size", [0, 1, 4079, 4080, 4081, 5 * 4080, 5 * 4080 + 7])
@pytest.mark.parametrize("sized", [True, False])
def test_chunks_that_lie_apart_open_as_they_do_together(size: int, sized: bool) -> None:
    plain = pattern(size)
    header, sealed = sealed_part(plain)
    opener = Opener(part_key(DEK, header, DATA_ID, 1), size if sized else None)
    chunks = [sealed[at : at + 4096] for at in range(0, len(sealed), 4096)]
    out = bytearray(b"\xee" * (size + 20))
    middle = len(chunks) // 2
    at = opener.open_chunks(0, chunks[:middle], memoryview(out), 10)
    assert at == 10 + middle * 4080
    assert opener.open_chunks(middle, chunks[middle:], memoryview(out), at) == 10 + size
    assert out == b"\xee" * 10 + plain + b"\xee" * 10
    for number in range(len(chunks)):
        broken = [bytearray(chunk) for chunk in chunks]
        broken[number][len(broken[number]) // 2] ^= 1
        with pytest.raises(SealBroken) as caught:
            opener.open_chunks(0, broken, memoryview(out), 10)
        assert caught.value.index == number
    with pytest.raises(SealBroken):
        opener.open_chunks(1, chunks, memoryview(out), 10)
    with pytest.raises(SealBroken):
        opener.open_chunks(0, [*chunks[:-1], chunks[-1] + b"\0"], memoryview(out), 10)
