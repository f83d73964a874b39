"""A disk that can be frozen: an ext4 file system on a loop device, with fsfreeze(8).

Whoever writes to a frozen file system waits in the kernel, asynchronous writers too; reads go on. Needs Linux, root and
a loop device; the test is skipped elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

IMAGE_BYTES = 256 * 1024 * 1024


class FrozenDisk:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.frozen = False

    def freeze(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", self.directory], check=True)
        self.frozen = True

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """It is frozen inside the block."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def thaw(self) -> None:
        if self.frozen:
            subprocess.run(["fsfreeze", "--unfreeze", self.directory], check=True)
            self.frozen = False


@contextlib.contextmanager
def frozen_disk(size: int = IMAGE_BYTES) -> Iterator[FrozenDisk]:
    """A disk of ``size`` bytes that works; it is thawed at the end. Its file has holes."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs Linux and root")
    with tempfile.TemporaryDirectory(prefix="frozen-disk-") as place:
        image, directory = Path(place) / "image", Path(place) / "disk"
        directory.mkdir()
        with image.open("wb") as file:
            file.truncate(size)
        try:
            subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True)
            subprocess.run(["mount", "-o", "loop", image, directory], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        disk = FrozenDisk(directory)
        try:
            yield disk
        finally:
            disk.thaw()
            subprocess.run(["umount", "--lazy", directory], check=True)
