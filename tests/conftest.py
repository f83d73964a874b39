"""Which event loops run the tests, and with how many examples properties are tried."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uvloop
from hypothesis import settings

from tests.examples import examples
from tests.sim.virtual import OneThreadLoop

settings.register_profile("tests", max_examples=examples(100), deadline=None)  # a busy machine is slow, no test times
settings.load_profile("tests")

HEARD = frozenset(
    {
        "test_aio",
        "test_s3_http",
        "test_s3_hostile",
        "test_s3_patience",
        "test_s3_soon",
        "test_s3_soon_put",
        "test_s3_strangers",
        "test_s3_chunk_turns",
    }
)
"""Modules that test what a loop hears of from the kernel, by sockets or an eventfd: on the loop that serves in
production, too.
"""


LONG = (
    "test_profile_change",
    "test_guide",
    "test_changes",
    "test_sparing",
    "test_forgetful_disks",
    "test_chaos",
    "test_recover_system",
    "test_cluster_changes",
    "test_recover",
    "test_moves_paused",
    "test_full_cluster",
    "test_planted_bugs",
    "test_ring_simulation",
)
"""Modules whose tests take minutes, and begin first. Otherwise the last one would run when all others have ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


GARBAGE_AFTER = (50_000, 20, 10)
"""How many objects are made before Python looks for garbage. Thousands of collected tests and modules stay for ever; to
look through them again and again took a fifth of the CPU time.
"""

gc.disable()  # until all modules are imported and all tests are known


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_AFTER)
    gc.enable()


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    virtual = item.get_closest_marker("virtual_time")
    if virtual is not None and virtual.args != (False,):
        return {"virtual": OneThreadLoop}
    if item.path.stem.removesuffix("_served") in HEARD:
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts its programs in the background has them ignore it, and the processes of tests inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers",
        "virtual_time: on a loop whose time jumps to the next timer; (False): not this test of a module with the mark",
    )


@pytest.fixture
def cached_reads(tmp_path: Path) -> None:
    """Skips where the temporary directory is on a file system without RWF_NOWAIT (tmpfs)."""
    probe = tmp_path / "probe"
    probe.write_bytes(b"x")
    with probe.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("the file system of the temporary directory has no RWF_NOWAIT")
    probe.unlink()
