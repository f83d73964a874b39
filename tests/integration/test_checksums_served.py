"""The ten checksums of S3: values, what is kept of what came without one, and how parts' become the whole's.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

import pytest

from storaged.objects.api import CHECKSUM_ALGORITHMS
from tests.integration.s3_front import ACCESS, REGION, ask, s3_world, signed
from tests.unit.test_checksums import OTHER, text


@pytest.mark.parametrize("algorithm", CHECKSUM_ALGORITHMS)
async def test_request_documents_are_verified_against_each_algorithm(algorithm: str) -> None:
    name = f"x-amz-checksum-{algorithm.lower()}"
    document = b"<Delete><Object><Key>k</Key></Object></Delete>"
    async with s3_world() as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        for sum_of, answer in ((b"other", b"<Code>BadDigest</Code>"), (document, b"<Deleted><Key>k</Key>")):
            headers = {name: text(OTHER[algorithm](sum_of))}
            assert answer in await ask(world, signed(world, "POST", "/bucket?delete=", body=document, headers=headers))


@pytest.mark.parametrize("algorithm", CHECKSUM_ALGORITHMS)
async def test_a_trailer_of_each_algorithm_is_verified_and_kept(algorithm: str) -> None:
    name = f"x-amz-checksum-{algorithm.lower()}"
    async with s3_world() as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        for sum_of, answer in ((b"some content", b"HTTP/1.1 200"), (b"other", b"HTTP/1.1 400")):
            trailer = f"{name}:{text(OTHER[algorithm](sum_of))}".encode()
            framed = b"c\r\nsome content\r\n0\r\n%b\r\n\r\n" % trailer
            headers = {"content-encoding": "aws-chunked", "x-amz-trailer": name, "x-amz-decoded-content-length": "12"}
            request = signed(
                world,
                "PUT",
                f"/bucket/{answer[-3:].decode()}",
                body=framed,
                headers=headers,
                payload="STREAMING-UNSIGNED-PAYLOAD-TRAILER",
            )
            found = await ask(world, request)
            assert found.startswith(answer), found
        assert (await world.head("200")).checksums == {algorithm: text(OTHER[algorithm](b"some content"))}
        assert b"400" not in await world.stored()
