"""The folder of an authority, made by the operator's commands, as those commands find it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from storaged.cli.main import cli

SAID = pytest.CaptureFixture[str]


def call(*arguments: str) -> None:
    cli.main(args=list(arguments), prog_name="storaged", standalone_mode=False)


def answered(capsys: SAID, *arguments: str) -> Any:
    """The document of a command that has ``--json``."""
    capsys.readouterr()
    call(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def issue_three(place: Path) -> None:
    for number, rack in enumerate(("FR/par1/a", "FR/par2/b", "FR/lyo1/c"), 1):
        call("cluster", "issue", str(place), f"n{number}", "--rack", rack, "--roles", "storage",
             "--address", f"10.0.{number}.1:7400", "--disk", "/srv/disk1", "--disk", "/srv/disk2:4000")  # fmt: skip
    call("cluster", "issue", str(place), "gateway", "--rack", "FR/par1/a", "--roles", "gateway")


def three_signed(place: Path) -> Path:
    """Three storage nodes, a gateway and their first layout."""
    call("cluster", "create", str(place), "--cluster", "eu-1", "--profile", "2+1")
    issue_three(place)
    call("cluster", "layout", str(place))
    return place
