"""A node whose directory is full when it learns a layout, and a gateway that can't write the register of the layout."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.cluster.layouts import LayoutBook, LayoutFiles
from storaged.errors import DiskUnusable, ServiceUnavailable, SlowDown, StoragedError
from storaged.node import node
from storaged.node.planes import NodePlanes
from tests.worlds.authority import World, until
from tests.worlds.layouts import History, first


async def test_a_layout_that_cannot_be_kept_is_not_used_and_taken_when_it_is_offered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = History(World(tmp_path))
    planes: Any = SimpleNamespace(own=history.identity("n1"), directory=tmp_path, ledgers=None)
    planes._files = LayoutFiles(tmp_path / "layouts")

    async def persist(epoch: int, signed: Any) -> None:
        await NodePlanes._persist(planes, epoch, signed)

    layouts: LayoutBook = history.book(persist=persist)
    second = history.sign(history.after(first(), moving=False))

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("storaged.cluster.layouts.replace_file", full)
        with pytest.raises(DiskUnusable, match=r"n1 can't keep layout 2 in .*No space left"):
            await layouts.learn(second, "a peer")
    assert layouts.epoch == 1
    assert await layouts.learn(second, "a peer")


@pytest.mark.parametrize(
    "error",
    [
        DiskUnusable("gw can't keep layout 2: No space left on device"),
        ServiceUnavailable("No majority of the replicas answered in time."),
        # `cluster apply` changes the register at the same time, and the system partition has no majority.
        SlowDown("Other changes of this key took too long."),
    ],
    ids=lambda error: error.code,
)
async def test_a_gateway_that_can_not_exchange_layouts_now_goes_on_with_the_one_that_it_has(
    error: StoragedError, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def exchange(*_arguments: object) -> None:
        nonlocal asked
        asked += 1
        raise error

    monkeypatch.setattr(node, "exchange_layout", exchange)
    monkeypatch.setattr(node, "LAYOUT_RETRY_S", 0.0)
    gateway: Any = SimpleNamespace(paths=None, layouts=None)
    keeping = asyncio.create_task(node.Node._keep_layout_register(gateway))
    await until(lambda: asked >= 2)
    assert not keeping.done()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
