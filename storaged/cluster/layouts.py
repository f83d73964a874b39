"""The layouts that this node knows: the one in force, and the earlier ones that records still name.

A layout is believed for its signature alone, whoever brings it. Epochs only grow: a layout that is older than the one in force joins the
history and changes nothing, and a second one under an epoch already known is refused, since one of the two was not meant to exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import MsgspecError

from storaged.cluster.identity import LAYOUT_BYTES_MAX, SignedLayout, verify_layout
from storaged.cluster.layout import Layout
from storaged.durable import replace_file
from storaged.errors import LayoutRefused
from storaged.wire import decode, encode

log = structlog.get_logger(__name__)

HISTORY_MAX = 4096
"""Layouts kept in memory: a change every day for eleven years."""

Persist = Callable[[int, SignedLayout], Awaitable[None]]
"""``await persist(epoch, signed)`` returns when the layout is durable."""


class LayoutBook:
    """Implements ``Layouts``. ``known`` are those read at start (see :class:`LayoutFiles`); each is verified again."""

    def __init__(
        self, administration: Ed25519PublicKey, cluster: str, *, known: Iterable[SignedLayout] = (), persist: Persist | None = None
    ) -> None:
        self._administration = administration
        self._cluster = cluster
        self._persist = persist
        self._signed: dict[int, SignedLayout] = {}
        self._layouts: dict[int, Layout] = {}
        self._current: Layout | None = None
        self._learning = asyncio.Lock()
        self._watchers: list[Callable[[Layout], None]] = []
        for signed in known:
            self._adopt(verify_layout(signed, administration, cluster), signed)

    @property
    def current(self) -> Layout:
        """Raises LayoutRefused while this node has never been given one."""
        if self._current is None:
            raise LayoutRefused("This node knows no layout yet; it learns one from the first peer that it reaches.")
        return self._current

    @property
    def epoch(self) -> int:
        """Of the layout in force; 0 when there is none."""
        return self._current.epoch if self._current is not None else 0

    def at(self, epoch: int) -> Layout:
        return self._layouts[epoch]

    def signed_after(self, epoch: int) -> SignedLayout | None:
        """The next layout behind ``epoch``, to pass on; None when there is none."""
        following = [known for known in self._signed if known > epoch]
        return self._signed[min(following)] if following else None

    def watch(self, watcher: Callable[[Layout], None]) -> None:
        """``watcher(layout)`` is called for each layout that comes into force."""
        self._watchers.append(watcher)

    async def learn(self, signed: SignedLayout) -> bool:
        """Verifies, persists, then uses. True when it is new to this node. Raises LayoutRefused."""
        layout = verify_layout(signed, self._administration, self._cluster)
        if layout.epoch < 1:
            raise LayoutRefused("Epochs are numbered from 1.")
        async with self._learning:
            known = self._signed.get(layout.epoch)
            if known is not None:
                if known.payload != signed.payload:
                    log.error("two layouts were signed under one epoch", epoch=layout.epoch)
                    raise LayoutRefused(f"Another layout is known under epoch {layout.epoch}; this one is not taken.")
                return False
            if self._persist is not None:
                await self._persist(layout.epoch, signed)
            in_force = layout.epoch > self.epoch
            self._adopt(layout, signed)
        if in_force:
            log.info("layout in force", epoch=layout.epoch, nodes=len(layout.nodes), disks=len(layout.disks))
            for watcher in self._watchers:
                watcher(layout)
        return True

    def _adopt(self, layout: Layout, signed: SignedLayout) -> None:
        self._signed[layout.epoch] = signed
        self._layouts[layout.epoch] = layout
        if layout.epoch > self.epoch:
            self._current = layout
        if len(self._signed) > HISTORY_MAX:
            oldest = min(self._signed)
            del self._signed[oldest], self._layouts[oldest]


class LayoutFiles:
    """Layouts as files of a directory, ``layout-EPOCH.signed`` each: an encoded :class:`SignedLayout`, synced before it is used."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def load(self) -> list[SignedLayout]:
        """The newest ``HISTORY_MAX``, oldest first. Raises LayoutRefused for a file that does not decode (the signature is verified by the book)."""
        found = []
        for path in sorted(self.directory.glob("layout-*.signed"))[-HISTORY_MAX:]:
            try:
                found.append(decode(path.read_bytes(), SignedLayout))
            except MsgspecError as error:
                raise LayoutRefused(
                    f"{path} does not decode: {error}. Remove it: this node learns that layout again from its peers."
                ) from error
        return found

    async def save(self, epoch: int, signed: SignedLayout) -> None:
        """A ``Persist``."""
        await asyncio.to_thread(self._write, epoch, encode(signed))

    def _write(self, epoch: int, content: bytes) -> None:
        assert len(content) <= LAYOUT_BYTES_MAX + 1024
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_file(self.directory / f"layout-{epoch:012d}.signed", content, 0o666)
