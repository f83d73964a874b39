"""An accept between being judged and being on disk: who is told of what becomes of it, and with what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import Struct

from storaged.errors import StoragedError
from storaged.meta.messages import Accept, AcceptReply
from storaged.meta.names import RegisterName
from storaged.meta.ports import Ballot, StoreBatch

if TYPE_CHECKING:
    from storaged.meta.acceptor.replica import LocalReplica

AnswerAccept = Callable[[AcceptReply | Exception], None]


class Writing(Struct):
    """An accept on its way to the disk. ``size`` in bytes, of its value and copy; ``copied``: it came with one."""

    replica: LocalReplica
    name: RegisterName
    ballot: Ballot
    identity: bool
    batch: StoreBatch
    size: int
    copied: bool
    told: AnswerAccept
    again: list[AnswerAccept] = []
    """Of the same accept, come again."""
    copy_error: str = ""
    arrival: asyncio.Future[None] | None = None
    """Of who waits for it to arrive, or to fail."""

    def joined(self, request: Accept, header: bytes, answer: AnswerAccept) -> bool:
        """Whether the request is the very one that is being written, come again: then ``answer`` is told what becomes
        of it.
        """
        same = (
            request.ballot == self.ballot
            and request.identity == self.identity
            and bool(header) == self.copied
            and request.value == self.batch.slots[0].value
        )
        if same:
            self.again.append(answer)
        return same

    def answer(self, outcome: AcceptReply | Exception) -> None:
        self.told(outcome)
        for told in self.again:
            told(outcome)

    def stored(self, error: Exception | None) -> None:
        """``ports.Done``."""
        self.replica.arrived(self, error)

    def kept(self, refusal: StoragedError | None, error: StoragedError | None) -> None:
        """``ports.Kept``: the copy, then the row."""
        if refusal is None:
            self.replica.arrived(self, error)
        else:
            self.replica.copy_refused(self, refusal)
