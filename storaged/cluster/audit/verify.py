"""Verifies an audit log: names the first altered, missing or reordered entry of each chain, missing chains, and a
missing tail.

Works on copies of the files, in any order, without the node; memory does not grow with them. What the files alone
prove: nothing between the first and the last entry was changed by who could not also compute all hashes after it
anew. Who owns the node can: that the log was not rewritten, nor its end cut off, is proved up to the newest
checkpoint that a witness saw (``witness_record``), and by as many nodes as witnesses agree.

A file that the node removed because it was old enough has an entry ``audit.pruned``; one that is missing without it
is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from cryptography import x509

from storaged.cluster.audit.files import FILE_NAME
from storaged.cluster.audit.format import (
    ENTRY_BYTES_MAX,
    GENESIS,
    Checkpoint,
    Entry,
    Head,
    Predecessor,
    RegisterCheckpoint,
    parse_line,
    predecessor_of,
)
from storaged.cluster.audit.witness_record import Mark, SeenChain, SeenNode
from storaged.cluster.identity import signed_by_node
from storaged.config import KEEP_DAYS_MIN
from storaged.errors import StoragedError

PRUNED: Final = "audit.pruned"
DAY_MS: Final = 24 * 3600 * 1000


class AuditProblem(NamedTuple):
    """``where`` is ``file:line`` when there is such a place."""

    chain: str
    sequence: int
    where: str
    reason: str
    by: tuple[str, ...] = ()
    """Witnesses whose word it is."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason


class WitnessView(NamedTuple):
    """What one witness has of the node whose log is verified. ``seen`` None: it could not be asked, for the
    ``reason``."""

    name: str
    seen: SeenNode | None
    reason: str = ""


WitnessState = Literal["agrees", "differs", "unreachable", "empty", "unusable"]


class WitnessResult(NamedTuple):
    """``agrees``: all that it saw is in the files as it saw it. ``empty``: it saw nothing of these chains.
    ``unusable``: what it gives is not signed by the node.

    ``sequence``: the last entry of the newest chain given that it saw, -1 for none."""

    name: str
    state: WitnessState
    chains: int
    sequence: int
    reason: str


@dataclass(frozen=True)
class AuditReport:
    """``heads`` are the last entries of the chains, in order. ``begins_after`` names the head that the oldest entry
    given follows (empty: the very beginning).

    ``torn_bytes`` lie behind the last entry of a chain after a crash; nothing that was acknowledged is among them.
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
        """With every witness there is, and there is one."""
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

    @property
    def first_problem(self) -> AuditProblem | None:
        return self.problems[0] if self.problems else None


@dataclass
class _Chain:
    name: str
    ordinal: int
    files: list[Path] = field(default_factory=list)
    first: Entry | None = None
    head: Head | None = None
    previous: str = ""
    """Hash that the next entry must name."""
    loose_bytes: int = 0
    """Unreadable bytes behind the last entry."""
    loose_line: str = ""
    """Where a whole line is among them, and what is wrong with it."""
    broken: bool = False
    wanted: dict[int, dict[str, list[str]]] = field(default_factory=dict)
    """Sequence -> the hashes that checkpoints say it has -> whose checkpoints."""
    agreed: int = -1
    """The last entry that is the one that a checkpoint names."""


def verify(
    files: Iterable[Path],
    checkpoints: Sequence[RegisterCheckpoint] = (),
    witnesses: Sequence[WitnessView] = (),
    *,
    authority: x509.Certificate | None = None,
    whole: bool = False,
) -> AuditReport:
    """Verifies the files of one node's audit log. With ``authority`` the checkpoints' signatures are verified too,
    without it they are taken as they are.

    ``checkpoints`` are those that versions with protocol 2 kept in registers. ``whole``: all of the log is given, so
    that what is missing of it is named too. Raises OSError for a file that cannot be read; everything that is wrong
    with the content is in the report.
    """
    problems: list[AuditProblem] = []
    paths = sorted(set(files), key=lambda path: path.name)
    chains = _group(paths, problems)
    for checkpoint in checkpoints:
        _place(checkpoint, chains, authority, problems)
    usable = {view.name: _place_witness(view, chains, authority) for view in witnesses}
    pruned: dict[str, _Pruned] = {}
    entries = 0
    for chain in chains.values():
        entries += _walk(chain, problems, pruned)
    ordered = sorted(chains.values(), key=lambda chain: chain.ordinal)
    begins_after = _link(ordered, problems)
    if begins_after and whole and not _begins_where_pruned(ordered, pruned):
        reason = (
            f"the oldest files are missing: the log begins after {begins_after}, and no entry {PRUNED} says that they"
            " were removed"
        )
        problems.insert(0, AuditProblem(ordered[0].name, 0, "", reason))
    for view in witnesses:
        if view.seen is not None and not usable[view.name]:
            _find_missing(view, chains, pruned, problems, whole=whole)
    torn_bytes = sum(chain.loose_bytes for chain in ordered)
    return AuditReport(
        len(paths),
        entries,
        tuple(chain.head for chain in ordered if chain.head is not None),
        tuple(problems),
        begins_after,
        torn_bytes,
        len(checkpoints),
        tuple(_result(view, usable[view.name], ordered, problems) for view in witnesses),
    )


class _Pruned(NamedTuple):
    """Files of a chain that the node says it removed, up to the entry ``sequence``."""

    sequence: int
    hash: str
    time_ms: int


def _place_witness(view: WitnessView, chains: dict[str, _Chain], authority: x509.Certificate | None) -> str:
    """Notes what the entries are to be. Returns why what the witness gives can't be used; empty when it can."""
    for name, seen in view.seen.chains.items() if view.seen is not None else ():
        if (chain := chains.get(name)) is None:
            continue
        if authority is not None and (reason := _forged(seen.checkpoint, authority)):
            return reason
        last = seen.checkpoint
        for sequence, entry_hash, _ in (*seen.marks, (last.sequence, last.hash, last.time_ms)):
            chain.wanted.setdefault(sequence, {}).setdefault(entry_hash.hex(), []).append(view.name)
    return ""


def _forged(checkpoint: Checkpoint, authority: x509.Certificate) -> str:
    try:
        signer = signed_by_node(authority, checkpoint.certificate, checkpoint.signed_bytes(), checkpoint.signature)
    except StoragedError as error:
        return (
            f"its checkpoint at entry {checkpoint.sequence} of chain {checkpoint.chain} is not genuine: {error.message}"
        )
    return "" if signer.name == checkpoint.node else f"its checkpoint of {checkpoint.node} was signed by {signer.name}"


def _find_missing(
    view: WitnessView,
    chains: dict[str, _Chain],
    pruned: dict[str, _Pruned],
    problems: list[AuditProblem],
    *,
    whole: bool,
) -> None:
    """Chains that the witness saw and that are not in the files, and those that it saw begin where they should not."""
    assert view.seen is not None
    names = list(view.seen.chains)
    gone = max((at for at, name in enumerate(names) if name in pruned), default=-1)
    for at, (name, seen) in enumerate(view.seen.chains.items()):
        checkpoint = seen.checkpoint
        if name in chains:
            if seen.problem:
                problems.append(AuditProblem(name, 0, "", f"{view.name} saw it begin: {seen.problem}", (view.name,)))
        elif whole and at > gone:
            reason = f"chain {name} is missing: {view.name} saw its entry {checkpoint.sequence}"
            problems.append(AuditProblem(name, checkpoint.sequence, "", reason, (view.name,)))
        if name in pruned and (removed := _removed_too_early(seen, pruned[name])):
            problems.append(
                AuditProblem(name, removed[0], "", f"{removed[1]}, by the word of {view.name}", (view.name,))
            )


def _removed_too_early(seen: SeenChain, pruned: _Pruned) -> tuple[int, str] | None:
    """The entry of a chain that was removed before KEEP_DAYS_MIN were over, and what that is called. The times are
    those of entries, as the node told them before."""
    last = seen.checkpoint
    shown = [
        mark for mark in (*seen.marks, Mark(last.sequence, last.hash, last.time_ms)) if mark.sequence <= pruned.sequence
    ]
    if not shown or (days := (pruned.time_ms - shown[-1].time_ms) // DAY_MS) >= KEEP_DAYS_MIN:
        return None
    return (
        shown[-1].sequence,
        (
            f"entry {shown[-1].sequence} of chain {last.chain} was removed when it was {days} days old, not"
            f" {KEEP_DAYS_MIN}"
        ),
    )


def _result(
    view: WitnessView, unusable: str, ordered: Sequence[_Chain], problems: Sequence[AuditProblem]
) -> WitnessResult:
    if view.seen is None:
        return WitnessResult(view.name, "unreachable", 0, -1, view.reason)
    if unusable:
        return WitnessResult(view.name, "unusable", 0, -1, unusable)
    common = [chain.name for chain in ordered if chain.name in view.seen.chains]
    sequence = view.seen.chains[common[-1]].checkpoint.sequence if common else -1
    damaged = f"{view.seen.damaged_lines} of its lines are damaged" if view.seen.damaged_lines else ""
    reached = all(
        _agrees(chain, view.seen.chains[chain.name].checkpoint.sequence) for chain in ordered if chain.name in common
    )
    if not reached or any(view.name in problem.by for problem in problems):
        return WitnessResult(view.name, "differs", len(common), sequence, damaged)
    return WitnessResult(view.name, "agrees" if common else "empty", len(common), sequence, damaged)


def _agrees(chain: _Chain, sequence: int) -> bool:
    """That entry is the one that was seen, or lay in a file that was removed."""
    return chain.first is not None and (sequence <= chain.agreed or sequence < chain.first.sequence)


def _begins_where_pruned(ordered: Sequence[_Chain], pruned: dict[str, _Pruned]) -> bool:
    """The oldest entry follows one that the node says it removed."""
    first = next((chain.first for chain in ordered if chain.first is not None), None)
    if first is None:
        return False
    before = (
        predecessor_of(first)
        if first.sequence == 0
        else Predecessor(first.chain, first.sequence - 1, first.previous, 0)
    )
    removed = pruned.get(before.chain) if before is not None else None
    return (
        before is not None
        and removed is not None
        and (removed.sequence, removed.hash) == (before.sequence, before.hash)
    )


def _group(paths: Sequence[Path], problems: list[AuditProblem]) -> dict[str, _Chain]:
    """Chains by name, their files in order. A file is placed by its name, or by its first entry when it was renamed."""
    chains: dict[str, _Chain] = {}
    for position, path in enumerate(paths):
        match = FILE_NAME.fullmatch(path.name)
        if match is not None:
            name, ordinal = match[2], int(match[1])
        else:
            first = next(_lines(path), (0, b""))[1]
            try:
                name, ordinal = parse_line(first.rstrip(b"\n")).chain, position
            except ValueError as error:
                problems.append(AuditProblem("", 0, f"{path.name}:1", f"not an audit log: {error}"))
                continue
        chains.setdefault(name, _Chain(name, ordinal)).files.append(path)
    return chains


def _place(
    checkpoint: RegisterCheckpoint,
    chains: dict[str, _Chain],
    authority: x509.Certificate | None,
    problems: list[AuditProblem],
) -> None:
    name, sequence = checkpoint.chain, checkpoint.sequence
    if authority is not None:
        try:
            signer = signed_by_node(authority, checkpoint.certificate, checkpoint.signed_bytes(), checkpoint.signature)
        except StoragedError as error:
            problems.append(
                AuditProblem(
                    name,
                    sequence,
                    "",
                    f"the checkpoint at entry {sequence} of chain {name} is not genuine: {error.message}",
                )
            )
            return
        if signer.name != checkpoint.node:
            problems.append(
                AuditProblem(
                    name,
                    sequence,
                    "",
                    f"the checkpoint of {checkpoint.node} at entry {sequence} was signed by {signer.name}",
                )
            )
            return
    if name not in chains:
        problems.append(
            AuditProblem(
                name,
                sequence,
                "",
                f"chain {name} is missing: a checkpoint of {checkpoint.node} knows its entry {sequence}",
            )
        )
        return
    chains[name].wanted.setdefault(sequence, {}).setdefault(checkpoint.hash, []).append("a register")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(ENTRY_BYTES_MAX + 1):
            number += 1
            yield number, line


def _walk(chain: _Chain, problems: list[AuditProblem], pruned: dict[str, _Pruned]) -> int:
    """Follows one chain through its files up to the first problem. Returns how many entries hold."""
    entries = 0
    for path in chain.files:
        for number, line in _lines(path):
            where = f"{path.name}:{number}"
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line is incomplete")
                entry = parse_line(line[:-1])
            except ValueError as error:
                chain.loose_bytes += len(line)
                if line.endswith(b"\n") and not chain.loose_line:
                    chain.loose_line = f"{where}: {error}"
                continue
            reason = _misfit(chain, entry)
            if reason:
                expected = chain.head.sequence + 1 if chain.head is not None else 0
                problems.append(AuditProblem(chain.name, expected, where, reason))
                chain.broken = True
                return entries
            chain.first = chain.first or entry
            chain.head, chain.previous = Head(entry.chain, entry.sequence, entry.hash), entry.hash
            entries += 1
            if entry.kind == PRUNED:
                _note_pruned(entry, pruned)
            wanted = chain.wanted.pop(entry.sequence, None)
            if wanted is None:
                continue
            others = tuple(who for name, whose in wanted.items() if name != entry.hash for who in whose)
            if others:
                problems.append(
                    AuditProblem(chain.name, entry.sequence, where, _rewritten(chain, entry, others), others)
                )
                chain.broken = True
                return entries
            chain.agreed = entry.sequence
    return entries


def _rewritten(chain: _Chain, entry: Entry, whose: Sequence[str]) -> str:
    since = (
        f"some entry from {chain.agreed + 1} on was changed" if chain.agreed < entry.sequence - 1 else "it was changed"
    )
    return (
        f"entry {entry.sequence} is not the one that a checkpoint names ({', '.join(whose)}): {since}, and the hashes"
        " computed anew"
    )


def _note_pruned(entry: Entry, pruned: dict[str, _Pruned]) -> None:
    chain, last, last_hash = (entry.fields.get(name) for name in ("chain", "last", "hash"))
    if isinstance(chain, str) and isinstance(last, int) and isinstance(last_hash, str):
        known = pruned.get(chain)
        if known is None or last > known.sequence:
            pruned[chain] = _Pruned(last, last_hash, entry.time_ms)


def _misfit(chain: _Chain, entry: Entry) -> str:
    """Why an entry, whole in itself, does not belong here; empty when it does."""
    if entry.chain != chain.name:
        return f"an entry of chain {entry.chain} does not belong in a file of chain {chain.name}"
    if chain.head is None:
        if entry.sequence == 0 and entry.kind != "start":
            return "entry 0 does not begin the chain: its kind is not 'start'"
        if entry.sequence > 0 and entry.kind != "continue":
            return f"the entries before entry {entry.sequence} are missing: files begin with a 'start' or a 'continue'"
        return ""
    expected = chain.head.sequence + 1
    if chain.loose_bytes:
        return (
            f"entry {expected} is damaged or was altered ({chain.loose_line or 'its line is incomplete'}): entry"
            f" {entry.sequence} stands behind it"
        )
    if entry.sequence > expected:
        missing = (
            f"entry {expected} is"
            if entry.sequence == expected + 1
            else f"entries {expected} to {entry.sequence - 1} are"
        )
        return f"{missing} missing or out of order: entry {entry.sequence} stands in its place"
    if entry.sequence < expected:
        return f"entry {entry.sequence} stands where entry {expected} belongs: out of order or repeated"
    if entry.previous != chain.previous:
        return f"entry {entry.sequence} does not follow from the one before: one of them was replaced"
    return ""


def _link(ordered: Sequence[_Chain], problems: list[AuditProblem]) -> str:
    """Checks that each chain follows from the one before, and each tail against what is known of it. Returns what the
    oldest chain follows."""
    begins_after = ""
    named_by: dict[str, tuple[Predecessor, Entry]] = {}
    earlier: set[str] = set()
    for chain in ordered:
        first = chain.first
        if first is None:
            continue
        try:
            before = predecessor_of(first) if first.sequence == 0 else None
        except ValueError as error:
            problems.append(AuditProblem(chain.name, 0, "", str(error)))
            before = None
        reason = ""
        if not earlier:
            if first.sequence > 0:
                begins_after = f"entry {first.sequence - 1} of chain {chain.name}"
            elif before is not None:
                begins_after = f"entry {before.sequence} of chain {before.chain}"
            elif first.previous != GENESIS:
                reason = "it names no predecessor, but follows a hash"
        elif first.sequence > 0:
            reason = f"its beginning is missing: the first entry here is {first.sequence}"
        elif before is None:
            reason = "it begins anew although there are older chains"
        elif before.chain not in earlier:
            reason = f"chain {before.chain}, which it names, is missing"
        if reason:
            problems.append(
                AuditProblem(
                    chain.name, 0, "", f"chain {chain.name} does not follow from the files before it: {reason}"
                )
            )
        if before is not None:
            named_by[before.chain] = (before, first)
        earlier.add(chain.name)
    for chain in ordered:
        _check_tail(chain, named_by.get(chain.name), problems)
    return begins_after


def _check_tail(chain: _Chain, successor: tuple[Predecessor, Entry] | None, problems: list[AuditProblem]) -> None:
    if chain.broken:
        return
    last = chain.head.sequence if chain.head is not None else -1
    promised = max(chain.wanted, default=-1)
    whose = tuple(
        dict.fromkeys(
            who for at, wanted in chain.wanted.items() if at > last for each in wanted.values() for who in each
        )
    )
    torn_recorded: int | None = None
    if successor is not None:
        named, start = successor
        if named.sequence <= last and (named.sequence, named.hash, start.previous) != (
            last,
            chain.previous,
            chain.previous,
        ):
            reason = (
                f"entry {last} is the last of chain {chain.name}, but chain {start.chain} follows from entry"
                f" {named.sequence} with another hash"
            )
            problems.append(AuditProblem(chain.name, last, "", reason))
            return
        promised = max(promised, named.sequence)
        torn_recorded = named.torn_bytes
    if promised <= last and torn_recorded == chain.loose_bytes:
        return
    where, reason = "", ""
    if chain.loose_line:
        where, _, reason = chain.loose_line.partition(": ")
        reason = f"entry {last + 1} is damaged or was altered: {reason}"
    elif promised > last:
        what = f"entry {promised} is" if promised == last + 1 else f"entries {last + 1} to {promised} are"
        by = f" ({', '.join(whose)})" if whose else ""
        reason = f"the tail of chain {chain.name} is missing: {what} known to have been written{by}"
    elif torn_recorded is not None:
        reason = (
            f"{chain.loose_bytes} unreadable bytes lie behind entry {last} of chain {chain.name}, where {torn_recorded}"
            " were recorded"
        )
    if reason:
        problems.append(AuditProblem(chain.name, last + 1, where, reason, whose if promised > last else ()))
