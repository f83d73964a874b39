"""``storaged audit``: exit codes, documents, and words that never call a cut a crash."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from storaged.cli import audit as command
from storaged.cli.main import cli
from storaged.errors import AuditBroken, AuditNotCompared, NotRunning, OperatorError
from storaged.wire import encode
from tests.unit.test_witness import lines_of
from tests.worlds.witness import Witnessed


@pytest.fixture
async def rig(tmp_path: Path) -> Witnessed:
    found = Witnessed(tmp_path)
    for _ in range(2):
        await found.life(5)
    (tmp_path / "config.toml").touch()
    (tmp_path / "authority.crt").write_bytes((tmp_path / "world" / "authority" / "authority.crt").read_bytes())
    return found


def call(rig: Witnessed, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--dir", str(rig.directory), "audit", *arguments])


def code_of(result: Result) -> int:
    """As ``main`` exits."""
    return getattr(result.exception, "exit_code", result.exit_code)


def saved(rig: Witnessed, *names: str) -> list[str]:
    found = []
    for name in names or rig.books:
        found += ["--witness", str(rig.directory / name / "witness" / "gw.jsonl")]
    return [*found, "--authority", str(rig.directory / "authority.crt")]


@pytest.fixture
def cluster(rig: Witnessed, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the gateway answers."""
    told: dict[str, Any] = {
        "witnesses": [
            {
                "name": name,
                "reachable": True,
                "reason": "",
                "lines": (rig.directory / name / "witness" / "gw.jsonl").read_text().splitlines(),
            }
            for name in rig.books
        ],
        "checkpoints": [],
        "reason": "",
        "authority": (rig.directory / "authority.crt").read_text(),
    }

    def answer(_place: Path, _method: str, _path: str, *, query: dict[str, str], timeout_s: float) -> dict[str, Any]:
        assert query == {"node": "gw"}
        return told

    monkeypatch.setattr(command, "gateway", answer)
    return told


async def test_a_whole_log_and_all_witnesses_are_exit_code_0(rig: Witnessed, cluster: dict[str, Any]) -> None:
    done = call(rig, "verify", str(rig.audit))
    assert code_of(done) == 0
    assert "every entry follows from the one before, and every witness agrees" in done.output
    assert done.output.count("agrees, saw 2 of these chains, the newest up to entry 5") == 3
    assert code_of(call(rig, "verify", str(rig.audit), *saved(rig))) == 0


async def test_an_altered_log_is_exit_code_3_and_its_document_names_the_entry(
    rig: Witnessed, cluster: dict[str, Any]
) -> None:
    path = rig.files()[0]
    lines = lines_of(path)
    path.write_bytes(b"".join([*lines[:3], *lines[4:]]))
    done = call(rig, "verify", str(rig.audit))
    assert isinstance(done.exception, AuditBroken)
    assert code_of(done) == 3
    assert "entry 3 is missing" in done.exception.message
    document = json.loads((told := call(rig, "verify", "--json", str(rig.audit))).output)
    assert code_of(told) == 3
    assert (document["ok"], document["node"], document["problems"][0]["sequence"]) == (False, "gw", 3)


@pytest.mark.parametrize("at", [-30, -1])
async def test_a_cut_is_not_called_a_crash_where_a_witness_saw_more(
    rig: Witnessed, cluster: dict[str, Any], at: int
) -> None:
    path = rig.files()[-1]
    path.write_bytes(path.read_bytes()[:at])
    done = call(rig, "verify", str(rig.audit))
    assert code_of(done) == 3
    assert "the tail of chain" in str(done.exception)
    assert "crash" not in done.output + str(done.exception)


async def test_what_a_crash_tore_is_only_called_so_when_no_witness_saw_more(
    rig: Witnessed, cluster: dict[str, Any]
) -> None:
    path = rig.files()[-1]
    path.write_bytes(path.read_bytes() + b'{"chain":"00')
    done = call(rig, "verify", str(rig.audit))
    assert code_of(done) == 0
    assert (
        "12 bytes after an end are no entry, as a crash leaves them: no witness saw more than there is" in done.output
    )
    alone = call(rig, "verify", "--offline", str(rig.audit))
    assert code_of(alone) == 0
    assert "a crash leaves that, and so does who cuts a log; only witnesses can tell" in alone.output


async def test_witnesses_that_are_away_are_named_and_exit_code_4(rig: Witnessed, cluster: dict[str, Any]) -> None:
    cluster["witnesses"][1] |= {"reachable": False, "reason": "n2 is away", "lines": []}
    done = call(rig, "verify", str(rig.audit))
    assert isinstance(done.exception, AuditNotCompared)
    assert code_of(done) == 4
    assert "n2 (unreachable: n2 is away)" in done.exception.message
    document = json.loads((told := call(rig, "verify", "--json", str(rig.audit))).output)
    assert code_of(told) == 4
    assert (document["ok"], document["compared_with_all_witnesses"]) == (True, False)


async def test_a_cluster_that_does_not_answer_or_has_no_other_node_is_exit_code_4(
    rig: Witnessed, cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster["witnesses"] = []
    assert "compared with no witness: there is none" in str(call(rig, "verify", str(rig.audit)).exception)

    def away(*_: Any, **__: Any) -> Any:
        raise NotRunning("nothing answers")

    monkeypatch.setattr(command, "gateway", away)
    done = call(rig, "verify", str(rig.audit))
    assert code_of(done) == 4
    assert "the cluster could not be asked: nothing answers" in str(done.exception)


async def test_what_cannot_be_checked_is_exit_code_1(rig: Witnessed, cluster: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = call(rig, "verify", str(tmp_path / "empty"))
    assert isinstance(done.exception, OperatorError)
    assert code_of(done) == 1
    assert "no audit log" in done.exception.message


async def test_witnesses_are_saved_and_compared_later_without_the_cluster(
    rig: Witnessed, cluster: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = call(rig, "witnessed", "gw", str(tmp_path / "saved"))
    assert code_of(done) == 0
    files = [str(tmp_path / "saved" / f"{name}.jsonl") for name in rig.books]
    monkeypatch.undo()
    options = [option for file in files for option in ("--witness", file)]
    compared = call(rig, "verify", str(rig.audit), *options, "--authority", str(tmp_path / "saved" / "authority.crt"))
    assert code_of(compared) == 0
    rig.files()[0].unlink()
    assert code_of(call(rig, "verify", str(rig.audit), *options)) == 3
    assert code_of(call(rig, "verify", str(rig.audit), "--witness", str(rig.directory / "n1" / "witness"))) == 3


async def test_checkpoints_of_earlier_versions_still_count(rig: Witnessed, cluster: dict[str, Any]) -> None:
    from storaged.cluster.audit.format import RegisterCheckpoint
    from storaged.cluster.identity import NodeSigner

    signer = NodeSigner(rig.own)
    unsigned = RegisterCheckpoint("gw", "99" * 8, 7, "ab" * 32, 1, signer.certificate)
    old = RegisterCheckpoint("gw", "99" * 8, 7, "ab" * 32, 1, signer.certificate, signer.sign(unsigned.signed_bytes()))
    cluster["checkpoints"] = [base64.b64encode(encode(old)).decode()]
    assert "is missing: a checkpoint of gw knows its entry 7" in str(call(rig, "verify", str(rig.audit)).exception)
