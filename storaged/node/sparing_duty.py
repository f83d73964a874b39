"""Decides which disks are out, in gateways: asks the storage nodes for their votes, and changes the register
``disks-out`` (``cluster.sparing``).

A gateway asks when it has itself seen a disk away for as long as the policy says, or back for so long. It asks for the
disks that are out, too: new votes on them replace the old ones in the record. It verifies the votes of all storage
nodes that answer, and writes by compare-and-set what a majority of them decides. Where it lacks a majority nothing
changes, and ``reason`` says so. All gateways do this; the second one finds that the first has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import structlog
from msgspec import MsgspecError

from storaged.clock import Clock
from storaged.cluster.layout import Layout, Sparing
from storaged.cluster.ports import Caller, Layouts
from storaged.cluster.sparing import (
    DISKS_MAX,
    NONCE_BYTES,
    NONE_OUT,
    PATH,
    DisksOut,
    Opinion,
    SignedVote,
    Vote,
    VoteAsk,
    decide,
    due,
    majority_of,
    voters_of,
)
from storaged.errors import LayoutRefused, StoragedError, VoteRefused
from storaged.wire import decode, encode

LOOK_S = 5.0
LOOKS_A_DELAY = 4
"""With a short delay a gateway looks more often."""
CALL_S = 5.0

log = structlog.get_logger("sparing")


def pause_s(policy: Sparing) -> float:
    """Between two looks of a gateway."""
    return min(LOOK_S, max(1.0, policy.fragments_s / LOOKS_A_DELAY))


class Paths(Protocol):
    """``node.system.SystemPaths``."""

    async def replace(self, path: str, choose: Callable[[bytes | None], bytes | None]) -> bytes | None: ...


@dataclass(frozen=True)
class SparingPorts:
    """``seen()``: what this node has seen of each disk. ``read()``: reads the register into ``layouts.partitions``.
    ``verify(signed)`` returns a vote that counts; raises VoteRefused. ``sign(record)``: with the signing key of the
    cluster's gateways. ``note(before, after)``: for the audit log.
    """

    layouts: Layouts
    caller: Caller
    paths: Paths
    clock: Clock
    verify: Callable[[SignedVote], Vote]
    seen: Callable[[], dict[str, Opinion]]
    read: Callable[[], Awaitable[None]]
    sign: Callable[[DisksOut], DisksOut]
    entropy: Callable[[int], bytes]
    note: Callable[[DisksOut, DisksOut], None]


class SparingDuty:
    """``run`` is its task."""

    def __init__(self, ports: SparingPorts) -> None:
        self._ports = ports
        self.reason = ""
        """Why a disk that should go out, or come back, does not; empty while there is none."""

    async def run(self) -> None:
        """Runs for ever."""
        while True:
            try:
                await self.once()
            except (StoragedError, TimeoutError) as error:
                self.reason = str(error)
            await asyncio.sleep(pause_s(self._ports.layouts.current.sparing))

    async def once(self) -> None:
        """Asks and writes when something is due. Raises StoragedError."""
        layouts, seen = self._ports.layouts, self._ports.seen()
        layout = layouts.current
        if not due(layout, layouts.partitions.out, seen):
            self.reason = ""
            return
        await self._ports.read()  # another gateway may have decided
        known = layouts.partitions.out
        disks = due(layout, known, seen)
        if not disks:
            return
        asked = (*disks, *sorted(known.disks.difference(disks)))[:DISKS_MAX]
        votes = await self.ask(layout, asked)
        record = decide(layout, known, votes, self._ports.clock.wall_ms())
        self.reason = _why_not(layout, known, record, disks, len(votes))
        if record is not None and await self._write(known, self._ports.sign(record)):
            self._ports.note(known, record)

    async def ask(self, layout: Layout, disks: tuple[str, ...]) -> dict[str, tuple[Vote, SignedVote]]:
        """The votes on these disks that count, by node."""
        ask = VoteAsk(self._ports.entropy(NONCE_BYTES), disks)
        found: dict[str, tuple[Vote, SignedVote]] = {}

        async def one(node: str) -> None:
            try:
                signed, _ = await self._ports.caller.call(node, "cluster.vote", ask, SignedVote, timeout_s=CALL_S)
                vote = self._ports.verify(signed)
                if {opinion.disk for opinion in vote.opinions}.difference(disks):
                    raise VoteRefused("It names disks that were not asked for.")
            except VoteRefused as error:
                log.error("a vote does not count", node=node, reason=str(error))
            except (StoragedError, TimeoutError):
                pass  # most likely it is the node that is away
            else:
                if (vote.node, vote.epoch, vote.nonce) == (node, layout.epoch, ask.nonce):
                    found[node] = vote, signed

        await asyncio.gather(*(one(node) for node in sorted(voters_of(layout))))
        return found

    async def _write(self, known: DisksOut, record: DisksOut) -> bool:
        """Whether it is in the register now. False when another gateway was first."""
        body = encode(record)

        def choose(held: bytes | None) -> bytes | None:
            # Lower than what was known before: it was lost with the majority of the system partition.
            return body if _number_in(held) <= known.number else None

        after = await self._ports.paths.replace(PATH, choose)
        await self._ports.read()
        return after == body


def _number_in(body: bytes | None) -> int:
    """Raises LayoutRefused for what is no record."""
    try:
        return decode(body, DisksOut).number if body is not None else NONE_OUT.number
    except MsgspecError as error:
        raise LayoutRefused(f"The register {PATH} does not decode: {error}") from None


def _why_not(layout: Layout, known: DisksOut, record: DisksOut | None, disks: tuple[str, ...], votes: int) -> str:
    after = known if record is None else record
    left = [disk for disk in disks if (disk in after.disks) == (disk in known.disks)]
    if not left:
        return ""
    named = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    if votes < majority_of(layout):
        return f"disk {named}: {votes} of {len(voters_of(layout))} storage nodes vote, {majority_of(layout)} have to"
    if all(disk in known.disks for disk in left):
        return f"disk {named}: no majority has seen it back for {layout.sparing.fragments_s} s"
    return (
        f"disk {named}: no majority has seen it away for {layout.sparing.registers_s} s, or more than"
        f" {layout.sparing.domains_max} {layout.domain_kind}s would be replaced at the same time"
    )
