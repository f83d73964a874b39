"""What ``benches.many`` sends is what the server takes."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from benches import many
from benches.many import PAGE_VERSIONS, VERSIONED, Client, Costs, disk_bytes, fill, full_pages, rule
from benches.many import lifecycle as measure_lifecycle
from benches.s3client import Connection, Target, WrongAnswer
from benches.servers import Server
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


TARGET = Target("http://127.0.0.1:1", "key", "secret", "eu-fr-1")


def test_it_tells_files_by_what_they_are_for(tmp_path: Path) -> None:
    names = {
        "segments": "disk1/segments/0000000001.seg",
        "index": "disk1/index/data.mdb",
        "rows": "disk1/meta/data.mdb",
        "fixed": "disk1/meta/redo",
        "other": "state/audit",
    }
    for count, name in enumerate(names.values(), 1):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 65_536 * count)
    found = disk_bytes(tmp_path)
    assert list(found) == list(names)
    assert list(found.values()) == sorted(set(found.values()))  # each has its own file, and these grow
    assert found["segments"] >= 65_536


async def test_it_ends_before_the_file_system_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    costs = Costs(Server("one", TARGET, folder=tmp_path))
    costs.check_free()
    monkeypatch.setattr(many, "FREE_BYTES_MIN", 10**18)
    with pytest.raises(SystemExit, match="GB are free"):
        costs.check_free()


class Answers:
    """A connection that gives these refusals first, the last one first."""

    def __init__(self, *refusals: str) -> None:
        self._refusals = list(refusals)
        self.asked = 0

    async def request(self, head: bytes, *, head_only: bool = False) -> bytes:
        self.asked += 1
        if self._refusals:
            raise WrongAnswer(self._refusals.pop())
        return b"done"

    def close(self) -> None:
        pass


async def test_it_asks_again_when_the_server_has_too_much_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "TRY_AGAIN_S", 0.0)
    monkeypatch.setattr(Client, "refused", 0)
    answers = Answers("status 503: slow", "status 503: slow")
    assert await Client(cast(Connection, answers), TARGET).ask("PUT", "bucket") == b"done"
    assert (answers.asked, Client.refused) == (3, 2)
    with pytest.raises(WrongAnswer):
        await Client(cast(Connection, Answers("status 500: no")), TARGET).ask("PUT", "bucket")
    with pytest.raises(SystemExit):
        await Client(cast(Connection, Answers(*["status 503: slow"] * 20)), TARGET).ask("PUT", "bucket")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Those of every client's connection."""
    found = Answers()

    async def of(target: Target) -> Client:
        return Client(cast(Connection, found), target)

    monkeypatch.setattr(Client, "of", of)
    return found


async def test_it_stops_to_fill_when_its_time_is_over(answers: Answers, tmp_path: Path) -> None:
    costs, late = (Costs(Server("one", TARGET, folder=tmp_path), fill_s) for fill_s in (3600.0, 0.0))
    costs.begin_fill()
    late.begin_fill()
    assert await fill(TARGET, costs, range(100), 8) == answers.asked == 100
    assert await fill(TARGET, late, range(100), 8) == 0
    assert await fill(TARGET, late, range(100), 8, even_late=True) == 100


@pytest.mark.parametrize(("fill_s", "filled"), [(100.0, [2, 20, 200]), (0.0, [])])
async def test_objects_are_filled_in_although_versions_have_used_their_time(
    answers: Answers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fill_s: float, filled: list[int]
) -> None:
    now = 0.0
    monkeypatch.setattr(many, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter))
    costs = Costs(Server("one", TARGET, folder=tmp_path), fill_s)
    costs.begin_fill()
    now = 150.0
    assert costs.late
    await measure_lifecycle(TARGET, costs, 200, 8, lambda: {"walked_ms": 1, "expired": 200})
    assert [row["size"] for row in costs.rows if row["what"] == "PUT without rules"] == filled
    assert costs.rows[-1]["what"] == "due object, with its walk"
