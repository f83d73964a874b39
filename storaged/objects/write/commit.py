"""Barrier and commit: a new version becomes the register's value once its data is durable.

The condition of a write is judged on the record that the prepare of the accepted ballot brought.

The last of several blocks is sent beside the prepare. The barrier comes after the promise. Usually it costs no extra
time: the promise arrives before the block is sent. An only block is sent after the promise (``writer``). The barrier
may move blocks, when disks failed at the last moment; then the commit begins again with the entry as the barrier left
it (``RunsChanged``).

An only block under a key that is probably new is written before any promise, and a create follows. Its *grounds* are
taken before the block is sent: with them it is refused when a collector has deleted the block meanwhile
(``meta.consensus.floors``). When it is refused the commit goes on with a promise, and touches the fragments after that.

Why after the promise: a garbage collector that takes the fragments for orphans ends every promise that was given before
it looked, and deletes only what no writer has asked for since. So between each promise and its accept the fragments are
seen to exist, by a sync or a touch, which their disks then count as use (``fragments.condemned``). No age and no clock
matters.

A change whose accept was refused must therefore not simply be proposed again. An update may run once. When the register
asks for it again (``ProposedAgain``), another change begins, with a promise and a look of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from storaged.errors import SlowDown
from storaged.meta.names import Change, RegisterName, Value
from storaged.meta.ports import Outcome, SmallCopies, Unasked
from storaged.objects.background import cancel_all
from storaged.objects.bucket_keys import BucketKeys, KeyNeeded, change_with_keys
from storaged.objects.code.history import PageNeeded
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import PartEntry
from storaged.objects.write.sealing import Sealed
from storaged.objects.write.writer import PartWriter, RunsChanged

ATTEMPTS_MAX = 12
BACKOFF_FIRST_S = 0.01
BACKOFF_MAX_S = 1.0

SealedUpdate = Callable[[Value | None, PartEntry], Change]
"""What a register becomes, from its value, and from the entry of the body as the barrier left it. A part's place is in
the clear, so nothing is sealed anew when its blocks moved.
"""


AfterPromise = Callable[[], Awaitable[None]]
"""Awaited between the promise and the accept, after the update has run: it makes durable what the change refers to.
What it raises ends the change, and nothing is accepted.
"""


class ProposedAgain(Exception):
    """The register asked for the update a second time: its accept was refused, or another proposer came first."""


async def commit(
    plane: ObjectPlane,
    keys: BucketKeys,
    name: RegisterName,
    update: SealedUpdate,
    sealed: Sealed,
    *,
    regardless: bool = False,
    after_promise: AfterPromise | None = None,
) -> tuple[Outcome, PartEntry]:
    """Commits what refers to a sealed body once that is durable. ``regardless``: see ``ports.Registers.change``; it
    does not go with ``after_promise``. A coded body is created so only where it is one block, which waits.

    Raises what ``update`` raises; ServiceUnavailable when the data can't be made durable; SlowDown, which clients try
    again, when others change the key all the time.
    """
    writer, entry = sealed.writer, sealed.entry
    unasked: Unasked | None = None
    if writer is None:  # the accept writes the body as well: there is no barrier, and no fragment that could be judged
        bound = partial(_with_entry, update, entry)
        if after_promise is not None:
            outcome = await change_once(plane, keys, name, bound, after_promise, small=sealed.small)
        else:
            outcome = await change_with_keys(
                plane.registers, keys, name, bound, small=sealed.small, regardless=regardless
            )
        count_put(plane, sealed)
        return outcome, entry
    entry = writer.entry()  # a former commit may have moved blocks
    if regardless and after_promise is None and writer.held is not None:
        grounds = plane.registers.grounds(name)
        if grounds is not None:
            entry = await writer.durable_unasked()
            unasked = Unasked(grounds, update(None, entry))
    while True:
        bound = partial(_with_entry, update, entry)
        try:
            outcome = await commit_coded(
                plane, keys, name, bound, writer, after_promise, regardless=regardless, unasked=unasked
            )
        except RunsChanged:
            entry, unasked = writer.entry(), None
        else:
            count_put(plane, sealed)
            if writer.degraded:
                plane.on_degraded(name)
            return outcome, entry


def count_put(plane: ObjectPlane, sealed: Sealed) -> None:
    """Counts a body that was committed."""
    counters = plane.counters
    counters.bytes_in += sealed.digest.size
    if sealed.small is not None:
        counters.puts_small += 1
    elif sealed.entry.inline:
        counters.puts_inline += 1


def _with_entry(update: SealedUpdate, entry: PartEntry, value: Value | None) -> Change:
    return update(value, entry)


async def commit_coded(
    plane: ObjectPlane,
    keys: BucketKeys,
    name: RegisterName,
    update: Callable[[Value | None], Change],
    writer: PartWriter,
    after_promise: AfterPromise | None,
    *,
    regardless: bool = False,
    unasked: Unasked | None = None,
) -> Outcome:
    """Makes the data durable between promise and accept, and raises what that raises: RunsChanged, too. ``unasked``: a
    create that is tried first.
    """

    async def durable(promised: asyncio.Event) -> None:
        await writer.durable(promised)
        if after_promise is not None:
            await after_promise()

    return await _with_ready(plane, keys, name, update, durable, regardless=regardless, unasked=unasked)


async def change_once(
    plane: ObjectPlane,
    keys: BucketKeys,
    name: RegisterName,
    update: Callable[[Value | None], Change | None],
    after_promise: AfterPromise,
    *,
    small: SmallCopies | None = None,
) -> Outcome:
    """``registers.change`` with a promise of its own for each run of ``update``, after which ``after_promise`` runs.
    Raises as ``commit``.
    """

    async def ready(promised: asyncio.Event) -> None:
        await promised.wait()
        await after_promise()

    return await _with_ready(plane, keys, name, update, ready, small)


async def _with_ready(
    plane: ObjectPlane,
    keys: BucketKeys,
    name: RegisterName,
    update: Callable[[Value | None], Change | None],
    ready: Callable[[asyncio.Event], Awaitable[None]],
    small: SmallCopies | None = None,
    *,
    regardless: bool = False,
    unasked: Unasked | None = None,
) -> Outcome:
    attempt = 0
    while attempt < ATTEMPTS_MAX:
        promised = asyncio.Event()
        waiting = asyncio.ensure_future(ready(promised))
        try:
            once = _Once(update, promised).update
            return await plane.registers.change(
                name, once, small=small, ready=waiting, regardless=regardless, unasked=unasked
            )
        except (KeyNeeded, PageNeeded) as needed:
            await keys.supply(name, needed)
        except ProposedAgain:
            await asyncio.sleep(_backoff_s(plane, attempt))
            attempt += 1
        finally:
            await cancel_all([waiting])
        unasked = None
    raise SlowDown("Others change this key all the time; it was not written. Please reduce your request rate.")


class _Once:
    """An update that may run once. It runs with a promise, and says so."""

    def __init__(self, update: Callable[[Value | None], Change | None], promised: asyncio.Event) -> None:
        self._update = update
        self._promised = promised

    def update(self, value: Value | None) -> Change | None:
        if self._promised.is_set():
            raise ProposedAgain
        change = self._update(value)
        self._promised.set()
        return change


def _backoff_s(plane: ObjectPlane, attempt: int) -> float:
    """Exponential with full jitter: two gateways that duel must not meet again."""
    ceiling_s: float = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**attempt)
    return ceiling_s * plane.entropy(1)[0] / 255
