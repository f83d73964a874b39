"""``benches/compare REV-A REV-B``: measures the rows on the servers of two revisions in turn, and compares B to A.

This tree's load generator drives both, with this environment's libraries. The two runs of a pair follow each other, in
alternating order, and their ratio counts: what slows a shared machine down usually slows both. A ratio of speed above 1
is better, a ratio of CPU time below 1. With ``--bursts`` both servers run at once (``benches.bursts``), which tells
smaller differences.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvloop

from benches import bursts
from benches.measure import measure
from benches.report import is_large, line, speed
from benches.rows import GROUPS, ROWS, Result, rows_of
from benches.s3client import WrongAnswer
from benches.servers import Server, end_on_sigterm, storaged_cluster, storaged_single
from storaged.node.process import keep_memory

ROOT = Path(__file__).parents[1]
Make = Callable[..., contextlib.AbstractContextManager[Server]]
DEFAULT = "put-4k-64,get-4k-64,put-64m-4,get-64m-4,list-1000-4"


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[tuple[str, Path]]:
    """(short hash, directory) of a revision, in a temporary folder."""
    commit = git("rev-parse", "--verify", "--short", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="storaged-compare-") as place:
        folder = Path(place) / commit
        git("worktree", "add", "--quiet", "--detach", str(folder), commit)
        try:
            yield commit, folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def ratios(first: Sequence[Result], second: Sequence[Result]) -> tuple[list[float], list[float]]:
    """For each pair of runs without errors: the second's speed relative to the first's, and the same of the CPU time
    per operation.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=False) if not a.errors and not b.errors]
    speeds = [speed(b) / speed(a) for a, b in pairs if speed(a)]
    cpu = [b.cpu_us_per_operation / a.cpu_us_per_operation for a, b in pairs if a.cpu_us_per_operation]
    return speeds, cpu


def spread(values: Sequence[float]) -> str:
    """``1.08 (1.02 to 1.11)``: median, lowest, highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "failed"


def _shown(results: Sequence[Result]) -> str:
    unit = "MB/s" if is_large(results[0]) else "/s"
    cpu_us = statistics.median(result.cpu_us_per_operation for result in results)
    return f"{statistics.median(map(speed, results)):,.1f} {unit}, {cpu_us:,.0f} us"


def table(names: tuple[str, str], first: dict[str, list[Result]], second: dict[str, list[Result]]) -> str:
    """One line for each row, as Markdown."""
    lines = [
        (
            f"| row | {names[0]} | {names[1]} | speed, {names[1]} to {names[0]} | CPU an operation, {names[1]} to"
            f" {names[0]} |"
        ),
        "|---|---|---|---|---|",
    ]
    for row in first:
        speeds, cpu = ratios(first[row], second.get(row, []))
        cells = [row]
        for results in (first[row], second.get(row, [])):
            good = [result for result in results if not result.errors]
            cells.append(_shown(good) if good else "failed")
        lines.append("| " + " | ".join([*cells, spread(speeds), spread(cpu)]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benches/compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revisions", nargs=2, metavar="REV")
    parser.add_argument("--rows", default=DEFAULT, help=f"comma separated: {', '.join((*GROUPS, *ROWS))}")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs")
    parser.add_argument(
        "--bursts",
        type=int,
        nargs="?",
        const=20,
        metavar="PAIRS",
        help="both servers at once, PAIRS bursts of each row",
    )
    parser.add_argument("--scale", type=float, help="the work of a run (default 0.5) or of a burst (0.1)")
    parser.add_argument("--shape", choices=["cluster", "single"], default="cluster")
    parser.add_argument("--dir", type=Path)
    wanted = parser.parse_args(arguments)
    keep_memory()
    try:
        rows = rows_of(wanted.rows)
        if wanted.bursts:
            bursts.check(rows)
    except ValueError as error:
        parser.error(str(error))
    end_on_sigterm()
    make: Make = storaged_cluster if wanted.shape == "cluster" else storaged_single
    if wanted.scale is None:
        wanted.scale = 0.1 if wanted.bursts else 0.5
    return in_bursts(wanted, rows, make) if wanted.bursts else in_runs(wanted, rows, make)


def in_bursts(wanted: argparse.Namespace, rows: Sequence[str], make: Make) -> int:
    """Both servers at once. Returns the exit code."""
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(worktree(revision)) for revision in wanted.revisions]
        first, second = (stack.enter_context(make(wanted.dir, tree=folder, name=commit)) for commit, folder in sides)
        work = bursts.measured(
            (first, second), rows, pairs=wanted.bursts, scale=wanted.scale, say=lambda text: print(text, flush=True)
        )
        try:
            found = uvloop.run(work)
        except (bursts.Failed, WrongAnswer, OSError) as error:
            print(f"benches/compare: {error}", file=sys.stderr)
            return 1
    print(
        f"\n{wanted.bursts} pairs of bursts, {wanted.shape}, scale {wanted.scale:g}; load average"
        f" {os.getloadavg()[0]:.1f}\n"
    )
    print(bursts.table((sides[0][0], sides[1][0]), found))
    return 0


def in_runs(wanted: argparse.Namespace, rows: Sequence[str], make: Make) -> int:
    """Each run with fresh servers. Returns the exit code."""
    found: tuple[dict[str, list[Result]], dict[str, list[Result]]] = ({}, {})
    fine = True
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(worktree(revision)) for revision in wanted.revisions]
        for run in range(wanted.runs):
            for side in (0, 1) if run % 2 == 0 else (1, 0):
                commit, folder = sides[side]
                fine = _one(make(wanted.dir, tree=folder, name=commit), rows, wanted.scale, found[side]) and fine
    print(
        f"\n{wanted.runs} pairs of runs, {wanted.shape}, scale {wanted.scale:g}; load average"
        f" {os.getloadavg()[0]:.1f}\n"
    )
    print(table((sides[0][0], sides[1][0]), *found))
    return 0 if fine else 1


def _one(
    making: contextlib.AbstractContextManager[Server], rows: Sequence[str], scale: float, found: dict[str, list[Result]]
) -> bool:
    """One run of one side. Returns False when something failed. ``found`` gets one result for each row in any case, so
    that the results of the two sides stay pairs.
    """
    results: list[Result] = []
    with making as server:
        name = server.name
        try:
            results = uvloop.run(measure(server, rows, scale, lambda result: print(line(name, result), flush=True)))
        except (WrongAnswer, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
    measured = {result.row: result for result in results}
    for row in rows:
        found.setdefault(row, []).append(
            measured.get(row) or Result(row, errors=1, first_error=f"{row} was not measured")
        )
    return bool(results) and not any(result.errors for result in results)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
