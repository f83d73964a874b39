"""Of two commands on one authority's folder, the second waits for the first, and neither change is lost."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from storaged.cli import create, folder_lock, succeeding
from storaged.errors import FolderInUse
from tests.worlds.authority_folder import call, three_signed


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return three_signed(tmp_path / "authority")


def test_two_changes_at_once_are_both_in_the_list(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command is held up between reading and writing while the second one runs."""
    reading, go_on, inner = threading.Event(), threading.Event(), succeeding.layouts_after

    def slow(*given: object, **named: object) -> object:
        if threading.current_thread() is first:
            reading.set()
            assert go_on.wait(60)
        return inner(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(succeeding, "layouts_after", slow)
    first = threading.Thread(target=call, args=("node", "address", str(authority), "n1", "10.9.9.1:7400"))
    second = threading.Thread(target=call, args=("node", "address", str(authority), "n2", "10.9.9.2:7400"))
    first.start()
    assert reading.wait(60)
    second.start()
    second.join(1.0)  # long enough to end, if it did not wait
    go_on.set()
    first.join(60)
    second.join(60)
    found = {node.name: node.address for node in create.load_plan(authority).nodes}
    assert (found["n1"], found["n2"]) == ("10.9.9.1:7400", "10.9.9.2:7400")


def test_a_command_that_waits_too_long_is_refused_by_name_and_changes_nothing(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_S", 0.2)
    before = (authority / create.REGISTER_NAME).read_bytes()
    with (authority / folder_lock.LOCKED_NAME).open() as other:  # a lock belongs to a descriptor, not to a process
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FolderInUse):
            call("node", "address", str(authority), "n1", "10.9.9.1:7400")
    assert (authority / create.REGISTER_NAME).read_bytes() == before
    call("node", "address", str(authority), "n1", "10.9.9.1:7400")
    assert create.load_plan(authority).nodes[0].address == "10.9.9.1:7400"
