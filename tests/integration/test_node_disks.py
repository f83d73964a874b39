"""Disks that are blank, hung or failed: what the node remembers of them outside of them, and when they take part."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storaged import config
from storaged.cli import accept
from storaged.clock import SystemClock
from storaged.errors import DiskUnusable, OperatorError
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.store_ports import StoreBatch
from storaged.node import disks as node_disks
from storaged.node.admission import ACCEPTANCE, admission, take_acceptance, write_acceptance
from storaged.node.disks import Disks, Opener, OpenerPorts
from storaged.node.forming import Answers, Verdict
from storaged.node.ledger import LEDGER_FILE, Ledger
from tests.integration.test_node import storage_config
from tests.patience import GUARD_S
from tests.worlds.authority import until

WAIT = Answers(Verdict(False, "the cluster has been formed"))


def opener(loaded: config.Config, forming: Callable[[], Answers] | None = None, **more: Any) -> Opener:
    settings = {name: more.pop(name) for name in list(more) if name == "open_s"}
    if forming is not None:
        more["forming"] = forming
    ledger = Ledger(Path(loaded.node.directory))
    return Opener(loaded, SystemClock(), lambda *_: None, ledger, OpenerPorts(**more), **settings)


async def states(disks: Disks) -> list[str]:
    return [status.state for status in sorted(await disks.statuses(), key=lambda status: status.directory)]


async def reason_of(disks: Disks, directory: str) -> str:
    return next(status.reason for status in await disks.statuses() if status.directory.endswith(directory))


def ids(loaded: config.Config) -> tuple[str, str]:
    return loaded.disks[0].id, loaded.disks[1].id


# --- the ledger


def test_the_ledger_remembers_stores_failures_and_who_was_there(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert (ledger.formed, ledger.identity("d1"), ledger.knows("d1"), ledger.node("n2")) == (False, None, False, b"")
    ledger.form({"n2": b"\2" * 16}, ["d1", "d2"])
    ledger.record("d1", b"\1" * 24)
    ledger.note_failed("d1", "meta", "EIO")
    again = Ledger(tmp_path)
    assert (again.id, again.formed, again.node("n2")) == (ledger.id, True, b"\2" * 16)
    assert (again.identity("d1"), again.identity("d2"), again.knows("d2"), again.knows("d3")) == (
        b"\1" * 24,
        None,
        True,
        False,
    )
    assert (again.failure("d1", "meta"), again.failure("d1", "fragments"), again.failure("d3", "meta")) == (
        "EIO",
        "",
        "",
    )
    again.accept("d1")
    assert (Ledger(tmp_path).identity("d1"), Ledger(tmp_path).failure("d1", "meta")) == (None, "")


def test_a_ledger_of_before_is_that_of_a_node_that_took_part(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_text(json.dumps({"d1": "01" * 24}))
    ledger = Ledger(tmp_path)
    assert (ledger.formed, ledger.identity("d1"), ledger.knows("d2")) == (True, b"\1" * 24, False)
    ledger.record("d1", b"\2" * 24)
    assert (Ledger(tmp_path).identity("d1"), Ledger(tmp_path).id) == (b"\2" * 24, ledger.id)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 3}', '{"version": 2}', '{"d1": 7}'])
def test_a_ledger_that_cannot_be_read_is_no_new_ledger(tmp_path: Path, content: str) -> None:
    (tmp_path / LEDGER_FILE).write_text(content)
    with pytest.raises(OperatorError, match=LEDGER_FILE):
        Ledger(tmp_path)
    assert (tmp_path / LEDGER_FILE).read_text() == content


# --- blank ones


async def test_blank_disks_of_a_new_node_wait_for_the_others_and_then_join(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    answer = [Answers(Verdict(False, "no answer yet from n2"))]
    opening = opener(loaded, lambda: answer[0])
    disks = await opening.open()
    assert await states(disks) == ["blank", "blank"]
    assert "no answer yet from n2" in await reason_of(disks, "d1")
    assert not (tmp_path / "d1").exists(), "nothing is made before it may"
    answer[0] = Answers(Verdict(True), {"n2": b"2" * 16})
    await until(lambda: len(disks.used) == 2)
    assert set(disks.replicas) == set(disks.fragments) == set(disks.metas) == set(ids(loaded))
    assert (opening.ledger.formed, opening.ledger.node("n2")) == (True, b"2" * 16)
    await disks.close()
    again = await opener(loaded, lambda: WAIT).open()
    assert await states(again) == ["ok", "ok"]
    await again.close()


async def test_a_server_built_anew_answers_nothing_until_an_operator_accepts_its_disk(tmp_path: Path) -> None:
    """The node was rebuilt from its issued folder: its ledger and its disks are gone."""
    loaded = storage_config(tmp_path)
    heard: list[tuple[str, int]] = []
    disks = await opener(
        loaded, lambda: WAIT, epoch=lambda: 3, on_accepted=lambda disk, _place, uid: heard.append((disk, uid))
    ).open()
    assert await states(disks) == ["blank", "blank"]
    assert "accept" not in "".join(os.listdir(tmp_path))
    accept.accept_blank.main([str(tmp_path / "config.toml"), ids(loaded)[0]], standalone_mode=False)
    await until(lambda: len(disks.used) == 1)
    assert await states(disks) == ["ok", "blank"]
    assert heard == [(ids(loaded)[0], os.getuid())]
    assert not (tmp_path / (ACCEPTANCE + ids(loaded)[0])).exists(), "the word is used up"
    floor = disks.replicas[ids(loaded)[0]].state.floor
    assert floor.epoch == 3
    assert floor.counter > 0, "what the disk promised in its earlier life lies below"
    await disks.close()
    shutil.rmtree(tmp_path / "d1")
    again = await opener(loaded, lambda: WAIT).open()
    assert await states(again) == ["foreign", "blank"], "once is once"
    await again.close()


async def test_a_store_without_a_ledger_waits_and_says_that_this_node_is_not_new(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    await (await opener(loaded).open()).close()
    (tmp_path / LEDGER_FILE).unlink()
    shutil.rmtree(tmp_path / "d2")
    opening = opener(loaded, lambda: WAIT)
    disks = await opening.open()
    assert await states(disks) == ["foreign", "blank"]
    assert "no record of" in await reason_of(disks, "d1")
    assert opening.foreign_stores
    write_acceptance(tmp_path, ids(loaded)[0], 0)
    await until(lambda: len(disks.used) == 1)
    await disks.close()


async def test_an_exchanged_disk_waits_and_one_in_order_needs_no_word(tmp_path: Path) -> None:
    loaded = storage_config(tmp_path)
    await (await opener(loaded).open()).close()
    shutil.rmtree(tmp_path / "d1")
    write_acceptance(tmp_path, ids(loaded)[1], 0)  # of a disk that is in order: not kept for a later day
    disks = await opener(loaded).open()
    assert await states(disks) == ["foreign", "ok"]
    assert "DISK_BLANK" in await reason_of(disks, "d1")
    assert take_acceptance(tmp_path, ids(loaded)[1]) is None
    with pytest.raises(OperatorError, match="nothing to accept"):
        accept.accept_blank.main([str(tmp_path / "config.toml"), ids(loaded)[1]], standalone_mode=False)
    with pytest.raises(OperatorError, match="no disk of"):
        accept.accept_blank.main([str(tmp_path / "config.toml"), "elsewhere"], standalone_mode=False)
    accept.accept_blank.main([str(tmp_path / "config.toml"), str(tmp_path / "d1")], standalone_mode=False)
    await until(lambda: len(disks.used) == 2)
    await disks.close()


def test_the_word_for_one_disk_is_none_for_another(tmp_path: Path) -> None:
    write_acceptance(tmp_path, "d1", 0)
    assert take_acceptance(tmp_path, "d2") is None
    (tmp_path / (ACCEPTANCE + "d2")).write_bytes((tmp_path / (ACCEPTANCE + "d1")).read_bytes())
    assert take_acceptance(tmp_path, "d2") is None
    (tmp_path / (ACCEPTANCE + "d3")).write_bytes(b"yes")
    assert take_acceptance(tmp_path, "d3") is None


def test_a_formed_node_begins_with_no_disk_that_it_has_no_record_of(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record("d1", b"\1" * 24)
    assert admission(ledger, "d2", True, Verdict(False)).state == "blank"
    assert admission(ledger, "d2", False, Verdict(True)).state == "foreign"
    assert admission(ledger, "d1", True, Verdict(True)).state == "foreign"
    assert admission(ledger, "d1", False, Verdict(False)).opening is not None


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
    disks = await opener(loaded, open_s=0.2).open()
    assert asked.is_set()
    assert await states(disks) == ["hung", "ok"]
    assert set(disks.replicas) == {ids(loaded)[1]}
    walked = iter(node_disks.Snapshot(disks.metas).items())
    next(walked)
    answers.set()
    await until(lambda: len(disks.used) == 2)
    assert await states(disks) == ["ok", "ok"]
    assert list(walked) == [], "who walks through the disks is not disturbed by one that joins"
    await disks.close()


async def test_a_node_stops_although_a_disk_still_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = storage_config(tmp_path)
    answers = threading.Event()
    monkeypatch.setattr(node_disks, "is_blank", lambda directory: directory.name == "d1" and answers.wait())
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
    assert "failed before, as this node noted" in await reason_of(again, "d1")
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
