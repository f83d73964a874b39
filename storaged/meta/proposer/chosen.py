"""Watches that what is chosen does not fall back: the sequences of a register's chosen values only grow.

Each process remembers what it has seen chosen of the registers that it changed last. A lower sequence later means that
a chosen value was undone: replicas lie or were put back, or a proposer is wrong.
"""

from __future__ import annotations

from collections import OrderedDict

import structlog

from storaged.meta.names import RegisterName
from storaged.meta.ports import Outcome

REGISTERS_MAX = 4096

log = structlog.get_logger(__name__)


class ChosenWatch:
    """``falls``: how often it was seen; ``last``: the register (its packed name in hex) and the two sequences."""

    def __init__(self) -> None:
        self._sequences: OrderedDict[RegisterName, int] = OrderedDict()
        self.falls = 0
        self.last = ""

    def saw(self, name: RegisterName, outcome: Outcome) -> None:
        """The outcome of a change: what it found was chosen, or became so with it."""
        before, after = outcome
        sequences = self._sequences
        known = sequences.pop(name, 0)
        if before is not None and before.sequence < known:
            self._alarm(name, known, before.sequence)
        if after is not None:
            sequences[name] = after.sequence
            if len(sequences) > REGISTERS_MAX:
                sequences.popitem(last=False)

    def _alarm(self, name: RegisterName, known: int, found: int) -> None:
        self.falls += 1
        self.last = f"register {name.pack().hex()[:256]} went from sequence {known} back to {found}"
        log.error(
            "what was chosen has fallen back", register=name.pack().hex()[:256], known_sequence=known, sequence=found
        )
