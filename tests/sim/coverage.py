"""``python -m tests.sim --coverage [--seeds N]``: plays seeds, and says which branches of the consensus, the transport
and the lists they reach.

Branches are the arms of ``if``, of conditional expressions and of conditions of comprehensions, the bodies of loops,
handlers, cases, and functions. They are counted by bytes that are set, which costs a few per cent: a trace function
would cost several times the run. Branches that seeds need not reach are listed in ``unreached.txt``, a reason each;
all others that no seed reached are named, and with ``--strict`` they fail the run.

Seeds are played in portions. With ``--results`` each portion is a line of a file: a run that was stopped goes on where
it was, processes share the work (``--part``), and the report is about all portions of today's sources in the file.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from tests.sim.changing import ROOT, change_imports, in_child, resolve
from tests.sim.hits import HITS
from tests.sim.planted import PLAYS

PACKAGES = ("consensus", "transport", "listing")
ALL_PACKAGES = (*PACKAGES, "acceptor", "proposer", "storage")

SHARES = {
    "ring": 0.19,
    "hostile": 0.13,
    "object lies": 0.06,
    "flicker": 0.06,
    "listing": 0.12,
    "buckets": 0.09,
    "small": 0.08,
    "bursts": 0.03,
    "files": 0.04,
    "forgetful": 0.02,
    "collecting": 0.01,
    "collecting floors": 0.01,
    "lending": 0.01,
    "moving": 0.05,
    "expunging": 0.06,
    "recovering": 0.02,
    "stale": 0.02,
}
"""Of the seeds."""

MOVES = (
    "storaged/cluster/certificates.py",
    "storaged/cluster/layout_exchange.py",
    "storaged/cluster/layouts.py",
    "storaged/cluster/partition_map.py",
    "storaged/cluster/partitions.py",
    "storaged/cluster/succession.py",
    "storaged/maintain/partition_mover.py",
    "storaged/meta/acceptor/epochs.py",
    "storaged/meta/acceptor/handover.py",
    "storaged/meta/proposer/fences.py",
    "storaged/meta/proposer/moving.py",
    "storaged/meta/views.py",
    "storaged/node/accepting.py",
    "storaged/node/applying.py",
    "storaged/node/partition_follower.py",
    "storaged/node/system_move.py",
)
"""What moves partitions, the system partition among them, and decides layouts."""

MOVES_SHARES = {"moving": 0.55, "layouts": 0.35, "collecting moves": 0.1}

PORTION = 20
"""Seeds of one play that are counted together."""

OFTEN = 5
"""A branch that this many portions reach need not be listed."""

ACCEPTED = Path(__file__).with_name("unreached.txt")
"""Lines ``branch | reason``; a branch is named as ``Branch.name`` does it."""


class Branch(NamedTuple):
    path: str
    function: str
    line: int
    text: str

    @property
    def name(self) -> str:
        """Without the line, which changes with every edit."""
        return f"{self.path.removeprefix('storaged/meta/')} {self.function}: {self.text}"


@dataclass
class Instrumented(ast.NodeTransformer):
    """A module's tree with a byte set in each branch. ``branches``: what they are, by index."""

    path: str
    branches: list[Branch] = field(default_factory=list)
    _functions: list[str] = field(default_factory=list)

    def _new(self, node: ast.AST, text: str) -> int:
        line = getattr(node, "lineno", 0)
        text = " ".join(text.split())
        self.branches.append(Branch(self.path, ".".join(self._functions) or "module", line, text))
        return len(self.branches) - 1

    def _statement(self, node: ast.AST, text: str) -> ast.stmt:
        made = ast.parse(f"_HITS[{self._new(node, text)}] = 1").body[0]
        return ast.copy_location(made, node)

    def _noted(self, node: ast.expr, text: str) -> ast.expr:
        """``node``, noted as it is evaluated."""
        index = self._new(node, text)
        made = ast.parse(f"(_HITS.__setitem__({index}, 1), None)[1]", mode="eval").body
        assert isinstance(made, ast.Subscript)
        assert isinstance(made.value, ast.Tuple)
        made.value.elts[1] = node
        return ast.copy_location(made, node)

    def visit_If(self, node: ast.If) -> ast.AST:
        condition = ast.unparse(node.test)
        if condition == "TYPE_CHECKING":
            return node
        true = self._statement(node, f"if {condition}")
        false = self._statement(node, f"not if {condition}")
        self.generic_visit(node)
        node.body.insert(0, true)
        node.orelse.insert(0, false)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        condition = ast.unparse(node.test)
        self.generic_visit(node)
        node.body = self._noted(node.body, f"when {condition}")
        node.orelse = self._noted(node.orelse, f"not when {condition}")
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        texts = [ast.unparse(condition) for condition in node.ifs]
        self.generic_visit(node)
        node.ifs = [
            ast.IfExp(
                condition,
                self._noted(ast.Constant(True), f"taken by {text}"),
                self._noted(ast.Constant(False), f"left out by {text}"),
            )
            for condition, text in zip(node.ifs, texts, strict=True)
        ]
        return node

    def _loop(self, node: ast.For | ast.While | ast.AsyncFor, head: str) -> ast.AST:
        entered = self._statement(node, head)
        self.generic_visit(node)
        node.body.insert(0, entered)
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        return self._loop(node, f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}")

    def visit_While(self, node: ast.While) -> ast.AST:
        return self._loop(node, f"while {ast.unparse(node.test)}")

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        entered = self._statement(node, f"except {ast.unparse(node.type) if node.type is not None else ''}")
        self.generic_visit(node)
        node.body.insert(0, entered)
        return node

    def visit_match_case(self, node: ast.match_case) -> ast.AST:
        entered = self._statement(node.pattern, f"case {ast.unparse(node.pattern)}")
        self.generic_visit(node)
        node.body.insert(0, entered)
        return node

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        self._functions.append(node.name)
        entered = self._statement(node, "called")
        self.generic_visit(node)
        node.body.insert(1 if ast.get_docstring(node, clean=False) is not None else 0, entered)
        self._functions.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._functions.append(node.name)
        if not any(ast.unparse(base) == "Protocol" for base in node.bases):
            self.generic_visit(node)
        self._functions.pop()
        return node


def instrument(path: str, source: str) -> tuple[ast.Module, list[Branch]]:
    transformer = Instrumented(path)
    tree = transformer.visit(ast.parse(source))
    at = next(
        index
        for index, statement in enumerate(tree.body)
        if not (isinstance(statement, ast.Expr) or getattr(statement, "module", "") == "__future__")
    )
    tree.body[at:at] = ast.parse(f"from tests.sim.hits import HITS as _HITS_OF\n_HITS = _HITS_OF[{path!r}]").body
    return ast.fix_missing_locations(tree), transformer.branches


def modules(packages: Sequence[str]) -> list[str]:
    return [
        str(file.relative_to(ROOT))
        for package in packages
        for file in sorted((ROOT / "storaged/meta" / package).glob("*.py"))
        if file.name != "__init__.py"
    ]


def branches_of(paths: Sequence[str]) -> dict[str, list[Branch]]:
    return {path: instrument(path, (ROOT / path).read_text())[1] for path in paths}


def play(paths: Sequence[str], shares: dict[str, tuple[int, int]]) -> tuple[dict[str, bytes], list[str]]:
    """In a process that has not imported the program. ``shares``: the first seed and how many, by play. Returns the
    bytes by path, and violations.
    """
    for path, branches in branches_of(paths).items():
        HITS[path] = bytearray(len(branches))
    change_imports({path: lambda source, path=path: instrument(path, source)[0] for path in paths})  # type: ignore[misc]
    violations = []
    for name, (first, seeds) in shares.items():
        run = resolve(PLAYS[name])
        for seed in range(first, first + seeds):
            found = run(seed)
            if found.violation:
                violations.append(f"{name} seed {seed}: {found.violation}")
    return {path: bytes(hits) for path, hits in HITS.items()}, violations


def accepted() -> dict[str, str]:
    if not ACCEPTED.exists():
        return {}
    lines = [line for line in ACCEPTED.read_text().splitlines() if line and not line.startswith("#")]
    return {name.strip(): reason.strip() for name, _, reason in (line.rpartition(" | ") for line in lines)}


class Portion(NamedTuple):
    """Seeds of one play, and what they reached. ``hits``: bytes by path, in hexadecimal digits."""

    play: str
    first: int
    seeds: int
    hits: dict[str, str]
    violations: list[str]
    cpu_s: float
    sources: str
    """A digest of the modules: branches of other ones are numbered otherwise."""


def digest_of(paths: Sequence[str]) -> str:
    return sha256(b"".join((ROOT / path).read_bytes() for path in paths)).hexdigest()[:16]


def portions(seeds: int, first: int, shares: dict[str, float]) -> list[tuple[str, int, int]]:
    """(play, first seed, how many), shortest plays and long ones mixed."""
    counts = {name: max(1, round(share * seeds)) for name, share in shares.items()}
    found = [
        (start / count, name, first + start, min(PORTION, count - start))
        for name, count in counts.items()
        for start in range(0, count, PORTION)
    ]
    return [(name, start, count) for _, name, start, count in sorted(found)]


def read_portions(path: Path | None, sources: str) -> list[Portion]:
    if path is None or not path.exists():
        return []
    found = [Portion(*json.loads(line)) for line in path.read_text().splitlines()]
    return [portion for portion in found if portion.sources == sources]


def play_portions(
    paths: Sequence[str], wanted: Sequence[tuple[str, int, int]], results: Path | None
) -> tuple[list[Portion], str]:
    """Plays those that the file does not have yet. Returns all, and what went wrong."""
    sources = digest_of(paths)
    done = read_portions(results, sources)
    known = {(portion.play, portion.first, portion.seeds) for portion in done}
    for name, first, seeds in wanted:
        if (name, first, seeds) in known:
            continue
        outcome = in_child(lambda: play(paths, {name: (first, seeds)}), limit_s=86_400)  # noqa: B023
        if outcome.error:
            return done, f"{name} from {first} on: {outcome.error}"
        hits, violations = outcome.value
        texts = {path: found.hex() for path, found in hits.items()}
        done.append(Portion(name, first, seeds, texts, violations, outcome.cpu_s, sources))
        if results is not None:
            with results.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    return done, ""


def reached_in(paths: Sequence[str], done: Sequence[Portion]) -> Counter[str]:
    """In how many portions seeds reached all branches of a name."""
    found: Counter[str] = Counter()
    branches = branches_of(paths)
    for portion in done:
        for path in paths:
            hits = dict.fromkeys((branch.name for branch in branches[path]), True)
            for branch, hit in zip(branches[path], bytes.fromhex(portion.hits[path]), strict=True):
                hits[branch.name] &= bool(hit)
            found.update(name for name, hit in hits.items() if hit)
    return found


def merged(paths: Sequence[str], done: Sequence[Portion]) -> dict[str, bytes]:
    hits: dict[str, bytes] = {path: bytes(len(branches)) for path, branches in branches_of(paths).items()}
    for portion in done:
        for path in paths:
            found = bytes.fromhex(portion.hits[path])
            hits[path] = bytes(map(max, hits[path], found))
    return hits


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim --coverage", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, metavar="N", help="of all plays together")
    parser.add_argument("--first", type=int, default=1, metavar="SEED")
    parser.add_argument("--all", action="store_true", help="the acceptor, the proposer and the store, too")
    parser.add_argument("--moves", action="store_true", help="what moves partitions and decides layouts, instead")
    parser.add_argument("--strict", action="store_true", help="fail when a branch is neither reached nor accepted")
    parser.add_argument("--results", type=Path, metavar="FILE", help="leave out what is in it, and append to it")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every Nth portion, from the Ith on")
    options = parser.parse_args(arguments)
    paths = list(MOVES) if options.moves else modules(ALL_PACKAGES if options.all else PACKAGES)
    shares = MOVES_SHARES if options.moves else SHARES
    part, parts = (int(number) for number in options.part.split("/"))
    wanted = portions(options.seeds, options.first, shares)[part - 1 :: parts]
    done, error = play_portions(paths, wanted, options.results)
    if error:
        print(error)
        return 1
    hits = merged(paths, done)
    violations = [violation for portion in done for violation in portion.violations]
    reasons, unnamed = accepted(), 0
    for path, branches in branches_of(paths).items():
        missed = [branch for branch, hit in zip(branches, hits[path], strict=True) if not hit]
        print(f"{path}: {len(branches) - len(missed)} of {len(branches)} branches")
        for branch in missed:
            reason = reasons.get(branch.name)
            unnamed += reason is None
            print(f"    {branch.line} {branch.name} | {reason or 'NOT REACHED'}")
    names = {branch.name for some in branches_of([*modules(PACKAGES), *MOVES]).values() for branch in some}
    print(*(f"{name}: listed in {ACCEPTED.name}, and gone" for name in reasons if name not in names), sep="\n")
    often = {name: count for name, count in reached_in(paths, done).items() if count >= OFTEN and name in reasons}
    for name, count in often.items():
        print(f"{name}: listed in {ACCEPTED.name}, and reached in {count} portions")
    print(*violations, sep="\n")
    cost = f"{sum(portion.seeds for portion in done)} seeds, {sum(portion.cpu_s for portion in done):.0f} s of CPU"
    print(f"{cost}, {len(violations)} violations, {unnamed} branches unreached")
    return 1 if violations or (unnamed and options.strict) else 0


if __name__ == "__main__":
    sys.exit(main())
