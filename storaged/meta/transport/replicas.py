"""Replicas of other nodes, and of this one, behind one port; and the methods with which a node
answers for its disks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, TypeVar

import msgspec

from storaged.cluster.layout import DiskEntry, Layout
from storaged.cluster.ports import (
    Call,
    Caller,
    EncodedCall,
    Layouts,
    Method,
    Methods,
    OnAnswer,
    OnReply,
    Reply,
    TryCaller,
)
from storaged.cluster.rpc.authority import grant
from storaged.errors import DiskUnusable, InvalidRequest
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.authority import Gate, KnownSteps, OnRefusal
from storaged.meta.consensus.bounds import check_floor
from storaged.meta.consensus.register import RULES, Rules, Verdict
from storaged.meta.messages import ScanReply, ScanRequest
from storaged.meta.names import Ballot, RegisterName
from storaged.meta.ports import Replica
from storaged.meta.storage.scan import Want
from storaged.meta.transport.accept_batching import ALONE_MAX, AcceptBatcher, try_accepts
from storaged.meta.transport.read_batching import OnRow, ReadBatcher, answer_read, answer_reads
from storaged.wire import Buffer, Message, encode

M = TypeVar("M", bound=Message)

_COMPARE = (Want.STAMPS, Want.PIECES)

_POSTED: dict[type[Message], tuple[str, type[Message]]] = {
    messages.Prepare: ("meta.prepare", messages.PrepareReply),
    messages.Accept: ("meta.accept", messages.AcceptReply),
    messages.Create: ("meta.create", messages.AcceptReply),
    messages.Read: ("meta.read", messages.ReadReply),
    ScanRequest: ("meta.scan", ScanReply),
}


class RemoteReplica:
    """``ports.RemoteTryReplica`` over RPC: one disk of another node."""

    def __init__(
        self,
        caller: Caller,
        node: str,
        disk: str,
        reads: ReadBatcher | None = None,
        accepts: AcceptBatcher | None = None,
    ) -> None:
        self._caller = caller
        self._try_caller = caller if isinstance(caller, TryCaller) else None
        self._reads = reads
        self._accepts = accepts
        self.node = node
        self.disk = disk
        self._encoded: dict[type[Message], tuple[bytes, EncodedCall, AcceptBatcher | None]] = {}
        """By the type of the request: how its encoding begins, the call that sends it by itself, and the batcher that
        sends it with others.
        """

    def try_call(
        self, request: Message, on_reply: OnReply, *, body: Sequence[Buffer] = (), timeout_s: float = 10.0
    ) -> bool:
        if self._try_caller is None:
            return False
        method, reply = _POSTED[type(request)]
        return self._try_caller.try_call(self.node, method, request, reply, on_reply, body=body, timeout_s=timeout_s)

    def try_call_encoded(
        self,
        kind: type[Message],
        first: bytes,
        tail: bytes,
        on_reply: OnReply,
        body: Sequence[Buffer],
        timeout_s: float,
    ) -> bool:
        """See ``ports.RemoteTryReplica``."""
        known = self._encoded.get(kind)
        if known is None:
            if self._try_caller is None:
                return False
            method, reply = _POSTED[kind]
            start = first + encode(self.disk)
            batcher = self._accepts if reply is messages.AcceptReply else None
            known = self._encoded[kind] = start, self._try_caller.encoded_call(self.node, method, reply, start), batcher
        start, call, batcher = known
        if batcher is None:
            return call(tail, on_reply, body, timeout_s)
        return batcher.ask((kind is messages.Create, start + tail, call, tail, body, on_reply, timeout_s))

    def try_ask_row(self, ask: bytes, epoch: int, on_row: OnRow, timeout_s: float) -> bool:
        """See ``read_batching.RowReader.ask``. False: this needs a task."""
        if self._reads is None:
            return False
        self._reads.ask(self.disk, ask, epoch, on_row, timeout_s)
        return True

    async def prepare(self, request: messages.Prepare, *, timeout_s: float = 10.0) -> messages.PrepareReply:
        reply, _ = await self._caller.call(
            self.node, "meta.prepare", request, messages.PrepareReply, timeout_s=timeout_s
        )
        return reply

    async def accept(
        self, request: messages.Accept, body: Sequence[Buffer] = (), *, timeout_s: float = 10.0
    ) -> messages.AcceptReply:
        method, _reply = _POSTED[type(request)]
        reply, _ = await self._caller.call(
            self.node, method, request, messages.AcceptReply, body=body, timeout_s=timeout_s
        )
        return reply

    async def read(self, request: messages.Read, *, timeout_s: float = 10.0) -> tuple[messages.ReadReply, memoryview]:
        return await self._caller.call(self.node, "meta.read", request, messages.ReadReply, timeout_s=timeout_s)

    async def page_put(self, request: messages.PagePut, *, timeout_s: float = 10.0) -> messages.PageReply:
        reply, _ = await self._caller.call(self.node, "meta.page_put", request, messages.PageReply, timeout_s=timeout_s)
        return reply

    async def page_get(self, request: messages.PageGet, *, timeout_s: float = 10.0) -> messages.PageReply:
        reply, _ = await self._caller.call(self.node, "meta.page_get", request, messages.PageReply, timeout_s=timeout_s)
        return reply

    async def page_check(self, request: messages.PageCheck, *, timeout_s: float = 10.0) -> messages.PagesMissing:
        reply, _ = await self._caller.call(
            self.node, "meta.page_check", request, messages.PagesMissing, timeout_s=timeout_s
        )
        return reply

    async def fence(self, request: messages.FenceSet, *, timeout_s: float = 10.0) -> messages.FenceReply:
        reply, _ = await self._caller.call(self.node, "meta.fence", request, messages.FenceReply, timeout_s=timeout_s)
        return reply

    async def unfence(self, request: messages.FenceLift, *, timeout_s: float = 10.0) -> messages.FenceReply:
        reply, _ = await self._caller.call(self.node, "meta.unfence", request, messages.FenceReply, timeout_s=timeout_s)
        return reply

    async def fence_epoch(self, request: messages.EpochFence, *, timeout_s: float = 10.0) -> messages.EpochReply:
        reply, _ = await self._caller.call(
            self.node, "meta.fence_epoch", request, messages.EpochReply, timeout_s=timeout_s
        )
        return reply

    async def turn(self, request: messages.Turn, *, timeout_s: float = 10.0) -> messages.TurnReply:
        """See ``ports.TurnReplica``."""
        reply, _ = await self._caller.call(self.node, "meta.turn", request, messages.TurnReply, timeout_s=timeout_s)
        return reply

    async def scan(self, request: ScanRequest, *, timeout_s: float = 10.0) -> ScanReply:
        reply, _ = await self._caller.call(self.node, "meta.scan", request, ScanReply, timeout_s=timeout_s)
        return reply

    @property
    def handover(self) -> RemoteHandover:
        return RemoteHandover(self._caller, self.node)

    @property
    def floors(self) -> RemoteFloors:
        return RemoteFloors(self._caller, self.node)


class _Remote:
    """What the ports of one node have in common."""

    def __init__(self, caller: Caller, node: str) -> None:
        self._caller = caller
        self._node = node

    async def _ask(self, method: str, request: Message, kind: type[M], timeout_s: float) -> M:
        reply, _ = await self._caller.call(self._node, method, request, kind, timeout_s=timeout_s)
        return reply


class RemoteHandover(_Remote):
    """``ports.Handover`` over RPC."""

    async def fences(self, request: messages.FencesAsk, *, timeout_s: float = 10.0) -> messages.FencesReply:
        return await self._ask("meta.fences", request, messages.FencesReply, timeout_s)

    async def take_fences(self, request: messages.FencesTake, *, timeout_s: float = 10.0) -> messages.FenceReply:
        return await self._ask("meta.take_fences", request, messages.FenceReply, timeout_s)

    async def ranges(self, request: messages.RangesAsk, *, timeout_s: float = 10.0) -> messages.RangesReply:
        return await self._ask("meta.ranges", request, messages.RangesReply, timeout_s)


class RemoteFloors(_Remote):
    """``ports.Floors`` over RPC."""

    async def set_floor(self, request: messages.FloorSet, *, timeout_s: float = 10.0) -> messages.FloorReply:
        return await self._ask("meta.floor", request, messages.FloorReply, timeout_s)

    async def expunge(self, request: messages.Expunge, *, timeout_s: float = 10.0) -> messages.ExpungeReply:
        return await self._ask("meta.expunge", request, messages.ExpungeReply, timeout_s)

    async def floors(self, request: messages.FloorsAsk, *, timeout_s: float = 10.0) -> messages.FloorsReply:
        return await self._ask("meta.floors", request, messages.FloorsReply, timeout_s)

    async def take_floors(self, request: messages.FloorsTake, *, timeout_s: float = 10.0) -> messages.FloorReply:
        return await self._ask("meta.take_floors", request, messages.FloorReply, timeout_s)


class ReplicaDirectory:
    """``ports.Replicas``: this node's disks without the network, every other disk of the layout through ``caller``. A
    disk of this ``node`` that is not among ``local`` is out of use, and is not asked.
    """

    def __init__(
        self,
        layouts: Layouts,
        caller: Caller,
        local: Mapping[str, Replica] | None = None,
        *,
        node: str = "",
        alone_max: int = ALONE_MAX,
    ) -> None:
        self._layouts = layouts
        self._caller = caller
        self._node = node
        self._alone_max = alone_max
        self._local = local if local is not None else {}
        self._remote: dict[str, RemoteReplica] = {}
        self._layout: Layout | None = None
        """The layout that ``_remote`` was built for."""
        self._batchers: dict[str, tuple[ReadBatcher, AcceptBatcher]] = {}

    def replica(self, disk_id: str) -> Replica:
        local = self._local.get(disk_id)
        if local is not None:
            return local
        layout = self._layouts.current
        if layout is self._layout:
            found = self._remote.get(disk_id)
            if found is not None:
                return found
        return self._look_up(layout, disk_id)

    def _look_up(self, layout: Layout, disk_id: str) -> RemoteReplica:
        if layout is not self._layout:
            self._layout = layout
            nodes = {disk_id: entry.node for disk_id, entry in layout.disk_by_id.items()}
            self._remote = {
                disk_id: known for disk_id, known in self._remote.items() if nodes.get(disk_id) == known.node
            }
        entry = layout.disk_by_id.get(disk_id) or self._removed(disk_id)
        if entry is None:
            raise DiskUnusable(f"No disk {disk_id} in the layout of epoch {layout.epoch}.")
        if entry.node == self._node:
            raise DiskUnusable(f"Disk {disk_id} is not in use on this node.")
        found = self._remote[disk_id] = RemoteReplica(self._caller, entry.node, disk_id, *self._batchers_of(entry.node))
        return found

    def _removed(self, disk_id: str) -> DiskEntry | None:
        """A disk that the layout does not name any more serves partitions until they have moved away from it."""
        earlier = self._layouts.earlier()
        return next((known.disk_by_id[disk_id] for known in earlier if disk_id in known.disk_by_id), None)

    def _batchers_of(self, node: str) -> tuple[ReadBatcher, AcceptBatcher] | tuple[()]:
        """Those of all disks of one node."""
        batchers = self._batchers.get(node)
        if batchers is None and isinstance(self._caller, TryCaller):
            batchers = self._batchers[node] = (
                ReadBatcher(self._caller, node),
                AcceptBatcher(self._caller, node, self._alone_max),
            )
        return batchers or ()


class ReplicaHost:
    """The replicas of this node's disks, by disk id. ``replicas`` may change while the node runs: a disk that fails is
    taken out by its owner.
    """

    def __init__(
        self,
        replicas: Mapping[str, LocalReplica],
        newest_epoch: Callable[[], int],
        rules: Rules = RULES,
        on_refusal: OnRefusal = lambda peer, error: None,
        steps: KnownSteps = KnownSteps(),  # noqa: B008
    ) -> None:
        """All but ``replicas``: see ``authority.Gate``."""
        self.replicas = replicas
        self.compared_at = -inf
        """When another node last compared its rows with those of disks here, by the event loop's clock."""
        self._steps = steps
        self._gate = Gate(newest_epoch, rules, on_refusal, steps)

    def _of(self, disk: str) -> LocalReplica:
        found = self.replicas.get(disk)
        if found is None:
            raise DiskUnusable(f"Disk {disk} is not in use on this node.")
        return found

    def methods(self) -> Methods:
        """What a storage node registers."""
        methods = {
            "meta.prepare": Method(messages.Prepare, self._prepare, try_answer=self._try_prepare),
            "meta.accept": Method(messages.Accept, self._accept, try_start=self._try_accept),
            "meta.create": Method(messages.Create, self._accept, try_start=self._try_accept),
            "meta.accepts": Method(
                messages.Accepts, self._accepts, try_start=partial(try_accepts, self._of, self._gate)
            ),
            "meta.read": Method(messages.Read, self._read, try_answer=self._try_read),
            "meta.reads": Method(messages.Reads, self._reads, try_answer=self._try_reads),
            "meta.page_put": Method(messages.PagePut, self._page_put),
            "meta.page_get": Method(messages.PageGet, self._page_get),
            "meta.page_check": Method(messages.PageCheck, self._page_check),
            "meta.fence": Method(messages.FenceSet, self._fence),
            "meta.unfence": Method(messages.FenceLift, self._unfence),
            "meta.fence_epoch": Method(messages.EpochFence, self._fence_epoch),
            "meta.fences": Method(messages.FencesAsk, self._fences),
            "meta.take_fences": Method(messages.FencesTake, self._take_fences),
            "meta.ranges": Method(messages.RangesAsk, self._ranges),
            "meta.floor": Method(messages.FloorSet, self._floor),
            "meta.expunge": Method(messages.Expunge, self._expunge),
            "meta.floors": Method(messages.FloorsAsk, self._floors),
            "meta.take_floors": Method(messages.FloorsTake, self._take_floors),
            "meta.scan": Method(ScanRequest, self._scan, try_answer=self._try_scan),
            "meta.turn": Method(messages.Turn, self._turn, try_start=self._try_turn),
        }
        return grant(methods)

    def _try_prepare(self, request: messages.Prepare, call: Call) -> messages.PrepareReply | None:
        if verdict := self._gate.judge(request, call.peer):
            return messages.PrepareReply(verdict)
        return self._of(request.disk).try_prepare(request)

    async def _prepare(self, request: messages.Prepare, call: Call) -> messages.PrepareReply:
        if verdict := self._gate.judge(request, call.peer):
            return messages.PrepareReply(verdict)
        return await self._of(request.disk).prepare(request)

    def _try_accept(self, request: messages.Accept, call: Call, answer: OnAnswer) -> bool:
        if verdict := self._gate.judge(request, call.peer):
            answer(messages.AcceptReply(verdict))
            return True
        return self._of(request.disk).try_accept(request, (call.body,), answer)

    async def _accept(self, request: messages.Accept, call: Call) -> messages.AcceptReply:
        if verdict := self._gate.judge(request, call.peer):
            return messages.AcceptReply(verdict)
        return await self._of(request.disk).accept(request, (call.body,))

    async def _accepts(self, request: messages.Accepts, call: Call) -> Message | Reply:
        answered: asyncio.Future[Message | Reply | Exception] = asyncio.get_running_loop().create_future()
        try_accepts(
            self._of,
            self._gate,
            request,
            call,
            lambda outcome: None if answered.done() else answered.set_result(outcome),
        )
        outcome = await answered
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _try_read(self, request: messages.Read, _call: Call) -> Reply | None:
        found = self._of(request.disk).try_read(request)
        return None if found is None else Reply(found[0], (found[1],) if len(found[1]) else ())

    async def _read(self, request: messages.Read, _call: Call) -> Reply:
        reply, payload = await self._of(request.disk).read(request)
        return Reply(reply, (payload,) if len(payload) else ())

    def _try_reads(self, request: messages.Reads, _call: Call) -> Reply | None:
        reply, copies = answer_reads(self.replicas, request)
        if request.wait and any(row is None for rows in reply.found for row in rows):
            return None
        return Reply(reply, copies)

    async def _reads(self, request: messages.Reads, _call: Call) -> Reply:
        reply, copy = await answer_read(self._of(request.disks[0]), request)
        return Reply(reply, (copy,) if len(copy) else ())

    async def _page_put(self, request: messages.PagePut, call: Call) -> messages.PageReply:
        if request.owner and "gateway" not in call.peer.roles:
            request = msgspec.structs.replace(request, owner=b"")  # only gateways say by what record a page is judged
        return await self._of(request.disk).page_put(request)

    async def _page_get(self, request: messages.PageGet, _call: Call) -> messages.PageReply:
        return await self._of(request.disk).page_get(request)

    async def _page_check(self, request: messages.PageCheck, _call: Call) -> messages.PagesMissing:
        return await self._of(request.disk).page_check(request)

    async def _fence(self, request: messages.FenceSet, _call: Call) -> messages.FenceReply:
        return await self._of(request.disk).fence(request)

    async def _unfence(self, request: messages.FenceLift, _call: Call) -> messages.FenceReply:
        return await self._of(request.disk).unfence(request)

    async def _fence_epoch(self, request: messages.EpochFence, _call: Call) -> messages.EpochReply:
        if request.partition == messages.WHOLE_DISK:
            raise InvalidRequest("No node fences a whole disk of another one: name a partition.")
        if not self._gate.knows(request.partition, request.epoch):
            await self._steps.refresh(request.partition)
        if not self._gate.knows(request.partition, request.epoch):
            return messages.EpochReply(0)  # a step without a record would stop the partition for ever
        return await self._of(request.disk).fence_epoch(request)

    async def _fences(self, request: messages.FencesAsk, _call: Call) -> messages.FencesReply:
        return await self._of(request.disk).handover.fences(request)

    async def _take_fences(self, request: messages.FencesTake, _call: Call) -> messages.FenceReply:
        return await self._of(request.disk).handover.take_fences(request)

    async def _ranges(self, request: messages.RangesAsk, _call: Call) -> messages.RangesReply:
        return await self._of(request.disk).handover.ranges(request)

    async def _floor(self, request: messages.FloorSet, _call: Call) -> messages.FloorReply:
        if not self._knows_step(request.prefix, request.ballot):
            return messages.FloorReply(Verdict.NEWER)
        return await self._of(request.disk).floors.set_floor(request)

    async def _expunge(self, request: messages.Expunge, _call: Call) -> messages.ExpungeReply:
        if not self._knows_step(request.prefix, request.ballot):
            return messages.ExpungeReply(Verdict.NEWER)
        return await self._of(request.disk).floors.expunge(request)

    def _knows_step(self, prefix: bytes, floor: Ballot) -> bool:
        check_floor(prefix, floor)
        return self._gate.knows(RegisterName(prefix[0], prefix[1:17], prefix[17], b"").partition, floor.epoch)

    async def _floors(self, request: messages.FloorsAsk, _call: Call) -> messages.FloorsReply:
        return await self._of(request.disk).floors.floors(request)

    async def _take_floors(self, request: messages.FloorsTake, _call: Call) -> messages.FloorReply:
        return await self._of(request.disk).floors.take_floors(request)

    def _try_turn(self, request: messages.Turn, call: Call, answer: OnAnswer) -> bool:
        self._of(request.disk).turns.ask(call.peer.name, request, answer)
        return True

    async def _turn(self, request: messages.Turn, call: Call) -> messages.TurnReply:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._try_turn(request, call, lambda answer: None if answered.done() else answered.set_result(answer))
        outcome = await answered
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, messages.TurnReply)
        return outcome

    def _try_scan(self, request: ScanRequest, _call: Call) -> ScanReply | None:
        self._note(request)
        return self._of(request.disk).try_scan(request)

    def _note(self, request: ScanRequest) -> None:
        if any(ask.want in _COMPARE for ask in request.shards[:1]):
            self.compared_at = asyncio.get_running_loop().time()

    async def _scan(self, request: ScanRequest, _call: Call) -> ScanReply:
        self._note(request)
        return await self._of(request.disk).scan(request)
