"""Catch-up is a pull: the node of a disk that lags has it adopt what the others agree on.

A node that finds replicas that differ (``bring_up``) looks at all of them. What a quorum has accepted under one ballot
and value is chosen. A disk that has something older accepts it too, under that ballot, as if the accept had come late:
its promises and fences may refuse it. For disks of its own the node does that at once. It asks other
nodes to look at the registers (``maintain.behind``): each looks itself, and believes no single replica, nor the node
that asks. Everything else (no quorum agrees, a replica has something newer, a row is damaged, a copy is missing, a
promise or a fence is in the way) a gateway has to settle.

The disk's promises are respected although the value is chosen: collection concludes from an accept that the disk had
promised nothing higher before (``consensus.looks``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from storaged.cluster.ports import Call, Caller, Method, Methods
from storaged.cluster.rpc import faults
from storaged.cluster.rpc.authority import grant
from storaged.errors import PeerError, PeerRefused, StoragedError
from storaged.maintain.context import MaintainContext, concurrently
from storaged.meta.consensus.looks import Held, Look, chosen
from storaged.meta.consensus.register import Verdict
from storaged.meta.messages import Accept
from storaged.meta.names import RegisterName, Table
from storaged.wire import Buffer, Message

NAMES_A_CALL = 100
AT_ONCE_MAX = 8
NO_COPY: Sequence[Buffer] = ()


class Behind(Message, frozen=True):
    """Registers (packed names, up to ``NAMES_A_CALL``) of which a disk of the asked node lags."""

    names: tuple[bytes, ...]


class BroughtUp(Message, frozen=True):
    """Those that no disk of this node lags with any more."""

    names: tuple[bytes, ...] = ()


class Pull:
    """Of one storage node."""

    def __init__(self, context: MaintainContext, caller: Caller) -> None:
        self._context = context
        self._caller = caller
        self.adopted = 0

    async def bring_up(self, name: RegisterName) -> None:
        """Brings the replicas of a register that answer to the same row. Raises as ``Registers.settle``."""
        look = await self._context.look(name)
        held = chosen(look)
        if held is None or look.fenced or self._unseen(look):
            await self._context.registers.settle(name)
            return
        behind = [disk for disk, its in look.held.items() if its.ballot < held.ballot]
        done = await asyncio.gather(*(self._bring_up_at(disk, name, held) for disk in behind))
        if not all(done):
            await self._context.registers.settle(name)

    def _unseen(self, look: Look) -> bool:
        """A replica that should answer has not said what it holds: its row may be damaged."""
        missing = [disk for disk in look.quorum.disks if disk not in look.held]
        return any(map(self._context.liveness.disk_readable, missing))

    async def _bring_up_at(self, disk: str, name: RegisterName, held: Held) -> bool:
        if disk in self._context.local_meta:
            return await self._adopt(disk, name, held)
        entry, timeout_s = self._context.layouts.current.disk_by_id.get(disk), self._context.limits.call_timeout_s
        if entry is None:  # a gateway settles it
            return False
        try:
            found, _ = await self._caller.call(
                entry.node, "maintain.behind", Behind((name.pack(),)), BroughtUp, timeout_s=timeout_s
            )
        except PeerError:
            return False
        return name.pack() in found.names

    async def _adopt(self, disk: str, name: RegisterName, held: Held) -> bool:
        """Has a disk of this node accept what a quorum has, with its copy."""
        value = held.value
        header, body = b"", NO_COPY
        if value is None:
            return False
        if value.payload:
            copies = await self._context.small_copies(name, value)
            if not copies or disk not in self._context.layouts.partition(name.partition).disks:
                return False
            header, body = copies[self._context.layouts.partition(name.partition).position_of(disk)]
        try:
            request = Accept(disk, name, held.ballot, value, b"", True, header)
            reply = await self._context.adopt(disk, request, body)
        except StoragedError as error:
            self._context.log(f"disk {disk} can't be brought up now: {error}")
            return False
        self.adopted += reply.verdict == Verdict.OK
        return reply.verdict == Verdict.OK and (reply.copy_synced or not value.payload)

    async def _look_and_adopt(self, name: RegisterName) -> bool:
        """Whether no disk of this node lags with the register now."""
        if name.table == Table.SYSTEM:
            return False
        look = await self._context.look(name)
        held = chosen(look)
        own = [disk for disk in look.held if disk in self._context.local_meta]
        if held is None or look.fenced or not own:
            return False
        lagging = [disk for disk in own if look.held[disk].ballot < held.ballot]
        return all([await self._adopt(disk, name, held) for disk in lagging])

    def methods(self) -> Methods:
        async def behind(request: Behind, _call: Call) -> BroughtUp:
            if len(request.names) > NAMES_A_CALL:
                raise PeerRefused(f"{len(request.names)} names at once", remote_code=faults.BAD_MESSAGE)
            try:
                names = [RegisterName.unpack(name) for name in request.names]
            except ValueError as error:
                raise PeerRefused(str(error), remote_code=faults.BAD_MESSAGE) from None
            done: list[bytes] = []

            async def one(name: RegisterName) -> None:
                try:
                    if await self._look_and_adopt(name):
                        done.append(name.pack())
                except (StoragedError, TimeoutError) as error:
                    self._context.log(f"a register can't be looked at now: {error}")

            await concurrently(map(one, names), AT_ONCE_MAX)
            return BroughtUp(tuple(done))

        return grant({"maintain.behind": Method(Behind, behind)})
