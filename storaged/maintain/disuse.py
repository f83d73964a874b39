"""Whether data on a disk can still come into use: what the collector has to see before it deletes. It asks no clock.

Theory of operation. The request that drew a data id is the only one that brings it into a register. Other proposers
carry on the values that they find there. A request that lends data to other keys does so, too: the data stays in the
record that had it (``objects.write.loans``), and no other record ever refers to it. So data is out of use for good when
no register refers to it, and nothing that its request has begun can take effect any more. The proof of that depends on
the kind of data:

*Replaced data.* A committed change of the owner's record replaced it: the gateway that made the change put it on the
garbage list (``REPLACED``). A settled read of the record shows that change, or what came after it.
    Why it suffices: the record that referred to the data is an ancestor of the one that was read, and all changes under
    higher ballots descend from that one. Whatever the request proposed lies below: its create too, for the record that
    referred to the data has the create's ballot or a higher one. So no round is needed, and a replica may be away.

*Data of a part* (``OF_UPLOAD``). It goes from the part's row to the version that a Complete pins, and from there to the
object's record; each place is written before the one before it is cleared. While its upload is open the data waits.
    That it has ended its own row says. Where it has none any more, every replica has to lack it.
    A Complete looks at the upload between its promise and its accept, and goes no further when that has ended. But it
    may sleep after this look, also when the upload is Done: of two Completes one may have put the version into the
    record, which was deleted since, when the other one was promised. So a round of the object's register is made after
    the upload was seen to have ended, and ends the promise (``meta.consensus.looks``). Data of a part is never in a
    create, so a majority suffices.

*All other data*: of a PUT that failed or is under way, or nothing is known of it. Its request may

1. sleep after its promise. A round ends the promise.
2. ask for its promise later than that. It makes sure after the promise that its fragments are there, and that pardons
   them (``fragments.condemned``). So the data is condemned first, then comes the round, then the deletion.
3. have sent a create, which no promise holds up. A replica that holds nothing takes it, even if a majority refuses it,
   and a later proposer may carry it on. A replica that holds something refuses it for ever. So *every* replica has to
   hold a row at or after the round; where nothing was ever written the round writes NEVER. With a replica away the data
   waits. When those rows are expunged the floor of their range refuses such a create: one of fragments names a floor
   from before they were written (``consensus.floors``).
4. be a part's. Its row is another register, which no round of this one ends. So the data waits while an upload of the
   key is open, or some replica says so, or does not answer. Afterwards the row means nothing.

*Data of a bucket that was deleted* goes, whatever it is (``is_proved_gone``). The proof is a fence that stays for ever,
    at a majority of the key's replicas. A gateway sets it when the bucket's record says Deleted, and its last loan has
    ended, and no storage node can set it at another one's disk. So two of three replicas would have to lie. That the
    directory does not name the bucket is asked besides, and proves nothing: one replica that lies can hide it while a
    deletion fences it that will be refused. Where the gateway died before it set that fence, another one does
    (``objects.system.keyends``). Nodes of version 0.1.0 do not tell which of their fences stay: where the others are no
    majority the data waits.
    What the key holds does not count. Such a fence lets no change pass, so no row of the bucket will ever be read as an
    object again. But there are rows: those of a disk that lagged, and of one that had the partition before, and comes
    back. Nothing settles them any more, and the mover of partitions leaves them as they are. A majority of the replicas
    may have them, and so name the data for ever.

*Data of a bucket that was deleted while other buckets borrow from it* is judged as that of a living bucket, until its
    last loan has ended. Its fence lends (``meta.acceptor.fences``): what gateways settle has its nonce, and so passes.

*Fragments that no run places here*, of data that the record refers to: a move left them. A gateway that moves blocks
makes sure after its promise that the new fragments are there, which pardons them. So they are condemned too, and a
round at a majority suffices: moves are no creates.

A storage node writes no register. It asks a gateway for the round, and then sees for itself, by a look before and a
look after, that the replicas have accepted something new. What the gateway answers is not believed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from storaged.errors import DataDamaged, ServiceUnavailable, StoragedError
from storaged.maintain.asks import NAMES_A_SETTLE, Settle, SettledNames
from storaged.maintain.context import MaintainContext, concurrently
from storaged.maintain.directory import Buckets
from storaged.maintain.walk import entries_of
from storaged.meta.consensus.looks import Look, moved_on
from storaged.meta.names import RegisterName, Table, Value, upload_name
from storaged.meta.ports import PageQuery
from storaged.objects.records import PartEntry
from storaged.objects.write.references import parts_in
from storaged.objects.write.uploads import COMPLETING, OPEN, decode_upload, living_upload, living_uploads, part_rows

T = TypeVar("T")

LOOKS_CONCURRENT_MAX = 64
READS_CONCURRENT_MAX = 128
STRAGGLERS_S = (0.05, 0.5)
"""A round is committed when a majority has it on disk. Pauses before further looks, for the other replicas."""

GONE_MAX = 10_000
PAST = (StoragedError, KeyError, ValueError, TimeoutError)
"""What keeps a register from being judged now."""


class Proof(NamedTuple):
    """What was seen of a register. ``value``: that of the round; ``entries``: what it refers to. ``everywhere``: every
    replica holds the round's row. ``uploads``: some upload of the key may be open; ``of_uploads``: the data that those
    refer to. ``gone``: the bucket was deleted for good, whatever its rows still refer to.
    """

    entries: Sequence[PartEntry] = ()
    everywhere: bool = False
    uploads: bool = False
    of_uploads: frozenset[bytes] = frozenset()
    gone: bool = False
    value: Value | None = None


class Judge:
    """Looks at registers for one node."""

    def __init__(self, context: MaintainContext, buckets: Buckets | None = None) -> None:
        self._context = context
        self.buckets = buckets if buckets is not None else Buckets()
        self._gone: set[bytes] = set()
        """Ids of buckets that were deleted for good."""

    # --- buckets ------------------------------------------------------------------------------------------------------

    async def is_gone(self, scope: bytes) -> bool:
        """Whether the bucket has left the directory, and so was deleted for good. Raises ServiceUnavailable."""
        if scope in self.buckets.by_id:  # also if it was left out before: that was a lie then
            return False
        if scope in self._gone:
            return True
        await self.buckets.refresh(self._context)
        if scope in self.buckets.by_id or not self.buckets.complete:
            return False
        if len(self._gone) >= GONE_MAX:
            self._gone.clear()
        self._gone.add(scope)
        return True

    async def is_proved_gone(self, owner: RegisterName) -> bool:
        """Whether the bucket of the owner was deleted for good, as the directory and the fences of the owner's replicas
        say. So a directory that leaves out a living bucket proves nothing, nor do fences that may be lifted. False when
        that is not known now.
        """
        try:
            if await self.is_gone(owner.scope):
                await self._first_look(owner)
        except _Gone:
            return True
        except PAST:
            pass
        return False

    async def countries_of(self, scope: bytes) -> tuple[str, ...]:
        """Raises as ``Buckets.countries_of``, ServiceUnavailable."""
        if scope not in self.buckets.by_id:
            await self.buckets.refresh(self._context)
        return self.buckets.countries_of(scope)

    # --- settled reads ------------------------------------------------------------------------------------------------

    async def read(self, owners: Sequence[RegisterName]) -> dict[RegisterName, Proof | str]:
        """Settles each by a read, which suffices for replaced data. Returns proofs, or the reasons why there is none
        now."""
        found: dict[RegisterName, Proof | str] = {}

        async def one(owner: RegisterName) -> Proof:
            try:
                value = (await self._context.registers.read(owner)).value
                return Proof([entry async for entry in entries_of(self._context, owner, value)], value=value)
            except PAST:
                if await self.is_proved_gone(owner):
                    return Proof(gone=True)
                raise

        found |= await self._of_each(owners, one, found, READS_CONCURRENT_MAX)
        return found

    async def upload_state(self, owner: RegisterName, upload_id: bytes) -> str:
        """Of an upload of the owner's key; empty when there is none. Its row may have been expunged; but a replica that
        lies and one that lags may lack it, too. So without a row every replica is asked. Raises as ``Registers.read``,
        DataDamaged, NotYet.
        """
        name = upload_name(owner.scope, owner.key, upload_id)
        value = (await self._context.registers.read(name)).value
        record = decode_upload(value)
        if record is not None:
            return record.state
        if value is None:
            look = await self._context.look(name)
            if not all(disk in look.held for disk in look.quorum.disks):
                raise NotYet("a replica of its upload's register is away")
            for held in look.held.values():
                record = decode_upload(held.value)
                if record is not None and is_open(record.state):
                    return record.state
        return ""

    # --- proofs -------------------------------------------------------------------------------------------------------

    async def prove(self, owners: Sequence[RegisterName]) -> dict[RegisterName, Proof | str]:
        """Has the registers settled, and looks before and after. What is to be deleted must have been condemned before.
        In place of a proof: why there is none now.
        """
        found: dict[RegisterName, Proof | str] = {}
        firsts = await self._of_each(owners, self._first_look, found)
        left = [owner for owner in firsts if owner not in found]
        uploads = await self._of_each(left, self._uploads_of, found)
        await self._settle(left)
        seconds = await self._of_each(left, self._context.look, found)
        for pause_s in STRAGGLERS_S:
            slow = [owner for owner in seconds if not moved_on(firsts[owner], seconds[owner], everywhere=True)]
            if slow:
                await asyncio.sleep(pause_s)
                seconds |= await self._of_each(slow, self._context.look, {})

        async def conclude(owner: RegisterName) -> Proof:
            first, second, of_uploads = firsts[owner], seconds[owner], uploads[owner]
            everywhere = moved_on(first, second, everywhere=True)
            held = everywhere or moved_on(first, second)
            if held is None:
                raise NotYet("no round of its register is seen at a majority of the replicas")
            entries = [entry async for entry in entries_of(self._context, owner, held.value)]
            uploads_open, of_parts = of_uploads is not None, frozenset(of_uploads or ())
            return Proof(entries, everywhere is not None, uploads_open, of_parts, value=held.value)

        found |= await self._of_each(left, conclude, found)
        return found

    async def _of_each(
        self,
        owners: Iterable[RegisterName],
        work: Callable[[RegisterName], Awaitable[T]],
        failed: dict[RegisterName, Proof | str],
        concurrent_max: int = LOOKS_CONCURRENT_MAX,
    ) -> dict[RegisterName, T]:
        """What ``work`` returns for each; those for which it raises go into ``failed`` with the reason."""
        found: dict[RegisterName, T] = {}

        async def one(owner: RegisterName) -> None:
            try:
                found[owner] = await work(owner)
            except PAST as error:
                failed[owner] = str(error)
            except _Gone:
                failed[owner] = Proof(gone=True)

        await concurrently((one(owner) for owner in owners if owner not in failed), concurrent_max)
        return found

    async def _first_look(self, owner: RegisterName) -> Look:
        """What is fenced by fences that lend counts as not fenced: rounds are made of such a bucket's registers, and
        judged as ever. So it does no harm when a replica lies about its fence, or has missed it. That a bucket is gone
        needs a majority whose fences stay for ever.
        """
        look = await self._context.look(owner)
        if look.quorum.met(look.fenced - look.lends):
            for_ever = look.quorum.met(look.final)
            if for_ever and await self.is_gone(owner.scope):
                raise _Gone
            raise NotYet("its bucket is being deleted")
        return look

    async def _uploads_of(self, owner: RegisterName) -> set[bytes] | None:
        """The data that open uploads of the key refer to; None when no upload is open, as every replica says."""
        if owner.table != Table.OBJECT or await self._no_replica_has_uploads(owner):
            return None
        found: set[bytes] = set()
        context = self._context
        async for upload in living_uploads(context.scanner, owner):
            async for part in parts_in(context.pages, owner, upload.value.body, Table.UPLOAD):
                found.add(part.data_id)
            async for row in part_rows(context.scanner, owner.scope, upload.record.upload_id):
                found.add(row.entry.data_id)
        return found

    async def _no_replica_has_uploads(self, owner: RegisterName) -> bool:
        """Whether no replica has an open upload of the key. A listing asks a majority, of which one may lie and one
        lag. False also when that is not known now.
        """
        wanted = PageQuery(Table.UPLOAD, owner.scope, [owner.shard], prefix=owner.key + b"\0")
        try:
            async for row in self._context.scanner.rows_anywhere(wanted):
                upload = living_upload(row.key, row.value)
                if upload is not None and upload.key == owner.key:
                    return False
        except (ServiceUnavailable, DataDamaged):
            return False
        return True

    async def _settle(self, owners: Sequence[RegisterName]) -> None:
        """Has gateways make a round of each. Whether it was made the second look shows."""
        for start in range(0, len(owners), NAMES_A_SETTLE):
            names = tuple(owner.pack() for owner in owners[start : start + NAMES_A_SETTLE])
            try:
                await self._context.asks.ask("settle", Settle(names), SettledNames)
            except (StoragedError, TimeoutError) as error:
                self._context.log(f"{len(names)} registers are not settled for the collector now: {error}")


class NotYet(ValueError):
    """Nothing can be proved now."""


class _Gone(Exception):
    """The bucket was deleted for good."""


def is_open(state: str) -> bool:
    """Whether an upload in this state may still become an object."""
    return state in (OPEN, COMPLETING)
