"""Disks that are blank, hung or failed: what the node remembers of them outside of them, and when they take part."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from storaged import config
from storaged.clock import SystemClock
from storaged.cluster.claims import DiskClaim, Ledgers
from storaged.cluster.ports import LedgerReport
from storaged.errors import DiskRolledBack, DiskUnusable, OperatorError
from storaged.meta.messages import Read
from storaged.meta.names import system_name
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.store_ports import StoreBatch
from storaged.node import ledger as node_ledger
from storaged.node import opener as node_opener
from storaged.node.admission import is_blank
from storaged.node.disks import Disks, Snapshot
from storaged.node.ledger import LEDGER_FILE, Ledger
from storaged.node.ledger_exchange import LoneLedger
from storaged.node.opener import Opener, Place, place_in
from tests.doubles.layouts import KnownLayouts
from tests.integration.test_node import storage_config
from tests.patience import GUARD_S
from tests.worlds.authority import until
from tests.worlds.layouts import first as first_layout
from tests.worlds.layouts import with_nodes


def opener(loaded: config.Config, others: OtherLedgers | None = None, **settings: Any) -> Opener:
    ledger = Ledger(Path(loaded.node.directory))
    found = Opener(loaded, SystemClock(), lambda *_: None, ledger, **settings)
    if others is not None:
        others.ledger = found.ledgers.ledger
        found.ledgers = others
    return found


class OtherLedgers(LoneLedger):
    """What two other nodes report, as a test sets it, and what reached them."""

    def __init__(self, **reports: LedgerReport | None) -> None:
        self.reports = {"n2": None, "n3": None, **reports}
        self.published: list[DiskClaim] = []
        self.takes = True
        self.news = asyncio.Event()

    def view(self) -> Ledgers:
        return Ledgers(self.ledger.whole, self.reports)

    async def changed(self) -> None:
        await self.news.wait()

    def tell(self, **reports: LedgerReport | None) -> None:
        self.reports.update(reports)
        self.news.set()
        self.news = asyncio.Event()

    async def publish(self, claim: DiskClaim) -> None:
        await super().publish(claim)
        while not self.takes:
            await self.changed()
        self.published.append(claim)


NEW = LedgerReport(b"2" * 16, False)
"""Of a node that has not begun, with a blank ledger."""
USED = LedgerReport(b"2" * 16, True, b"", True)


async def states(disks: Disks) -> list[str]:
    return [status.state for status in sorted(await disks.statuses(), key=lambda status: status.directory)]


async def reason_of(disks: Disks, directory: str) -> str:
    return next(status.reason for status in await disks.statuses() if status.directory.endswith(directory))


def ids(loaded: config.Config) -> tuple[str, str]:
    return loaded.disks[0].id, loaded.disks[1].id


# --- the ledger


def claim_of(disk: str, store: bytes = b"s" * 16, starts: int = 1, position: int = 0) -> DiskClaim:
    return DiskClaim(disk, store, starts, position)


def test_the_ledger_remembers_stores_positions_failures_and_who_was_there(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert (ledger.formed, ledger.recorded("d1"), ledger.knows("d1"), ledger.node("n2")) == (False, None, False, b"")
    assert (ledger.whole, ledger.fresh) == (False, True), "it may replace one that was lost"
    ledger.form({"n2": b"\2" * 16}, ["d1", "d2"])
    ledger.record(claim_of("d1", starts=3, position=7))
    assert ledger.note_positions({"d1": 9, "d2": 4, "d7": 1})
    assert not ledger.note_positions({"d1": 8})
    assert Ledger(tmp_path).recorded("d1") == claim_of("d1", starts=3, position=7), "positions alone wait for a flush"
    ledger.flush()
    ledger.note_failed("d2", "meta", "EIO")
    ledger.count_again(fresh=False)
    again = Ledger(tmp_path)
    assert (again.id, again.formed, again.node("n2")) == (ledger.id, True, b"\2" * 16)
    assert (again.whole, again.fresh) == (True, False)
    assert again.recorded("d1") == claim_of("d1", starts=3, position=9)
    assert (again.recorded("d2"), again.knows("d2"), again.knows("d3")) == (None, True, False)
    assert (again.failure("d2", "meta"), again.failure("d2", "fragments"), again.failure("d3", "meta")) == (
        "EIO",
        "",
        "",
    )


def test_a_ledger_of_before_is_that_of_a_node_that_took_part(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_text(json.dumps({"d1": "01" * 24}))
    ledger = Ledger(tmp_path)
    starts = int.from_bytes(b"\1" * 8, "big")
    assert (ledger.formed, ledger.whole, ledger.recorded("d1")) == (True, True, claim_of("d1", b"\1" * 16, starts))
    ledger.record(claim_of("d1", b"\1" * 16, starts + 1))
    assert Ledger(tmp_path).recorded("d1") == claim_of("d1", b"\1" * 16, starts + 1)
    assert Ledger(tmp_path).id == ledger.id


@pytest.mark.parametrize("formed", [True, False])
def test_a_ledger_of_version_2_counts_if_its_node_took_part(tmp_path: Path, formed: bool) -> None:
    disks = {"d1": {"store": "02" * 24, "failed": {"fragments": "EIO"}}} if formed else {}
    before = {"version": 2, "ledger": "07" * 16, "formed": formed, "nodes": {"n2": "02" * 16}, "disks": disks}
    (tmp_path / LEDGER_FILE).write_text(json.dumps(before))
    ledger = Ledger(tmp_path)
    assert (ledger.formed, ledger.whole, ledger.fresh, ledger.id) == (formed, formed, not formed, b"\7" * 16)
    if formed:
        assert ledger.claimed("d1").only == claim_of("d1", b"\2" * 16, int.from_bytes(b"\2" * 8, "big"))
        assert ledger.failure("d1", "fragments") == "EIO"
    ledger.flush()
    ledger.form({}, [])
    assert json.loads((tmp_path / LEDGER_FILE).read_text())["version"] == 3


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"version": 4}', '{"version": 2}', '{"d1": 7}', '{"version": 3}']
    + [
        '{"version": 3, "ledger": "", "formed": true, "nodes": {}, "disks": {}, "statements": ["' + text + '"]}'
        for text in ("?", "AAAA", "k8QAxADEAA==")
    ],
)
def test_a_ledger_that_cannot_be_read_is_no_new_ledger(tmp_path: Path, content: str) -> None:
    (tmp_path / LEDGER_FILE).write_text(content)
    with pytest.raises(OperatorError, match=LEDGER_FILE):
        Ledger(tmp_path)
    assert (tmp_path / LEDGER_FILE).read_text() == content


# --- blank ones


async def test_blank_disks_of_a_new_node_wait_for_the_others_and_then_join(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    others = OtherLedgers(n3=NEW)
    opening = opener(loaded, others)
    disks = await opening.open()
    assert await states(disks) == ["waiting", "waiting"]
    assert "no answer yet from n2" in await reason_of(disks, "d1")
    assert "no answer yet from n2" in disks.waits()
    assert not (tmp_path / "d1").exists(), "nothing is made before it may"
    others.tell(n2=NEW)
    await until(lambda: opening.ledger.whole)
    assert await states(disks) == ["waiting", "waiting"], "one ledger of three counts"
    others.tell(n2=LedgerReport(b"2" * 16, False, b"", True))
    await until(lambda: len(disks.used) == 2)
    assert set(disks.replicas) == set(disks.fragments) == set(disks.metas) == set(ids(loaded))
    assert (opening.ledger.formed, opening.ledger.node("n2")) == (True, b"2" * 16)
    assert sorted(claim.disk for claim in others.published) == sorted(ids(loaded))
    await opening.close()
    again = await opener(loaded, OtherLedgers(n2=USED)).open()
    assert await states(again) == ["ok", "ok"]
    await again.close()


async def test_a_server_built_anew_answers_nothing_and_no_one_can_let_it(tmp_path: Path) -> None:
    """The node was rebuilt from its issued folder: its ledger and its disks are gone."""
    loaded = storage_config(tmp_path)
    (tmp_path / ("accept-blank-" + ids(loaded)[0])).write_text(json.dumps({"disk": ids(loaded)[0], "uid": 0}))
    disks = await opener(loaded, OtherLedgers(n2=USED, n3=USED)).open()
    assert await states(disks) == ["blank", "blank"]
    assert "formed without these disks" in await reason_of(disks, "d1")
    assert disks.waits() == ""
    await disks.close()
    assert not (tmp_path / "d1").exists()


async def test_a_disk_that_was_emptied_is_left_out(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    await (await opener(loaded).open()).close()
    shutil.rmtree(tmp_path / "d1")
    disks = await opener(loaded).open()
    assert await states(disks) == ["blank", "ok"]
    assert "DISK_BLANK" in await reason_of(disks, "d1")
    await disks.close()


async def test_disks_say_that_the_directory_of_the_node_is_full_and_not_they(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = storage_config(tmp_path)
    await (await opener(loaded).open()).close()

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    found = opener(loaded)
    with monkeypatch.context() as patch:
        patch.setattr(node_ledger, "replace_file", full)
        disks = await found.open()
        assert await states(disks) == ["failed", "failed"]
        file = Path(loaded.node.directory) / LEDGER_FILE
        assert await reason_of(disks, "d1") == f"the ledger can't be written: No space left on device: {file}"
        assert found.ledger.problem == await reason_of(disks, "d1")
        await disks.close()
    found.ledger.flush()
    assert found.ledger.problem == "", "there is room again"
    disks = await opener(loaded).open()
    assert await states(disks) == ["ok", "ok"]
    await disks.close()


async def test_a_disk_without_an_entry_waits_until_the_other_disks_of_its_new_node_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = storage_config(tmp_path)
    answers = threading.Event()
    monkeypatch.setattr(node_opener, "is_blank", lambda directory: directory.name == "d2" or answers.wait())
    monkeypatch.setattr(node_opener, "LOOK_AGAIN_S", 0.05)
    opening = opener(loaded, open_s=1.0)
    disks = await opening.open()
    assert opening.formed() is None
    assert await states(disks) == ["hung", "waiting"]
    answers.set()
    await until(lambda: len(disks.used) == 2)
    await disks.close()


# --- without a ledger


async def test_a_node_that_lost_its_ledger_waits_for_the_others_and_goes_on_with_its_disks(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    first = opener(loaded)
    disks = await first.open()
    claims = [first.ledger.recorded(disk) for disk in ids(loaded)]
    await first.close()
    (tmp_path / LEDGER_FILE).unlink()
    others = OtherLedgers(n2=USED)
    opening = opener(loaded, others)
    disks = await opening.open()
    assert await states(disks) == ["waiting", "waiting"]
    assert "the ledger of this node is blank" in await reason_of(disks, "d1")
    for claim in claims:  # as the exchange does with what the others have
        assert claim is not None
        opening.ledger._book._known[claim.disk] = {claim.store: claim}
    others.tell(n3=USED)
    await until(lambda: len(disks.used) == 2)
    assert {claim.starts for claim in others.published} == {2}
    await disks.close()


async def test_stores_begin_without_any_ledger_only_when_all_were_lost(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    await (await opener(loaded).open()).close()
    shutil.rmtree(tmp_path / "d2")
    knew = LedgerReport(b"3" * 16, True, b"an earlier ledger", True)
    for reports, expected in (
        ({"n2": NEW, "n3": None}, ["waiting", "waiting"]),
        ({"n2": USED, "n3": knew}, ["foreign", "blank"]),
        ({"n2": USED, "n3": USED}, ["ok", "blank"]),
    ):
        (tmp_path / LEDGER_FILE).unlink()
        disks = await opener(loaded, OtherLedgers(**reports)).open()
        assert await states(disks) == expected
        await disks.close()
    (tmp_path / LEDGER_FILE).unlink()
    disks = await opener(loaded).open()
    assert await states(disks) == ["ok", "blank"], "the only node of a cluster"
    await disks.close()


# --- others, and older ones


async def test_two_disks_that_were_swapped_are_both_left_out_and_named(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    await (await opener(loaded, cluster="c1").open()).close()
    for before, after in (("d1", "aside"), ("d2", "d1"), ("aside", "d2")):
        (tmp_path / before).rename(tmp_path / after)
    disks = await opener(loaded, cluster="c1").open()
    assert await states(disks) == ["foreign", "foreign"]
    await disks.close()
    (tmp_path / LEDGER_FILE).unlink()
    disks = await opener(loaded, cluster="c1").open()
    assert await states(disks) == ["foreign", "foreign"], "also where no ledger knows them: the stores know"
    assert f"is that of disk '{ids(loaded)[1]}' of cluster 'c1'" in await reason_of(disks, "d1")
    await disks.close()


async def test_a_disk_of_another_cluster_is_left_out(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    await (await opener(loaded, cluster="c1").open()).close()
    (tmp_path / LEDGER_FILE).unlink()
    disks = await opener(loaded, cluster="c2").open()
    assert await states(disks) == ["foreign", "foreign"]
    assert "of cluster 'c1'" in await reason_of(disks, "d1")
    await disks.close()


async def test_a_store_of_before_gets_its_owner_at_its_next_start(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    await (await opener(loaded).open()).close()
    await (await opener(loaded, cluster="c1").open()).close()
    disks = await opener(loaded, cluster="c2").open()
    assert await states(disks) == ["foreign", "foreign"]
    await disks.close()


@pytest.mark.parametrize("kind", ["an earlier start", "the same start"])
async def test_a_snapshot_of_a_disk_is_refused_and_not_touched(tmp_path: Path, kind: str) -> None:
    loaded = storage_config(tmp_path)
    opening = opener(loaded)
    disks = await opening.open()
    meta = disks.metas[ids(loaded)[0]]
    await meta.commit(StoreBatch(meta={"x": b"old"}))
    if kind == "an earlier start":
        await opening.close()
    shutil.copytree(tmp_path / "d1", tmp_path / "snapshot")
    if kind == "an earlier start":
        opening = opener(loaded)
        disks = await opening.open()
    else:
        await meta.commit(StoreBatch(meta={"x": b"acknowledged later"}))
    await opening.close()
    shutil.rmtree(tmp_path / "d1")
    shutil.copytree(tmp_path / "snapshot", tmp_path / "d1")
    for _ in range(2):
        disks = await opener(loaded).open()
        assert await states(disks) == ["rolled-back", "ok"]
        assert "put back to an older state" in await reason_of(disks, "d1")
        await disks.close()


async def test_a_disk_with_a_damaged_redo_log_is_called_damaged_and_not_foreign(tmp_path: Path) -> None:
    """To look for a disk that was swapped would be of no use."""
    loaded = storage_config(tmp_path)
    opening = opener(loaded)
    disks = await opening.open()
    await disks.metas[ids(loaded)[0]].commit(StoreBatch(meta={"x": b"y"}))
    await opening.close()
    log = tmp_path / "d1" / "meta" / "redo"
    log.write_bytes(b"\0" * 100 + log.read_bytes()[100:])
    for _ in range(2):
        disks = await opener(loaded).open()
        assert await states(disks) == ["damaged", "ok"]
        assert "does not begin as a redo log" in await reason_of(disks, "d1")
        await disks.close()


async def test_a_disk_whose_start_does_not_reach_a_majority_answers_nothing_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_opener, "CLAIM_S", 0.1)
    loaded = storage_config(tmp_path)
    await (await opener(loaded).open()).close()
    others = OtherLedgers(n2=USED, n3=USED)
    others.takes = False
    disks = await opener(loaded, others).open()
    assert await states(disks) == ["waiting", "waiting"]
    assert disks.replicas == {}
    others.takes = True
    others.tell()
    await until(lambda: len(disks.used) == 2)
    await disks.close()


async def test_a_disk_in_use_that_turns_out_to_be_older_falls_silent(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    opening = opener(loaded)
    disks = await opening.open()
    opening.on_outdated(ids(loaded)[0], DiskRolledBack("the ledgers know start 9"))
    assert await states(disks) == ["rolled-back", "ok"]
    with pytest.raises(DiskUnusable, match="the ledgers know start 9"):
        await disks.replicas[ids(loaded)[0]].read(Read(ids(loaded)[0], system_name("x"), 1))
    await opening.close()


# --- hung ones


async def test_a_disk_that_hangs_while_it_is_opened_is_named_and_joins_when_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = storage_config(tmp_path)
    await (await opener(loaded).open()).close()
    answers, asked = threading.Event(), threading.Event()
    plain = LmdbMetaStore.open_or_refuse

    def hangs(directory: Path, *given: Any, **more: Any) -> LmdbMetaStore:
        if directory.parent.name == "d1":
            asked.set()
            answers.wait()
        return plain(directory, *given, **more)

    monkeypatch.setattr(LmdbMetaStore, "open_or_refuse", hangs)
    disks = await opener(loaded, open_s=2.0).open()
    assert asked.is_set()
    assert await states(disks) == ["hung", "ok"]
    assert set(disks.replicas) == {ids(loaded)[1]}
    walked = iter(Snapshot(disks.metas).items())
    next(walked)
    answers.set()
    await until(lambda: len(disks.used) == 2)
    assert await states(disks) == ["ok", "ok"]
    assert list(walked) == [], "who walks through the disks is not disturbed by one that joins"
    await disks.close()


async def test_a_node_stops_although_a_disk_still_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = storage_config(tmp_path)
    answers = threading.Event()
    monkeypatch.setattr(node_opener, "is_blank", lambda directory: directory.name == "d1" and answers.wait())
    disks = await opener(loaded, open_s=0.1).open()
    assert (await states(disks))[0] == "hung"
    await asyncio.wait_for(disks.close(), GUARD_S)
    answers.set()


# --- failed ones


async def test_a_metadata_store_that_failed_is_refused_also_where_the_disk_could_not_note_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = storage_config(tmp_path)
    disks = await opener(loaded).open()
    disk = disks.used[ids(loaded)[0]]

    def refuses(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("storaged.meta.storage.state.replace_file", refuses)
    await asyncio.to_thread(disk.meta._state.fail, OSError(5, "Input/output error"))
    assert not (tmp_path / "d1" / "meta" / "failed").exists()
    with pytest.raises(DiskUnusable):
        await disk.meta.commit(StoreBatch(meta={"x": b"y"}))
    await disks.close()
    monkeypatch.undo()
    again = await opener(loaded).open()
    assert await states(again) == ["foreign", "ok"]
    assert "failed before, as was noted" in await reason_of(again, "d1")
    await again.close()


async def test_the_markers_of_failed_stores_are_synced_with_their_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = storage_config(tmp_path)
    disks = await opener(loaded).open()
    disk = disks.used[ids(loaded)[0]]
    synced: list[str] = []
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    await asyncio.to_thread(disk.meta._state.fail, OSError(5, "Input/output error"))
    await asyncio.to_thread(disk.fragments._engine.state.fail, "Input/output error")
    monkeypatch.undo()
    for name, directory in (("failed", "meta"), ("FAILED", "fragments"), (LEDGER_FILE, "")):
        place = tmp_path / "d1" / directory if directory else tmp_path
        assert str(place / (name + ".new")) in synced, "the bytes, before they have the name"
        assert str(place) in synced, "the name"
    await disks.close()


async def test_a_fragment_store_that_failed_takes_nothing_also_where_the_disk_could_not_note_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = storage_config(tmp_path)
    disks = await opener(loaded).open()

    def refuses(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("storaged.fragments.files.replace_file", refuses)
    engine = disks.used[ids(loaded)[0]].fragments._engine
    await asyncio.to_thread(engine.state.fail, "fdatasync of segment 1: Input/output error")
    assert engine.state.failure_noted, "a start will know of it"
    await disks.close()
    monkeypatch.undo()
    again = await opener(loaded).open()
    assert await states(again) == ["read-only", "ok"]
    assert "fdatasync" in await reason_of(again, "d1")
    await again.close()


async def test_a_disk_of_a_new_node_that_is_slower_than_the_other_holds_up_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the faster one waits, and is not in use yet when the node is open."""
    loaded = storage_config(tmp_path)
    looked = threading.Event()

    def slow(directory: Path) -> bool:
        if directory.name == "d1":
            looked.set()
        else:
            looked.wait(GUARD_S)
            time.sleep(0.1)
        return is_blank(directory)

    monkeypatch.setattr("storaged.node.opener.is_blank", slow)
    disks = await opener(loaded).open()
    assert set(disks.used) == set(ids(loaded))
    await disks.close()


# --- disks that a layout adds


async def test_a_disk_that_is_lost_for_good_is_refused_and_falls_silent_when_it_is_in_use(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    one, other = ids(loaded)
    places = {one: Place(False, joins=False, lost=True), other: Place(True, joins=False)}
    found = opener(loaded, place_of=places.__getitem__)
    disks = await found.open()
    assert await states(disks) == ["lost", "ok"]
    assert "explain DISK_LOST" in await reason_of(disks, "d1")
    places[other] = Place(False, joins=False, lost=True)
    for _ in range(2):
        found.follow()
    assert await states(disks) == ["lost", "lost"]
    assert disks.used[other].replica.statistics().state != "ok"
    await found.close()


async def test_a_disk_that_a_layout_adds_joins_without_all_nodes_once_and_never_again_blank(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    old, new = ids(loaded)
    places = {old: Place(True, joins=False), new: Place(False, joins=False)}
    others = OtherLedgers(n2=USED, n3=None)
    first = opener(loaded, others, place_of=places.__getitem__, open_s=GUARD_S)
    first.ledger.form({"n2": b"2" * 16, "n3": b"3" * 16}, [old])
    first.ledger.count_again(fresh=False)
    disks = await first.open()
    assert await states(disks) == ["ok", "waiting"]
    assert "no layout in force gives it to this node yet" in await reason_of(disks, "d2")
    places[new] = Place(True, joins=True)
    others.tell()
    await until(lambda: set(disks.used) == {old, new})
    assert {claim.disk for claim in others.published} == {old, new}
    assert first.ledger.node("n3") == b"3" * 16, "it remembers the ledgers that were there when it was formed"
    await first.close()
    shutil.rmtree(tmp_path / "d2")
    others = OtherLedgers(n2=USED, n3=USED)
    second = opener(loaded, others, place_of=places.__getitem__)
    disks = await second.open()
    assert await states(disks) == ["ok", "blank"], "it took part, and has forgotten what it promised"
    await second.close()


async def test_a_disk_that_a_layout_adds_waits_for_a_majority_of_the_ledgers(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    others = OtherLedgers()
    found = opener(loaded, others, place_of=lambda _disk: Place(True, joins=True), open_s=GUARD_S)
    disks = await found.open()
    assert await states(disks) == ["waiting", "waiting"]
    others.tell(n2=USED)
    await asyncio.sleep(0)
    assert not disks.used, "its own ledger is blank, and one of two others is not enough to rebuild it"
    others.tell(n3=USED)
    await until(lambda: len(disks.used) == 2)
    assert found.ledger.node("n2") == USED.id, "a new node remembers the others"
    await found.close()


async def test_a_disk_that_a_layout_adds_with_a_store_of_its_own_is_foreign(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    first = opener(loaded)
    await first.open()
    await first.close()
    (tmp_path / LEDGER_FILE).unlink()
    second = opener(loaded, OtherLedgers(n2=USED, n3=USED), place_of=lambda _disk: Place(True, joins=True))
    second.ledger.count_again(fresh=False)
    assert await states(await second.open()) == ["foreign", "foreign"]
    await second.close()


def test_what_a_layout_says_of_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    before = first_layout()
    layouts = KnownLayouts(before)
    assert place_in(layouts, "n1", "d1a") == Place(True, joins=False)
    assert place_in(layouts, "n2", "d1a") == place_in(layouts, "n4", "d4a") == Place(False, joins=False)
    layouts.learn(replace(with_nodes(before, "n4"), epoch=100, base=1))
    assert place_in(layouts, "n1", "d1a") == Place(True, joins=False)
    assert place_in(layouts, "n4", "d4a") == Place(True, joins=True)
    layouts.learn(replace(with_nodes(before, "n4"), epoch=200, base=1))
    assert place_in(layouts, "n4", "d4a") == Place(True, joins=True)
    unknown = KnownLayouts(replace(with_nodes(before, "n4"), epoch=200, base=1))
    assert place_in(unknown, "n4", "d4a") == Place(True, joins=False), "what was placed first is not known"


def test_the_ledger_follows_the_layouts_that_its_node_used(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.goes_by(b"one")
    assert not ledger.goes_by(b"two")
    assert ledger.goes_by(b"two", {b"one"})
    assert not Ledger(tmp_path).goes_by(b"one"), "the files of layouts were put back"
    ledger.move_to(b"three")
    assert Ledger(tmp_path).goes_by(b"three")
    assert not ledger.goes_by(b"two", {b"one", b"two"})


def test_a_disk_of_before_the_recovery_does_not_begin_blank(tmp_path: Path) -> None:
    """Its claims may be lost with the ledgers of the lost nodes."""
    before = with_nodes(first_layout(), "n4", "n5")
    layouts = KnownLayouts(first_layout())
    layouts.learn(replace(before, epoch=100, base=1))
    assert place_in(layouts, "n4", "d4a") == Place(True, joins=True)
    after = with_nodes(before, "n6")
    layouts.learn(replace(after, epoch=200, base=1, lost=("d1a",), seeds_recovered=200))
    assert place_in(layouts, "n4", "d4a") == Place(True, joins=False)
    assert place_in(layouts, "n6", "d6a") == Place(True, joins=True)
    assert place_in(layouts, "n1", "d1a").lost
    layouts.learn(replace(with_nodes(after, "n7"), epoch=300, base=1, seeds_recovered=200))
    assert place_in(layouts, "n6", "d6a") == place_in(layouts, "n7", "d7a") == Place(True, joins=True)
