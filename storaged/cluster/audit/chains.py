"""Follows the chains of an audit log through their files, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from storaged.cluster.audit.files import FILE_NAME
from storaged.cluster.audit.format import (
    ENTRY_BYTES_MAX,
    GENESIS,
    Entry,
    Head,
    Predecessor,
    parse_line,
    predecessor_of,
)
from storaged.cluster.audit.report import AuditProblem

PRUNED: Final = "audit.pruned"


@dataclass
class Chain:
    """One chain, and the state of the walk through it."""

    name: str
    ordinal: int
    files: list[Path] = field(default_factory=list)
    first: Entry | None = None
    head: Head | None = None
    previous: str = ""
    """The hash that the next entry must name."""
    loose_bytes: int = 0
    """Unreadable bytes after the last entry."""
    loose_line: str = ""
    """Where a whole line is among them, and its problem."""
    broken: bool = False
    wanted: dict[int, dict[str, list[str]]] = field(default_factory=dict)
    """Sequence -> hash -> the witnesses (or registers) whose checkpoints say that the entry has this hash."""
    agreed: int = -1
    """The last entry that agrees with a checkpoint."""


class Pruned(NamedTuple):
    """Files of a chain that the node says it removed, up to the entry ``sequence``."""

    sequence: int
    hash: str
    time_ms: int


def group_files(paths: Sequence[Path], problems: list[AuditProblem]) -> dict[str, Chain]:
    """The chains by name, their files in order. A renamed file is placed by its first entry."""
    chains: dict[str, Chain] = {}
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
        chains.setdefault(name, Chain(name, ordinal)).files.append(path)
    return chains


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(ENTRY_BYTES_MAX + 1):
            number += 1
            yield number, line


def walk_chain(chain: Chain, problems: list[AuditProblem], pruned: dict[str, Pruned]) -> int:
    """Follows one chain through its files up to the first problem. Returns the number of valid entries."""
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
            reason = _misplaced(chain, entry)
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
            problem = _compare_with_checkpoints(chain, entry, where)
            if problem is not None:
                problems.append(problem)
                chain.broken = True
                return entries
    return entries


def _compare_with_checkpoints(chain: Chain, entry: Entry, where: str) -> AuditProblem | None:
    """The problem of an entry that checkpoints name with another hash; notes the agreement of those that do not."""
    wanted = chain.wanted.pop(entry.sequence, None)
    if wanted is None:
        return None
    others = tuple(name for entry_hash, names in wanted.items() if entry_hash != entry.hash for name in names)
    if not others:
        chain.agreed = entry.sequence
        return None
    since = (
        f"some entry from {chain.agreed + 1} on was changed" if chain.agreed < entry.sequence - 1 else "it was changed"
    )
    reason = (
        f"entry {entry.sequence} is not the one that a checkpoint names ({', '.join(others)}): {since}, and the hashes"
        " recomputed"
    )
    return AuditProblem(chain.name, entry.sequence, where, reason, others)


def _note_pruned(entry: Entry, pruned: dict[str, Pruned]) -> None:
    chain, last, last_hash = (entry.fields.get(name) for name in ("chain", "last", "hash"))
    if isinstance(chain, str) and isinstance(last, int) and isinstance(last_hash, str):
        known = pruned.get(chain)
        if known is None or last > known.sequence:
            pruned[chain] = Pruned(last, last_hash, entry.time_ms)


def _misplaced(chain: Chain, entry: Entry) -> str:
    """Why an entry, valid by itself, does not belong here; empty when it does."""
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
            f" {entry.sequence} follows it"
        )
    if entry.sequence > expected:
        missing = (
            f"entry {expected} is"
            if entry.sequence == expected + 1
            else f"entries {expected} to {entry.sequence - 1} are"
        )
        return f"{missing} missing or out of order: entry {entry.sequence} is in its place"
    if entry.sequence < expected:
        return f"entry {entry.sequence} is in the place of entry {expected}: out of order or repeated"
    if entry.previous != chain.previous:
        return f"entry {entry.sequence} does not follow from the one before: one of them was replaced"
    return ""


def check_links(ordered: Sequence[Chain], problems: list[AuditProblem]) -> str:
    """Checks that each chain follows from the one before, and that no tail is missing. Returns what the oldest chain
    follows.
    """
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
        if not earlier and (first.sequence > 0 or before is not None):
            begins_after = (
                f"entry {first.sequence - 1} of chain {chain.name}"
                if before is None
                else f"entry {before.sequence} of chain {before.chain}"
            )
        reason = _broken_link(first, before, earlier)
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


def _broken_link(first: Entry, before: Predecessor | None, earlier: set[str]) -> str:
    """Why a chain that begins with ``first`` does not follow from the ``earlier`` ones; empty when it does."""
    if not earlier:
        follows_a_hash = first.sequence == 0 and before is None and first.previous != GENESIS
        return "it names no predecessor, but follows a hash" if follows_a_hash else ""
    if first.sequence > 0:
        return f"its beginning is missing: the first entry here is {first.sequence}"
    if before is None:
        return "it names no predecessor although there are older chains"
    return "" if before.chain in earlier else f"chain {before.chain}, which it names, is missing"


def _check_tail(chain: Chain, successor: tuple[Predecessor, Entry] | None, problems: list[AuditProblem]) -> None:
    """Reports entries or torn bytes after the chain's last entry that a checkpoint or the next chain knows of."""
    if chain.broken:
        return
    last = chain.head.sequence if chain.head is not None else -1
    promised = max(chain.wanted, default=-1)
    later = [names for sequence, wanted in chain.wanted.items() if sequence > last for names in wanted.values()]
    witnesses = tuple(dict.fromkeys(name for names in later for name in names))
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
        by = f" ({', '.join(witnesses)})" if witnesses else ""
        reason = f"the tail of chain {chain.name} is missing: {what} known to have been written{by}"
    elif torn_recorded is not None:
        reason = (
            f"{chain.loose_bytes} unreadable bytes follow entry {last} of chain {chain.name}, where {torn_recorded}"
            " were recorded"
        )
    if reason:
        problems.append(AuditProblem(chain.name, last + 1, where, reason, witnesses if promised > last else ()))
