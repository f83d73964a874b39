"""What commands say about answers of a gateway: settings that are not known, a scrub that is paused, a log that no
witness has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from storaged.cli import accounts, audit, jobs, operate
from storaged.cli.main import cli
from storaged.cli.status import print_where
from storaged.cluster.move_settings import MoveSettings, document
from storaged.errors import OperatorError

Ask = Callable[..., Result]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """Runs a command on a gateway that gives the answers of ``answers``, by path."""
    (tmp_path / "config.toml").touch()

    def run(answers: dict[str, Any], *arguments: str) -> Result:
        def gateway(_place: Path, _method: str, path: str, **_options: Any) -> Any:
            return answers[path]

        for module in (accounts, audit, jobs, operate):
            monkeypatch.setattr(module, "gateway", gateway)
        return CliRunner().invoke(cli, ["--dir", str(tmp_path), *arguments])

    return run


def test_settings_that_the_gateway_does_not_know_are_not_called_set(ask: Ask) -> None:
    known = document(MoveSettings(revision=0))
    shown = ask({"/v1/jobs": {"jobs": [], "settings": known}}, "job", "list").output
    assert "scrub: not paused" in shown
    unknown = {**known, "known": False}
    shown = ask({"/v1/jobs": {"jobs": [], "settings": unknown}}, "job", "list").output
    assert "not known yet" in shown
    assert "not paused" not in shown


@pytest.mark.parametrize("paused", [False, True])
def test_a_scrub_that_is_paused_says_so(ask: Ask, paused: bool) -> None:
    settings = document(MoveSettings(revision=0, scrub_paused=paused))
    done = ask({"/v1/scrub": {"nodes": ["n1"]}, "/v1/jobs": {"jobs": [], "settings": settings}}, "scrub")
    assert done.exit_code == 0
    assert ("storaged job resume scrub" in done.output) == paused


def test_who_leaves_a_group_is_no_longer_in_it(ask: Ask) -> None:
    done = ask({"/v1/iam": {}}, "group", "leave", "alice", "ops", "backup")
    assert done.output == "backup is no longer in the group ops\n"


def test_a_node_whose_log_no_witness_has_seen_is_no_file_without_lines(ask: Ask, tmp_path: Path) -> None:
    witness = {"name": "n1", "reachable": True, "reason": "", "lines": []}
    answer = {"witnesses": [witness], "checkpoints": [], "reason": "", "authority": ""}
    failed = ask({"/v1/audit/witnessed": answer}, "audit", "witnessed", "nosuch", str(tmp_path / "saved"))
    assert isinstance(failed.exception, OperatorError)
    assert "'nosuch'" in failed.exception.message
    assert not (tmp_path / "saved").exists()
    answer["witnesses"] = [{**witness, "lines": ["{}"]}]
    assert ask({"/v1/audit/witnessed": answer}, "audit", "witnessed", "n2", str(tmp_path / "saved")).exit_code == 0


def test_the_directory_of_a_node_is_not_its_log(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    failed = ask({}, "audit", "verify", str(tmp_path))
    assert isinstance(failed.exception, OperatorError)
    assert str(tmp_path / "audit") in failed.exception.message


def test_one_more_disk_is_one_disk(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "size": 1,
        "domain": "rack",
        "disks_may_fail": 2,
        "racks_may_fail": 1,
        "replicas_may_fail": 1,
        "fragments": [],
        "replicas": [],
    }
    print_where(found, "s3://b/k")
    assert "2 more disks or 1 more rack may fail" in capsys.readouterr().out
