"""Units start no server and no process: a test that does belongs in tests/integration. What many of them use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worlds.fragments import in_memory

ON_DISK = frozenset(
    {
        "test_aio",
        "test_disk_health",
        "test_disk_room",
        "test_durable",
        "test_folder_lock",
        "test_fragment_local",
        "test_fragment_read_errors",
        "test_fragment_wiring",
        "test_meta_redo",
        "test_meta_store",
        "test_meta_warm",
    }
)
"""Modules about what the system does with files: their folders are where those of servers are, on a disk."""

REFUSED = frozenset({"socket.bind", "socket.connect", "subprocess.Popen", "os.fork", "os.posix_spawn"})
_running: list[str] = []


def _refuse(event: str, _arguments: tuple[Any, ...]) -> None:
    if _running and event in REFUSED:
        raise AssertionError(f"{_running[-1]} is in tests/unit and may not do {event}: see tests/unit/conftest.py")


sys.addaudithook(_refuse)


@pytest.fixture(autouse=True)
def _no_server_and_no_process(request: pytest.FixtureRequest) -> Iterator[None]:
    _running.append(request.node.nodeid)
    yield
    _running.clear()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """In memory, but for ``ON_DISK``: otherwise units wait for syncs for longer than they work."""
    if request.path.stem in ON_DISK or "cached_reads" in request.fixturenames:
        yield tmp_path
        return
    with in_memory(tmp_path) as path:
        yield path


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For stores of which hundreds are made, and whose durability is not what is tested: they would mostly wait for
    syncs of the disk.
    """
    with in_memory(tmp_path_factory.mktemp("memory")) as path:
        yield path
