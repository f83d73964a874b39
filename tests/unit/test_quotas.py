"""Quotas of buckets and accounts: what fits is admitted, what does not is refused before anything is written, and
nothing is asked of buckets without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from storaged.errors import QuotaExceeded, ServiceUnavailable
from storaged.objects import quotas
from storaged.objects.configuration.document import NOTHING, Configuration
from storaged.objects.configuration.kinds import QUOTA, Quota
from storaged.objects.quotas import Limit, Quotas, Sources
from storaged.objects.records import BucketRecord
from storaged.objects.usage import Usage
from tests.doubles.clock import ManualClock

ONE, TWO = (BucketRecord(name, name.encode() * 4, "anne", 1, "active", 16, "eu") for name in ("one4", "two4"))


class Cluster:
    """What quotas are read from."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.limits: dict[bytes, Quota] = {}
        self.accounts: dict[str, Limit] = {}
        self.found: dict[bytes, Usage] = {}
        self.walks = 0
        self.fails = False
        self.uploads: dict[bytes, tuple[int, int]] = {}
        sources = Sources(self._buckets, self._configuration, self._accounts, self._usage, self._uploads)
        self.quotas = Quotas(sources, self.clock)

    async def _buckets(self) -> list[BucketRecord]:
        return [
            msgspec.structs.replace(each, configuration=b"x" if each.id in self.limits else b"") for each in (ONE, TWO)
        ]

    def _configuration(self, record: BucketRecord) -> Configuration:
        return NOTHING.having(QUOTA, self.limits.get(record.id))

    async def _accounts(self) -> AsyncIterator[tuple[str, Limit]]:
        for found in self.accounts.items():
            yield found

    async def _usage(self, record: BucketRecord, after: str) -> Usage:
        if self.fails:
            raise ServiceUnavailable
        self.walks += not after
        return self.found.get(record.id, Usage())

    async def _uploads(self, record: BucketRecord) -> tuple[int, int]:
        return self.uploads.get(record.id, (0, 0))


async def test_open_uploads_count_with_their_parts() -> None:
    cluster = Cluster()
    cluster.limits[ONE.id] = Quota(100, 3)
    cluster.found[ONE.id], cluster.uploads[ONE.id] = Usage(1, 1, 10), (1, 80)
    await cluster.quotas.look()
    with pytest.raises(QuotaExceeded):
        await cluster.quotas.admit(ONE, 11)
    cluster.uploads[ONE.id] = (2, 80)
    cluster.clock.advance(60)
    await cluster.quotas.look()
    with pytest.raises(QuotaExceeded):
        await cluster.quotas.admit(ONE, 1)
    await cluster.quotas.admit(ONE, 10, 0)


async def test_a_bucket_without_a_quota_is_never_counted_and_takes_everything() -> None:
    cluster = Cluster()
    await cluster.quotas.look()
    assert not cluster.quotas.watched
    assert not cluster.quotas.limits(ONE)
    await cluster.quotas.admit(ONE, 10**15)
    assert cluster.walks == 0


async def test_a_write_is_refused_that_would_exceed_the_bytes_or_the_objects_of_a_bucket() -> None:
    cluster = Cluster()
    cluster.limits[ONE.id] = Quota(100, 3)
    cluster.found[ONE.id] = Usage(1, 1, 60)
    await cluster.quotas.look()
    assert cluster.quotas.limits(ONE)
    assert not cluster.quotas.limits(TWO)
    with pytest.raises(QuotaExceeded):
        await cluster.quotas.admit(ONE, 41)
    await cluster.quotas.admit(ONE, 40)
    cluster.found[ONE.id] = Usage(2, 2, 100)
    with pytest.raises(QuotaExceeded):
        await cluster.quotas.admit(ONE, 1)
    with pytest.raises(QuotaExceeded):
        await cluster.quotas.admit(ONE, None)
    await cluster.quotas.admit(ONE, 0)
    cluster.found[ONE.id] = Usage(3, 3, 100)
    with pytest.raises(QuotaExceeded):
        await cluster.quotas.admit(ONE, 0)
    await cluster.quotas.admit(ONE, 0, 0)


async def test_overwrites_do_not_fill_a_quota_because_the_bucket_is_counted_again_before_a_refusal() -> None:
    cluster = Cluster()
    cluster.limits[ONE.id] = Quota(0, 2)
    cluster.found[ONE.id] = Usage(1, 1, 1)
    await cluster.quotas.look()
    for _ in range(20):
        await cluster.quotas.admit(ONE, 1)
    assert 1 < cluster.walks <= 21


async def test_a_large_bucket_is_not_walked_for_a_refusal_but_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.limits[ONE.id] = Quota(0, 1)
    monkeypatch.setattr(quotas, "SOON_S", 0.0)
    await cluster.quotas.look()
    await cluster.quotas.admit(ONE, 1)
    with pytest.raises(QuotaExceeded):
        await cluster.quotas.admit(ONE, 1)
    assert cluster.walks == 1
    cluster.clock.advance(quotas.COUNT_S)
    await cluster.quotas.look()
    await cluster.quotas.admit(ONE, 1)
    assert cluster.walks == 2


async def test_the_buckets_of_an_account_share_its_quota() -> None:
    cluster = Cluster()
    cluster.accounts["anne"] = Limit(100)
    cluster.found = {ONE.id: Usage(1, 1, 50), TWO.id: Usage(1, 1, 30)}
    await cluster.quotas.look()
    await cluster.quotas.admit(TWO, 20)
    cluster.found[TWO.id] = Usage(2, 2, 50)
    with pytest.raises(QuotaExceeded):
        await cluster.quotas.admit(ONE, 1)
    cluster.found[TWO.id] = Usage(1, 1, 30)
    cluster.clock.advance(quotas.SOON_S)
    await cluster.quotas.admit(ONE, 1)
    del cluster.accounts["anne"]
    await cluster.quotas.look()
    assert not cluster.quotas.watched


async def test_what_can_not_be_counted_now_keeps_its_last_count() -> None:
    cluster = Cluster()
    cluster.limits[ONE.id] = Quota(100)
    cluster.found[ONE.id] = Usage(1, 1, 100)
    await cluster.quotas.look()
    cluster.fails = True
    cluster.clock.advance(1000.0)
    await cluster.quotas.look()
    with pytest.raises(QuotaExceeded):
        await cluster.quotas.admit(ONE, 1)


@pytest.mark.parametrize("fails", [False, True])
async def test_many_writes_that_are_refused_at_once_walk_a_bucket_twice_at_most(fails: bool) -> None:
    cluster = Cluster()
    cluster.limits[ONE.id] = Quota(100)
    cluster.found[ONE.id] = Usage(1, 1, 100)
    await cluster.quotas.look()
    cluster.clock.advance(quotas.SOON_S)
    walks = 0

    async def usage(record: BucketRecord, after: str) -> Usage:
        nonlocal walks
        walks += 1
        await asyncio.sleep(0)
        cluster.clock.advance(0.5)
        if fails:
            raise ServiceUnavailable
        return cluster.found[record.id]

    cluster.quotas._sources = cluster.quotas._sources._replace(usage=usage)
    refused = await asyncio.gather(*(cluster.quotas.admit(ONE, 1) for _ in range(50)), return_exceptions=True)
    assert {type(each) for each in refused} == {QuotaExceeded}
    assert walks <= 2
