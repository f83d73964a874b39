"""Witnesses of an audit log: what one who owns the node, and its key, changes in it afterwards is noticed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.audit import witness, witness_record
from storaged.cluster.audit.files import chain_files
from storaged.cluster.audit.format import (
    GENESIS,
    Checkpoint,
    Entry,
    Event,
    first_link,
    make_line,
    next_link,
    parse_line,
)
from storaged.cluster.audit.links import RecentLinks, read_links
from storaged.cluster.audit.log import AuditLog
from storaged.cluster.audit.witness import WitnessedReply, WitnessedRequest, WitnessReply, WitnessRequest
from storaged.cluster.audit.witness_record import Accepted, Behind, Refused, SeenNode, adopt, judge
from storaged.cluster.identity import NodeSigner
from storaged.cluster.ports import Call
from storaged.errors import ServiceUnavailable
from tests.examples import examples
from tests.worlds.witness import Witnessed

ALL = {"n1", "n2", "n3"}


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def rewritten(path: Path, keep: Callable[[Entry], bool], previous: str = GENESIS) -> str:
    """The attack: entries are left out, and the chain is computed anew over the rest. Returns the new head's hash."""
    sequence, out = 0, []
    for line in lines_of(path):
        entry = parse_line(line[:-1])
        if keep(entry):
            event = Event(entry.kind, entry.actor, entry.target, entry.outcome, entry.fields)
            made, previous = make_line(entry.chain, sequence, entry.time_ms, event, previous, entry.salt)
            out.append(made)
            sequence += 1
    path.write_bytes(b"".join(out))
    return previous


@pytest.fixture
def rig(tmp_path: Path) -> Witnessed:
    return Witnessed(tmp_path)


# --- the log as it is


async def test_a_log_that_nobody_touched_is_what_every_witness_saw(rig: Witnessed) -> None:
    for _ in range(3):
        await rig.life(20, file_bytes_max=3000)
    report = rig.verify()
    assert report.problems == ()
    assert report.compared
    assert [(one.name, one.state, one.chains, one.sequence) for one in report.witnesses] == [
        (name, "agrees", 3, report.heads[-1].sequence) for name in sorted(ALL)
    ]
    assert rig.client.problems() == {}
    assert rig.client.taken() == dict.fromkeys(ALL, report.heads[-1].sequence)


async def test_witnesses_see_hashes_and_starts_and_no_entry(rig: Witnessed) -> None:
    await rig.start()
    await rig.log.append("user.add", actor="unix:0:SECRETNAME", target="user:SECRETNAME", outcome="done")
    await rig.stop()
    for name in rig.books:
        assert b"SECRETNAME" not in (rig.directory / name / "witness" / "gw.jsonl").read_bytes()


async def test_a_witness_that_was_away_is_brought_everything_it_missed(rig: Witnessed) -> None:
    await rig.life(5)
    rig.wire.away = {"n2"}
    for _ in range(2):
        await rig.life(30, file_bytes_max=3000)
    await rig.start()
    await rig.client.publish()
    assert set(rig.client.taken()) == ALL - {"n2"}
    rig.wire.away = set()
    await rig.write(3)
    await rig.client.publish()
    assert rig.client.taken() == dict.fromkeys(ALL, 3)
    await rig.stop()
    assert [(one.state, one.chains) for one in rig.verify().witnesses] == [("agrees", 4)] * 3
    assert rig.verify().problems == ()


async def test_a_process_that_crashed_is_followed_by_the_next_and_its_last_minute_is_shown_then(rig: Witnessed) -> None:
    await rig.start()
    await rig.client.publish()
    await rig.write(5)
    crashed = rig.log
    with rig.files()[-1].open("ab") as file:
        file.write(b'{"chain":"0000')
    await rig.start()
    await rig.client.publish()
    await rig.stop()
    report = rig.verify()
    assert report.problems == ()
    assert [(one.state, one.chains) for one in report.witnesses] == [("agrees", 2)] * 3
    assert rig.client.problems() == {}
    await crashed.close()


async def test_a_witness_that_is_new_or_lost_its_disk_is_brought_the_whole_log(rig: Witnessed) -> None:
    for _ in range(3):
        await rig.life(5)
    rig.books["n4"] = rig.open_book("n4")
    await rig.life(1)
    assert [(one.name, one.state, one.chains) for one in rig.verify().witnesses if one.name == "n4"] == [
        ("n4", "agrees", 4)
    ]


async def test_what_is_not_kept_in_memory_any_more_is_read_from_the_files(
    rig: Witnessed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storaged.cluster.audit.witness_client.HASHES_MAX", 7)
    await rig.start(file_bytes_max=3000)
    rig.log.links = RecentLinks(rig.log.head.chain, 4)
    rig.log.links.add(bytes.fromhex(rig.log.head.hash), 1)
    await rig.write(40)
    assert rig.log.links.after(0) is None
    await rig.client.publish()
    last = rig.log.head.sequence
    assert rig.client.taken() == dict.fromkeys(ALL, last)
    assert len([call for call in rig.wire.calls if call == ("n1", "audit.witness")]) == -(-(last + 1) // 7)
    await rig.stop()
    assert rig.verify().compared


async def test_an_answer_that_was_lost_is_made_up_for_and_is_no_alarm(rig: Witnessed) -> None:
    await rig.start()
    await rig.client.publish()
    await rig.write(3)
    rig.wire.lose = {"n1"}
    await rig.client.publish()
    rig.wire.lose = set()
    await rig.write(2)
    await rig.client.publish()
    assert rig.client.taken() == dict.fromkeys(ALL, 5)
    rig.client._known["n1"].sequence = 2  # as when the call was cancelled after the witness had taken it
    await rig.write(1)
    await rig.client.publish()
    assert rig.client.taken() == dict.fromkeys(ALL, 6)
    assert rig.client.problems() == {}
    await rig.stop()
    assert rig.verify().compared


async def test_a_witness_that_goes_back_is_an_alarm_until_it_has_everything_again(rig: Witnessed) -> None:
    await rig.start()
    await rig.write(3)
    await rig.client.publish()
    (rig.directory / "n1" / "witness" / "gw.jsonl").unlink()
    rig.books["n1"] = rig.open_book("n1")
    await rig.write(1)
    await rig.client.publish()
    assert rig.client.problems() == {"n1": "it had entry 3 of this chain, and has -1 now"}
    await rig.client.publish()
    assert rig.client.problems() == {}
    assert rig.client.taken() == dict.fromkeys(ALL, 4)
    await rig.stop()


def test_what_a_witness_says_can_not_play_with_a_terminal() -> None:
    assert witness_record.plain("\x1b[2Jall is well\r\n" + "x" * 1000) == ("?[2Jall is well??" + "x" * 1000)[:512]


async def test_nothing_is_sent_when_there_is_nothing_new(rig: Witnessed) -> None:
    await rig.start()
    await rig.client.publish()
    rig.wire.calls.clear()
    await rig.client.publish()
    assert rig.wire.calls == []
    await rig.stop()


# --- attacks on the files


async def test_a_log_rewritten_with_all_its_hashes_and_signed_anew_is_caught(rig: Witnessed) -> None:
    """The attack that an unkeyed chain with an anchor that can be overwritten does not notice."""
    await rig.start()
    await rig.log.append("user.add", target="user:mallory", outcome="done")
    await rig.write(3)
    await rig.stop()
    path = rig.files()[0]
    rewritten(path, lambda entry: entry.kind != "user.add")
    links = list(read_links(rig.log.head.chain, [path]))
    signer = NodeSigner(rig.own)
    last = links[-1]
    unsigned = Checkpoint(
        "gw", rig.log.head.chain, last.sequence, last.hash, last.link, rig.clock.now_ms, signer.certificate
    )
    checkpoint = unsigned.signed_with(signer.sign(unsigned.signed_bytes()))
    for name in rig.books:
        for after, some in ((-1, links), (last.sequence, []), (3, links[4:])):
            body = [link.hash for link in some]
            reply, _ = await rig.wire.call(
                name,
                "audit.witness",
                WitnessRequest(checkpoint, after, lines_of(path)[0][:-1]),
                WitnessReply,
                body=body,
            )
            assert not reply.taken
    report = rig.verify()
    assert {one.state for one in report.witnesses} == {"differs"}
    first = report.problems[0]
    assert first is not None
    assert first.by == ("n1", "n2", "n3")
    assert "is known to have been written" in first.reason or "is not the one that a checkpoint names" in first.reason


async def test_the_first_rewritten_entry_is_named_between_two_checkpoints(rig: Witnessed) -> None:
    await rig.start()
    for _ in range(5):
        await rig.write(4)
        await rig.client.publish()
    await rig.stop()
    path = rig.files()[0]
    lines, previous, out = lines_of(path), GENESIS, []
    for line in lines:
        entry = parse_line(line[:-1])
        target = "bucket-id:other" if entry.sequence == 10 else entry.target
        event = Event(entry.kind, entry.actor, target, entry.outcome, entry.fields)
        made, previous = make_line(entry.chain, entry.sequence, entry.time_ms, event, previous, entry.salt)
        out.append(made)
    path.write_bytes(b"".join(out))
    (found,) = rig.verify().problems
    assert found.sequence == 12
    assert "some entry from 9 on was changed" in found.reason


@pytest.mark.parametrize("how", ["between two lines", "within a line"])
async def test_a_tail_that_was_cut_off_is_called_missing_and_not_a_crash(rig: Witnessed, how: str) -> None:
    await rig.life(5)
    path = rig.files()[0]
    whole = path.read_bytes()
    path.write_bytes(b"".join(lines_of(path)[:4]) if how == "between two lines" else whole[:-30])
    report = rig.verify()
    assert not report.ok
    assert "the tail of chain" in report.problems[0].reason
    assert "n1, n2, n3" in report.problems[0].reason


async def test_a_process_that_goes_on_after_its_log_was_cut_is_told_at_once(rig: Witnessed) -> None:
    await rig.life(5)
    path = rig.files()[0]
    path.write_bytes(b"".join(lines_of(path)[:3]))
    await rig.start()
    await rig.client.publish()
    assert all("it has entry 5 of chain" in reason for reason in rig.client.problems().values())
    assert set(rig.client.problems()) == ALL
    await rig.write(1)
    await rig.client.publish()
    assert rig.client.taken() == dict.fromkeys(ALL, 1), "what happens from now on is witnessed all the same"
    await rig.stop()
    assert not rig.verify().ok


async def test_a_dropped_oldest_file_is_named(rig: Witnessed) -> None:
    await rig.life(40, file_bytes_max=3000)
    await rig.life(3)
    rig.files()[0].unlink()
    reasons = [str(found) for found in rig.verify().problems]
    assert any("the oldest files are missing" in reason for reason in reasons)


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_dropped_chain_is_named(rig: Witnessed, which: int) -> None:
    for _ in range(3):
        await rig.life(4)
    path = rig.files()[which]
    path.unlink()
    chain = path.name.split("-")[2]
    report = rig.verify()
    assert any(f"chain {chain} is missing: n1 saw its entry" in str(found) for found in report.problems)
    assert {one.state for one in report.witnesses} == {"differs"}


async def test_forged_restart_chains_are_seen_not_to_follow(rig: Witnessed) -> None:
    """All of the log is replaced by a new history, whose newest process shows it to the witnesses as if nothing had
    been.
    """
    for _ in range(2):
        await rig.life(6)
    first, second = rig.files()
    head = rewritten(first, lambda entry: entry.sequence not in (2, 3))
    chain = first.name.split("-")[2]
    start = parse_line(lines_of(second)[0][:-1])
    fields = {**start.fields, "predecessor": {"chain": chain, "sequence": 4, "hash": head, "torn_bytes": 0}}
    line, _ = make_line("ee" * 8, 0, start.time_ms, Event("start", "node:gw", "", "", fields), head)
    second.rename(second.with_name(second.name.replace(start.chain, "ee" * 8)))
    rig.files()[1].write_bytes(line)
    await rig.life(2)
    assert set(rig.client.problems()) == ALL
    assert all(book.alarms() for book in rig.books.values())
    report = rig.verify()
    reasons = " ".join(map(str, report.problems))
    assert "is missing: n2 saw its entry" in reasons
    assert {one.state for one in report.witnesses} == {"differs"}


async def test_a_log_that_was_put_back_from_a_copy_is_noticed(rig: Witnessed) -> None:
    await rig.life(4)
    saved = {path: path.read_bytes() for path in rig.files()}
    await rig.life(4)
    for path in rig.files():
        path.unlink()
    for path, data in saved.items():
        path.write_bytes(data)
    await rig.life(1)
    assert set(rig.client.problems()) == ALL
    assert "which chain 0000000000000002 followed already" in str(rig.verify().problems)


async def test_a_log_that_was_lost_goes_on_with_an_alarm_until_the_next_start_and_the_verifier_says_so_for_ever(
    rig: Witnessed,
) -> None:
    await rig.life(4)
    for path in rig.files():
        path.unlink()
    await rig.start()
    await rig.client.publish()
    assert "names no predecessor" in rig.client.problems()["n1"]
    assert rig.client.taken() == dict.fromkeys(ALL, 0)
    await rig.stop()
    await rig.life(1)
    assert rig.client.problems() == {}
    reasons = str(rig.verify().problems)
    assert "chain 0000000000000001 is missing" in reasons
    assert "n3 saw it begin: chain 0000000000000002 names no predecessor" in reasons


async def test_a_witness_that_is_away_is_named_and_the_verdict_is_not_that_all_agree(rig: Witnessed) -> None:
    await rig.life(4)
    rig.wire.away = {"n2"}
    report = rig.verify()
    assert report.ok
    assert not report.compared
    assert [(one.name, one.state, one.reason) for one in report.witnesses if one.state != "agrees"] == [
        ("n2", "unreachable", "is away")
    ]


async def test_one_honest_witness_is_enough(rig: Witnessed) -> None:
    await rig.life(6)
    for name in ("n1", "n2"):
        (rig.directory / name / "witness" / "gw.jsonl").write_bytes(b"")
    path = rig.files()[0]
    path.write_bytes(b"".join(lines_of(path)[:2]))
    report = rig.verify()
    assert not report.ok
    assert [one.state for one in report.witnesses] == ["empty", "empty", "differs"]


async def test_a_witness_that_makes_up_checkpoints_is_called_unusable_and_the_log_is_not_blamed(rig: Witnessed) -> None:
    await rig.life(4)
    path = rig.directory / "n1" / "witness" / "gw.jsonl"
    other = NodeSigner(rig.world.node("n1"))
    found = witness_record.read(lines_of(path))
    for seen in found.chains.values():
        forged = msgspec.structs.replace(seen.checkpoint, sequence=99, certificate=other.certificate, signature=b"")
        seen.checkpoint = forged.signed_with(other.sign(forged.signed_bytes()))
        seen.marks = []
    path.write_bytes(b"".join(witness_record.render(seen) for seen in found.chains.values()))
    report = rig.verify()
    assert report.problems == ()
    assert [one.state for one in report.witnesses] == ["unusable", "agrees", "agrees"]
    assert not report.compared


# --- attacks on the witnesses


async def shown(
    rig: Witnessed, name: str, change: Callable[[Checkpoint], Checkpoint], *, peer: str = "gw", sign: bool = True
) -> WitnessReply:
    """A checkpoint of the whole log, changed and sent."""
    links = list(read_links(rig.log.head.chain, chain_files(rig.audit)[rig.log.head.chain]))
    signer, last = NodeSigner(rig.own), links[-1]
    found = change(Checkpoint("gw", rig.log.head.chain, last.sequence, last.hash, last.link, 1, signer.certificate))
    if sign:
        found = found.signed_with(signer.sign(found.signed_bytes()))
    body = b"".join(link.hash for link in links)
    call = Call(rig.own.peer._replace(name=peer), memoryview(body), 0.0)
    answer = await rig.books[name]._witness(WitnessRequest(found, -1, rig.log.start_line), call)
    assert isinstance(answer, WitnessReply)
    return answer


async def test_a_node_shows_its_own_log_alone_signed_by_its_own_key(rig: Witnessed) -> None:
    await rig.start()
    await rig.write(2)
    trail = AuditLog(rig.directory / "n1" / "audit", "n1", b"\x09" * 8, clock=rig.clock)
    await trail.start()
    rig.books["n1"].trail = trail
    replace = msgspec.structs.replace
    for reply in (
        await shown(rig, "n1", lambda found: found, peer="n2"),
        await shown(rig, "n1", lambda found: replace(found, node="n2")),
        await shown(rig, "n1", lambda found: found, sign=False),
        await shown(rig, "n1", lambda found: replace(found, certificate=NodeSigner(rig.world.node("n2")).certificate)),
        await shown(rig, "n1", lambda found: replace(found, chain="../../x")),
        await shown(rig, "n1", lambda found: replace(found, link=bytes(32))),
        await shown(rig, "n1", lambda found: replace(found, sequence=7)),
    ):
        assert (reply.taken, bool(reply.reason)) == (False, True)
    assert not (rig.directory / "n1" / "witness").exists()
    assert (await shown(rig, "n1", lambda found: found)).taken
    await trail.close()
    kinds = [json.loads(line)["kind"] for path in (rig.directory / "n1" / "audit").iterdir() for line in lines_of(path)]
    assert kinds.count("audit.witness") == 2, "the first refusal, and the others counted"
    await rig.stop()


async def test_what_is_taken_is_durable_before_it_is_answered(rig: Witnessed, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.start()

    def full(_path: Path, _line: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(witness, "_append", full)
    with pytest.raises(ServiceUnavailable, match="No space"):
        await shown(rig, "n1", lambda found: found)
    monkeypatch.undo()
    assert rig.books["n1"]._files["gw"].seen.chains == {}
    assert (await shown(rig, "n1", lambda found: found)).taken
    again = rig.open_book("n1")
    assert again._files["gw"].seen.chains == rig.books["n1"]._files["gw"].seen.chains
    await rig.stop()


async def test_a_line_that_a_crash_tore_is_dropped_and_the_next_does_not_continue_it(rig: Witnessed) -> None:
    await rig.start()
    await rig.client.publish()
    await rig.write(1)
    await rig.client.publish()
    path = rig.directory / "n1" / "witness" / "gw.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    rig.books["n1"] = rig.open_book("n1")
    await rig.write(1)
    await rig.client.publish()
    await rig.client.publish()
    await rig.stop()
    assert witness.read_file(path).damaged_lines == 0
    assert rig.verify().compared
    assert not path.with_suffix(".damaged").exists()


async def test_a_damaged_line_is_kept_beside_and_no_other_is_lost(rig: Witnessed) -> None:
    await rig.start()
    for _ in range(4):
        await rig.write(1)
        await rig.client.publish()
    await rig.stop()
    path = rig.directory / "n1" / "witness" / "gw.jsonl"
    lines = lines_of(path)
    lines[0] = lines[0].replace(b'"sequence":1', b'"sequence":0')
    path.write_bytes(b"".join(lines))
    book = rig.open_book("n1")
    assert path.with_suffix(".damaged").read_bytes() == b"".join(lines)
    (seen,) = book._files["gw"].seen.chains.values()
    assert (seen.checkpoint.sequence, [mark.sequence for mark in seen.marks]) == (4, [2, 3])


async def test_of_a_node_whose_file_cannot_be_read_nothing_is_taken(rig: Witnessed) -> None:
    await rig.life(1)
    path = rig.directory / "n1" / "witness" / "gw.jsonl"
    path.unlink()
    path.mkdir()
    rig.books["n1"] = rig.open_book("n1")
    await rig.start()
    with pytest.raises(ServiceUnavailable, match="cannot be read"):
        await shown(rig, "n1", lambda found: found)
    await rig.log.close()


async def test_a_file_that_has_grown_is_made_anew_and_keeps_the_last_of_each_chain(
    rig: Witnessed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness, "LINES_MAX", 20)
    monkeypatch.setattr(witness_record, "MARKS_MAX", 4)
    await rig.life(1)
    await rig.start()
    for _ in range(60):
        await rig.write(1)
        await rig.client.publish()
    await rig.stop()
    path = rig.directory / "n1" / "witness" / "gw.jsonl"
    assert len(lines_of(path)) < 40
    assert [chain.checkpoint.sequence for chain in witness.read_file(path).chains.values()] == [1, 60]
    assert rig.verify().compared


async def test_what_a_witness_has_is_given_out_in_pages(rig: Witnessed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "CHAINS_A_PAGE", 2)
    for _ in range(5):
        await rig.life(1)
    lines, skip = b"", 0
    for _ in range(3):
        answer, body = await rig.wire.call("n1", "audit.witnessed", WitnessedRequest("gw", skip), WitnessedReply)
        lines, skip = lines + bytes(body), answer.next
    assert (skip, answer.chains) == (0, 5)
    assert witness_record.read(lines.splitlines(keepends=True)) == rig.books["n1"]._files["gw"].seen
    unknown, _ = await rig.wire.call("n1", "audit.witnessed", WitnessedRequest("n7"), WitnessedReply)
    assert unknown.chains == 0


def chain_of(count: int) -> tuple[bytes, list[bytes]]:
    """A start and the hashes of ``count`` entries."""
    fields = {"node": "gw", "incarnation": "0a", "predecessor": None}
    line, digest = make_line("0a", 0, 1, Event("start", "node:gw", "", "", fields), GENESIS)
    return line[:-1], [bytes.fromhex(digest), *(bytes([number]) * 32 for number in range(1, count))]


def link_of(hashes: list[bytes]) -> bytes:
    link = first_link("0a")
    for entry_hash in hashes:
        link = next_link(link, entry_hash)
    return link


@settings(max_examples=examples(200), deadline=None)
@given(st.data())
def test_whatever_a_node_that_has_the_key_sends_what_a_witness_took_stays_a_beginning_of_what_it_has(
    data: st.DataObject,
) -> None:
    """Requests are drawn from an honest chain and from forks of it; the witness's word is only ever extended."""
    start, honest = chain_of(12)
    node = SeenNode()
    taken: list[bytes] = []
    for _ in range(data.draw(st.integers(1, 12))):
        fork_at = data.draw(st.integers(1, 12))
        history = honest[:fork_at] + [bytes([200 + number]) * 32 for number in range(12 - fork_at)]
        end = data.draw(st.integers(1, 12))
        after = data.draw(st.integers(-1, 11))
        hashes = history[after + 1 : end]
        if data.draw(st.booleans()) and hashes:
            del hashes[data.draw(st.integers(0, len(hashes) - 1))]
        checkpoint = Checkpoint("gw", "0a", end - 1, history[end - 1], link_of(history[:end]), 1, b"")
        judged = judge(node, checkpoint, after, start, hashes)
        if isinstance(judged, Accepted) and judged.seen is not None:
            assert history[: len(taken)] == taken, "it took what does not extend the last"
            taken = history[:end]
            adopt(node, judged.seen)
        elif isinstance(judged, Behind):
            assert judged.sequence == len(taken) - 1
        elif isinstance(judged, Refused):
            assert judged.reason
        if taken:
            assert node.chains["0a"].checkpoint.link == link_of(taken)


def test_further_chains_than_are_kept_are_refused_and_none_is_dropped_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness_record, "CHAINS_MAX", 1)
    node, (start, hashes) = SeenNode(), chain_of(1)
    first = judge(node, Checkpoint("gw", "0a", 0, hashes[0], link_of(hashes), 1, b""), -1, start, hashes)
    assert isinstance(first, Accepted)
    assert first.seen is not None
    adopt(node, first.seen)
    assert isinstance(judge(node, Checkpoint("gw", "0b", 0, hashes[0], bytes(32), 1, b""), -1, start, hashes), Refused)
    assert list(node.chains) == ["0a"]


async def test_older_chains_keep_few_marks_and_their_last_checkpoint(
    rig: Witnessed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness_record, "CHAINS_MARKED_MAX", 2)
    monkeypatch.setattr(witness_record, "OLD_MARKS_MAX", 3)
    for _ in range(4):
        await rig.start()
        for _ in range(9):
            await rig.write(1)
            await rig.client.publish()
        await rig.stop()
    chains = list(rig.books["n1"]._files["gw"].seen.chains.values())
    assert [len(chain.marks) for chain in chains] == [3, 3, 8, 8]
    assert [chain.checkpoint.sequence for chain in chains] == [9] * 4
    assert rig.verify().compared


async def test_a_first_entry_that_would_fill_the_memory_of_witnesses_is_refused(rig: Witnessed) -> None:
    node, (_, hashes) = SeenNode(), chain_of(1)
    fields = {"node": "gw", "predecessor": None, "more": "x" * 3000}
    line, digest = make_line("0a", 0, 1, Event("start", "node:gw", "", "", fields), GENESIS)
    hashes = [bytes.fromhex(digest)]
    judged = judge(node, Checkpoint("gw", "0a", 0, hashes[0], link_of(hashes), 1, b""), -1, line[:-1], hashes)
    assert isinstance(judged, Refused)
    assert "more than 2048 bytes" in judged.reason


def rewrite_all(directory: Path, edit: Callable[[list[list[Entry]]], None]) -> None:
    """The strongest attack on the files: after ``edit`` all chains are computed anew, each start naming the head that
    is before it now.
    """
    chains: dict[str, list[Entry]] = {}
    for path in sorted(directory.iterdir()):
        chains.setdefault(path.name.split("-")[2], []).extend(
            parse_line(line) for line in path.read_bytes().splitlines()
        )
        path.unlink()
    histories = list(chains.values())
    edit(histories)
    predecessor, previous = None, GENESIS
    for ordinal, entries in enumerate(histories, start=1):
        lines = []
        for sequence, entry in enumerate(entries):
            fields = {**entry.fields, "predecessor": predecessor} if sequence == 0 else entry.fields
            event = Event(entry.kind, entry.actor, entry.target, entry.outcome, fields)
            line, previous = make_line(entries[0].chain, sequence, entry.time_ms, event, previous, entry.salt)
            lines.append(line)
        if entries:
            predecessor = {"chain": entries[0].chain, "sequence": len(entries) - 1, "hash": previous, "torn_bytes": 0}
            (directory / f"audit-{ordinal:08d}-{entries[0].chain}-00001.jsonl").write_bytes(b"".join(lines))


@settings(max_examples=examples(150), deadline=None)
@given(st.data())
def test_no_rewriting_of_what_was_witnessed_goes_unnoticed(witnessed_log: Witnessed, data: st.DataObject) -> None:
    """Entries are removed, changed, moved, put in; chains are dropped, swapped, renamed: all hashes fit again, and no
    witness is fooled.
    """
    rig = witnessed_log
    saved = {path: path.read_bytes() for path in rig.files()}

    def edit(histories: list[list[Entry]]) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            which = data.draw(st.integers(0, len(histories) - 1))
            entries = histories[which]
            action = data.draw(st.sampled_from(["erase", "change", "move", "insert", "cut", "drop", "rename"]))
            at = data.draw(st.integers(1, max(1, len(entries) - 1)))
            if action == "erase" and len(entries) > at:
                del entries[at]
            elif action == "change" and len(entries) > at:
                entries[at] = msgspec.structs.replace(entries[at], target="bucket-id:other")
            elif action == "move" and len(entries) > at + 1:
                entries[at], entries[at + 1] = entries[at + 1], entries[at]
            elif action == "insert" and entries:
                entries.insert(at, msgspec.structs.replace(entries[0], kind="nothing.happened", fields={}))
            elif action == "cut":
                del entries[at:]
            elif action == "drop" and len(histories) > 1:
                del histories[which]
            elif action == "rename":
                histories[which] = [msgspec.structs.replace(entry, chain="ab" * 8) for entry in entries]

    try:
        rewrite_all(rig.audit, edit)
        before = list(saved.values())
        now = [path.read_bytes() for path in rig.files()]
        extended = len(now) == len(before) and now[:-1] == before[:-1] and now[-1].startswith(before[-1])
        report = rig.verify()
        assert report.ok == extended, "what was added after the last checkpoint can't be known; everything else is"
        if not extended:
            assert "differs" in {one.state for one in report.witnesses} or report.problems
    finally:
        for path in rig.files():
            path.unlink()
        for path, content in saved.items():
            path.write_bytes(content)


@pytest.fixture(scope="module")
def witnessed_log(tmp_path_factory: pytest.TempPathFactory) -> Witnessed:
    found = Witnessed(tmp_path_factory.mktemp("witnessed"))

    async def live() -> None:
        for _ in range(3):
            await found.life(5)

    asyncio.run(live())
    return found
