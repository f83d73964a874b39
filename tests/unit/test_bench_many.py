"""What ``benches.many`` sends is what the server takes."""

from __future__ import annotations

from typing import cast

import pytest

from benches.many import PAGE_VERSIONS, VERSIONED, Client, full_pages, rule
from storaged.s3 import xml
from storaged.s3.ops import lifecycle


def test_its_rules_are_rules() -> None:
    for expiration in ("<Days>3650</Days>", "<Date>2020-01-01T00:00:00Z</Date>"):
        found, _ = lifecycle.parse(rule("0", expiration).encode())
        assert [(one.enabled, one.filter.prefix) for one in found.rules] == [(True, "0")]
    assert xml.parse(VERSIONED.encode(), root="VersioningConfiguration").all("Status")


class Pages:
    """A list of versions, newest first."""

    def __init__(self, count: int) -> None:
        self._count = count

    async def ask(self, method: str, bucket: str, key: str = "", query: str = "") -> bytes:
        asked = dict(field.split("=", 1) for field in query.split("&"))
        first = int(asked.get("version-id-marker", "v-1")[1:]) + 1
        assert ("version-id-marker" in asked) == ("key-marker" in asked)
        end = min(first + int(asked["max-keys"]), self._count)
        return b"".join(b"<VersionId>v%d</VersionId>" % number for number in range(first, end))


@pytest.mark.parametrize(("count", "full"), [(1, 1), (999, 1), (1000, 1), (1001, 1), (3000, 3), (3500, 3)])
async def test_it_finds_where_full_pages_begin(count: int, full: int) -> None:
    """The first page counts as full."""
    after, known = await full_pages(cast(Client, Pages(count)))
    assert after == ["", *(f"v{PAGE_VERSIONS * page - 1}" for page in range(1, full))]
    assert f"v{count - 1}" in known
