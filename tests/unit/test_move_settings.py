"""The settings of moves, how far moves are, and the commands that pause, resume and pace them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.cli import jobs, operate
from storaged.cluster.move_settings import (
    COLLECTION,
    FRAGMENTS,
    PARTITIONS,
    SCRUB,
    UNKNOWN,
    MoveSettings,
    changed,
    document,
    is_paused,
    signed_bytes,
)
from storaged.cluster.partitions import PartitionRecord
from storaged.errors import InvalidArgument, OperatorError
from storaged.maintain.scrub import PAUSED
from storaged.maintain.status import MaintainStatus
from storaged.node.move_progress import (
    Counted,
    MoveProgress,
    PartitionCounts,
    count_objects,
    count_partitions,
    what_is_left,
)
from tests.doubles.clock import ManualClock
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.worlds.authority_folder import call

RUNNING = MoveSettings()


def test_a_change_leaves_the_other_job_as_it_is() -> None:
    first = changed(MoveSettings(), PARTITIONS, 5, paused=True, pace=30)
    second = changed(first, FRAGMENTS, 6, paused=None, pace=1 << 20)
    assert second == MoveSettings(2, True, False, 30, 1 << 20, 6)
    third = changed(second, PARTITIONS, 7, paused=False, pace=None)
    assert (is_paused(third, PARTITIONS), is_paused(third, FRAGMENTS), third.partitions_per_min) == (False, False, 30)
    assert document(third)["fragments"] == {"paused": False, "bytes_per_s": 1 << 20}
    fourth = changed(third, SCRUB, 8, paused=True, pace=5 << 20)
    assert document(fourth)["scrub"] == {"paused": True, "bytes_per_s": 5 << 20}
    assert is_paused(fourth, SCRUB)
    assert document(fourth)["fragments"] == document(third)["fragments"]
    fifth = changed(changed(fourth, COLLECTION, 9, paused=True, pace=None), COLLECTION, 10, paused=None, pace=500)
    assert document(fifth)["collection"] == {"paused": True, "per_s": 500}
    assert is_paused(fifth, COLLECTION)
    assert document(fifth)["scrub"] == document(fourth)["scrub"]
    with pytest.raises(InvalidArgument, match="a pace of collection is from 1 to 1000000"):
        changed(fifth, COLLECTION, 11, paused=None, pace=1_000_001)
    with pytest.raises(InvalidArgument, match="there is no job 'repair' that can be paused"):
        changed(first, "repair", 5, paused=True, pace=None)
    for pace in (-1, 1 << 60):
        with pytest.raises(InvalidArgument, match="a pace of fragments is from 1 to"):
            changed(first, FRAGMENTS, 5, paused=None, pace=pace)


def test_every_field_is_signed_for_one_cluster() -> None:
    settings = MoveSettings(3, True, True, 4, 5, 6, b"signer", b"signature")
    signed = {signed_bytes("c", settings), signed_bytes("d", settings)}
    for field, value in (
        ("revision", 4),
        ("partitions_paused", False),
        ("fragments_paused", False),
        ("partitions_per_min", 5),
        ("bytes_per_s", 6),
        ("changed_ms", 7),
    ):
        signed.add(signed_bytes("c", replace(settings, **{field: value})))
    assert len(signed) == 8
    for field, value in (("scrub_paused", True), ("scrub_bytes_per_s", 1)):
        signed.add(signed_bytes("c", replace(settings, **{field: value})))
    assert len(signed) == 10
    for field, value in (("collection_paused", True), ("collection_per_s", 1)):
        signed.add(signed_bytes("c", replace(settings, **{field: value})))
        signed.add(signed_bytes("c", replace(settings, scrub_paused=True, **{field: value})))
    assert len(signed) == 14
    assert signed_bytes("c", replace(settings, signature=b"other")) in signed


def test_what_was_not_read_yet_counts_as_paused() -> None:
    assert is_paused(UNKNOWN, PARTITIONS)
    assert is_paused(UNKNOWN, FRAGMENTS)
    assert is_paused(UNKNOWN, SCRUB)
    assert is_paused(UNKNOWN, COLLECTION)
    assert not document(UNKNOWN)["known"]
    assert document(MoveSettings())["known"]


# --- progress


def test_partitions_are_counted_from_their_records() -> None:
    before = layout_of((1, 1, 1))
    after = replace(layout_of((1, 1, 1, 1), epoch=100), seeds=before.seeds, base=1)
    layouts = KnownLayouts(before)
    assert count_partitions(layouts, layouts.partitions) == PartitionCounts(Counted(0, 0), 0), "nothing ever moved"
    layouts.learn(after)
    assert count_partitions(layouts, layouts.partitions) is None
    layouts.partitions.complete = True
    going = [number for number in range(1024) if set(before.replicas_of(number)) != set(after.replicas_of(number))]
    assert count_partitions(layouts, layouts.partitions) == PartitionCounts(Counted(0, len(going)), 0)
    present, coming = before.replicas_of(going[0]), after.replicas_of(going[1])
    layouts.partitions.learn(PartitionRecord(going[0], 1, present, after.replicas_of(going[0]), 100))
    layouts.partitions.learn(PartitionRecord(going[1], 2, coming, (), 100))
    assert count_partitions(layouts, layouts.partitions) == PartitionCounts(Counted(1, len(going)), 1)
    layouts.learn(replace(after, epoch=101, profile="2+2"))
    assert count_partitions(layouts, layouts.partitions) == PartitionCounts(Counted(1, len(going)), 1), "nothing moves"
    layouts.learn(replace(after, epoch=200))
    assert count_partitions(layouts, layouts.partitions) == PartitionCounts(Counted(0, len(going) - 1), 1)


def status(node: str, judged: int, misplaced: int) -> MaintainStatus:
    return MaintainStatus(node, 0, 0, 0, True, False, (), judged=judged, misplaced=misplaced)


def test_objects_are_counted_by_the_walks_of_all_nodes() -> None:
    assert count_objects([status("n1", 10, 4), status("n2", 20, 0)]) == Counted(26, 30)
    assert count_objects([status("n1", 0, 4)]) == Counted(0, 4), "its first walk has not ended"


def test_status_says_what_is_left_of_objects_and_why_most_of_it_did_not_move() -> None:
    assert what_is_left([status("n1", 10, 4)], "4+2") == ""
    first = replace(status("n1", 10, 4), outdated=3, unmoved=(("a key is missing", 2), ("it is busy", 3)))
    second = replace(status("n2", 10, 4), outdated=4, unmoved=(("a key is missing", 2),))
    left = what_is_left([first, second], "4+2")
    assert left == "7 others get profile 4+2; 4 did not move when that was tried: a key is missing"
    (job,) = MoveProgress(ManualClock()).jobs(None, Counted(12, 20), RUNNING, "", left)
    assert job.detail == f"12 of 20 objects are where the layout wants them; {left}"


def test_the_rate_is_measured_and_the_rest_is_known_after_a_restart() -> None:
    clock = ManualClock()
    progress = MoveProgress(clock)

    def seen(left: int, settings: MoveSettings = RUNNING) -> Any:
        counts = PartitionCounts(Counted(100 - left, 100), 3)
        (job,) = progress.jobs(counts, Counted(7, 7), settings, "")
        return job

    first = seen(80)
    assert (first.name, first.node, first.state, first.done, first.total) == (
        "partitions",
        "cluster",
        "running",
        20,
        100,
    )
    assert (first.rate, first.eta_s) == ("", None)
    clock.advance(60)
    job = seen(60)
    assert (job.rate, job.eta_s) == ("20/min", pytest.approx(180))
    assert job.detail == "40 of 100 partitions are where the layout wants them; 3 are under way"
    paused = seen(60, MoveSettings(partitions_paused=True))
    assert (paused.state, paused.eta_s) == ("paused", None)
    assert seen(60, UNKNOWN).state == "waiting"
    progress = MoveProgress(clock)  # another process
    again = seen(60)
    assert (again.done, again.total, again.rate) == (40, 100, "")
    clock.advance(10)
    assert seen(90).rate == "", "another layout moves more"
    assert progress.jobs(PartitionCounts(Counted(5, 5), 0), Counted(3, 3), MoveSettings(), "") == []
    assert progress.jobs(None, Counted(3, 3), MoveSettings(), "") == []


# --- commands


def test_commands_change_one_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[Any] = []

    def gateway(_place: Any, method: str, path: str, body: Any = None) -> Any:
        sent.append((method, path, body))
        settings = document(MoveSettings(partitions_paused=True, bytes_per_s=20 << 20))
        return {"settings": settings, "jobs": []}

    monkeypatch.setattr(jobs, "gateway", gateway)
    monkeypatch.setattr(jobs, "find_directory", lambda _named: None)
    call("job", "pause", "partitions")
    assert "partitions: paused; pace: none is set" in capsys.readouterr().out
    call("job", "resume", "fragments", "--json")
    assert json.loads(capsys.readouterr().out)["settings"]["fragments"]["bytes_per_s"] == 20 << 20
    call("job", "pace", "fragments", "20MiB")
    call("job", "pace", "partitions", "30")
    call("job", "pace", "partitions", "none")
    call("job", "list")
    assert "fragments: not paused; pace: 20.0 MiB/s a storage node" in capsys.readouterr().out
    assert [body for _, path, body in sent if path == "/v1/moves"] == [
        {"job": "partitions", "paused": "true"},
        {"job": "fragments", "paused": "false"},
        {"job": "fragments", "pace": str(20 << 20)},
        {"job": "partitions", "pace": "30"},
        {"job": "partitions", "pace": "0"},
    ]
    for pace, said in (("0", "To stop the job: storaged job pause"), ("fast", "write a number such as 30, or none")):
        with pytest.raises(OperatorError, match=said):
            call("job", "pace", "partitions", pace)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_scrub_that_is_waited_for_says_once_that_it_is_paused_and_how_it_goes_on(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = iter(("", PAUSED, PAUSED, PAUSED, "", "done"))

    def gateway(_place: Any, method: str, _path: str) -> Any:
        if method == "POST":
            return {"nodes": ["n1"]}
        detail = next(states)
        job = {"name": "scrub", "node": "n1", "state": "running", "percent": 1, "rate": "", "eta_s": None}
        ended = {"state": "done", "detail": "0 damaged"} if detail == "done" else {"detail": detail}
        return {"jobs": [job | ended], "busy": False}

    monkeypatch.setattr(operate, "gateway", gateway)
    monkeypatch.setattr(operate, "find_directory", lambda _named: None)
    monkeypatch.setattr(operate, "POLL_S", 0)
    call("scrub", "--wait", *(["--json"] if as_json else []))
    told = capsys.readouterr()
    assert (told.err if as_json else told.out).count("storaged job resume scrub") == 1
    assert not as_json or json.loads(told.out)["jobs"][0]["detail"] == "0 damaged"
    assert next(states, None) is None
