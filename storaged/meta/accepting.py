"""An accept between being judged and being on disk: who is told of what becomes of it, and with what."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from storaged.errors import StoragedError
from storaged.meta.messages import AcceptReply
from storaged.meta.names import RegisterName
from storaged.meta.ports import Ballot, StoreBatch

if TYPE_CHECKING:
    from storaged.meta.replica import LocalReplica

AnswerAccept = Callable[[AcceptReply | Exception], None]


class Writing:
    """An accept on its way to the disk. ``size`` in bytes, of its value and copy; ``copied``: it came with one."""

    __slots__ = ("_replica", "answer", "ballot", "batch", "copied", "copy_error", "identity", "name", "size")

    def __init__(
        self,
        replica: LocalReplica,
        name: RegisterName,
        ballot: Ballot,
        identity: bool,
        batch: StoreBatch,
        size: int,
        copied: bool,
        answer: AnswerAccept,
    ) -> None:
        self._replica = replica
        self.name = name
        self.ballot = ballot
        self.identity = identity
        self.batch = batch
        self.size = size
        self.copied = copied
        self.answer = answer
        self.copy_error = ""

    def stored(self, error: Exception | None) -> None:
        """``ports.Done``."""
        self._replica.arrived(self, error)

    def kept(self, refusal: StoragedError | None, error: StoragedError | None) -> None:
        """``ports.Kept``: the copy, then the row."""
        if refusal is None:
            self._replica.arrived(self, error)
        else:
            self._replica.copy_refused(self, refusal)
