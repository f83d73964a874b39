"""The stand-alone opener agrees with the sealer, imports nothing of storaged, and writes nothing that it did not
verify.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

import subprocess
import sys

from tests.unit.test_unseal import SCRIPT, arguments, sealed_part


def test_it_runs_alone_as_a_script_from_a_pipe(tmp_path):
    alone = tmp_path / "unseal.py"
    alone.write_text(SCRIPT.read_text())
    plain = bytes(range(256)) * 100
    done = subprocess.run(
        [sys.executable, "-I", alone, *arguments("-")], input=sealed_part(plain, 16384), capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, plain, b"")
    shown = subprocess.run([sys.executable, "-I", alone, "--help"], capture_output=True, timeout=60, text=True)
    assert shown.returncode == 0
    assert "--data-id HEX" in shown.stdout
