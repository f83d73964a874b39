"""However a body is cut into parts, the checksum of the whole is the same; and what a Complete is known by says nothing
without its key."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.errors import InvalidRequest
from storaged.objects.api import CHECKSUM_ALGORITHMS, BodyChecks
from storaged.objects.write.checksums import (
    COMPOSITE,
    FULL_OBJECT,
    BodyDigest,
    can_be_full_object,
    checksum_of,
    digest_of,
    multipart_checksum,
)
from storaged.sov1 import derive_key

bodies = st.lists(st.binary(max_size=300), min_size=1, max_size=8)


@given(bodies)
@settings(deadline=None)
def test_parts_combine_to_the_checksum_of_the_whole(parts: list[bytes]) -> None:
    for algorithm in CHECKSUM_ALGORITHMS:
        named = [(checksum_of(algorithm, part), len(part)) for part in parts]
        if can_be_full_object(algorithm):
            assert multipart_checksum(algorithm, FULL_OBJECT, named) == checksum_of(algorithm, b"".join(parts))
        else:
            with pytest.raises(InvalidRequest):
                multipart_checksum(algorithm, FULL_OBJECT, named)
        joined = b"".join(base64.b64decode(value) for value, _ in named)
        assert multipart_checksum(algorithm, COMPOSITE, named) == f"{checksum_of(algorithm, joined)}-{len(parts)}"


@given(bodies, st.sets(st.sampled_from(CHECKSUM_ALGORITHMS)))
@settings(deadline=None)
def test_a_body_in_pieces_has_the_digest_of_the_whole(pieces: list[bytes], algorithms: set[str]) -> None:
    whole = b"".join(pieces)
    checks = BodyChecks(len(whole), algorithms=tuple(algorithms))
    streamed = BodyDigest(checks)
    for piece in pieces:
        streamed.update(piece)
    found = streamed.finish()
    assert found == digest_of(whole, checks)
    assert found.checksums.keys() == (algorithms or {"CRC64NVME"})


@given(
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=32, max_size=32),
    st.binary(max_size=80),
    st.binary(max_size=80),
)
def test_a_derived_key_depends_on_key_label_and_context(
    key: bytes, other: bytes, context: bytes, another: bytes
) -> None:
    found = derive_key(key, "sov.request.v1", context)
    assert len(found) == 32
    assert (derive_key(other, "sov.request.v1", context) == found) == (key == other)
    assert (derive_key(key, "sov.request.v1", another) == found) == (context == another)
    assert derive_key(key, "sov.request.v2", context) != found
