"""Verifies an audit log: names the first altered, missing or reordered entry of each chain, missing chains, and a missing tail.

Works on copies of the files, in any order, without the node; memory does not grow with them. What is proved: nothing between the first and the last
entry of what is given was changed. That nothing is missing behind it is proved up to the newest checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

from storaged.cluster.audit_format import ENTRY_BYTES_MAX, GENESIS, Checkpoint, Entry, Head, Predecessor, parse_line, predecessor_of
from storaged.cluster.identity import signed_by_node
from storaged.errors import StoragedError

_FILE_NAME = re.compile(r"audit-(\d+)-([0-9a-f]+)-(\d+)\.jsonl")


class AuditProblem(NamedTuple):
    """``where`` is ``file:line`` when there is such a place."""

    chain: str
    sequence: int
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason


@dataclass(frozen=True)
class AuditReport:
    """``heads`` are the last entries of the chains, in order. ``begins_after`` names the head that the oldest entry given follows (empty: the very beginning).

    ``torn_bytes`` lie behind the last entry of a chain after a crash; nothing that was acknowledged is among them.
    """

    files: int
    entries: int
    heads: tuple[Head, ...]
    problems: tuple[AuditProblem, ...]
    begins_after: str = ""
    torn_bytes: int = 0
    checkpoints: int = 0

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
    wanted: dict[int, str] = field(default_factory=dict)
    """Sequence -> the hash that a checkpoint says it has."""


def verify(files: Iterable[Path], checkpoints: Sequence[Checkpoint] = (), *, authority: x509.Certificate | None = None) -> AuditReport:
    """Verifies the files of one node's audit log. With ``authority`` the checkpoints' signatures are verified too, without it they are taken as they are.

    Raises OSError for a file that cannot be read; everything that is wrong with the content is in the report.
    """
    problems: list[AuditProblem] = []
    paths = sorted(set(files), key=lambda path: path.name)
    chains = _group(paths, problems)
    for checkpoint in checkpoints:
        _place(checkpoint, chains, authority, problems)
    entries = 0
    for chain in chains.values():
        entries += _walk(chain, problems)
    ordered = sorted(chains.values(), key=lambda chain: chain.ordinal)
    begins_after = _link(ordered, problems)
    torn_bytes = sum(chain.loose_bytes for chain in ordered)
    return AuditReport(
        len(paths),
        entries,
        tuple(chain.head for chain in ordered if chain.head is not None),
        tuple(problems),
        begins_after,
        torn_bytes,
        len(checkpoints),
    )


def _group(paths: Sequence[Path], problems: list[AuditProblem]) -> dict[str, _Chain]:
    """Chains by name, their files in order. A file is placed by its name, or by its first entry when it was renamed."""
    chains: dict[str, _Chain] = {}
    for position, path in enumerate(paths):
        match = _FILE_NAME.fullmatch(path.name)
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


def _place(checkpoint: Checkpoint, chains: dict[str, _Chain], authority: x509.Certificate | None, problems: list[AuditProblem]) -> None:
    name, sequence = checkpoint.chain, checkpoint.sequence
    if authority is not None:
        try:
            signer = signed_by_node(authority, checkpoint.certificate, checkpoint.signed_bytes(), checkpoint.signature)
        except StoragedError as error:
            problems.append(
                AuditProblem(name, sequence, "", f"the checkpoint at entry {sequence} of chain {name} is not genuine: {error.message}")
            )
            return
        if signer.name != checkpoint.node:
            problems.append(
                AuditProblem(name, sequence, "", f"the checkpoint of {checkpoint.node} at entry {sequence} was signed by {signer.name}")
            )
            return
    if name not in chains:
        problems.append(
            AuditProblem(name, sequence, "", f"chain {name} is missing: a checkpoint of {checkpoint.node} knows its entry {sequence}")
        )
        return
    known = chains[name].wanted.setdefault(sequence, checkpoint.hash)
    if known != checkpoint.hash:
        problems.append(AuditProblem(name, sequence, "", f"two checkpoints name different hashes for entry {sequence} of chain {name}"))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(ENTRY_BYTES_MAX + 1):
            number += 1
            yield number, line


def _walk(chain: _Chain, problems: list[AuditProblem]) -> int:
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
            if chain.wanted.pop(entry.sequence, entry.hash) != entry.hash:
                problems.append(
                    AuditProblem(chain.name, entry.sequence, where, f"entry {entry.sequence} is not the one that a checkpoint names")
                )
                chain.broken = True
                return entries
    return entries


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
        return f"entry {expected} is damaged or was altered ({chain.loose_line or 'its line is incomplete'}): entry {entry.sequence} stands behind it"
    if entry.sequence > expected:
        missing = f"entry {expected} is" if entry.sequence == expected + 1 else f"entries {expected} to {entry.sequence - 1} are"
        return f"{missing} missing or out of order: entry {entry.sequence} stands in its place"
    if entry.sequence < expected:
        return f"entry {entry.sequence} stands where entry {expected} belongs: out of order or repeated"
    if entry.previous != chain.previous:
        return f"entry {entry.sequence} does not follow from the one before: one of them was replaced"
    return ""


def _link(ordered: Sequence[_Chain], problems: list[AuditProblem]) -> str:
    """Checks that each chain follows from the one before, and each tail against what is known of it. Returns what the oldest chain follows."""
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
            problems.append(AuditProblem(chain.name, 0, "", f"chain {chain.name} does not follow from the files before it: {reason}"))
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
    torn_recorded: int | None = None
    if successor is not None:
        named, start = successor
        if named.sequence <= last and (named.sequence, named.hash, start.previous) != (last, chain.previous, chain.previous):
            reason = f"entry {last} is the last of chain {chain.name}, but chain {start.chain} follows from entry {named.sequence} with another hash"
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
        reason = f"the tail of chain {chain.name} is missing: {what} known to have been written"
    elif torn_recorded is not None:
        reason = f"{chain.loose_bytes} unreadable bytes lie behind entry {last} of chain {chain.name}, where {torn_recorded} were recorded"
    if reason:
        problems.append(AuditProblem(chain.name, last + 1, where, reason))
