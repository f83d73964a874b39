"""Hashes that a liar can't find other bytes for, and the older kind for which he can."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path

import pytest
import xxhash

from storaged import hashes
from storaged.errors import InvalidRequest
from storaged.hashes import fragment_hash, is_fragment, is_page, listed_hash, page_hash, row_hash
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.names import RegisterName
from storaged.objects.code.manifest import renew_pages
from tests.doubles.meta_store import MemoryMetaStore
from tests.second_preimage import second_preimage


def test_they_are_what_the_documentation_says() -> None:
    payload = bytes(range(256)) * 18
    assert fragment_hash([payload]) == hashlib.sha256(b"sov.fragment.v1\0" + payload).digest()[:20]
    assert page_hash(b"a page") == hashlib.sha256(b"sov.page.v1\0" + b"a page").digest()[:20]
    assert row_hash(b"a row") == hashlib.sha256(b"sov.row.v1\0" + b"a row").digest()[:16]
    assert listed_hash(b"rows") == hashlib.sha256(b"sov.listed.v1\0" + b"rows").digest()[:16]
    text = " ".join((Path(hashes.__file__).parent / "FORMATS.md").read_text().split())
    found = re.search(
        r"The hash of the fragment `00 01 .. ff`, 18 times, is `(\w+)` \(xxh3-128: `(\w+)`\); the name of the page `a"
        r" page` is `(\w+)`",
        text,
    )
    assert found is not None
    assert found.groups() == (
        fragment_hash([payload]).hex(),
        xxhash.xxh3_128_hexdigest(payload),
        page_hash(b"a page").hex(),
    )


def test_pieces_are_hashed_as_the_whole_and_a_fragment_is_no_page() -> None:
    assert fragment_hash([b"ab", memoryview(b"c")]) == fragment_hash([b"abc"]) != page_hash(b"abc")
    assert fragment_hash([]) == fragment_hash([b""])


@pytest.mark.parametrize("length", [1088, 4112, 16 * 1024, 300_000])
def test_other_bytes_with_an_equal_xxh3_do_not_pass(length: int) -> None:
    rng = random.Random(length)
    data = rng.randbytes(length)
    forged = second_preimage(data, rng)
    assert forged != data
    assert xxhash.xxh3_128_digest(forged) == xxhash.xxh3_128_digest(data), "a liar finds these within a second"
    assert is_fragment([data], fragment_hash([data]))
    assert not is_fragment([forged], fragment_hash([data]))
    assert is_page(data, page_hash(data))
    assert not is_page(forged, page_hash(data))


def test_the_kind_is_told_by_its_length_and_unknown_kinds_hold_nothing() -> None:
    data = b"sealed"
    old = xxhash.xxh3_128_digest(data)
    assert is_fragment([data], old)
    assert is_fragment([b"sea", b"led"], old)
    assert is_page(data, old)
    for length in (0, 1, 8, 15, 17, 19, 21, 32):
        whole = hashlib.sha256(b"sov.fragment.v1\0" + data).digest().ljust(32)
        assert not is_fragment([data], whole[:length])
        assert not is_page(data, hashlib.sha256(b"sov.page.v1\0" + data).digest()[:length])
        assert not is_fragment([data], (old * 2)[:length])


async def test_a_replica_that_holds_a_page_of_the_old_kind_takes_no_other_bytes_for_it() -> None:
    rng = random.Random(7)
    page = rng.randbytes(2000)
    name, forged = xxhash.xxh3_128_digest(page), second_preimage(page, rng)
    replica = LocalReplica("d", MemoryMetaStore())
    for _ in range(2):  # put, and renewed
        await replica.page_put(messages.PagePut("d", name, page))
    with pytest.raises(InvalidRequest):
        await replica.page_put(messages.PagePut("d", name, forged))
    assert (await replica.page_get(messages.PageGet("d", name))).body == page
    with pytest.raises(InvalidRequest):
        await replica.page_put(messages.PagePut("d", page_hash(page), forged))


async def test_a_page_is_renewed_under_the_name_that_it_has() -> None:
    """A record names it so; under a new name it would not be found, and the old one would be swept."""
    bodies = {xxhash.xxh3_128_digest(b"old page"): b"old page", page_hash(b"new page"): b"new page"}
    put: list[tuple[bytes, bytes]] = []

    class Pages:
        async def get_page(self, _near: object, name: bytes) -> bytes:
            return bodies[name]

        async def put_page(self, _near: object, body: bytes, name: bytes = b"") -> bytes:
            put.append((name or page_hash(body), body))
            return name

    await renew_pages(Pages(), RegisterName(1, bytes(16), 0, b"k"), list(bodies))  # type: ignore[arg-type]
    assert put == list(bodies.items())
