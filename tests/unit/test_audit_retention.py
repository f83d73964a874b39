"""Old files of an audit log go after six months at least, each with an entry; the verifier tells that from a file that
somebody removed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from storaged.cluster.audit.format import Entry, parse_line
from storaged.cluster.audit.retention import prune
from storaged.cluster.audit.verify import DAY_MS
from storaged.config import KEEP_DAYS_MIN
from tests.worlds.witness import Witnessed


@pytest.fixture
def rig(tmp_path: Path) -> Witnessed:
    return Witnessed(tmp_path)


def entries(rig: Witnessed, kind: str) -> list[Entry]:
    found = [parse_line(line) for path in rig.files() for line in path.read_bytes().splitlines()]
    return [entry for entry in found if entry.kind == kind]


async def test_files_go_when_their_last_entry_is_old_enough_oldest_first_and_with_an_entry(rig: Witnessed) -> None:
    await rig.life(40, file_bytes_max=3000)
    old = rig.files()
    rig.clock.now_ms += 100 * DAY_MS
    await rig.life(2)
    rig.clock.now_ms += 100 * DAY_MS
    await rig.start()
    assert await prune(rig.log, rig.clock, 190) == len(old)
    assert await prune(rig.log, rig.clock, 190) == 0
    await rig.stop()
    assert not any(path.exists() for path in old)
    pruned = entries(rig, "audit.pruned")
    assert [(entry.target, entry.outcome) for entry in pruned] == [
        (f"file:{path.name}", outcome) for path in old for outcome in ("intent", "done")
    ]
    report = rig.verify()
    assert report.problems == ()
    assert report.compared
    assert report.begins_after == f"entry {pruned[-2].fields['last']} of chain {1:016x}"


async def test_a_chain_that_is_half_removed_is_whole_from_there_on(rig: Witnessed) -> None:
    await rig.start(file_bytes_max=3000)
    await rig.client.publish()
    await rig.write(20)
    rig.clock.now_ms += 100 * DAY_MS
    await rig.write(20)
    await rig.stop()
    rig.clock.now_ms += 100 * DAY_MS
    await rig.start()
    removed = await prune(rig.log, rig.clock, 190)
    await rig.stop()
    assert 0 < removed < 20
    assert rig.verify().problems == ()


async def test_what_is_written_now_is_never_removed_nor_what_comes_after_a_damaged_file(rig: Witnessed) -> None:
    await rig.life(40, file_bytes_max=3000)
    second = rig.files()[1]
    data = second.read_bytes()
    second.write_bytes(data.replace(b"key.release", b"key.refused", 1))
    rig.clock.now_ms += 400 * DAY_MS
    await rig.start()
    count = len(rig.files())
    assert await prune(rig.log, rig.clock, 190) == 1
    second.write_bytes(data)
    rig.clock.now_ms += 400 * DAY_MS
    assert await prune(rig.log, rig.clock, 190) == count - 2
    assert [path.name.split("-")[2] for path in rig.files()] == [rig.log.head.chain]
    await rig.stop()


async def test_a_file_that_somebody_removed_is_missing_whatever_was_pruned_before(rig: Witnessed) -> None:
    for _ in range(3):
        await rig.life(2)
        rig.clock.now_ms += 100 * DAY_MS
    await rig.start()
    assert await prune(rig.log, rig.clock, 190) == 2
    await rig.stop()
    assert rig.verify().problems == ()
    rig.files()[0].unlink()
    assert "the oldest files are missing" in str(rig.verify().problems)


@pytest.mark.parametrize("lives", [1, 2])
async def test_a_file_removed_too_early_is_named_although_an_entry_says_so(rig: Witnessed, lives: int) -> None:
    """Who owns the node can write such an entry for what was done yesterday."""
    for _ in range(lives):
        await rig.life(40, file_bytes_max=3000)
    rig.clock.now_ms += 3 * DAY_MS
    await rig.start()
    assert await prune(rig.log, rig.clock, 1) > 0
    await rig.stop()
    reasons = str(rig.verify().problems)
    assert f"of chain {1:016x} was removed when it was 3 days old, not {KEEP_DAYS_MIN}, by the word of n1" in reasons


async def test_a_witness_that_came_late_does_not_call_it_too_early(rig: Witnessed) -> None:
    await rig.life(40, file_bytes_max=3000)
    rig.clock.now_ms += 185 * DAY_MS
    rig.books["n4"] = rig.open_book("n4")
    await rig.life(1)
    rig.clock.now_ms += 10 * DAY_MS
    await rig.start()
    assert await prune(rig.log, rig.clock, 190) > 1
    await rig.stop()
    assert rig.verify().problems == ()
