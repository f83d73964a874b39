"""Multipart uploads, and moves of blocks between disks, while every disk collects: parts of ``collecting``.

They follow ``objects.write.complete``, ``objects.write.multipart`` and ``maintain.mover`` step by step: what is durable
when, what is looked at between a promise and its accept, what goes on garbage lists with which origin. Two gateways may
complete one upload, and fall asleep for hours in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from storaged.errors import ConditionalRequestConflict, NoSuchUpload, PeerError, ServiceUnavailable, StoragedError
from storaged.fragments.ports import OF_UPLOAD, FragmentId, Retirement
from storaged.meta.names import Change, RegisterName, Value, Visibility, part_name, upload_name
from storaged.objects.records import ObjectRecord, PartEntry, Run, Version, decode_object, decode_version, encode_object
from storaged.objects.upload_records import PartRecord, UploadRecord
from storaged.objects.write.commit import ProposedAgain
from storaged.objects.write.uploads import ABORTED, COMPLETING, DONE, OPEN, decode_upload, part_rows
from storaged.wire import decode, encode
from tests.sim.cluster import DISKS, Gateway

if TYPE_CHECKING:
    from tests.sim.collecting import Collecting


async def nothing() -> None: ...


async def commit_move(
    run: Collecting,
    gateway: Gateway,
    name: RegisterName,
    changes: Callable[[Value | None], Change | None],
    moved: tuple[FragmentId, str],
    put_pages: Callable[[], Awaitable[None]] = nothing,
) -> None:
    """As ``maintain.mover``: proposes the record with the new place once, if ``changes`` makes one. The fragment that
    was written for that (``moved``: its id and disk) and pages become durable after the promise.
    """
    fragment, target = moved
    promised = asyncio.Event()

    def update(value: Value | None) -> Change | None:
        if promised.is_set():
            raise ProposedAgain
        change = changes(value)
        if change is None:
            raise ConditionalRequestConflict
        promised.set()
        return change

    async def touch_new() -> None:
        await promised.wait()
        (stat,) = await run.store(gateway, target).touch([fragment], 5)
        if stat.health:
            raise ServiceUnavailable("a fragment that was written for the move is gone")
        run.durable[fragment.data_id].add((fragment.position, target))
        await put_pages()
        await run.sleep(0.25)

    await gateway.client.change(name, update, ready=touch_new())


class Uploads:
    """Of one run."""

    def __init__(self, run: Collecting) -> None:
        self._run = run
        self._random = random.Random(f"uploads {run.found.seed}")
        self._owners: dict[RegisterName, RegisterName] = {}
        """The object of each upload."""

    # --- uploads

    async def upload(self, gateway: Gateway, owner: RegisterName) -> None:
        upload_id = bytes((owner.shard,)) + self._random.randbytes(15)
        name = upload_name(owner.scope, owner.key, upload_id)
        self._owners[name] = owner
        record = UploadRecord(upload_id, OPEN, "", 1, 1, b"", b"", b"")
        await gateway.client.change(name, lambda _value: Change(encode(record)))
        for number in self._random.choice(((1,), (1, 2), (1, 1))):
            await self._put_part(gateway, owner, upload_id, number)
        await self._run.sleep(0.2)
        if self._random.random() < 0.25:
            await self._abort(gateway, name)
            return
        gateways = [gateway]
        if self._random.random() < 0.5:
            gateways.append(self._random.choice(self._run.gateways))
        work = (self._complete(one, name) for one in gateways)
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _put_part(self, gateway: Gateway, owner: RegisterName, upload_id: bytes, number: int) -> None:
        def body_of(entry: PartEntry) -> bytes:
            return encode(PartRecord(msgspec.structs.replace(entry, number=number), 1, b""))

        register = part_name(owner.scope, upload_id, number)
        outcome, _ = await self._run.commit_coded(gateway, owner, register, body_of)
        if outcome.before is not None and outcome.before.body:
            before = decode(outcome.before.body, PartRecord)
            self._run.retire(gateway, owner, [before.entry], OF_UPLOAD + upload_id)

    async def _complete(self, gateway: Gateway, name: RegisterName) -> None:
        """As ``objects.write.complete``."""
        record = decode_upload((await gateway.client.read(name)).value)
        if record is None or record.state not in (OPEN, COMPLETING):
            raise NoSuchUpload
        resumed = record.state == COMPLETING
        if not resumed:
            record = await self._pin(gateway, name, record)
        owner, version = self._owners[name], decode_version(record.pinned)
        for _ in range(3):
            promised = asyncio.Event()
            update = _Once(record, version, promised, resumed=resumed).update
            guard = self._still_completing(gateway, name, record, promised)
            try:
                outcome = await gateway.client.change(owner, update, ready=guard)
                break
            except ProposedAgain:
                continue
        else:
            raise ProposedAgain
        self._run.retire_replaced(gateway, owner, outcome)
        await self._done(gateway, name)

    async def _pin(self, gateway: Gateway, name: RegisterName, record: UploadRecord) -> UploadRecord:
        owner, upload_id = self._owners[name], record.upload_id
        rows = [row.entry async for row in part_rows(self._run.scanner(gateway), owner.scope, upload_id)]
        version = Version(
            "", 1, 1, "", 1, upload_id, b"", False, b"", b"", tuple(rows), multipart=True, part_count=len(rows)
        )
        before = (await gateway.client.read(owner)).value
        sequence = before.sequence if before is not None else 0

        def update(value: Value | None) -> Change:
            found = decode_upload(value)
            if found is None or found.state != OPEN or not rows:
                raise NoSuchUpload
            pinned = msgspec.structs.replace(found, state=COMPLETING, pinned=encode(version), pinned_sequence=sequence)
            return Change(encode(pinned))

        found = decode_upload((await gateway.client.change(name, update)).after)
        assert found is not None
        return found

    async def _still_completing(
        self, gateway: Gateway, name: RegisterName, record: UploadRecord, promised: asyncio.Event
    ) -> None:
        await promised.wait()
        found = decode_upload((await gateway.client.read(name)).value)
        if found is None or found.state != COMPLETING or found.pinned != record.pinned:
            raise NoSuchUpload
        await self._run.sleep(0.4)

    async def _done(self, gateway: Gateway, name: RegisterName) -> None:
        def update(value: Value | None) -> Change | None:
            record = decode_upload(value)
            if record is None or record.state == DONE:
                return None
            return Change(encode(msgspec.structs.replace(record, state=DONE, pinned=b"")), Visibility.HIDDEN)

        await gateway.client.change(name, update)

    async def _abort(self, gateway: Gateway, name: RegisterName) -> None:
        before: UploadRecord | None = None

        def update(value: Value | None) -> Change:
            nonlocal before
            before = decode_upload(value)
            if before is None or before.state not in (OPEN, COMPLETING):
                raise NoSuchUpload
            return Change(encode(msgspec.structs.replace(before, state=ABORTED)), Visibility.HIDDEN)

        await gateway.client.change(name, update)
        assert before is not None
        owner = self._owners[name]
        if before.state == COMPLETING:
            held = await gateway.client.settle(owner)
            if before.upload_id in [version.context_id for version in versions_of(held)]:
                await self._done(gateway, name)
                return
        async for row in part_rows(self._run.scanner(gateway), owner.scope, before.upload_id):
            self._run.retire(gateway, owner, [row.entry], OF_UPLOAD + before.upload_id)
            part = part_name(owner.scope, before.upload_id, row.entry.number)
            await gateway.client.change(part, lambda _value: Change(b"", Visibility.TOMBSTONE))

    async def end(self, gateway: Gateway) -> None:
        """Aborts all uploads that are open. What they have is garbage then, when each replica knows it."""
        for name in self._owners:
            await self._judge_open(gateway, name)
            with contextlib.suppress(NoSuchUpload):
                await self._abort(gateway, name)
        for name in self._owners:
            await self._run.settle_everywhere(gateway, name)

    async def _judge_open(self, gateway: Gateway, name: RegisterName) -> None:
        """The parts of an upload that is open are where their writers saw them durable."""
        record = decode_upload((await gateway.client.read(name)).value)
        if record is None or record.state not in (OPEN, COMPLETING):
            return
        async for row in part_rows(self._run.scanner(gateway), name.scope, record.upload_id):
            self._run.found.done["open parts"] += 1
            self._run.judge_places(row.entry)

    # --- moves

    async def move(self, gateway: Gateway, owner: RegisterName) -> None:
        """As ``maintain.mover`` does what repair asks: a fragment has a copy on another disk already."""
        run = self._run
        seen = (await gateway.client.read(owner)).value
        versions = versions_of(seen)
        coded = [entry for version in versions for entry in version.parts if not entry.small]
        if seen is None or not coded:
            return
        entry = self._random.choice(coded)
        places = entry.runs[0].moved
        position, target = self._random.choice(list(places)), self._random.choice(DISKS)
        fragment, source = FragmentId(entry.data_id, 0, 2, 1, position), places[position]
        if target in places.values() or not await self._copy(fragment, source, target):
            return
        moved = msgspec.structs.replace(entry.runs[0], moved={**places, position: target})
        body = encode_object(ObjectRecord(tuple(_with_run(version, entry, moved) for version in versions)))
        await run.sleep(0.1)

        def changes(value: Value | None) -> Change | None:
            same = value is not None and value.sequence == seen.sequence
            return Change(body, value.visibility, value.payload) if value is not None and same else None

        await commit_move(run, gateway, owner, changes, (fragment, target))
        with contextlib.suppress(PeerError):
            await run.store(gateway, source).retire([Retirement(entry.data_id, owner.pack(), 0)])

    async def _copy(self, fragment: FragmentId, source: str, target: str) -> bool:
        """Repair has written it, durably. False: it could not."""
        nodes = self._run.world.nodes
        one, other = nodes["n" + source[1:]], nodes["n" + target[1:]]
        if not one.up or not other.up or fragment not in one.medium.fragments.fragments:
            return False
        kept = one.medium.fragments.kept(fragment)
        with contextlib.suppress(StoragedError):
            await other.medium.fragments.write(kept.header, [kept.payload], sync=True)
            return True
        return False


def versions_of(value: Value | None) -> Sequence[Version]:
    return decode_object(value.body).versions if value is not None and value.body else ()


def _with_run(version: Version, entry: PartEntry, run: Run) -> Version:
    parts = tuple(
        msgspec.structs.replace(part, runs=(run,)) if part.data_id == entry.data_id else part for part in version.parts
    )
    return msgspec.structs.replace(version, parts=parts)


class _Once:
    """The change of a Complete, which may run once."""

    def __init__(self, record: UploadRecord, version: Version, promised: asyncio.Event, *, resumed: bool) -> None:
        self._record, self._version = record, version
        self._promised, self._resumed = promised, resumed

    def update(self, value: Value | None) -> Change | None:
        if self._promised.is_set():
            raise ProposedAgain
        held = versions_of(value)
        if any(self._version.context_id == other.context_id for other in held):
            self._promised.set()
            return None
        if self._resumed and (value.sequence if value is not None else 0) != self._record.pinned_sequence:
            raise ConditionalRequestConflict
        self._promised.set()
        return Change(encode_object(ObjectRecord((self._version,))), Visibility.LIVE)
