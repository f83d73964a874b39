"""What ``benches.loans`` reads is what it has written, and how it compares."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from benches import loans
from benches.loans import COUNTS, KINDS, SIZES, Burst, Reads, _cells
from benches.s3client import Target
from benches.servers import Server

TARGET = Target("http://127.0.0.1:1", "key", "secret", "eu-fr-1")


class Store:
    """Client and server in one: keeps whose data each key has."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], tuple[str, str]] = {}
        self.deleted: list[str] = []

    async def ask(self, method: str, bucket: str, key: str = "", body: bytes = b"") -> None:
        if method == "DELETE" and not key:
            assert not [at for at in self.found if at[0] == bucket]
            self.deleted.append(bucket)
        elif method == "DELETE":
            del self.found[bucket, key]
        elif key:
            assert body
            self.found[bucket, key] = bucket, key

    async def copy(self, source: str, bucket: str, key: str) -> None:
        where, _, name = source.partition("/")
        self.found[bucket, key] = self.found[where, name]


async def test_it_reads_each_kind_of_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()

    @contextlib.asynccontextmanager
    async def client_of(_target: Target) -> AsyncIterator[Store]:
        yield store

    monkeypatch.setattr(loans, "client_of", client_of)
    monkeypatch.setitem(SIZES, "16m", 1)
    reads = Reads(TARGET, Server("one", TARGET))
    await reads.write()
    assert store.deleted == ["left"]
    read = {
        (kind, size, n): reads.where(kind, size, n) for kind in KINDS for size in SIZES for n in range(COUNTS[size])
    }
    assert len(set(read.values())) == len(read) == len(store.found)
    for (kind, size, number), at in read.items():
        assert store.found[at] == ("left" if kind == KINDS[3] else "own", f"{size}-{number}")
        assert (store.found[at] == at) == (kind == KINDS[0])
        assert (at[0] == "own") == (kind in KINDS[:2])


def test_it_compares_bursts_of_one_round() -> None:
    base = [Burst(1.0, 10.0), Burst(2.0, 20.0), Burst(9.0, 90.0)]
    twice = [Burst(2 * burst.cpu_ms, burst.p50_ms / 2) for burst in base]
    cpu, p50 = _cells(twice, base)
    assert (cpu.split(), p50.split()) == (["CPU", "4.000", "ms", "(2.00)"], ["p50", "10.00", "ms", "(0.50)"])
