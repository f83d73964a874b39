"""The transcript of the README is executed: every command must succeed, and print the lines that the README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import free_port

ROOT = Path(__file__).resolve().parents[2]
ANY = "…"


def steps() -> list[tuple[str, list[str]]]:
    """(command, lines shown after it) of the block under the heading «First minutes»."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## First minutes.*?```console\n(.*?)```", text, re.DOTALL)
    assert block, "README.md has no console block under «First minutes»"
    found: list[tuple[str, list[str]]] = []
    for line in block[1].splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.strip():
            found[-1][1].append(line)
    return found


def pattern_of(line: str) -> re.Pattern[str]:
    """A shown line, in which «…» means anything, and runs of spaces mean runs of spaces."""
    parts = [re.sub(r"(\\ )+", r"\\s+", re.escape(part.strip())) for part in line.split(ANY)]
    return re.compile(r"\s*.*".join(parts))


@pytest.mark.timeout(3600)
def test_the_first_minutes_of_the_readme_work_as_printed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "STORAGED_", "XDG_", "VIRTUAL_ENV"))}
    environment = {
        **kept,
        "HOME": str(home),
        "PATH": f"{kept['PATH']}:{Path(sys.executable).parent}",
        "AWS_EC2_METADATA_DISABLED": "true",
        "STORAGED_DEV_S3_PORT": str(free_port()),
    }
    commands = steps()
    assert len(commands) >= 8
    script = "set -u\ncd " + str(ROOT) + "\n"
    for number, (command, _) in enumerate(commands):
        # A transcript goes on after a command that tells of trouble by its exit code (status does), so codes are
        # collected, not fatal.
        script += f"echo '@@{number}'\n{command}\necho \"@@exit $?\"\n"
    script += "storaged dev stop >/dev/null 2>&1 || true\n"
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=3500, check=False
    )
    for number, (command, shown) in enumerate(commands):
        output = re.search(rf"^@@{number}\n(.*?)^@@exit (\d+)$", done.stdout, re.DOTALL | re.MULTILINE)
        assert output, f"{command}: never ran\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        allowed = ("0", "1") if command.startswith("storaged status") else ("0",)
        assert output[2] in allowed, f"{command} -> {output[2]}\n{output[1]}\n{done.stderr[-3000:]}"
        for line in shown:
            assert pattern_of(line).search(output[1]), (
                f"{command} does not show {line!r}:\n{output[1]}\n{done.stderr[-2000:]}"
            )
