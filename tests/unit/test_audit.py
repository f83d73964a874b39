"""The audit log: durable before it counts, and every kind of tampering named by its first bad entry."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.audit.format import Event, RegisterCheckpoint, make_line, parse_line
from storaged.cluster.audit.log import AuditLog
from storaged.cluster.audit.refusals import Refusals
from storaged.cluster.audit.report import AuditReport
from storaged.cluster.audit.trail import audited
from storaged.cluster.audit.verify import verify
from storaged.cluster.identity import NodeSigner
from storaged.errors import AuditUnwritable, OperatorError, ServiceUnavailable
from tests.examples import examples
from tests.worlds.authority import World


class Clock:
    def __init__(self) -> None:
        self.now_ms = 1_767_225_600_000

    def monotonic(self) -> float:
        return self.now_ms / 1000

    def wall_ms(self) -> int:
        return self.now_ms


def event(kind: str, **fields: Any) -> Event:
    return Event(kind, "node:gw", "", "", fields)


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("audit-*.jsonl"))


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


async def written(directory: Path, *counts: int, **options: Any) -> AuditLog:
    """One chain per count, of that many entries besides its start. Returns the last log."""
    log: AuditLog | None = None
    for chain, count in enumerate(counts, start=len(files_of(directory)) + 1):
        log = AuditLog(directory, "gw", bytes([chain] * 8), clock=Clock(), **options)
        await log.start()
        for number in range(count):
            await log.append("key.release", bucket="photos", number=number)
        await log.close()
    assert log is not None
    return log


# --- writing


async def test_an_entry_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, "gw", b"\x01" * 8, clock=Clock())
    await log.start()
    await log.append("key.release", bucket="photos")
    start, entry = [parse_line(line[:-1]) for line in lines_of(files_of(tmp_path)[0])]
    assert (start.kind, start.fields["node"], start.fields["incarnation"], start.fields["predecessor"]) == (
        "start",
        "gw",
        "01" * 8,
        None,
    )
    assert (entry.sequence, entry.kind, entry.fields, entry.previous) == (
        1,
        "key.release",
        {"bucket": "photos"},
        start.hash,
    )
    assert log.head == (log.head.chain, 1, entry.hash)
    await log.close()
    assert oct(files_of(tmp_path)[0].stat().st_mode)[-3:] == "600"


async def test_many_appends_share_few_syncs_and_keep_their_order(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, "gw", b"\x01" * 8)
    await log.start()
    await asyncio.gather(*(log.append("key.release", number=number) for number in range(500)))
    assert log.statistics().syncs < 50
    assert log.statistics().entries_durable == 501
    await log.close()
    numbers = [parse_line(line[:-1]).fields["number"] for line in lines_of(files_of(tmp_path)[0])[1:]]
    assert numbers == list(range(500))
    assert verify(files_of(tmp_path)).ok


async def test_each_start_of_the_process_continues_the_chain_of_the_one_before(tmp_path: Path) -> None:
    await written(tmp_path, 3, 0, 2)
    report = verify(files_of(tmp_path))
    assert report.ok
    assert (report.files, report.entries, report.begins_after) == (3, 8, "")
    assert [head.sequence for head in report.heads] == [3, 0, 2]


async def test_a_full_file_is_followed_by_another_of_the_same_chain(tmp_path: Path) -> None:
    await written(tmp_path, 30, file_bytes_max=2000)
    files = files_of(tmp_path)
    assert len(files) > 3
    assert all(path.stat().st_size <= 2000 for path in files)
    assert verify(reversed(files)).ok
    middle = verify(files[1:2])
    assert middle.ok
    assert middle.begins_after.startswith("entry ")


async def test_an_entry_that_is_too_large_or_not_json_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, "gw", b"\x01" * 8)
    await log.start()
    with pytest.raises(ValueError):
        await log.append("x", text="y" * 20_000)
    with pytest.raises(TypeError):
        await log.append("x", value=object())
    await log.append("fine")
    await log.close()
    assert verify(files_of(tmp_path)).entries == 2


async def test_an_entry_says_who_did_what_to_what_and_how_it_ended(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, "gw", b"\x01" * 8, clock=Clock())
    await log.start()
    await log.append("user.add", actor="unix:0:root", target="user:alice", outcome="done", access_key="AK")
    await log.append("key.release", target="bucket-id:00")
    log.note("layout.taken", target="layout:2", outcome="done")
    await log.close()
    entries = [parse_line(line[:-1]) for line in lines_of(files_of(tmp_path)[0])]
    assert [(entry.kind, entry.actor, entry.target, entry.outcome) for entry in entries] == [
        ("start", "node:gw", "", ""),
        ("user.add", "unix:0:root", "user:alice", "done"),
        ("key.release", "node:gw", "bucket-id:00", ""),
        ("layout.taken", "node:gw", "layout:2", "done"),
    ]
    assert entries[1].fields == {"access_key": "AK"}


async def test_two_entries_that_say_the_same_have_hashes_that_nobody_can_guess(tmp_path: Path) -> None:
    """Witnesses know the chain, the hash before and about when it was: without a salt they could try what an entry
    says.
    """
    salts = set()
    for number in range(2):
        log = AuditLog(tmp_path / str(number), "gw", b"\x01" * 8, clock=Clock())
        await log.start()
        await log.append("key.release", target="bucket-id:00")
        await log.close()
        salts |= {parse_line(line[:-1]).salt for line in lines_of(files_of(tmp_path / str(number))[0])}
    assert len(salts) == 4
    assert all(len(salt) == 32 for salt in salts)


async def test_an_entry_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """As it was before: without actor, target and outcome."""
    body = (
        b'{"chain":"0101010101010101","sequence":0,"time_ms":1,"kind":"start","fields":{"node":"gw","predecessor":null},"previous":"'
        + b"0" * 64
        + b'"'
    )
    digest = hashlib.sha256(b"sov.audit.v1\0" + body).hexdigest().encode()
    path = tmp_path / "audit-00000001-0101010101010101-00001.jsonl"
    path.write_bytes(body + b',"hash":"' + digest + b'"}\n')
    assert verify([path]).ok
    assert (parse_line(lines_of(path)[0][:-1]).actor, parse_line(lines_of(path)[0][:-1]).kind) == ("", "start")


class Refused(OperatorError):
    code = "NO"
    status = 403


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "done"),
        (Refused("no"), "refused NO"),
        (ServiceUnavailable("away"), "failed ServiceUnavailable"),
        (ZeroDivisionError(), "failed InternalError"),
        (asyncio.CancelledError(), "failed CANCELLED"),
    ],
)
async def test_what_is_done_is_an_intent_and_an_outcome_of_one_operation(
    tmp_path: Path, error: BaseException | None, outcome: str
) -> None:
    log = AuditLog(tmp_path, "gw", b"\x01" * 8, clock=Clock())
    await log.start()
    with contextlib.suppress(type(error) if error is not None else ()):  # type: ignore[arg-type]
        async with audited(log, "user.add", actor="unix:0:root", target="user:alice", access_key="AK") as found:
            during = parse_line(lines_of(files_of(tmp_path)[0])[-1][:-1])
            found["user_id"] = "7"
            if error is not None:
                raise error
    await log.close()
    intent, after = [parse_line(line[:-1]) for line in lines_of(files_of(tmp_path)[0])[1:]]
    assert during == intent, "the intent is on disk before it is done"
    assert (intent.outcome, after.outcome) == ("intent", outcome)
    assert {(entry.kind, entry.actor, entry.target, entry.fields["operation"]) for entry in (intent, after)} == {
        ("user.add", "unix:0:root", "user:alice", intent.fields["operation"])
    }
    assert after.fields["user_id"] == "7"


async def test_nothing_is_done_without_its_intent_and_nothing_undone_without_its_outcome(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, "gw", b"\x01" * 8, clock=Clock())
    with pytest.raises(AuditUnwritable):
        async with audited(log, "user.add", actor="a", target="b"):
            pytest.fail("it was done")
    await log.start()
    async with audited(log, "user.add", actor="a", target="b"):
        await log.close()


async def test_refusals_are_counted_and_no_flood_of_them_fills_the_disk(tmp_path: Path) -> None:
    clock = Clock()
    log = AuditLog(tmp_path, "gw", b"\x01" * 8, clock=clock)
    await log.start()
    for number in range(10_000):
        log.refused(
            "s3.refused",
            "AccessDenied",
            actor=f"address:10.0.{number // 250}.{number % 250}",
            target=f"/photos/{number}",
        )
    log.refused(
        "s3.refused", "SignatureDoesNotMatch", actor="address:10.0.0.1", target="/x" * 20_000, note="y" * 20_000
    )
    clock.now_ms += 61_000
    log._write_refusals()
    log.refused("s3.refused", "AccessDenied", actor="address:10.0.0.9")
    await log.close()
    entries = [parse_line(line[:-1]) for line in lines_of(files_of(tmp_path)[0])[1:]]
    assert [(entry.kind, entry.outcome, entry.fields.get("repeated")) for entry in entries] == [
        ("s3.refused", "refused AccessDenied", None),
        ("s3.refused", "refused SignatureDoesNotMatch", None),
        ("s3.refused", "refused AccessDenied", 9999),
        ("s3.refused", "refused AccessDenied", 1),
    ]
    assert (len(entries[2].fields["actors"]), entries[2].fields["others"]) == (16, 9983)
    assert entries[3].actor == "address:10.0.0.9"
    assert verify(files_of(tmp_path)).ok


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(-5_000, 40_000), st.sampled_from("abc"), st.text(max_size=3)), max_size=60))
def test_every_refusal_is_told_once_and_a_kind_at_most_twice_a_minute(refusals: list[tuple[int, str, str]]) -> None:
    counter, now_ms, told = Refusals(), 1_000_000, []
    for step_ms, code, actor in refusals:
        now_ms += step_ms
        told += [(now_ms, event) for event in counter.due(now_ms)]
        event = counter.add(now_ms, "k", code, actor, "", {})
        told += [(now_ms, event)] if event is not None else []
    told += [(now_ms, event) for event in counter.due(now_ms, all_of_them=True)]
    assert sum(event.fields.get("repeated", 1) for _, event in told) == len(refusals)
    if all(step_ms >= 0 for step_ms, _, _ in refusals):
        for code in "abc":
            times = [when for when, event in told[:-3] if event.outcome == f"refused {code}"]
            assert all(later - earlier >= 60_000 for earlier, later in zip(times, times[2:], strict=False))


async def test_a_note_that_is_not_json_is_dropped_and_counted(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, "gw", b"\x01" * 8)
    await log.start()
    log.note("odd", value=object())
    log.note("fine")
    await log.close()
    assert log.statistics().notes_dropped == 1
    assert [parse_line(line[:-1]).kind for line in lines_of(files_of(tmp_path)[0])] == [
        "start",
        "audit.dropped",
        "fine",
    ]


@pytest.mark.parametrize("fails_at", ["write", "fdatasync"])
async def test_when_the_disk_refuses_nobody_is_told_that_an_entry_is_safe_and_the_log_goes_on_in_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    log = AuditLog(tmp_path, "gw", b"\x01" * 8)
    await log.start()
    await log.append("before")
    real: Callable[..., Any] = getattr(os, fails_at)
    full = True

    def refusing(descriptor: int, *rest: Any) -> Any:
        if full and descriptor == log._file.descriptor:
            if fails_at == "write":
                real(descriptor, bytes(rest[0])[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, *rest)

    monkeypatch.setattr(os, fails_at, refusing)
    results = await asyncio.gather(
        *(log.append("during", number=number) for number in range(5)), return_exceptions=True
    )
    assert all(isinstance(result, AuditUnwritable) for result in results)
    assert "No space left" in log.problem
    assert log.head.sequence == 1
    full = False
    await log.append("after")
    assert log.problem == ""
    await log.close()
    report = verify(files_of(tmp_path))
    assert report.ok
    assert report.files == 2
    kinds = [json.loads(line)["kind"] for path in files_of(tmp_path) for line in lines_of(path)]
    assert kinds == ["start", "before", "continue", "after"]


async def test_a_directory_that_cannot_be_written_is_named_at_start(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("a file in the way")
    with pytest.raises(AuditUnwritable, match="audit"):
        await AuditLog(tmp_path / "audit", "gw", b"\x01" * 8).start()


async def test_nothing_is_accepted_after_close(tmp_path: Path) -> None:
    log = await written(tmp_path, 1)
    with pytest.raises(AuditUnwritable):
        await log.append("late")


# --- verifying


def problem(report: AuditReport) -> tuple[int, str]:
    first = report.problems[0]
    return first.sequence, str(first)


async def test_an_altered_entry_is_named(tmp_path: Path) -> None:
    await written(tmp_path, 5)
    path = files_of(tmp_path)[0]
    lines = lines_of(path)
    lines[3] = lines[3].replace(b"photos", b"fotos!")
    path.write_bytes(b"".join(lines))
    sequence, reason = problem(verify([path]))
    assert sequence == 3
    assert "entry 3" in reason
    assert "altered" in reason


@pytest.mark.parametrize("which", [1, 3, 5])
async def test_a_changed_byte_anywhere_in_an_entry_is_named(tmp_path: Path, which: int) -> None:
    await written(tmp_path, 5)
    path = files_of(tmp_path)[0]
    lines = lines_of(path)
    for position in range(0, len(lines[which]) - 1, 7):
        changed = bytearray(lines[which])
        changed[position] ^= 4
        path.write_bytes(b"".join([*lines[:which], bytes(changed), *lines[which + 1 :]]))
        assert problem(verify([path]))[0] == which


async def test_an_entry_altered_with_its_hash_recomputed_no_longer_carries_the_next(tmp_path: Path) -> None:
    await written(tmp_path, 5)
    path = files_of(tmp_path)[0]
    lines = lines_of(path)
    entry = parse_line(lines[3][:-1])
    lines[3] = make_line(entry.chain, 3, entry.time_ms, event(entry.kind, bucket="other"), entry.previous)[0]
    path.write_bytes(b"".join(lines))
    assert problem(verify([path]))[0] == 4


async def test_a_removed_entry_is_named(tmp_path: Path) -> None:
    await written(tmp_path, 5)
    path = files_of(tmp_path)[0]
    lines = lines_of(path)
    path.write_bytes(b"".join(lines[:2] + lines[4:]))
    sequence, reason = problem(verify([path]))
    assert sequence == 2
    assert "entries 2 to 3 are missing" in reason


async def test_swapped_and_repeated_entries_are_named(tmp_path: Path) -> None:
    await written(tmp_path, 5)
    path = files_of(tmp_path)[0]
    lines = lines_of(path)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert problem(verify([path])) == (
        1,
        f"{path.name}:2: entry 1 is missing or out of order: entry 2 is in its place",
    )
    path.write_bytes(b"".join([*lines[:3], lines[1], *lines[3:]]))
    assert problem(verify([path]))[1].endswith("entry 1 is in the place of entry 3: out of order or repeated")


async def test_a_missing_file_of_a_chain_is_named(tmp_path: Path) -> None:
    await written(tmp_path, 30, file_bytes_max=2000)
    files = files_of(tmp_path)
    assert "missing" in problem(verify(files[:1] + files[2:]))[1]


async def test_a_missing_chain_is_named(tmp_path: Path) -> None:
    await written(tmp_path, 2, 2, 2)
    files = files_of(tmp_path)
    assert f"chain {'02' * 8}, which it names, is missing" in problem(verify([files[0], files[2]]))[1]
    older_gone = verify(files[1:])
    assert older_gone.ok
    assert older_gone.begins_after == f"entry 2 of chain {'01' * 8}"


async def test_a_tail_cut_off_shows_in_the_chain_that_follows(tmp_path: Path) -> None:
    await written(tmp_path, 4, 1)
    first = files_of(tmp_path)[0]
    first.write_bytes(b"".join(lines_of(first)[:3]))
    sequence, reason = problem(verify(files_of(tmp_path)))
    assert sequence == 3
    assert "entries 3 to 4 are known to have been written" in reason


async def test_an_entry_forged_at_the_end_of_a_chain_shows_in_the_chain_that_follows(tmp_path: Path) -> None:
    await written(tmp_path, 2, 1)
    first = files_of(tmp_path)[0]
    lines = lines_of(first)
    last = parse_line(lines[-1][:-1])
    forged = make_line(last.chain, 3, last.time_ms, event("nothing.happened"), last.hash)[0]
    first.write_bytes(b"".join([*lines, forged]))
    assert "follows from entry 2" in problem(verify(files_of(tmp_path)))[1]


async def test_what_a_crash_tore_is_accepted_and_what_was_torn_later_is_not(tmp_path: Path) -> None:
    await written(tmp_path, 3)
    first = files_of(tmp_path)[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-20])
    alone = verify([first])
    assert alone.ok
    assert alone.torn_bytes == len(lines_of(first)[-1])
    await written(tmp_path, 1)
    assert verify(files_of(tmp_path)).ok
    first.write_bytes(whole[:-50])
    assert not verify(files_of(tmp_path)).ok
    first.write_bytes(whole)
    assert not verify(files_of(tmp_path)).ok


async def test_a_crash_in_the_first_line_of_a_new_file_leaves_the_log_verifiable(tmp_path: Path) -> None:
    await written(tmp_path, 2)
    (tmp_path / f"audit-00000001-{'01' * 8}-00002.jsonl").write_bytes(b'{"chain":"01')
    (tmp_path / f"audit-00000002-{'02' * 8}-00001.jsonl").write_bytes(b"")
    await written(tmp_path, 1)
    report = verify(files_of(tmp_path))
    assert report.problems == ()
    assert [head.sequence for head in report.heads] == [2, 1]


def test_a_file_that_is_no_audit_log_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    assert "not an audit log" in problem(verify([path]))[1]


# --- checkpoints


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


async def checkpointed(directory: Path, world: World) -> tuple[list[RegisterCheckpoint], AuditLog]:
    """A log and the checkpoint that an earlier version put into a register."""
    log = await written(directory, 4)
    signer = NodeSigner(world.node("gw", ("gateway",)))
    unsigned = RegisterCheckpoint("gw", *log.head, 1, signer.certificate)
    return [msgspec.structs.replace(unsigned, signature=signer.sign(unsigned.signed_bytes()))], log


async def test_a_missing_tail_shows_against_a_checkpoint(tmp_path: Path, world: World) -> None:
    checkpoints, _log = await checkpointed(tmp_path, world)
    assert [checkpoint.sequence for checkpoint in checkpoints] == [4]
    path = files_of(tmp_path)[0]
    authority = world.authority.certificate
    assert verify([path], checkpoints, authority=authority).ok
    path.write_bytes(b"".join(lines_of(path)[:3]))
    assert verify([path]).ok
    sequence, reason = problem(verify([path], checkpoints, authority=authority))
    assert (sequence, "entries 3 to 4 are known to have been written" in reason) == (3, True)


async def test_a_rewritten_history_shows_against_a_checkpoint(tmp_path: Path, world: World) -> None:
    checkpoints, _log = await checkpointed(tmp_path, world)
    path = files_of(tmp_path)[0]
    previous, lines = "0" * 64, []
    for line in lines_of(path):
        entry = parse_line(line[:-1])
        fields = {"bucket": "harmless"} if entry.sequence == 2 else entry.fields
        rewritten, previous = make_line(
            entry.chain, entry.sequence, entry.time_ms, event(entry.kind, **fields), previous
        )
        lines.append(rewritten)
    path.write_bytes(b"".join(lines))
    assert verify([path]).ok
    assert (
        "not the one that a checkpoint names"
        in problem(verify([path], checkpoints, authority=world.authority.certificate))[1]
    )


async def test_a_forged_checkpoint_is_not_believed(tmp_path: Path, world: World) -> None:
    checkpoints, _log = await checkpointed(tmp_path, world)
    genuine = checkpoints[0]
    other = NodeSigner(World(tmp_path / "other").node("gw", ("gateway",)))
    forged = RegisterCheckpoint("gw", genuine.chain, 9, "ab" * 32, 1, other.certificate)
    forged = msgspec.structs.replace(forged, signature=other.sign(forged.signed_bytes()))
    changed = RegisterCheckpoint(
        "gw", genuine.chain, 3, genuine.hash, genuine.time_ms, genuine.certificate, genuine.signature
    )
    for bad in (forged, changed):
        assert "not genuine" in problem(verify(files_of(tmp_path), [bad], authority=world.authority.certificate))[1]


async def test_a_chain_that_only_a_checkpoint_knows_is_missing(tmp_path: Path, world: World) -> None:
    checkpoints, _log = await checkpointed(tmp_path / "gone", world)
    await written(tmp_path / "kept", 1)
    (other,) = [RegisterCheckpoint(c.node, "ff" * 8, c.sequence, c.hash, c.time_ms, c.certificate) for c in checkpoints]
    assert f"chain {'ff' * 8} is missing" in problem(verify(files_of(tmp_path / "kept"), [other]))[1]


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_no_change_to_a_log_that_another_follows_goes_unnoticed(memory: Path, data: st.DataObject) -> None:
    directory = Path(tempfile.mkdtemp(dir=memory))
    asyncio.run(written(directory, 3, 1))
    path = files_of(directory)[0]
    lines = lines_of(path)
    action = data.draw(st.sampled_from(["flip", "drop", "swap", "repeat", "cut"]))
    at = data.draw(st.integers(0, len(lines) - 2))
    if action == "flip":
        position = data.draw(st.integers(0, len(lines[at]) - 1))
        changed = bytearray(lines[at])
        changed[position] ^= data.draw(st.integers(1, 255))
        lines[at] = bytes(changed)
    elif action == "drop":
        del lines[at]
    elif action == "swap":
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
    elif action == "repeat":
        lines.insert(at, lines[at])
    else:
        lines = [b"".join(lines)[: -data.draw(st.integers(1, 200))]]
    path.write_bytes(b"".join(lines))
    assert not verify(files_of(directory)).ok
