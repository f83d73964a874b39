"""Files that are there after a crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storaged.durable import replace_file


def test_a_file_is_replaced_whole_with_its_mode_and_what_a_crash_left_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "node.key", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    (tmp_path / "node.key.new").write_bytes(b"half of what was wr")
    (tmp_path / "node.key.new").chmod(0o644)
    for content in (b"the first", b"another"):
        replace_file(path, content, 0o600)
        assert (path.read_bytes(), path.stat().st_mode & 0o777, os.listdir(tmp_path)) == (content, 0o600, ["node.key"])
    assert order == [f"{path}.new", str(tmp_path)] * 2


def test_where_the_disk_refuses_the_new_file_the_old_one_stays_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node.key"
    replace_file(path, b"the old one")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"the new one")
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["node.key"]
