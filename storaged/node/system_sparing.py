"""Gives the place of a seed disk that is out to another disk, in gateways, by layouts that were signed beforehand
(``cluster.presigned``).

The record ``disks-out`` says when it is time. Then a gateway takes the first of these layouts whose disk answers, asks
the storage nodes for their votes again, and brings the layout into force as ``storaged cluster apply`` does
(``node.applying``). Votes that are asked now end the matter where the disk is back. While the system partition is joint
by such a layout, the gateway looks whether the disk that comes has everything, and applies the one that ends the
exchange. All gateways do this; the register of the layout decides which one is first. A layout that another gateway has
decided, and not brought into force, is finished, also when the disk is back meanwhile: it would stand in the way of all
others. So each gateway looks into the register now and then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog
from msgspec.structs import replace

from storaged.cluster.layout import Layout
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.presigned import layout_after, step_for, step_to_end
from storaged.cluster.signed_layout import SignedLayout
from storaged.cluster.sparing import Opinion, SignedVote, Vote, verdict_on
from storaged.errors import StoragedError
from storaged.node.applying import LayoutApplication
from storaged.node.sparing_duty import pause_s
from storaged.wire import decode

log = structlog.get_logger("sparing")

REGISTER_LOOKS = 12
"""The register is read at every REGISTER_LOOKS-th look, even if nothing is due."""

Votes = Mapping[str, tuple[Vote, SignedVote]]


@dataclass(frozen=True)
class SystemSparingPorts:
    """``ask(layout, disks)``: the votes of the storage nodes, verified. ``answers(disk)``: whether it can be read now.
    ``may_settle(layout)``: why the system partition can't settle yet; empty when it can. ``note(layout)``: for the
    audit log.
    """

    layouts: LayoutBook
    application: LayoutApplication
    ask: Callable[[Layout, tuple[str, ...]], Awaitable[Votes]]
    answers: Callable[[str], bool]
    may_settle: Callable[[Layout], Awaitable[str]]
    note: Callable[[SignedLayout], None]


class SystemSparing:
    """``run`` is its task."""

    def __init__(self, ports: SystemSparingPorts) -> None:
        self._ports = ports
        self.reason = ""
        """Why the system partition does not leave a seed disk that is out; empty while there is no reason."""
        self._looks = 0

    async def run(self) -> None:
        """Runs for ever."""
        while True:
            try:
                await self.once()
            except (StoragedError, TimeoutError) as error:
                self.reason = str(error)
            await asyncio.sleep(pause_s(self._ports.layouts.current.sparing))

    async def once(self) -> None:
        """Takes the next step when one is due. Raises StoragedError."""
        ports, layout = self._ports, self._ports.layouts.current
        lost, joint = self._lost(layout), bool(layout.seeds_next and layout.if_out)
        self._looks += 1
        if not lost and not joint:
            self.reason = ""
            if self._looks % REGISTER_LOOKS:
                return
        wanted: SignedLayout | None
        wanted, in_force = await ports.application.newest()
        if not lost and not joint and (in_force or not decode(wanted.payload, Layout).if_out):
            return
        if in_force:
            wanted = await (self._end(layout) if layout.seeds_next else self._exchange(layout, lost))
        if wanted is None:
            return
        done = await ports.application.apply(wanted)
        self.reason = ""
        if done["accepted"]:
            ports.note(wanted)
            log.warning("a layout that was signed beforehand is in force", epoch=done["epoch"])

    def _lost(self, layout: Layout) -> list[str]:
        out = self._ports.layouts.partitions.out.disks
        seeds = (seed for seed in layout.seeds if seed not in layout.seeds_lost)
        return [seed for seed in seeds if seed in out and not self._ports.answers(seed)]

    async def _exchange(self, layout: Layout, lost: list[str]) -> SignedLayout | None:
        """The layout that exchanges one of the disks; None, with ``reason``, where there is none."""
        ports, signed = self._ports, self._ports.layouts.signed(layout.epoch)
        out = ports.layouts.partitions.out.disks
        usable = {disk.id for disk in layout.disks if disk.id not in out and ports.answers(disk.id)}
        steps = [step for seed in lost if (step := step_for(signed, seed, usable)) is not None]
        if not steps:
            self.reason = f"no layout was signed beforehand that gives the place of {lost[0]} to a disk that answers"
            return None
        votes = await ports.ask(layout, tuple(step.out for step in steps))
        heard = [vote for vote, _ in votes.values()]

        def says_away(opinion: Opinion) -> bool:
            return opinion.says_away(layout.sparing.registers_s)

        for step in steps:
            if verdict_on(step.out, heard, layout, says_away) is not None:
                return replace(layout_after(signed, step), votes=tuple(each for _, each in votes.values()))
        self.reason = f"no majority of the storage nodes sees seed disk {steps[0].out} away now"
        return None

    async def _end(self, layout: Layout) -> SignedLayout | None:
        """The layout that ends the exchange; None, with ``reason``, while it can't end."""
        signed = self._ports.layouts.signed(layout.epoch)
        step = step_to_end(signed)
        self.reason = "the layout that ends the exchange was not signed beforehand: an administrator has to sign it"
        if step is not None:
            self.reason = await self._ports.may_settle(layout)
        return None if self.reason or step is None else layout_after(signed, step)
