"""What every node does for disks that are out (``cluster.sparing``): it watches disks, and follows the register. A
storage node votes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog
from msgspec import MsgspecError

from storaged.clock import Clock
from storaged.cluster.identity import Identity, NodeSigner
from storaged.cluster.ports import Call, Layouts, Method, Methods
from storaged.cluster.rpc.authority import grant
from storaged.cluster.signers import is_signed
from storaged.cluster.sparing import DISKS_MAX, NONCE_BYTES, PATH, DisksOut, Opinion, Vote, VoteAsk, signed_bytes
from storaged.cluster.votes import check_votes, sign_vote
from storaged.errors import CertificateRefused, StoragedError, VoteRefused
from storaged.wire import Message, decode

if TYPE_CHECKING:  # it builds this
    from storaged.node.planes import NodePlanes

LOOK_S = 1.0
PAUSE_MAX_S = 30.0
"""After a longer pause between two looks nothing is known of the time between: all times begin anew."""
READ_EVERY_S = 30.0

log = structlog.get_logger("sparing")


class DiskTimes:
    """How long each disk of the layout has been away, or has answered, as this process has seen it.

    ``why_away(disk)``: the reason; empty while it can be read.
    """

    def __init__(self, layouts: Layouts, why_away: Callable[[str], str], clock: Clock) -> None:
        self._layouts = layouts
        self._why_away = why_away
        self._clock = clock
        self._since: dict[str, tuple[bool, float]] = {}
        self._looked = float("-inf")

    def seen(self) -> dict[str, Opinion]:
        """By disk, as of now."""
        now = self._clock.monotonic()
        if now - self._looked > PAUSE_MAX_S:
            self._since.clear()
        self._looked = now
        found, since = {}, {}
        for disk in self._layouts.current.disk_by_id:
            state = self._why_away(disk)
            known = self._since.get(disk)
            since[disk] = known if known is not None and known[0] == bool(state) else (bool(state), now)
            found[disk] = Opinion(disk, state, int(now - since[disk][1]))
        self._since = since
        return found

    async def run(self) -> None:
        """Runs for ever."""
        while True:
            self.seen()
            await asyncio.sleep(LOOK_S)


class Voter:
    """Serves ``cluster.vote`` on a storage node. ``own()``: its identity now."""

    def __init__(self, own: Callable[[], Identity], layouts: Layouts, times: DiskTimes) -> None:
        self._own = own
        self._layouts = layouts
        self._times = times
        self._signer: tuple[Identity, NodeSigner] | None = None

    def methods(self) -> Methods:
        return grant({"cluster.vote": Method(VoteAsk, self._on_ask)})

    async def _on_ask(self, ask: VoteAsk, _call: Call) -> Message:
        if len(ask.nonce) != NONCE_BYTES or not 0 < len(set(ask.disks)) == len(ask.disks) <= DISKS_MAX:
            raise VoteRefused(f"A question names 1 to {DISKS_MAX} disks once, and has a nonce of {NONCE_BYTES} bytes.")
        own, seen = self._own(), self._times.seen()
        if self._signer is None or self._signer[0] is not own:
            self._signer = own, NodeSigner(own)
        opinions = tuple(seen[disk] for disk in ask.disks if disk in seen)
        return sign_vote(self._signer[1], Vote(own.cluster, own.name, self._layouts.current.epoch, ask.nonce, opinions))


class NodeSparing:
    """Of one node. ``work`` returns its tasks."""

    def __init__(self, node: NodePlanes) -> None:
        self._node = node
        self._reading = asyncio.Lock()
        self.times = DiskTimes(node.layouts, node.membership.why_away, node.clock)
        self.refused = ""
        """Why the record in the register is not believed; empty when it is."""

    def methods(self) -> Methods:
        node = self._node
        return Voter(lambda: node.own, node.layouts, self.times).methods() if node.config.storage else {}

    def work(self) -> list[Coroutine[Any, Any, None]]:
        """A gateway's further workers move nothing, and don't read the register."""
        return [self.times.run(), self._follow()] if self._node.leader is None else []

    async def _follow(self) -> None:
        while True:
            try:
                await self.read()
            except (StoragedError, TimeoutError) as error:
                log.debug("which disks are out is read later", reason=str(error))
            await asyncio.sleep(READ_EVERY_S)

    async def read(self) -> None:
        """Reads the register. Raises ServiceUnavailable without a majority of the system partition."""
        async with self._reading:
            body = await self._node.paths.read(PATH)
            if body is not None:
                await self._learn(body)

    def _judge(self, record: DisksOut) -> None:
        """In a thread, with what follows for all partitions: 100 ms with 100 disks. Raises VoteRefused."""
        node = self._node
        check_votes(record, node.layouts.at, node.authority, node.own.cluster)
        node.layouts.partitions.prepare(node.layouts.current, record)

    async def _learn(self, body: bytes) -> None:
        node, partitions = self._node, self._node.layouts.partitions
        try:
            record = decode(body, DisksOut)
            if record.number <= partitions.out.number:
                return
            key = await node.signers.key(record.signer)
            if not is_signed(key, signed_bytes(node.own.cluster, record), record.signature):
                raise VoteRefused("The record of disks that are out is not signed by a gateway.")
            await asyncio.to_thread(self._judge, record)
        except (MsgspecError, CertificateRefused, VoteRefused) as error:
            if self.refused != str(error):
                log.error("the record of disks that are out is not believed", reason=str(error))
            self.refused = str(error)
            return
        self.refused = ""
        if partitions.note_out(record):
            log.info("disks are out", number=record.number, disks=",".join(sorted(record.disks)) or "none")
