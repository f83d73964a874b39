"""The suite of a disk's files on every body: a directory, and the disk in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.fragments.files import PosixFiles
from tests.doubles.files import SimulatedFiles
from tests.suites.files import FilesSuite


class TestPosix(FilesSuite):
    @pytest.fixture
    def files(self, tmp_path: Path) -> Iterator[PosixFiles]:
        found = PosixFiles(tmp_path)
        yield found
        found.close()


class TestSimulated(FilesSuite):
    @pytest.fixture(params=[0, 1 << 20], ids=["large", "small"])
    def files(self, request: pytest.FixtureRequest) -> SimulatedFiles:
        made = SimulatedFiles()
        made.limit = request.param
        return made
