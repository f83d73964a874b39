"""Files that are there after a crash.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.patience import GUARD_S

REPLACE_MANY = """
import sys
from pathlib import Path
from storaged.durable import replace_file
for number in range(100):
    replace_file(Path(sys.argv[1]), sys.argv[2].encode() * 1000)
"""


def test_processes_that_replace_one_file_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "records"
    running = [subprocess.Popen([sys.executable, "-c", REPLACE_MANY, str(path), letter]) for letter in "abc"]
    assert [process.wait(GUARD_S) for process in running] == [0, 0, 0]
    assert path.read_bytes() in [letter * 1000 for letter in (b"a", b"b", b"c")]
    assert os.listdir(tmp_path) == ["records"]
