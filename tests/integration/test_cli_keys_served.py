"""Passphrases at the command line: what is asked, what is refused, and what there is without a terminal. Who may ask a
node is said before it hangs up.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storaged.cli import client
from storaged.errors import AdminNotAllowed, NotRunning


def test_a_process_without_a_terminal_knows_that_it_has_none() -> None:
    program = "from storaged.cli.keys import _has_terminal; print(_has_terminal())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, start_new_session=True
    )
    assert done.stdout == "False\n"


def test_a_user_who_may_not_ask_is_told_who_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "admin.sock").touch()
    with pytest.raises(NotRunning):
        client.request(tmp_path, "GET", "/v1/status")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(AdminNotAllowed, match="is of the user"):
        client.request(tmp_path, "GET", "/v1/status")
