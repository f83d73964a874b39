"""How the command line finds its cluster and understands the names of nodes and racks.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from storaged.cli.env import render_settings


@pytest.mark.parametrize("client", ["shell", "aws"])
def test_an_aws_command_that_does_not_know_the_variable_gets_the_endpoint_too(client: str, tmp_path: Path) -> None:
    old = tmp_path / "aws"
    old.write_text('#!/bin/sh\necho "$@"\n')  # it ignores AWS_ENDPOINT_URL, as those of Debian 11 and 12 do
    old.chmod(0o755)
    found = {"endpoint": "http://127.0.0.1:1", "region": "r", "access_key": "A", "secret_key": "S'", "bucket": "b"}
    script = render_settings(client, found, tmp_path) + "aws s3 ls s3://b/"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-eu", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--endpoint-url", "http://127.0.0.1:1", "s3", "ls", "s3://b/"]
