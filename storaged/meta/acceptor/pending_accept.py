"""Accepts between being judged and being on disk, at one acceptor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from storaged.errors import StoragedError
from storaged.meta.messages import Accept, AcceptReply
from storaged.meta.names import Ballot, RegisterName
from storaged.meta.store_ports import StoreBatch

OnAcceptReply = Callable[[AcceptReply | Exception], None]
"""Gets what ``ports.Replica.accept`` returns or raises."""


class Owner(Protocol):
    """The acceptor that the accept is for."""

    def on_stored(self, pending: PendingAccept, error: Exception | None) -> None:
        """The row is on disk, or the store refused it."""

    def on_copy_refused(self, pending: PendingAccept, refusal: StoragedError) -> None:
        """The small copy was not stored, and so the row was not written."""


class PendingAccept(Struct):
    """``size`` in bytes, of its value and copy. ``copied``: it came with a copy."""

    owner: Owner
    name: RegisterName
    ballot: Ballot
    identity: bool
    batch: StoreBatch
    size: int
    copied: bool
    on_answer: OnAcceptReply
    again: list[OnAcceptReply] = []
    """Of the same accept, when it came again."""
    arrival: asyncio.Future[None] | None = None
    """Done when it has arrived, or failed; None while nothing waits for that."""

    def joined(self, request: Accept, header: bytes, on_answer: OnAcceptReply) -> bool:
        """Whether the request is the very one that is being written, come again: then ``on_answer`` gets its result
        too.
        """
        same = (
            request.ballot == self.ballot
            and request.identity == self.identity
            and bool(header) == self.copied
            and request.value == self.batch.slots[0].value
        )
        if same:
            self.again.append(on_answer)
        return same

    def answer(self, outcome: AcceptReply | Exception) -> None:
        self.on_answer(outcome)
        for on_answer in self.again:
            on_answer(outcome)

    def stored(self, error: Exception | None) -> None:
        """``ports.Done``."""
        self.owner.on_stored(self, error)

    def kept(self, refusal: StoragedError | None, error: StoragedError | None) -> None:
        """``ports.Kept``: the copy, then the row."""
        if refusal is None:
            self.owner.on_stored(self, error)
        else:
            self.owner.on_copy_refused(self, refusal)


class PendingAccepts:
    """The accepts of one disk that are on their way to it, at most one for each register."""

    def __init__(self) -> None:
        self.by_name: dict[RegisterName, PendingAccept] = {}

    def __len__(self) -> int:
        return len(self.by_name)

    def end(self, pending: PendingAccept) -> None:
        """It has arrived, or failed: other requests for its register go on."""
        del self.by_name[pending.name]
        if pending.arrival is not None:
            pending.arrival.set_result(None)

    def arrival(self, name: RegisterName) -> asyncio.Future[None]:
        """Done when the pending accept of this register has arrived, or failed."""
        pending = self.by_name[name]
        if pending.arrival is None:
            pending.arrival = asyncio.get_running_loop().create_future()
        return pending.arrival

    def arrivals(self) -> list[asyncio.Future[None]]:
        return list(map(self.arrival, self.by_name))

    async def quiet(self, name: RegisterName, check: Callable[[], None]) -> None:
        """Returns when no accept of this register is on its way. Calls ``check`` whenever it goes on."""
        check()
        while name in self.by_name:
            await asyncio.wait((self.arrival(name),))
            check()

    async def all_arrived(self) -> None:
        """Everything that was on its way when this was called."""
        if self.by_name:
            await asyncio.wait(self.arrivals())


def resolve(answered: asyncio.Future[AcceptReply], outcome: AcceptReply | Exception) -> None:
    """Gives the outcome of an accept to a caller that waits, unless it has gone away."""
    if answered.done():
        return
    if isinstance(outcome, Exception):
        answered.set_exception(outcome)
    else:
        answered.set_result(outcome)
