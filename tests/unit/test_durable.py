"""Files that are there after a crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storaged.durable import make_directory, replace_file


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


def test_a_directory_is_made_with_those_above_it_and_every_name_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    made = tmp_path / "disk" / "fragments"
    make_directory(made, 0o700)
    assert (made.is_dir(), made.stat().st_mode & 0o777) == (True, 0o700)
    assert synced == [str(tmp_path), str(tmp_path / "disk")]
    make_directory(made)
    assert synced[2:] == [str(tmp_path / "disk")], "whoever made it may have been killed before it was synced"
