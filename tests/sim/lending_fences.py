"""A part of ``partitions``: a bucket becomes a *lender*, while partitions move and everything fails.

Its fence begins to lend when all replicas have it. From then on processes that know the nonce change a row, while
others go on to write there without it; another process that deletes the bucket, and is late, sets the plain fence
again. In some runs the first attempt to delete the bucket fails and its fence is lifted, and in some the fence is final
at last.

In some runs one replica lies about the fence: in its refusals, in looks, and to the mover once all replicas lend.
(Before that, and while another one is away, it could keep the disk that comes from ever having the fence, which holds
up the deletion of a bucket.) It takes no write that it should refuse: that replicas make up values is played in
``hostile``.

Judged is
* that nothing begun without the nonce since a majority was fenced is acknowledged, or appears in the row;
* that nothing begun with it since no fence lends any more is acknowledged, or appears there;
* that all that was acknowledged is there, and was told so;
* that in the end, when everything is well, the nonce passes as long as the fence lends, and others are told to look for
  it; and that the fence of each replica lends, wherever the partition has moved to.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any

from storaged.errors import NoSuchBucket, StoragedError
from storaged.meta.acceptor.fences import Fences
from storaged.meta.messages import ScopeFence
from storaged.meta.names import Change, Value, Visibility, object_name
from storaged.meta.ports import Update
from storaged.meta.store_ports import Fence
from tests.sim.cluster import DISKS, Gateway, StorageNode
from tests.sim.parts import Part

if TYPE_CHECKING:
    from tests.sim.partitions import Moving

SCOPE = b"lends as 0001047"
"""Of the partition of ``partitions.REOPENED``, so that no partition more moves for it."""
LENT = object_name(SCOPE, range(1), b"key")
NEW = object_name(SCOPE, range(1), b"new")
"""Nobody has the nonce for it: whoever writes it creates it."""
EARLIER, NONCE, HIGHER = b"1", b"2", b"3"


class Lender(Part):
    finishes = True

    def __init__(self, scenario: Moving, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.of: Moving = scenario
        self.joined = chance.random() < 0.6
        self.liar = chance.choice(DISKS) if self.joined and chance.random() < 0.4 else ""
        self._fails_first = chance.random() < 0.3
        self._ends = chance.random() < 0.4
        self._final = False
        self._turn = asyncio.Lock()
        self._closed_at = self._lends_at = self._ended_at = -1
        self._begun: dict[bytes, tuple[int, bool]] = {}
        """When each write began, and whether it has the nonce."""
        self._acknowledged: list[bytes] = []

    async def run(self) -> None:
        uses = [self._use() for _ in range(3)]
        await asyncio.gather(self._lend(), *uses)

    async def heal(self) -> None:
        """A replica that lies to the mover may have the plain fence set at the disk that comes. Housekeeping repeats
        what it has asked for.
        """
        async with self._turn:
            if self.liar and self._lends_at >= 0 and not self._final:
                await self._at_all(self._fence(lends=True))

    # --- the bucket

    def _fences(self) -> list[Fence | None]:
        """Of all disks, as they are there."""
        return [node.store.get_fence(SCOPE) for node in self.world.nodes.values()]

    def _fence(self, nonce: bytes = NONCE, **kind: bool) -> Any:
        return lambda process: process.client.fence(SCOPE, [0], nonce, **kind)

    async def _lend(self) -> None:
        until_done, chance = self.of.closing.until_done, self.chance
        await asyncio.sleep(chance.uniform(0, 0.2))
        if self._fails_first:
            await self._fail_first()
        await until_done("fencer", self._fence())
        self._closed_at = self.of.moment()
        late = self.world.loop.create_task(self._is_late())
        await self._at_all(self._fence(lends=True))
        self._lends_at = self.of.moment()
        self.of.found.done["lenders"] += 1
        await asyncio.gather(late, *(self._change() for _ in range(2)))
        if self._ends:
            async with self._turn:
                await until_done("fencer", self._fence(final=True))
                self._final = True
            if not any(fence is not None and fence.lends for fence in self._fences()):
                self._ended_at = self.of.moment()
            with contextlib.suppress(StoragedError):
                await self._fence(lends=True)(self.chance.choice(self.of.gateways))
            await self._change()

    async def _fail_first(self) -> None:
        until_done = self.of.closing.until_done
        await until_done("fencer", self._fence(EARLIER))
        if self.chance.random() < 0.5:
            await until_done("fencer", self._fence(EARLIER, lends=True))
        await self._at_all(lambda process: process.client.unfence(SCOPE, [0], EARLIER))

    async def _at_all(self, call: Any) -> None:
        """Until all replicas have done it."""
        done = await self.of.closing.until_done("fencer", call)
        while not done:
            await asyncio.sleep(0.02)
            done = await self.of.closing.until_done("fencer", call)

    async def _is_late(self) -> None:
        """Another process deletes the bucket, too."""
        for _ in range(3):
            await asyncio.sleep(self.chance.uniform(0, 0.3))
            await self.of.closing.until_done("fencer", self._fence())

    # --- its rows

    async def _use(self) -> None:
        for _ in range(8):
            await asyncio.sleep(self.chance.uniform(0, 0.2))
            await self.write(self.chance.choice(self.of.gateways), b"", creates=self.chance.random() < 0.4)

    async def _change(self) -> None:
        for _ in range(6):
            await asyncio.sleep(self.chance.uniform(0, 0.1))
            await self.write(self.chance.choice(self.of.gateways), NONCE)

    async def write(self, gateway: Gateway, nonce: bytes, *, creates: bool = False) -> StoragedError | None:
        """One write, and what it raised."""
        began, token = self.of.moment(), b"%d" % len(self._begun)
        self._begun[token] = began, bool(nonce)
        append: Update = lambda value: Change((value.body if value else b"") + token + b" ", Visibility.LIVE)  # noqa: E731
        name, update = (NEW, lambda _value: Change(token, Visibility.LIVE)) if creates else (LENT, append)
        try:
            await gateway.client.change(name, update, settling_nonce=nonce, regardless=creates)
        except StoragedError as error:
            return error
        self._acknowledged += [token] if name is LENT else []
        self.of.found.done["of lenders"] += bool(nonce)
        if self._refused(token):
            self.of.complain(f"a lender took a write {'after its end' if nonce else 'without its nonce'}")
        return None

    def _refused(self, token: bytes) -> bool:
        """Whether it began when nothing of its kind was taken any more."""
        began, has_nonce = self._begun[token]
        since = self._ended_at if has_nonce else self._closed_at
        return -1 < since < began

    async def judge(self, reader: Gateway) -> None:
        error = await self.write(reader, NONCE)
        lends = self._lends_at >= 0 and not self._final
        if lends and error is not None:
            self.of.complain(f"a lender can't be changed with its nonce: {error!r}")
        error = await self.write(reader, b"")
        if lends and not (isinstance(error, NoSuchBucket) and error.details.get("lends")):
            self.of.complain(f"who has no nonce of a lender is not told to look for it: {error!r}")
        found = (await reader.client.read(LENT, settling_nonce=NONCE)).value
        self._judge_row(found)
        for disk in reader.layouts.partition(LENT.partition).present:
            fence = self.world.nodes["n" + disk[1:]].store.get_fence(SCOPE)
            if lends and not (fence is not None and fence.lends):
                self.of.complain(f"at {disk} the fence of a lender does not lend: {fence}")

    def _judge_row(self, found: Value | None) -> None:
        tokens = found.body.split() if found is not None else []
        if len(set(tokens)) != len(tokens):
            self.of.complain("a change of a lender was applied twice")
        missing = set(self._acknowledged).difference(tokens)
        if missing and not self._final:  # rows of a bucket that is deleted do not move
            self.of.complain(f"changes of a lender that were acknowledged are gone: {sorted(missing)}")
        if late := [token for token in tokens if self._refused(token)]:
            self.of.complain(f"a lender has changes that its fence refuses: {late}")

    # --- a replica that lies

    def corrupt(self, node: StorageNode) -> None:
        """Called when a node starts."""
        if node.disk != self.liar:
            return
        replica = node.replica
        replica._fences = replica._rows._fences = _LyingFences(self, replica._fences)  # type: ignore[assignment]
        told = replica.handover._of

        def of(scope: bytes) -> ScopeFence:
            return self._told() if scope == SCOPE and self._lends_at >= 0 else told(scope)

        replica.handover._of = of  # type: ignore[method-assign]

    def fence_of_a_liar(self, true: Fence) -> Fence:
        """It refuses what the true one refuses."""
        nonce, kind = self.chance.choice((NONCE, HIGHER)), self.chance.random()
        return Fence(SCOPE, nonce, final=kind < 0.3, lends=kind > 0.6 and not true.final)

    def _told(self) -> ScopeFence:
        return self.chance.choice(
            (
                ScopeFence(SCOPE, b"", False, b""),
                ScopeFence(SCOPE, b"", False, HIGHER),
                ScopeFence(SCOPE, NONCE, False, b""),
                ScopeFence(SCOPE, NONCE, True, b""),
                ScopeFence(SCOPE, NONCE, False, b"", True),
            )
        )


class _LyingFences:
    """What a liar says of its fences, once the lender has one."""

    def __init__(self, lender: Lender, honest: Fences) -> None:
        self._lender = lender
        self._honest = honest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._honest, name)

    def of(self, scope: bytes) -> Fence | None:
        fence = self._honest.of(scope)
        return fence if scope != SCOPE or fence is None else self._lender.fence_of_a_liar(fence)
