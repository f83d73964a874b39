"""Fragment stores over RPC: the port for the disks of other nodes, the host that answers for this node's disks, and the
directory of all disks.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from storaged.cluster.ports import BeginCaller, Call, Caller, Layouts, Method, Methods, Reply, TryCaller
from storaged.cluster.rpc.authority import grant
from storaged.errors import DiskUnusable, FragmentDamaged, FragmentOther, PeerError, PeerRefused, StoragedError
from storaged.fragments.format import KEY_BYTES
from storaged.fragments.messages import (
    MISSING_CELL,
    DeleteRequest,
    Done,
    HeadersReply,
    IdsRequest,
    ReadReply,
    ReadRequest,
    ReadsReply,
    ReadsRequest,
    RetiredReply,
    RetiredRequest,
    RetireRequest,
    ScanReply,
    ScanRequest,
    StatsReply,
    TouchRequest,
    UnretireRequest,
    UsageReply,
    UsageRequest,
    WriteRequest,
)
from storaged.fragments.ports import (
    HEADERS_MAX,
    READS_MAX,
    RETIREMENTS_MAX,
    CellRead,
    FragmentHeader,
    FragmentId,
    FragmentStat,
    FragmentStore,
    NearStore,
    Retirement,
    Usage,
)
from storaged.fragments.read_batches import ReadBatcher, cells_in
from storaged.units import MIB
from storaged.wire import Buffer, Message

T = TypeVar("T", bound=Message)

SCAN_PAGE_MAX = 1000
RETIRED_PAGE_MAX = 10_000
READS_BYTES_MAX = MIB
"""Of cells in one answer to ``fragment.reads``."""


def _pack(ids: Sequence[FragmentId]) -> tuple[bytes, ...]:
    return tuple(fragment.pack() for fragment in ids)


class RemoteFragmentStore:
    """A FragmentStore on another node. A call that is not answered in time raises PeerTimeout; whether it was carried
    out is unknown then.
    """

    def __init__(
        self,
        caller: Caller,
        node: str,
        disk_id: str,
        *,
        timeout_s: float = 10.0,
        verify_timeout_s: float = 120.0,
        batcher: ReadBatcher | None = None,
    ) -> None:
        """``batcher``: of reads of this node, where the caller makes calls without tasks."""
        self._caller = caller
        self._begin_caller = caller if isinstance(caller, BeginCaller) else None
        self._node = node
        self._disk = disk_id
        self._timeout_s = timeout_s
        self._verify_timeout_s = verify_timeout_s
        self._batcher = batcher

    async def _ask(
        self, method: str, request: Message, reply: type[T], body: Sequence[Buffer] = ()
    ) -> tuple[T, memoryview]:
        timeout_s = self._verify_timeout_s if method == "fragment.verify" else self._timeout_s
        return await self._caller.call(self._node, method, request, reply, body=body, timeout_s=timeout_s)

    async def write(
        self,
        header: FragmentHeader,
        payload: Sequence[Buffer],
        *,
        sync: bool = False,
        check: bytes = b"",
        spare_other: bool = False,
    ) -> None:
        """``spare_other`` follows from this node's role (``FragmentHost``)."""
        await self._ask("fragment.write", WriteRequest(self._disk, header, sync, check), Done, payload)

    def try_write(
        self,
        header: FragmentHeader,
        payload: Sequence[Buffer],
        on_done: Callable[[PeerError | None], None],
        *,
        sync: bool = False,
        check: bytes = b"",
    ) -> Callable[[], object] | None:
        """See ``ports.TryWrite``."""
        if self._begin_caller is None:
            return None
        return self._begin_caller.begin_call(
            self._node,
            "fragment.write",
            WriteRequest(self._disk, header, sync, check),
            Done,
            partial(_on_written, on_done),
            body=payload,
            timeout_s=self._timeout_s,
        )

    async def sync(self, ids: Sequence[FragmentId]) -> None:
        """A node that restarted since the write and lost it answers FragmentMissing: its index knows only what is in
        its log.
        """
        await self._ask("fragment.sync", IdsRequest(self._disk, _pack(ids)), Done)

    async def read(self, fragment: FragmentId, first_cell: int, count: int) -> CellRead:
        request = ReadRequest(self._disk, fragment.pack(), first_cell, count)
        reply, body = await self._ask("fragment.read", request, ReadReply)
        found = cells_in(request, reply, body)
        if isinstance(found, FragmentDamaged):
            raise found
        return found

    def try_ask_cells(
        self,
        fragment: FragmentId,
        first_cell: int,
        count: int,
        cell_bytes: int,
        on_found: Callable[[CellRead | PeerError | None], None],
    ) -> bool:
        """As ``read``, without a task, together with other reads of its node (``read_batches``, which says what
        ``cell_bytes`` and ``on_found`` are). False: nothing was asked.
        """
        if self._batcher is None:
            return False
        self._batcher.ask(ReadRequest(self._disk, fragment.pack(), first_cell, count), cell_bytes, on_found)
        return True

    async def stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        reply, _ = await self._ask("fragment.stat", IdsRequest(self._disk, _pack(ids)), StatsReply)
        return self._answers(ids, reply)

    async def headers(self, ids: Sequence[FragmentId]) -> list[FragmentHeader | None]:
        reply, _ = await self._ask("fragment.headers", IdsRequest(self._disk, _pack(ids)), HeadersReply)
        found = list(reply.headers)
        if [header.id if header else fragment.pack() for header, fragment in zip(found, ids, strict=False)] != [
            fragment.pack() for fragment in ids
        ]:
            raise self._bad_reply()
        return found

    async def touch(self, ids: Sequence[FragmentId], now_ms: int) -> list[FragmentStat]:
        reply, _ = await self._ask("fragment.touch", TouchRequest(self._disk, _pack(ids), now_ms), StatsReply)
        return self._answers(ids, reply)

    def _answers(self, ids: Sequence[FragmentId], reply: StatsReply) -> list[FragmentStat]:
        if tuple(stat.id for stat in reply.stats) != _pack(ids):
            raise self._bad_reply()
        return list(reply.stats)

    def _bad_reply(self) -> PeerRefused:
        return PeerRefused(
            f"disk {self._disk} did not answer for the fragments that it was asked about", remote_code="BAD_REPLY"
        )

    async def retire(self, entries: Sequence[Retirement]) -> None:
        if entries:
            first, more = entries[0], tuple(entries[1:])
            request = RetireRequest(self._disk, first.data_id, first.owner, first.due_ms, more, first.origin)
            await self._ask("fragment.retire", request, Done)

    async def retired(self, now_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        reply, _ = await self._ask("fragment.retired", RetiredRequest(self._disk, now_ms, limit), RetiredReply)
        return list(reply.entries)

    async def unretire(self, data_id: bytes) -> None:
        await self._ask("fragment.unretire", UnretireRequest(self._disk, data_id), Done)

    async def delete(self, ids: Sequence[FragmentId], *, created_ms: Sequence[int] = ()) -> int:
        reply, _ = await self._ask("fragment.delete", DeleteRequest(self._disk, _pack(ids), tuple(created_ms)), Done)
        return reply.count

    async def scan(self, after: bytes = b"", limit: int = 1000) -> AsyncIterator[FragmentHeader]:
        while limit > 0:
            reply, _ = await self._ask(
                "fragment.scan", ScanRequest(self._disk, after, min(limit, SCAN_PAGE_MAX)), ScanReply
            )
            if not reply.headers:
                return
            for header in reply.headers:
                yield header
            limit -= len(reply.headers)
            after = reply.headers[-1].id

    async def verify(self, fragment: FragmentId) -> FragmentStat:
        reply, _ = await self._ask("fragment.verify", IdsRequest(self._disk, (fragment.pack(),)), StatsReply)
        return self._answers([fragment], reply)[0]

    async def usage(self) -> Usage:
        reply, _ = await self._ask("fragment.usage", UsageRequest(self._disk), UsageReply)
        return reply.usage

    async def close(self) -> None:
        """No-op: the connection belongs to the caller."""


class FragmentHost:
    """Answers for the disks of this node. ``stores`` is looked up at every call, so that a disk may join or leave.

    A storage node writes what it has rebuilt, and replaces no sound fragment by another. Where it would,
    ``on_contested(owner, fragment)`` gets the owner's packed name: this node compares the block by itself.
    """

    def __init__(
        self,
        stores: Mapping[str, NearStore],
        on_contested: Callable[[bytes, FragmentId], None] = lambda owner, fragment: None,
    ) -> None:
        self._stores = stores
        self._on_contested = on_contested

    def methods(self) -> Methods:
        """The methods that a storage node registers."""
        methods = {
            "fragment.write": Method(WriteRequest, self._write),
            "fragment.sync": Method(IdsRequest, self._sync),
            "fragment.read": Method(ReadRequest, self._read, try_answer=self._try_read),
            "fragment.reads": Method(ReadsRequest, self._reads, try_answer=self._try_reads),
            "fragment.stat": Method(IdsRequest, self._stat),
            "fragment.headers": Method(IdsRequest, self._headers),
            "fragment.touch": Method(TouchRequest, self._touch),
            "fragment.retire": Method(RetireRequest, self._retire),
            "fragment.retired": Method(RetiredRequest, self._retired),
            "fragment.unretire": Method(UnretireRequest, self._unretire),
            "fragment.delete": Method(DeleteRequest, self._delete),
            "fragment.scan": Method(ScanRequest, self._scan),
            "fragment.verify": Method(IdsRequest, self._verify),
            "fragment.usage": Method(UsageRequest, self._usage),
        }
        return grant(methods)

    def _store(self, disk_id: str) -> NearStore:
        store = self._stores.get(disk_id)
        if store is None:
            raise DiskUnusable(f"this node does not serve disk {disk_id}", state="failed")
        return store

    async def _write(self, request: WriteRequest, call: Call) -> Done:
        trusted, header = "gateway" in call.peer.roles, request.header
        check = request.check if trusted else b""
        try:
            await self._store(request.disk).write(
                header, [call.body], sync=request.sync, check=check, spare_other=not trusted
            )
        except FragmentOther:
            self._on_contested(header.owner, FragmentId.unpack(header.id))
            raise
        return Done(1)

    async def _sync(self, request: IdsRequest, _call: Call) -> Done:
        await self._store(request.disk).sync(_unpack(request.ids))
        return Done(len(request.ids))

    async def _read(self, request: ReadRequest, _call: Call) -> Reply:
        return _reply(
            await self._store(request.disk).read(_unpack((request.id,))[0], request.first_cell, request.count)
        )

    def _try_read(self, request: ReadRequest, _call: Call) -> Reply | None:
        found = self._store(request.disk).try_read(_unpack((request.id,))[0], request.first_cell, request.count)
        return None if found is None else _reply(found)

    async def _reads(self, request: ReadsRequest, call: Call) -> Reply:
        return self._try_reads(request, call)

    def _try_reads(self, request: ReadsRequest, _call: Call) -> Reply:
        """Answers those that need no waiting and have no fault, up to about READS_BYTES_MAX."""
        if len(request.reads) > READS_MAX:
            raise PeerRefused(
                f"{len(request.reads)} reads are more than {READS_MAX} at once", remote_code="BAD_REQUEST"
            )
        found: list[ReadReply | None] = []
        body: list[Buffer] = []
        size = 0
        for read in request.reads:
            reply = None
            if size < READS_BYTES_MAX:
                with contextlib.suppress(StoragedError):  # the caller asks for it alone, and gets the error
                    reply = self._try_read(read, _call)
            if reply is None:
                found.append(None)
            else:
                message, pieces = reply
                assert isinstance(message, ReadReply)
                found.append(message)
                body += pieces
                size += sum(map(len, pieces))
        return Reply(ReadsReply(tuple(found)), body)

    async def _stat(self, request: IdsRequest, _call: Call) -> StatsReply:
        return StatsReply(tuple(await self._store(request.disk).stat(_unpack(request.ids))))

    async def _headers(self, request: IdsRequest, _call: Call) -> HeadersReply:
        if len(request.ids) > HEADERS_MAX:
            raise PeerRefused(
                f"{len(request.ids)} headers are more than {HEADERS_MAX} at once", remote_code="BAD_REQUEST"
            )
        return HeadersReply(tuple(await self._store(request.disk).headers(_unpack(request.ids))))

    async def _touch(self, request: TouchRequest, _call: Call) -> StatsReply:
        return StatsReply(tuple(await self._store(request.disk).touch(_unpack(request.ids), request.now_ms)))

    async def _retire(self, request: RetireRequest, _call: Call) -> Done:
        if len(request.more) >= RETIREMENTS_MAX:
            raise PeerRefused(
                f"{len(request.more) + 1} retirements are more than {RETIREMENTS_MAX} at once",
                remote_code="BAD_REQUEST",
            )
        await self._store(request.disk).retire(
            [Retirement(request.data_id, request.owner, request.due_ms, request.origin), *request.more]
        )
        return Done(1 + len(request.more))

    async def _retired(self, request: RetiredRequest, _call: Call) -> RetiredReply:
        entries = await self._store(request.disk).retired(request.now_ms, min(request.limit, RETIRED_PAGE_MAX))
        return RetiredReply(tuple(entries))

    async def _unretire(self, request: UnretireRequest, _call: Call) -> Done:
        await self._store(request.disk).unretire(request.data_id)
        return Done(1)

    async def _delete(self, request: DeleteRequest, _call: Call) -> Done:
        if request.created_ms and len(request.created_ms) != len(request.ids):
            raise PeerRefused("a deletion with ages names one for each fragment", remote_code="BAD_REQUEST")
        return Done(await self._store(request.disk).delete(_unpack(request.ids), created_ms=request.created_ms))

    async def _scan(self, request: ScanRequest, _call: Call) -> ScanReply:
        limit = min(request.limit, SCAN_PAGE_MAX)
        return ScanReply(tuple([header async for header in self._store(request.disk).scan(request.after, limit)]))

    async def _verify(self, request: IdsRequest, _call: Call) -> StatsReply:
        store = self._store(request.disk)
        return StatsReply(tuple([await store.verify(fragment) for fragment in _unpack(request.ids)]))

    async def _usage(self, request: UsageRequest, _call: Call) -> UsageReply:
        return UsageReply(await self._store(request.disk).usage())


def _on_written(on_done: Callable[[PeerError | None], None], answer: Done | PeerError, _body: memoryview) -> None:
    on_done(answer if isinstance(answer, PeerError) else None)


def _reply(found: CellRead) -> Reply:
    lengths = tuple([MISSING_CELL if cell is None else len(cell) for cell in found.cells])
    pieces = [cell for cell in found.cells if cell is not None] if found.whole is None else [found.whole]
    return Reply(ReadReply(found.header, lengths, found.unread), pieces)


def _unpack(ids: Sequence[bytes]) -> list[FragmentId]:
    for packed in ids:
        if len(packed) != KEY_BYTES:
            raise PeerRefused(f"a fragment id has {KEY_BYTES} bytes, not {len(packed)}", remote_code="BAD_FRAGMENT")
    return [FragmentId.unpack(packed) for packed in ids]


class StoreDirectory:
    """FragmentStores: this node's disks directly, every other disk over RPC on the node that a layout names."""

    def __init__(
        self, layouts: Layouts, caller: Caller, local: Mapping[str, FragmentStore], *, timeout_s: float = 10.0
    ) -> None:
        self._layouts = layouts
        self._caller = caller
        self._local = local
        self._timeout_s = timeout_s
        self._remote: dict[tuple[str, str], RemoteFragmentStore] = {}
        self._batchers: dict[str, ReadBatcher] = {}

    def store(self, disk_id: str) -> FragmentStore:
        local = self._local.get(disk_id)
        if local is not None:
            return local
        disk = self._layouts.current.disk_by_id.get(disk_id)
        node = disk.node if disk is not None else self._earlier_node(disk_id)
        found = self._remote.get((node, disk_id))
        if found is None:
            batcher = self._batchers.get(node)
            if batcher is None and isinstance(self._caller, TryCaller):
                batcher = self._batchers[node] = ReadBatcher(self._caller, node, self._timeout_s)
            found = self._remote[node, disk_id] = RemoteFragmentStore(
                self._caller, node, disk_id, timeout_s=self._timeout_s, batcher=batcher
            )
        return found

    def _earlier_node(self, disk_id: str) -> str:
        """By the newest earlier layout that names the disk: it may still be read."""
        for known in self._layouts.earlier():
            if disk_id in known.disk_by_id:
                return known.disk_by_id[disk_id].node
        raise DiskUnusable(f"no known layout names disk {disk_id}", state="unknown")
