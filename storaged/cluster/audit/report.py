"""What the verifier of an audit log takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from storaged.cluster.audit.format import Head
from storaged.cluster.audit.witness_record import SeenNode


class AuditProblem(NamedTuple):
    """Something that is wrong with a chain at an entry. ``where`` is ``file:line`` where there is such a place."""

    chain: str
    sequence: int
    where: str
    reason: str
    by: tuple[str, ...] = ()
    """The witnesses that say so."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason


class WitnessView(NamedTuple):
    """What one witness has of the node whose log is verified. ``seen`` None: it could not be asked, because of
    ``reason``.
    """

    name: str
    seen: SeenNode | None
    reason: str = ""


WitnessState = Literal["agrees", "differs", "unreachable", "empty", "unusable"]


class WitnessResult(NamedTuple):
    """How a witness compares with the files.

    ``agrees``: all that it saw is in the files as it saw it. ``empty``: it saw nothing of these chains. ``unusable``:
    what it has is not signed by the node. ``sequence``: the last entry that it saw of the newest given chain, -1 for
    none.
    """

    name: str
    state: WitnessState
    chains: int
    sequence: int
    reason: str


@dataclass(frozen=True)
class AuditReport:
    """The result of a verification.

    ``heads`` are the last entries of the chains, in order. ``begins_after`` names the head that the oldest given entry
    follows (empty: the very beginning). ``torn_bytes`` follow the last entry of a chain after a crash; nothing that was
    acknowledged is among them.
    """

    files: int
    entries: int
    heads: tuple[Head, ...]
    problems: tuple[AuditProblem, ...]
    begins_after: str = ""
    torn_bytes: int = 0
    checkpoints: int = 0
    witnesses: tuple[WitnessResult, ...] = ()

    @property
    def compared(self) -> bool:
        """Whether there are witnesses, and the log was compared with every one of them."""
        return bool(self.witnesses) and all(witness.state in ("agrees", "differs") for witness in self.witnesses)

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "ok": self.ok,
            "compared_with_all_witnesses": self.compared,
            "files": self.files,
            "entries": self.entries,
            "heads": [head._asdict() for head in self.heads],
            "begins_after": self.begins_after,
            "unreadable_bytes_at_ends": self.torn_bytes,
            "problems": [problem._asdict() for problem in self.problems],
            "witnesses": [witness._asdict() for witness in self.witnesses],
            "register_checkpoints": self.checkpoints,
        }

    @property
    def ok(self) -> bool:
        return not self.problems
