"""System registers by path, and the files that a node keeps about its cluster."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import structlog
from msgspec.structs import replace

from storaged.cluster import moves
from storaged.cluster.identity import Identity
from storaged.cluster.layout import Layout
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.partitions import PartitionRecord, path_of
from storaged.cluster.signed_layout import SignedLayout
from storaged.cluster.succession import is_numbered_as_moving
from storaged.errors import LayoutRefused
from storaged.meta.names import Change, Value, system_name
from storaged.meta.ports import Registers
from storaged.wire import decode, encode

LAYOUT_FILE = "layout.signed"
BASE_FILE = "base.signed"
"""Beside it, for a new node: the layout that placed the keys which never moved."""
LAYOUT_REGISTER = "the register layout"

log = structlog.get_logger("node")


class Taken(Exception):
    """The register holds a value already."""


class SystemPaths:
    """System registers by path."""

    def __init__(self, registers: Registers) -> None:
        self._registers = registers

    async def read(self, path: str) -> bytes | None:
        """The settled body; None when the register was never written. Raises ServiceUnavailable without a majority."""
        value = (await self._registers.read(system_name(path))).value
        return value.body if value is not None and value.body else None

    async def create(self, path: str, body: bytes) -> None:
        """Writes a register that has no value. Raises Taken, and changes nothing, when it has one."""

        def update(value: Value | None) -> Change:
            if value is not None and value.body:
                raise Taken(path)
            return Change(body)

        await self._registers.change(system_name(path), update)

    async def write(self, path: str, body: bytes) -> None:
        """Writes the register, whatever its value was."""
        await self._registers.change(system_name(path), lambda _value: Change(body))

    async def replace(self, path: str, choose: Callable[[bytes | None], bytes | None]) -> bytes | None:
        """Changes a register by compare-and-set: ``choose`` (pure) returns the new body, or None to leave it. Returns
        the body afterwards.
        """

        def update(value: Value | None) -> Change | None:
            body = choose(value.body if value is not None and value.body else None)
            return None if body is None else Change(body)

        after = (await self._registers.change(system_name(path), update)).after
        return after.body if after is not None else None


async def exchange_layout(paths: SystemPaths, layouts: LayoutBook) -> None:
    """Writes the layout in force to the register ``layout`` when that has an older one or none, and learns a newer one
    from it.

    A layout that moves data is put there by ``node.applying`` alone, and stays until it is in force.

    Verifies the signature of what it learns. Raises ServiceUnavailable without a majority, and LayoutRefused for a
    register with a value that the administration key never signed.
    """
    mine = layouts.signed(layouts.epoch)

    def choose(body: bytes | None) -> bytes | None:
        if body is None:
            return encode(mine)
        held = decode(body, SignedLayout)
        if held.payload == mine.payload:
            more = (mine.certificate and not held.certificate) or (mine.following and not held.following)
            return encode(_with_both(mine, held)) if more else None
        layout = decode(held.payload, Layout)
        older = layout.epoch < layouts.epoch or layouts.is_overtaken(layout)
        return encode(mine) if older and not is_pending(held, layouts) else None

    try:
        body = await paths.replace("layout", choose)
        held = decode(body, SignedLayout) if body is not None else None
        if held is not None and not is_pending(held, layouts):
            await layouts.learn(held, LAYOUT_REGISTER)
    except msgspec.MsgspecError as error:
        raise LayoutRefused(f"the register of the layout does not decode: {error}") from None


def _with_both(mine: SignedLayout, held: SignedLayout) -> SignedLayout:
    """One layout, with what either copy of it has."""
    return replace(mine, certificate=mine.certificate or held.certificate, following=mine.following or held.following)


async def write_again(paths: SystemPaths, known: PartitionRecord) -> None:
    """Writes the record of a partition, with its signature, that the system partition has lost: it has an earlier step
    (``PartitionFollower.on_fallen``).
    """

    def choose(body: bytes | None) -> bytes | None:
        held = decode(body, PartitionRecord).step if body is not None else 0
        return encode(known) if held < known.step else None

    try:
        await paths.replace(path_of(known.partition), choose)
    except msgspec.MsgspecError as error:
        raise LayoutRefused(f"The record of partition {known.partition} does not decode: {error}") from None


def is_pending(held: SignedLayout, layouts: LayoutBook) -> bool:
    """Whether this layout of the register was decided, and may still come into force. Raises MsgspecError."""
    if held.certificate or layouts.has(held):
        return False
    layout = decode(held.payload, Layout)
    return is_numbered_as_moving(layout) and not layouts.is_overtaken(layout)


def digests_of(layouts: LayoutBook) -> tuple[bytes, set[bytes]]:
    """The digest of the places of the layout in force, and those of the layouts from which it was reached by moving
    data.
    """
    current = layouts.current
    before = [old for old in layouts.earlier() if current.base and old.epoch >= current.base]
    return moves.places_digest(current), {moves.places_digest(old) for old in before}


def operator_layout(own: Identity, name: str = LAYOUT_FILE) -> SignedLayout | None:
    """The layout beside the certificate, where the operator put it; None when there is none or it does not decode
    (which is logged).
    """
    path = own.directory / name
    try:
        return decode(path.read_bytes(), SignedLayout)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        log.warning("a layout file is passed over", file=str(path), reason=str(error))
        return None


async def learn_operators(own: Identity, layouts: LayoutBook) -> None:
    """Learns the layout beside the certificate. A refused one is noted and the layout in use stays. A node without any
    begins with the one that placed the keys which never moved, and asks its peers for those that followed.

    Raises LayoutRefused without any layout.
    """
    signed, first = operator_layout(own), None if layouts.epoch else operator_layout(own, BASE_FILE)
    try:
        if first is not None:
            await layouts.learn(first, str(own.directory / BASE_FILE))
        if signed is not None and _comes_later(signed, layouts):
            await layouts.propose(signed)
        elif signed is not None:
            await layouts.learn(signed, str(own.directory / LAYOUT_FILE))
    except LayoutRefused:
        if not layouts.epoch:
            raise
    if not layouts.epoch:
        raise LayoutRefused(f"there is no layout: put the signed one into {own.directory} (storaged cluster layout)")


def _comes_later(signed: SignedLayout, layouts: LayoutBook) -> bool:
    """Whether the cluster has to decide this layout, or this node to learn one before it."""
    if not layouts.epoch or layouts.has(signed):
        return False
    try:
        layout = decode(signed.payload, Layout)
    except msgspec.MsgspecError:
        return False
    return bool(layout.base) and (is_pending(signed, layouts) or layouts.by_hash(layout.predecessor) is None)
