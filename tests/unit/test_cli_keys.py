"""Passphrases at the command line: what is asked, what is refused, and what there is without a terminal. Who may ask a
node is said before it hangs up.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from storaged.cli import keys
from storaged.cli.main import cli
from storaged.config import load
from storaged.errors import OperatorError, PassphraseTooShort
from storaged.node.protection import protection_of
from tests.unit.test_config import GATEWAY

LONG = "correct horse battery"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, str]]:
    """What a gateway that answers everything was sent."""
    sent: list[dict[str, str]] = []

    def answer(_place: Path, _method: str, _path: str, *, body: dict[str, str], timeout_s: float) -> dict[str, Any]:
        sent.append(body)
        return {"keyring": "id", "backup": base64.b64encode(b"sealed").decode()}

    monkeypatch.setattr(keys, "gateway", answer)
    (tmp_path / "config.toml").touch()
    return sent


def backup(tmp_path: Path, *options: str, typed: str = "") -> Any:
    arguments = ["--dir", str(tmp_path), "keys", "backup", str(tmp_path / "backup"), *options]
    return CliRunner().invoke(cli, arguments, input=typed)


def test_without_a_terminal_it_says_what_to_do_instead(
    asked: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_has_terminal", lambda: False)
    failed = backup(tmp_path, typed=f"{LONG}\n")
    assert isinstance(failed.exception, OperatorError)
    assert "--passphrase-file FILE" in failed.exception.message
    assert "--passphrase-file - and the passphrase on standard input" in failed.exception.message
    assert not asked


def test_standard_input_and_a_file_give_the_passphrase(asked: list[dict[str, str]], tmp_path: Path) -> None:
    assert backup(tmp_path, "--passphrase-file", "-", typed=f"{LONG}\nmore\n").exit_code == 0
    (tmp_path / "backup").unlink()
    (tmp_path / "phrase").write_text(f"{LONG}\n")
    assert backup(tmp_path, "--passphrase-file", str(tmp_path / "phrase")).exit_code == 0
    assert asked == [{"passphrase": LONG}] * 2


def test_the_rule_is_said_before_it_is_asked(
    asked: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_has_terminal", lambda: True)
    done = backup(tmp_path, typed=f"{LONG}\n{LONG}\n")
    assert "12 characters or more" in done.output
    assert asked == [{"passphrase": LONG}]


@pytest.mark.parametrize("how", ["terminal", "file", "stdin"])
def test_a_short_passphrase_is_refused_before_anything_is_made(
    asked: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(keys, "_has_terminal", lambda: True)
    (tmp_path / "phrase").write_text("eleven char\n")
    options = {
        "terminal": [],
        "file": ["--passphrase-file", str(tmp_path / "phrase")],
        "stdin": ["--passphrase-file", "-"],
    }[how]
    failed = backup(tmp_path, *options, typed="eleven char\neleven char\n")
    assert isinstance(failed.exception, PassphraseTooShort)
    assert not asked
    assert not (tmp_path / "backup").exists()


def test_a_keyring_is_not_made_under_a_short_passphrase_and_an_old_one_still_opens(tmp_path: Path) -> None:
    (tmp_path / "phrase").write_text("short\n")
    config = tmp_path / "config.toml"
    config.write_text(GATEWAY.replace('credential = "$CREDENTIALS_DIRECTORY/keyring"', 'passphrase = "phrase"'))
    with pytest.raises(PassphraseTooShort):
        protection_of(load(config), create=True)
    assert protection_of(load(config)).text == "short"  # type: ignore[union-attr]
