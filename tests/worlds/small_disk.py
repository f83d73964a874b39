"""A disk of a given size: a file system in memory. Needs Linux and root; the test is skipped elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


class SmallDisks:
    """Mounts disks, and takes all of them away again."""

    def __init__(self) -> None:
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("needs Linux and root")
        self._mounted: list[Path] = []

    def mount(self, directory: Path, size: int) -> None:
        """``size`` in bytes."""
        directory.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        self._mounted.append(directory)

    def close(self) -> None:
        for directory in self._mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
        self._mounted = []
