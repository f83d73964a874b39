"""Which buckets are fenced at one disk: what its store has, and over it what is on its way there.

A fence is in force from the moment that it was asked for, and until its lifting is on disk.

A fence may *lend*. It closes a bucket of which nothing is left but rows that lend data to other buckets. It refuses
what each fence refuses, creates too, but lets changes with its nonce pass besides settling rounds. It is no proof that
nothing changes: it proves that nothing changes but by those who know the nonce. A gateway that was suspended in a PUT
does not; only what ends loans and names new places of data has it.
* A plain fence becomes one that lends when it is asked for with the same nonce. No late request takes that back: a
  replica that lends no more would refuse what the others take, and nobody would notice.
* It ends when it is made final, with the same nonce, or is lifted. Then it never comes back: a final fence does not
  lend, and a nonce that was lifted sets no fence. A replica that has missed the final fence may yet take a change with
  the nonce, and a settling round may carry that on. So a bucket ends when it has no row left: nothing that has the
  nonce makes one.
* Which replicas lend changes nothing for a change without the nonce. So a replica that has the plain fence yet, and
  one that lends already, refuse the same, and no moment has to be agreed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from storaged.errors import DiskUnusable
from storaged.meta.consensus.acceptor import AcceptorState
from storaged.meta.consensus.register import RULES, Rules, Verdict
from storaged.meta.messages import FenceLift, FenceReply, FenceSet
from storaged.meta.store_ports import Fence, MetaStore, NotInMemory, RowDamaged, StoreBatch

T = TypeVar("T")

FENCES_KNOWN_MAX = 4_096
"""Buckets whose state is cached, fenced or not; only this disk's replica changes it."""

META_LIFTED = "lifted "
"""And the scope's hexadecimal digits: the name under which the store has the highest nonce whose fence was lifted."""

Write = tuple[StoreBatch, Callable[[], None]]
"""A batch to write, and a callback for when it is on disk."""


class Fences:
    """Everything here raises DiskUnusable where the store can't say, and may raise NotInMemory (``when_in_memory``).

    Nonces of a scope grow. A request that comes late, with a nonce that was lifted or is lower than the one in force,
    is refused: its fence would stay for ever, or take the place of the fence that another deletion relies on, and be
    lifted under it.
    """

    def __init__(self, disk: str, store: MetaStore, state: AcceptorState, rules: Rules = RULES) -> None:
        self._disk = disk
        self._store = store
        self._state = state
        self._rules = rules
        self._unsynced: dict[bytes, Fence] = {}
        self._lifted_unsynced: dict[bytes, bytes] = {}
        self._known: dict[bytes, Fence | None] = {}
        self._arriving: dict[bytes, bytes] = {}
        """Scope -> nonce of its fence. Accepts that were judged before the fence was set may not be on disk yet."""

    def of(self, scope: bytes) -> Fence | None:
        unsynced = self._unsynced.get(scope)
        return unsynced if unsynced is not None else self._on_disk(scope)

    def holds(self, scope: bytes, nonce: bytes) -> bool:
        """Whether the fence of this nonce is on disk, and everything that was judged before it."""
        fence = self._on_disk(scope)
        return fence is not None and fence.nonce == nonce and scope not in self._arriving

    def arrived(self, scope: bytes, nonce: bytes) -> None:
        """Everything that was judged before the fence of this nonce is on disk, or failed. It says nothing about a
        later fence: after this one was lifted, accepts were judged without a fence.
        """
        if self._arriving.get(scope) == nonce:
            del self._arriving[scope]

    def _on_disk(self, scope: bytes) -> Fence | None:
        try:
            return self._known[scope]
        except KeyError:
            pass
        try:
            fence = self._store.get_fence(scope)
        except RowDamaged as error:
            raise DiskUnusable(f"Disk {self._disk} can't tell whether a bucket is fenced: {error}") from None
        if len(self._known) >= FENCES_KNOWN_MAX:
            self._known.clear()
        self._known[scope] = fence
        return fence

    async def when_in_memory(self, call: Callable[[], T]) -> T:
        """The result of a call of this object, as soon as it need not wait for the disk. Raises what the call raises,
        SlowDown, DiskUnusable.
        """
        while True:
            try:
                return call()
            except NotInMemory as missing:
                await self._store.load(missing)

    def is_old(self, epochs: Mapping[int, int]) -> bool:
        """Whether one of these partitions is in a later step here. ``epochs``: as the caller knows them."""
        state = self._state
        if not state.epochs or not self._rules.fences_by_step:
            return False
        return any(epoch < state.epochs.get(partition, state.epoch) for partition, epoch in epochs.items())

    def reply(self, request: FenceSet | FenceLift, *, done: bool) -> FenceReply:
        """To a request for which nothing is to be written."""
        return FenceReply(done, Verdict.EPOCH if self.is_old(request.epochs) else Verdict.OK)

    def set(self, request: FenceSet) -> Write | None:
        """In force from now on; None: refused."""
        scope, nonce = request.scope, request.nonce
        if self.is_old(request.epochs):
            return None
        present = self.of(scope)
        if present is not None and present.final and present.nonce != nonce:
            return None
        final = request.final or (present is not None and present.final)
        if not final and (nonce <= self._lifted(scope) or (present is not None and nonce < present.nonce)):
            return None
        lent = present is not None and present.lends and present.nonce == nonce
        fence = Fence(scope, nonce, final, lends=(request.lends or lent) and not final)
        arriving = (lent and final) or not self.holds(scope, nonce)
        self._unsynced[scope] = fence
        if arriving:
            self._arriving[scope] = nonce

        def synced() -> None:
            self._known.pop(scope, None)
            if self._unsynced.get(scope) is fence:
                del self._unsynced[scope]

        return StoreBatch(fences=[fence]), synced

    def lift(self, request: FenceLift) -> Write | bool | None:
        """Returns the batch to write, which also says that this nonce was lifted; True if the lifting is on disk
        already; False if refused because a fence with a higher nonce, or a final one, stays; None if the caller does
        not know a step of a partition.
        """
        scope, nonce = request.scope, request.nonce
        if self.is_old(request.epochs):
            return None
        present = self.of(scope)
        if present is not None and (present.final or nonce < present.nonce):
            return False
        if present is None and nonce <= self._lifted(scope) and scope not in self._lifted_unsynced:
            return True
        lifted = self._lifted_unsynced[scope] = max(nonce, self._lifted(scope))

        def synced() -> None:
            self._known.pop(scope, None)
            if self._lifted_unsynced.get(scope) is lifted:
                del self._lifted_unsynced[scope]

        return StoreBatch(unfence=[scope], meta={META_LIFTED + scope.hex(): lifted}), synced

    def _lifted(self, scope: bytes) -> bytes:
        try:
            return self._lifted_unsynced.get(scope) or self._store.get_meta(META_LIFTED + scope.hex()) or b""
        except RowDamaged as error:
            raise DiskUnusable(f"Disk {self._disk} can't tell which fences were lifted: {error}") from None
