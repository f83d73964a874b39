"""A gateway's side of ``asks``: it fetches what storage nodes ask, verifies it, and carries it out.

``Answers`` keeps one call open at each storage node of the layout. What it works on is bounded for each node, so that a
node that asks too much delays only itself. A request is carried out by the handler of its kind; what the handler raises
goes back as the error. A handler believes nothing of a request: its asker may be hostile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from storaged.cluster.ports import Caller, Layouts
from storaged.cluster.rpc import faults
from storaged.errors import NoSuchBucket, PeerError, StoragedError
from storaged.maintain.asks import (
    FENCED,
    FENCED_FOR_EVER,
    KINDS,
    SETTLED,
    UNSETTLED,
    WAIT_S_MAX,
    Answered,
    Asked,
    Divide,
    DividedNames,
    EndedLoans,
    EndLoans,
    Settle,
    SettledNames,
    TakeAsks,
    TakenAsks,
    names_in,
)
from storaged.maintain.context import concurrently
from storaged.maintain.pace import Pace
from storaged.meta.names import RegisterName, Table, Value, object_name
from storaged.meta.ports import Registers
from storaged.objects.records import BucketRecord
from storaged.wire import MALFORMED, Message, decode, encode

Handler = Callable[[str, Any], Awaitable[Message]]
"""``await handler(node, request)``: ``node`` asks, as its certificate says. Raises StoragedError."""

ASKS_A_NODE_MAX = 8
"""Of one storage node, worked on at the same time."""

SETTLES_CONCURRENT_MAX = 16
DIVIDES_CONCURRENT_MAX = 4
"""Bodies that are opened and coded at the same time, of one call: clients use the same gateway."""
RETRY_S = 1.0
"""Pause after a call that failed, or that came back at once with nothing: an honest node lets the call wait."""

REFUSED_S = 0.1
"""A refused ask keeps its place for this time, so that a node with impossible asks does not keep the gateway busy."""

LAYOUT_POLL_S = 1.0

NEVERS_PER_S = 10
NEVERS_BURST = 2_000
"""Registers that were never written, which a node may have settled: each leaves a row for ever. An honest node asks for
those of failed requests; it asks again later.
"""


class Answers:
    """``run`` is its task. ``handlers``: by kind; a kind without one is refused."""

    def __init__(
        self, caller: Caller, layouts: Layouts, handlers: Mapping[str, Handler], log: Callable[[str], None]
    ) -> None:
        self._caller = caller
        self._layouts = layouts
        self._handlers = handlers
        self._log = log
        self.answered = self.refused = 0

    async def run(self) -> None:
        """Follows the layout, for ever."""
        serving: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                nodes = {disk.node for disk in self._layouts.current.disks}
                for node in nodes - serving.keys():
                    serving[node] = group.create_task(_AskingNode(self, node).serve())
                for node in serving.keys() - nodes:
                    serving.pop(node).cancel()
                await asyncio.sleep(LAYOUT_POLL_S)

    async def call(self, node: str, request: TakeAsks) -> TakenAsks:
        taken, _ = await self._caller.call(node, "maintain.asks", request, TakenAsks, timeout_s=2 * WAIT_S_MAX + 1)
        return taken

    async def answer(self, node: str, ask: Asked) -> Answered:
        """Carries an ask out, and never raises."""
        try:
            kind, handler = KINDS.get(ask.kind), self._handlers.get(ask.kind)
            if kind is None or handler is None:
                raise faults.refused(faults.UNKNOWN_METHOD, f"this gateway answers nothing of the kind {ask.kind!r}")
            try:
                request = decode(ask.request, kind.request)
            except MALFORMED as error:
                raise faults.refused(faults.BAD_MESSAGE, f"an ask that cannot be read: {error}") from None
            found = Answered(ask.id, encode(await handler(node, request)))
        except Exception as error:
            if not isinstance(error, StoragedError | TimeoutError):
                self._log(f"what {node} asked ({ask.kind}) was not carried out: {type(error).__name__}: {error}")
            self.refused += 1
            return Answered(ask.id, error=faults.to_head(error))
        self.answered += 1
        return found


class _AskingNode:
    """One storage node, as a gateway serves it."""

    def __init__(self, answers: Answers, node: str) -> None:
        self._answers = answers
        self._node = node
        self._working: dict[int, asyncio.Task[None]] = {}
        self._done: list[Answered] = []
        self._came = asyncio.Event()
        """Something is done."""
        self._freed = asyncio.Event()
        """Something was handed in, so that there is room for more."""

    async def serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hand_in())
            while True:
                self._freed.clear()
                room = ASKS_A_NODE_MAX - len(self._working)
                if room <= 0:
                    await self._freed.wait()
                    continue
                began = asyncio.get_running_loop().time()
                try:
                    taken = await self._answers.call(
                        self._node, TakeAsks((), tuple(self._working), room, int(WAIT_S_MAX * 1000))
                    )
                except (PeerError, TimeoutError):
                    await asyncio.sleep(RETRY_S)
                    continue
                fresh = {ask.id: ask for ask in taken.asks[:room] if ask.id not in self._working}
                for ask in fresh.values():
                    self._working[ask.id] = group.create_task(self._work(ask))
                if not fresh and asyncio.get_running_loop().time() - began < WAIT_S_MAX / 2:
                    await asyncio.sleep(RETRY_S)

    async def _work(self, ask: Asked) -> None:
        answered = await self._answers.answer(self._node, ask)
        if answered.error is not None:
            await asyncio.sleep(REFUSED_S)
        self._done.append(answered)
        self._came.set()

    async def _hand_in(self) -> None:
        """At once, while the other call waits for more. What is being worked on is named often enough to stay this
        gateway's.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S_MAX):
                    await self._came.wait()
            self._came.clear()
            done, self._done = self._done, []
            if not done and not self._working:
                continue
            # An answer that does not arrive is asked for again, here or at another gateway.
            with contextlib.suppress(PeerError, TimeoutError):
                await self._answers.call(self._node, TakeAsks(tuple(done), tuple(self._working)))
            for answer in done:
                self._working.pop(answer.id, None)
            self._freed.set()


def loans_handler(
    find_bucket: Callable[[bytes], Awaitable[BucketRecord | None]],
    end_unused: Callable[[BucketRecord, RegisterName], Awaitable[object]],
) -> Handler:
    """Of the kind ``loans``. ``find_bucket``: by its id; None: it is not known, or not verified."""

    async def loans(_node: str, request: EndLoans) -> EndedLoans:
        failed = 0

        async def one(name: RegisterName) -> None:
            nonlocal failed
            try:
                bucket = await find_bucket(name.scope)
                if bucket is None:
                    failed += 1
                elif name == object_name(bucket.id, bucket.shard_numbers, name.key):
                    await end_unused(bucket, name)
            except (StoragedError, TimeoutError):
                failed += 1

        await concurrently(map(one, names_in(request)), SETTLES_CONCURRENT_MAX)
        return EndedLoans(failed)

    return loans


def divide_handler(
    find_bucket: Callable[[bytes], Awaitable[BucketRecord | None]],
    divide: Callable[[BucketRecord, RegisterName], Awaitable[str]],
) -> Handler:
    """Of the kind ``divide``. ``find_bucket``: by its id; None: it is not known, or not verified. ``divide``: returns
    why something stays whole.
    """

    async def handle(_node: str, request: Divide) -> DividedNames:
        names = names_in(request)
        reasons = [""] * len(names)

        async def one(index: int, name: RegisterName) -> None:
            try:
                bucket = await find_bucket(name.scope)
                if bucket is None:
                    reasons[index] = "the bucket is not known here, or not verified"
                elif name == object_name(bucket.id, bucket.shard_numbers, name.key):
                    reasons[index] = await divide(bucket, name)
                elif name.table == Table.PART:
                    reasons[index] = "its upload has not ended: it is coded when it is in an object"
                else:
                    reasons[index] = "it is no object"
            except (StoragedError, TimeoutError) as error:
                reasons[index] = str(error)

        await concurrently((one(index, name) for index, name in enumerate(names)), DIVIDES_CONCURRENT_MAX)
        return DividedNames(tuple(reasons))

    return handle


def settle_handler(registers: Registers) -> Handler:
    """Of the kind ``settle``. A node that has had too many registers settled that were never written gets UNSETTLED."""
    pace = Pace(NEVERS_PER_S, NEVERS_BURST)

    async def settle(node: str, request: Settle) -> SettledNames:
        names, now = names_in(request), asyncio.get_running_loop().time
        if pace.wait_s(node, now()) > 0:
            reason = "this node had many keys settled that were never written, and has to wait"
            return SettledNames((UNSETTLED,) * len(names), (reason,) * len(names))
        results, reasons = [UNSETTLED] * len(names), [""] * len(names)
        values: list[Value | None] = [None] * len(names)

        async def one(index: int, name: RegisterName) -> None:
            if name.table == Table.SYSTEM:
                reasons[index] = "registers of the system table are looked after by gateways"
                return
            try:
                values[index] = await registers.settle(name)
                results[index] = SETTLED
                if values[index] is None:
                    pace.spend(node, 1, now())
            except NoSuchBucket as error:
                if error.details.get("lends"):
                    reasons[index] = "its bucket was deleted and lends, but has no record of that now"
                    return
                results[index] = FENCED_FOR_EVER if error.details.get("final") else FENCED
                reasons[index] = "its bucket is being deleted"
            except (StoragedError, TimeoutError) as error:
                reasons[index] = str(error)

        await concurrently((one(index, name) for index, name in enumerate(names)), SETTLES_CONCURRENT_MAX)
        return SettledNames(tuple(results), tuple(reasons), values[0] if request.value and len(names) == 1 else None)

    return settle
