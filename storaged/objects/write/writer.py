"""Writes one part: seals it, codes it and spreads it over disks, block by block, with a bounded number of blocks in
memory.

Theory of operation. A block is filled from the body. One call in a thread hashes, seals and codes it into other memory,
which is leased when the block is full; so a slow client occupies memory for plaintext only. Then the block is sent to
its disks while the next one is filled.

A block counts as written when the fragments that reached their disks satisfy the acknowledge rule
(``place.acceptable``). A disk that refuses or is late is left out of the rest of the part, and the missing fragments of
the block go to other disks, under another profile when the writable disks can't hold the target.

``durable`` waits for the last block and for a promise, then syncs every disk. One that is late is left out when all
blocks are safe without it (``patience``). A disk that fails there, or failed after it took earlier blocks, may leave
blocks short of the rule. They are read back from the surviving fragments, coded again for the disks that are up, and
synced too. Nothing is acknowledged before every block satisfies the rule with synced fragments.

While memory is not short, a part of one block is sent after the promise, or before a create. Each disk writes and syncs
its fragment in one call: half as many messages and turns of its writer thread. The collector sees the write as it would
see the sync.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from functools import partial

from storaged import trace
from storaged.cluster.layout import Layout, Profile
from storaged.errors import PeerError, ServiceUnavailable
from storaged.fragments.ports import FragmentHeader, FragmentId, Retirement
from storaged.objects.background import cancel_all
from storaged.objects.cache.buffers import Lease, Transfer, block_size_for
from storaged.objects.code import erasure, place
from storaged.objects.code.assemble import assemble, empty_fragments
from storaged.objects.code.seal import PartSealer
from storaged.objects.garbage import retire_all
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import PartEntry
from storaged.objects.write import blocks
from storaged.objects.write.blocks import BlockState, Coded, Form, NewPart, OnPlain, runs_of, shape_of
from storaged.objects.write.body import BodyReader
from storaged.objects.write.patience import GiveUp, OnResult, begin_write, in_task, note_late, until_safe
from storaged.sov1 import SALT_BYTES, chunk_count

ATTEMPTS_MAX = 6
"""Placements tried for one block, and rounds of the barrier: each leaves out at least one more disk."""

TOUCHES_A_CALL = 4000


class RunsChanged(Exception):
    """Disks failed before the barrier, and blocks were moved: the entry that was announced is wrong. ``entry()``
    returns the right one.
    """


class PartWriter:
    """Writes one part of ``size`` bytes (None: unknown). Leaving it, a context manager, ends all its tasks.

    It has more than 20 attributes: what a part is, its sealer and sizes, and what is on its way.
    """

    def __init__(self, plane: ObjectPlane, part: NewPart, size: int | None) -> None:
        self._plane = plane
        self._owner = part.name.pack()
        self._data_id = data_id = part.data_id
        self._number = number = part.sealed_number
        self._target = target = plane.layouts.current.target
        self._countries = part.bucket.countries
        self._is_shared = part.form is not None
        left, cells_max = plane.fill_buffers.left, plane.limits.block_cells_max
        form = part.form or Form(*block_size_for(target, size, left, cells_max), plane.entropy(SALT_BYTES))
        chunk, self._block_cells, salt = form
        self._sealer = PartSealer(part.dek, data_id, number, chunk, salt)
        cells = self._block_cells if size is None else min(chunk_count(size, chunk), self._block_cells)
        self._plain_bytes = cells * self._sealer.plain_bytes
        self._sealed_bytes = cells * chunk
        self._parity_bytes = erasure.parity_length(target, chunk, self._sealed_bytes) * (
            target.m if target.k > 1 else 0
        )
        self._size = 0
        self._synced = False
        """The barrier was passed once: every fragment was synced."""
        self._created_ms = plane.clock.wall_ms()
        self._failed: set[str] = set()
        self._blocks: list[BlockState] = []
        self._unsynced: dict[str, list[FragmentId]] = {}
        self._sending: asyncio.Task[None] | None = None
        self.held: tuple[BlockState, Coded, Lease] | None = None
        """The only block, until ``durable`` sends it."""
        self._leases: list[Lease] = []
        self._announced: PartEntry | None = None
        self._transfers = (Transfer(plane.fill_buffers), Transfer(plane.put_buffers))
        self._trace = trace.current()

    async def __aenter__(self) -> PartWriter:
        for transfer in self._transfers:
            transfer.__enter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._sending is not None:
            await cancel_all([self._sending])
        for lease in self._leases:
            lease.release()
        for transfer in self._transfers:
            transfer.__exit__()

    # --- the body ---------------------------------------------------------------------------------------------------

    async def write(self, reader: BodyReader, on_plain: OnPlain) -> None:
        """Returns when the body has ended and its last block is being sent; ``durable`` waits for that block.

        Raises ServiceUnavailable when a block can't be made safe, SlowDown when memory is short, and what the body
        raises.
        """
        filling = await self._plane.fill_buffers.lease(self._plain_bytes)
        self._leases.append(filling)
        last = False
        while not last:
            with trace.span("receive"):
                count = await reader.fill(filling.view[: self._plain_bytes])
            last = reader.ended
            lease = await self._lease_work()
            state, coded = await self._seal(filling.view[:count], lease.view, last, on_plain)
            if last:
                filling.release()
            await self._sent()
            self._blocks.append(state)
            if last and not state.number and self._plane.put_buffers.left >= blocks.HELD_LEFT_MIN:
                self.held = state, coded, lease
            else:
                self._sending = asyncio.create_task(self._send_and_release(state, coded, lease))
            del coded, lease  # views would keep the buffer from being reused
        self._size = reader.bytes_read

    async def _lease_work(self) -> Lease:
        """Memory for a sealed block and its parity: a second one while the block before is being sent, when there is
        room; else after that block is written.
        """
        size = self._sealed_bytes + self._parity_bytes
        lease = self._plane.put_buffers.try_lease(size) if self._sending is not None else None
        if lease is None:
            await self._sent()
            lease = await self._plane.put_buffers.lease(size)
        self._leases.append(lease)
        return lease

    async def _sent(self) -> None:
        """Waits for the block that is being sent, and raises what that raises. The block goes on when the wait is
        cancelled: a commit that begins again waits for it once more.
        """
        if self._sending is not None:
            await asyncio.wait([self._sending])
            self._sending.result()
            self._sending = None

    async def _seal(
        self, plain: memoryview, area: memoryview, last: bool, on_plain: OnPlain
    ) -> tuple[BlockState, Coded]:
        layout = self._plane.layouts.current
        placement = self._choose(layout)
        number = len(self._blocks)

        def work() -> tuple[BlockState, Coded]:
            with trace.span_of(self._trace, "digest"):
                on_plain(plain)
            with trace.span_of(self._trace, "seal"):
                length = self._sealer.seal_block(number * self._block_cells, plain, area, last=last)
            with trace.span_of(self._trace, "code"):
                coded = self._code(placement.profile, area[:length], area[self._sealed_bytes :])
            shape = shape_of(self._sealer.chunk_bytes, length)
            return BlockState(number, shape, placement, layout, coded.hashes), coded

        if len(plain) <= blocks.INLINE_BYTES_MAX:
            return work()
        return await self._plane.in_thread(work)

    def _code(self, profile: Profile, sealed: memoryview, room: memoryview) -> Coded:
        return blocks.code_block(profile, self._sealer.chunk_bytes, sealed, room)

    # --- one block to its disks -------------------------------------------------------------------------------------

    def _writable(self, disk: str) -> bool:
        return disk not in self._failed and self._plane.liveness.disk_writable(disk)

    def _choose(self, layout: Layout) -> place.Placement:
        try:
            placement = place.choose_prompt(
                layout, self._data_id, self._target, self._writable, self._plane.liveness.disk_prompt, self._countries
            )
        except ServiceUnavailable:
            self._plane.room.check_blocks(self._countries)
            raise
        if placement.profile != self._target:
            self._plane.counters.blocks_fallback += 1
        return placement

    def _acceptable(self, state: BlockState, without: Collection[str] = ()) -> bool:
        """``without``: as if these disks had nothing."""
        durable = state.durable
        if without:
            durable = {position: disk for position, disk in durable.items() if disk not in without}
        return place.acceptable(state.layout, state.placement.profile, durable, self._writable, self._countries)

    async def _send_and_release(self, state: BlockState, coded: Coded, lease: Lease, *, sync: bool = False) -> None:
        try:
            with trace.span("send"):
                await self._send(state, coded, sync=sync)
        finally:
            lease.release()
            self._leases.remove(lease)

    async def _send(self, state: BlockState, coded: Coded, *, sync: bool) -> None:
        """Sends the block until it satisfies the rule; ``sync``: with synced fragments. Raises ServiceUnavailable."""
        await self._write_missing(state, coded, sync=sync)
        for _ in range(ATTEMPTS_MAX):
            if self._acceptable(state):
                return
            coded = await self._replace(state, coded)
            await self._write_missing(state, coded, sync=sync)
        raise ServiceUnavailable("The block could not be written to enough disks: too many refuse it or do not answer.")

    async def _replace(self, state: BlockState, coded: Coded) -> Coded:
        """Places the block on the disks that are left. Fragments that are in place stay."""
        placement = self._choose(state.layout)
        if placement.profile == state.placement.profile:
            stale = {p: disk for p, disk in state.durable.items() if placement.disks[p] != disk}
        else:
            stale = dict(state.durable)
            coded = await self._plane.in_thread(self._code, placement.profile, coded.sealed, memoryview(b""))
        await self._forget(state, stale)
        state.placement, state.hashes = placement, coded.hashes
        return coded

    async def _forget(self, state: BlockState, stale: Mapping[int, str]) -> None:
        """Deletes fragments that no record will refer to. Those of a part that others write too (``NewPart.form``), or
        of a create, go to the garbage lists: a record may name them.

        Waits for that. A disk that does not confirm is not used again: a late deletion must not hit the fragment anew.
        """
        for position, disk in stale.items():
            state.durable.pop(position, None)
            fragment = self._fragment(state, position)
            waiting = self._unsynced.get(disk, [])
            if fragment in waiting:
                waiting.remove(fragment)
        await asyncio.gather(*(self._delete(disk, self._fragment(state, position)) for position, disk in stale.items()))

    async def _delete(self, disk: str, fragment: FragmentId) -> None:
        try:
            async with asyncio.timeout(self._plane.limits.write_timeout_s):
                store = self._plane.stores.store(disk)
                await (store.retire([self._retirement()]) if self._is_shared else store.delete([fragment]))
        except (PeerError, TimeoutError):
            self._failed.add(disk)

    def _fragment(self, state: BlockState, position: int) -> FragmentId:
        profile = state.placement.profile
        return FragmentId(self._data_id, state.number, profile.k, profile.m, position)

    async def _write_missing(self, state: BlockState, coded: Coded, *, sync: bool = False) -> None:
        """Sends every fragment that is not in place. Cancels a write that is late when the block is safe without it."""
        profile, disks = state.placement.profile, state.placement.disks

        def on_done(position: int, written: bool) -> None:
            if written:
                state.durable[position] = disks[position]
                if not sync:
                    self._unsynced.setdefault(disks[position], []).append(self._fragment(state, position))
            else:
                self._failed.add(disks[position])
                self._plane.counters.writes_failed += 1

        missing = [position for position in range(profile.n) if position not in state.durable]
        begin = partial(self._begin_write, state, coded, sync)
        limit_s = self._plane.limits.write_timeout_s
        safe, curable = partial(self._acceptable, state), profile.m.__ge__  # it is still in memory
        late = await until_safe(self._plane, missing, begin, on_done, safe, curable, limit_s)
        for position, for_s in late.items():
            self._failed.add(disks[position])
            note_late(self._plane, disks[position], for_s)

    def _begin_write(self, state: BlockState, coded: Coded, sync: bool, position: int, on_result: OnResult) -> GiveUp:
        """Begins to write one fragment."""
        profile, chunk = state.placement.profile, self._sealer.chunk_bytes
        payload = coded.fragment(profile, chunk, position)
        header = FragmentHeader(
            self._fragment(state, position).pack(),
            self._owner,
            self._sealer.header,
            coded.hashes,
            chunk,
            sum(map(len, payload)),
            self._created_ms,
        )
        check = coded.check(profile, position)
        return begin_write(self._plane, state.placement.disks[position], header, payload, sync, check, on_result)

    # --- the barrier ------------------------------------------------------------------------------------------------

    async def durable(self, promised: asyncio.Event) -> None:
        """Returns when every block is durable under the acknowledge rule, at the places of the announced entry, and was
        seen there after the promise: collectors spare it from now on.

        Raises RunsChanged when they are durable at other places; ServiceUnavailable when they can't be made durable, or
        are gone.
        """
        await self._sent()
        await promised.wait()
        held, self.held = self.held, None
        if held is not None:
            await self._send_and_release(*held, sync=True)
            del held  # its views would keep the buffer from being reused
        elif self._synced:
            await self._touch_all()
        await self.barrier()

    async def durable_unasked(self) -> PartEntry:
        """Before any promise, for a create. Returns the entry. Raises ServiceUnavailable."""
        self._announced, now = None, asyncio.Event()
        now.set()
        await self.durable(now)
        self._is_shared = True  # a replica may take the create, and a later proposer carry it on
        return self.entry()

    async def barrier(self) -> None:
        """Syncs what is not synced yet, every fragment the first time. Raises as ``durable``."""
        for _ in range(ATTEMPTS_MAX):
            with trace.span("sync"):
                await self._sync_all()
            short = [state for state in self._blocks if not self._acceptable(state)]
            if not short:
                break
            for state in short:
                await self._rebuild(state)
        else:
            raise ServiceUnavailable(
                "The object could not be made durable on enough disks: too many failed while it was written."
            )
        self._synced = True
        if self._announced is not None and self._announced != self._make_entry():
            raise RunsChanged

    async def _sync_all(self) -> None:
        """Syncs fragments that are not synced yet. A disk that fails, or is late, is removed from every block."""
        for disk in {disk for state in self._blocks for disk in state.durable.values()}:
            if not self._plane.liveness.disk_readable(disk):
                self._lose(disk)
        waiting = {disk: ids for disk, ids in self._unsynced.items() if ids}
        self._unsynced = {}
        missing = set(waiting)

        def on_done(disk: str, synced: bool) -> None:
            if synced:
                missing.discard(disk)

        def safe() -> bool:
            return all(self._acceptable(state, missing) for state in self._blocks)

        def curable(count: int) -> bool:
            """Each block can be read back from disks that have synced it."""
            return count <= self._target.m and all(
                len(set(state.durable.values()) - missing) >= state.placement.profile.k for state in self._blocks
            )

        def begin(disk: str, on_result: OnResult) -> GiveUp:
            return in_task(self._plane, self._sync_one(disk, waiting[disk]), on_result)

        limit_s = self._plane.limits.sync_timeout_s
        late = await until_safe(self._plane, waiting, begin, on_done, safe, curable, limit_s)
        for disk, for_s in late.items():
            note_late(self._plane, disk, for_s)
        for disk in missing:
            self._lose(disk)

    async def _sync_one(self, disk: str, ids: list[FragmentId]) -> bool:
        try:
            await self._plane.stores.store(disk).sync(ids)
        except PeerError:
            return False
        return True

    def _lose(self, disk: str) -> None:
        self._failed.add(disk)
        self._unsynced.pop(disk, None)
        for state in self._blocks:
            state.durable = {position: holder for position, holder in state.durable.items() if holder != disk}

    async def _rebuild(self, state: BlockState) -> None:
        """Reads a block that is short of the rule back from its surviving fragments, and writes it to disks that are
        up.
        """
        sealed = await self._read_back(state)
        coded = Coded(memoryview(sealed), (), state.hashes)
        old = state.placement.profile
        if old.k > 1:
            coded = await self._plane.in_thread(self._code, old, coded.sealed, memoryview(b""))
        coded = await self._replace(state, coded)
        await self._write_missing(state, coded)
        self._plane.counters.blocks_rebuilt_at_barrier += 1

    async def _read_back(self, state: BlockState) -> bytearray:
        profile, shape = state.placement.profile, state.shape
        present = empty_fragments(profile, shape)
        for position, disk in sorted(state.durable.items()):
            if len(present) == profile.k or (profile.k == 1 and present):
                break
            fragment = await self._read_fragment(state, position, disk)
            if fragment is not None:
                present[position] = fragment
        if len(present) < profile.k:
            raise ServiceUnavailable("Too many disks failed while the object was written.")
        return await self._plane.in_thread(assemble, profile, shape, present)

    async def _read_fragment(self, state: BlockState, position: int, disk: str) -> bytes | None:
        cells = state.shape.fragment_cells(state.placement.profile, position)
        try:
            async with asyncio.timeout(self._plane.limits.read_timeout_s):
                found = await self._plane.stores.store(disk).read(self._fragment(state, position), 0, cells)
        except (PeerError, TimeoutError):
            self._lose(disk)
            return None
        whole = b"".join(cell for cell in found.cells if cell is not None)
        if not state.wrote(whole, position):
            state.durable.pop(position, None)
            return None
        return whole

    # --- the result -------------------------------------------------------------------------------------------------

    def entry(self) -> PartEntry:
        """The part as the record will have it, if the barrier does not raise RunsChanged."""
        self._announced = self._make_entry()
        return self._announced

    def _make_entry(self) -> PartEntry:
        return PartEntry(
            self._number,
            self._data_id,
            self._size,
            self._sealer.header,
            self._block_cells,
            str(self._target),
            runs_of(self._blocks),
        )

    @property
    def degraded(self) -> bool:
        """Some block has fewer durable fragments than its profile, or another profile than the target, which may have
        changed since the body began.
        """
        return self._target != self._plane.layouts.current.target or any(
            state.placement.profile != self._target or len(state.durable) < state.placement.profile.n
            for state in self._blocks
        )

    async def discard(self) -> None:
        """After a failure: puts the fragments on the disks' garbage lists. Those on disks that don't answer are left to
        the sweep of orphans.
        """
        held, self.held = self.held, None
        if held is not None:
            return  # the only block was not sent yet
        disks = {disk for state in self._blocks for disk in (*state.durable.values(), *state.placement.disks)}
        lists = {disk: [self._retirement()] for disk in disks}
        await retire_all(self._plane.stores, lists, self._plane.limits.write_timeout_s)

    def _retirement(self) -> Retirement:
        return Retirement(self._data_id, self._owner, self._plane.clock.wall_ms() + self._plane.limits.retire_delay_ms)

    async def _touch_all(self) -> None:
        """Makes sure that the fragments exist, after another promise: garbage collection may have deleted them
        meanwhile. Raises ServiceUnavailable when a block is no longer safe.
        """
        by_disk: dict[str, list[tuple[BlockState, int]]] = {}
        for state in self._blocks:
            for position, disk in state.durable.items():
                by_disk.setdefault(disk, []).append((state, position))
        await asyncio.gather(*(self._touch(disk, held) for disk, held in by_disk.items()))
        if not all(self._acceptable(state) for state in self._blocks):
            raise ServiceUnavailable("The object's fragments are gone or out of reach; it was not committed.")

    async def _touch(self, disk: str, held: list[tuple[BlockState, int]]) -> None:
        ids = [self._fragment(state, position) for state, position in held]
        try:
            async with asyncio.timeout(self._plane.limits.sync_timeout_s):
                store, now_ms = self._plane.stores.store(disk), self._plane.clock.wall_ms()
                stats = [
                    stat
                    for start in range(0, len(ids), TOUCHES_A_CALL)
                    for stat in await store.touch(ids[start : start + TOUCHES_A_CALL], now_ms)
                ]
        except (PeerError, TimeoutError):
            self._lose(disk)
            return
        for (state, position), stat in zip(held, stats, strict=True):
            if stat.health:
                state.durable.pop(position, None)
