"""What ``benches.many`` sends is what the server takes."""

from __future__ import annotations

from typing import cast

from benches.many import VERSIONED, Client, rule, seek
from storaged.s3 import xml
from storaged.s3.ops import lifecycle


def test_its_rules_are_rules() -> None:
    for expiration in ("<Days>3650</Days>", "<Date>2020-01-01T00:00:00Z</Date>"):
        found, _ = lifecycle.parse(rule("0", expiration).encode())
        assert [(one.enabled, one.filter.prefix) for one in found.rules] == [(True, "0")]
    assert xml.parse(VERSIONED.encode(), root="VersioningConfiguration").all("Status")


class Pages:
    """A list of 50 versions, 10 on a page."""

    async def ask(self, method: str, bucket: str, key: str = "", query: str = "") -> bytes:
        after = int(query.split("version-id-marker=v")[1].split("&")[0])
        return b"".join(b"<VersionId>v%d</VersionId>" % number for number in range(after + 1, min(after + 11, 50)))


async def test_it_finds_the_page_at_a_depth() -> None:
    first = [b"v%d" % number for number in range(10)]
    pages = cast(Client, Pages())
    assert await seek(pages, 5, first) == first
    assert (await seek(pages, 25, first))[0] == b"v20"
    assert await seek(pages, 1000, first) == []
