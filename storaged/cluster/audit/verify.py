"""Verifies an audit log: finds the first altered, missing or reordered entry of each chain, missing chains, and a
missing tail.

It works on copies of the files, in any order, without the node; memory does not grow with them. The files alone prove
that nothing between the first and the last entry was changed by somebody who could not also recompute all hashes after
it. The owner of the node can. Up to the newest checkpoint that a witness saw (``witness_record``), the witness proves
that the log was not rewritten and its end not cut off; the proof is as strong as the number of nodes that agree.

The log has an entry ``audit.pruned`` for each file that the node removed because it was old enough. A file that is
missing without such an entry is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509

from storaged.cluster.audit.chains import PRUNED, Chain, Pruned, check_links, group_files, walk_chain
from storaged.cluster.audit.format import Checkpoint, Predecessor, RegisterCheckpoint, predecessor_of
from storaged.cluster.audit.report import AuditProblem, AuditReport, WitnessResult, WitnessView
from storaged.cluster.audit.witness_record import Mark, SeenChain
from storaged.cluster.identity import signed_by_node
from storaged.config import KEEP_DAYS_MIN
from storaged.errors import StoragedError

DAY_MS: Final = 24 * 3600 * 1000


def verify(
    files: Iterable[Path],
    checkpoints: Sequence[RegisterCheckpoint] = (),
    witnesses: Sequence[WitnessView] = (),
    *,
    authority: x509.Certificate | None = None,
    whole: bool = False,
) -> AuditReport:
    """Verifies the files of one node's audit log.

    With ``authority`` it verifies the checkpoints' signatures too; without it, it believes them. ``checkpoints`` are
    those that versions with protocol 2 kept in registers. ``whole``: the complete log is given, so that missing parts
    are reported too. Raises OSError for a file that cannot be read; the report has everything that is wrong with the
    content.
    """
    problems: list[AuditProblem] = []
    paths = sorted(set(files), key=lambda path: path.name)
    chains = group_files(paths, problems)
    for checkpoint in checkpoints:
        _place(checkpoint, chains, authority, problems)
    unusable = {view.name: _place_witness(view, chains, authority) for view in witnesses}
    pruned: dict[str, Pruned] = {}
    entries = 0
    for chain in chains.values():
        entries += walk_chain(chain, problems, pruned)
    ordered = sorted(chains.values(), key=lambda chain: chain.ordinal)
    begins_after = check_links(ordered, problems)
    if begins_after and whole and not _begins_where_pruned(ordered, pruned):
        reason = (
            f"the oldest files are missing: the log begins after {begins_after}, and no entry {PRUNED} says that they"
            " were removed"
        )
        problems.insert(0, AuditProblem(ordered[0].name, 0, "", reason))
    for view in witnesses:
        if view.seen is not None and not unusable[view.name]:
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
        tuple(_result(view, unusable[view.name], ordered, problems) for view in witnesses),
    )


def _place_witness(view: WitnessView, chains: dict[str, Chain], authority: x509.Certificate | None) -> str:
    """Notes which hashes a witness says the entries have. Returns why the witness can't be used; empty when it can."""
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
    chains: dict[str, Chain],
    pruned: dict[str, Pruned],
    problems: list[AuditProblem],
    *,
    whole: bool,
) -> None:
    """Reports chains that a witness saw and the files lack, and chains that it saw begin in the wrong place."""
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


def _removed_too_early(seen: SeenChain, pruned: Pruned) -> tuple[int, str] | None:
    """The entry of a chain that was removed before KEEP_DAYS_MIN were over, and the problem's text. The times are those
    of entries, as the node reported them earlier.
    """
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
    view: WitnessView, unusable: str, ordered: Sequence[Chain], problems: Sequence[AuditProblem]
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


def _agrees(chain: Chain, sequence: int) -> bool:
    """Whether that entry is the one that was seen, or was in a removed file."""
    return chain.first is not None and (sequence <= chain.agreed or sequence < chain.first.sequence)


def _begins_where_pruned(ordered: Sequence[Chain], pruned: dict[str, Pruned]) -> bool:
    """Whether the oldest entry follows one that the node says it removed."""
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


def _place(
    checkpoint: RegisterCheckpoint,
    chains: dict[str, Chain],
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
