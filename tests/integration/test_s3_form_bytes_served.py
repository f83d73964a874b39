"""Browser forms read from bytes: every form has one meaning, and what its policy says holds all together.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.integration.s3_front import ACCESS, REGION, World, s3_world
from tests.integration.test_s3_post import policy, post, signed_form, stored


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


async def test_a_form_with_a_security_token_is_refused(world: World) -> None:
    status, body, _ = await post(
        world,
        signed_form(policy({"x-amz-security-token": "t"}, {"key": "k"}), {"key": "k", "x-amz-security-token": "t"}),
    )
    assert (status, b"<Code>InvalidToken</Code>" in body) == (400, True), body
    assert await stored(world, b"k") is None


@pytest.mark.parametrize("field", ["x-amz-copy-source", "x-amz-write-offset-bytes", "x-amz-grant-read"])
async def test_a_form_that_asks_for_what_a_form_can_not_do_is_refused(world: World, field: str) -> None:
    status, _, _ = await post(
        world, signed_form(policy({field: "/bucket/other"}, {"key": "k"}), {"key": "k", field: "/bucket/other"})
    )
    assert status in (400, 501)
    assert await stored(world, b"k") is None


async def test_a_form_may_name_where_a_website_redirects(world: World) -> None:
    name = "x-amz-website-redirect-location"

    async def send(where: str) -> tuple[int, bytes]:
        form = signed_form(policy(["starts-with", f"${name}", ""], {"key": "k"}), {"key": "k", name: where})
        return (await post(world, form))[:2]

    status, answer = await send("elsewhere")
    assert (status, b"<Code>InvalidRedirectLocation</Code>" in answer) == (400, True), answer
    assert await stored(world, b"k") is None
    assert (await send("/a/b?c#d"))[0] == 204
    assert (await world.head("k")).headers[name] == "/a/b?c#d"


@pytest.mark.parametrize(
    "name",
    ["if-match", "If-None-Match", "if-modified-since", "if-unmodified-since", "content-range", "x-storaged-countries"],
)
async def test_a_field_that_asks_for_what_a_form_does_not_do_overwrites_nothing(world: World, name: str) -> None:
    """A policy that names a condition means it: to ignore it would overwrite what it protects."""
    conditions = (["starts-with", "$key", ""], ["starts-with", f"${name}", ""])
    assert (await post(world, signed_form(policy(*conditions[:1]), {"key": "k"}, b"old")))[0] == 204
    before = await stored(world, b"k")
    status, answer, _ = await post(world, signed_form(policy(*conditions), {"key": "k", name: "*"}, b"new"))
    assert (status, b"<Code>NotImplemented</Code>" in answer) == (501, True)
    assert await stored(world, b"k") == before
