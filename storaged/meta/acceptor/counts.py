"""What one acceptor counts, and the alarms among it."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from storaged.meta.consensus.acceptor import AcceptorState
from storaged.meta.names import Ballot, RegisterName

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ReplicaStatistics:
    """Counts since the start of the process. ``ballot_conflicts`` is an alarm: it is 0 in a sound cluster."""

    disk: str
    state: str
    promises: int
    accepts_in_flight: int
    prepares: int
    accepts: int
    reads: int
    refused: int
    promises_evicted: int
    rows_damaged: int
    ballot_conflicts: int
    sequence_falls: int
    """Values accepted over one with a higher sequence. A crash may leave a value that was never chosen, so a few say
    nothing. Without crashes it is an alarm: somebody puts older records back.
    """


@dataclass(slots=True)
class AcceptorCounts:
    """See ``ReplicaStatistics``."""

    disk: str
    prepares: int = 0
    accepts: int = 0
    refused: int = 0
    conflicts: int = 0
    falls: int = 0

    def statistics(
        self, known: AcceptorState, state: str, in_flight: int, *, reads: int, refused: int, damaged: int
    ) -> ReplicaStatistics:
        """``refused`` and ``damaged``: of reads."""
        return ReplicaStatistics(
            disk=self.disk,
            state=state,
            promises=len(known.promises),
            accepts_in_flight=in_flight,
            prepares=self.prepares,
            accepts=self.accepts,
            reads=reads,
            refused=self.refused + refused,
            promises_evicted=known.evicted,
            rows_damaged=damaged,
            ballot_conflicts=self.conflicts,
            sequence_falls=self.falls,
        )

    def note_conflict(self, name: RegisterName, ballot: Ballot) -> None:
        """One ballot came with two values."""
        self.conflicts += 1
        log.error("one ballot with two values", disk=self.disk, ballot=str(ballot), register=name.pack().hex())

    def note_fall(self, name: RegisterName, ballot: Ballot, held: int, sequence: int) -> None:
        """A value comes with a lower sequence than the one held. It is taken nevertheless: what is here may never have
        been chosen, and a register whose acceptors refused the chosen value would be stuck.
        """
        self.falls += 1
        register = name.pack().hex()
        log.warning(
            "a register's sequence falls",
            disk=self.disk,
            register=register,
            ballot=str(ballot),
            held=held,
            sequence=sequence,
        )
