"""Accepts layouts that move data, on a storage node: the method ``cluster.accept``.

Theory of operation. A node with a seed disk signs an acceptance (``cluster.certificates``) only if the layout follows
the one in force here by the rules, and if the register ``layout`` holds exactly this layout, read with a majority. So
the compare-and-set of that register decides between two administrators. Before it signs, the node durably notes the
layout as the one that it accepts after its present *generation* (the newest layout in force that moved data). It never
signs a second one for the same generation, even if the register changes. So two layouts can't both get a majority,
even where a gateway lies.

A layout that ends the exchange of a seed disk is accepted only when the system partition's new replica has everything
(``may_settle``). One that was signed beforehand for the loss of a seed disk is accepted only with votes that this disk
is out (``cluster.presigned``).

A layout that recovers the system partition is accepted without the register, which can't be read then. The node refuses
while the register can be read, or a disk answers that the layout calls lost, or its own seed disk is not in use
(``may_recover``). Why such a layout may take the place of one that was promised: ``cluster.succession``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from msgspec import MsgspecError

from storaged.cluster.certificates import accept, seed_nodes
from storaged.cluster.identity import Identity, NodeSigner, authority_of
from storaged.cluster.layout import Layout
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.messages import AcceptAnswer
from storaged.cluster.ports import Call, Method, Methods
from storaged.cluster.rpc.authority import grant
from storaged.cluster.signed_layout import SignedLayout, verify_layout
from storaged.cluster.succession import outranks, recovers
from storaged.cluster.votes import check_said_out
from storaged.durable import replace_file
from storaged.errors import DiskUnusable, LayoutOvertaken, LayoutRefused, RecoverRefused, VoteRefused
from storaged.node.system import SystemPaths
from storaged.wire import Message, decode, encode

PROMISE_FILE = "accepted"

log = structlog.get_logger("node")


class Promise(Message, frozen=True):
    """The file ``layouts/accepted``: the one layout (``SignedLayout.hash``) that this node accepts after a
    generation.
    """

    generation: int
    epoch: int
    layout: bytes
    seeds_lost: tuple[str, ...] = ()
    """Of a layout that recovers the system partition."""


async def not_whole(_layout: Layout) -> str:
    """The ``may_settle`` of a node that can't tell."""
    return "this node can't tell whether the new replica of the system partition has everything"


async def not_lost(_layout: Layout) -> str:
    """The ``may_recover`` of a node that can't tell."""
    return "this node can't tell whether the majority of the seed disks is lost"


class LayoutAcceptor:
    """Serves ``cluster.accept``. ``directory``: with the layouts that this node has used.

    ``may_settle`` and ``may_recover``: may be replaced. ``await may_settle(layout)`` returns why the system partition
    can't settle yet, ``await may_recover(layout)`` why it may not be recovered; empty when it can.
    """

    def __init__(self, own: Identity, layouts: LayoutBook, paths: SystemPaths, directory: Path) -> None:
        self.may_settle: Callable[[Layout], Awaitable[str]] = not_whole
        self.may_recover: Callable[[Layout], Awaitable[str]] = not_lost
        self._own = own
        self._signer = NodeSigner(own)
        self._layouts = layouts
        self._paths = paths
        self._file = directory / PROMISE_FILE
        self._accepting = asyncio.Lock()

    def methods(self) -> Methods:
        return grant({"cluster.accept": Method(SignedLayout, self._on_accept)})

    def renew(self, own: Identity) -> None:
        """Signs with the identity's certificate from now on. Raises CertificateRefused."""
        self._own, self._signer = own, NodeSigner(own)

    async def _on_accept(self, signed: SignedLayout, _call: Call) -> AcceptAnswer:
        layout = await asyncio.to_thread(verify_layout, signed, self._own.administration, self._own.cluster)
        async with self._accepting:
            if not self._layouts.has(signed):
                await self._judge(signed, layout)
            return AcceptAnswer(accept(self._signer, signed, layout))

    async def _judge(self, signed: SignedLayout, layout: Layout) -> None:
        """Returns when this node may accept a layout, and has promised to accept no other."""
        before = await asyncio.to_thread(self._layouts.judge, layout)
        if self._own.name not in seed_nodes(before, layout):
            raise LayoutRefused(f"{self._own.name} has no seed disk by layout {before.epoch}.")
        generation = self._layouts.generation
        promise = await asyncio.to_thread(self._load)
        other = promise is not None and promise.generation >= generation and promise.layout != signed.hash
        if promise is not None and other and not outranks(layout, promise.seeds_lost):
            raise LayoutOvertaken(f"{self._own.name} has accepted another layout {promise.epoch}.")
        if not recovers(layout):
            await self._judge_decided(signed, layout, before)
        elif reason := await self.may_recover(layout):
            raise RecoverRefused(f"{self._own.name} does not accept layout {layout.epoch}: {reason}.")
        lost = layout.seeds_lost if recovers(layout) else ()
        try:
            await asyncio.to_thread(self._save, Promise(generation, layout.epoch, signed.hash, lost))
        except OSError as error:
            log.error("an acceptance can't be noted", file=str(self._file), reason=str(error))
            raise DiskUnusable(f"{self._own.name} can't note what it accepts.") from None
        log.info("a layout is accepted", epoch=layout.epoch, follows=before.epoch)

    async def _judge_decided(self, signed: SignedLayout, layout: Layout, before: Layout) -> None:
        """Returns when the register holds exactly this layout, and what it settles is whole."""
        body = await self._paths.read("layout")
        try:
            decided = decode(body, SignedLayout) if body is not None else None
        except MsgspecError as error:
            raise LayoutRefused(f"The register of the layout does not decode: {error}") from None
        if decided is None or decided.payload != signed.payload:
            raise LayoutOvertaken(f"The system partition has decided another layout than this layout {layout.epoch}.")
        if layout.if_out:
            await asyncio.to_thread(self._check_out, layout, signed)
        if before.seeds_next and layout.seeds == before.seeds_next and (reason := await self.may_settle(layout)):
            raise LayoutRefused(f"Layout {layout.epoch} ends the exchange of a seed disk too early: {reason}.")

    def _check_out(self, layout: Layout, signed: SignedLayout) -> None:
        """Returns when a majority of the storage nodes has voted, in this generation, that the disk is out for which
        the layout was signed beforehand. Raises LayoutRefused.
        """
        layouts, own = self._layouts, self._own
        try:
            check_said_out(layout.if_out, signed.votes, layouts.generation, layouts.at, authority_of(own), own.cluster)
        except VoteRefused as error:
            raise LayoutRefused(
                f"Layout {layout.epoch} was signed for the loss of seed disk {layout.if_out}. {error.message}"
            ) from None

    def _load(self) -> Promise | None:
        try:
            return decode(self._file.read_bytes(), Promise)
        except FileNotFoundError:
            return None
        except MsgspecError as error:
            raise LayoutRefused(f"{self._file} does not decode: {error}. Put it back from a copy.") from None
        except OSError as error:
            raise DiskUnusable(f"{self._own.name} can't read what it accepted: {error}") from None

    def _save(self, promise: Promise) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._file, encode(promise))
