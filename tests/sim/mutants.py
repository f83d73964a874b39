"""``python -m tests.sim --mutants``: changes each comparison, number and boolean operator of the consensus, one at a
time, and prints the mutants that neither its tests nor seeds notice.

A mutant dies by the tests in ``QUICK_TESTS`` and ``TESTS``, or by a seed. A survivor is listed in ``survivors.txt``
with the reason why nothing has to notice it; any other survivor fails the run.
"""

from __future__ import annotations

import argparse
import ast
import copy
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from tests.sim.changing import ROOT, change_imports, in_child, resolve
from tests.sim.coverage import modules
from tests.sim.planted import PLAYS

QUICK_TESTS = ("tests/unit/test_register.py", "tests/unit/test_quorums.py", "tests/unit/test_rounds.py")
"""Before any seed: most mutants die at once."""

FIRST_SEEDS = {"ring": 8, "hostile": 4}

TESTS = (
    "tests/property/test_reader.py",
    "tests/property/test_proposer.py",
    "tests/unit/test_create.py",
    "tests/unit/test_state_diagrams.py",
    "tests/unit/test_change_shell.py",
    "tests/unit/test_replica.py",
)

SEEDS = {"ring": 120, "hostile": 60, "buckets": 10, "listing": 10}
"""From the first one on, of each play."""

SURVIVORS = Path(__file__).with_name("survivors.txt")
"""Lines ``mutant | reason``."""

MUTANT_S_MAX = 240

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}


class Mutant(NamedTuple):
    path: str
    place: int
    """The node's number in its module, in the order of a walk."""
    variant: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.path.removeprefix('storaged/meta/')} {self.text}"


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What takes the node's place."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            for other in _COMPARISONS[type(operator)]:
                changed = copy.deepcopy(node)
                changed.ops[index] = other()
                yield changed
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(2 * node.value + 1)
    elif isinstance(node, ast.BoolOp):
        changed = copy.deepcopy(node)
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand


class _Places(ast.NodeVisitor):
    """The nodes of a module that have variants, with where they are."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.AST, str]] = []
        self._inside: list[str] = []
        self._statement = ""

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            first = ast.unparse(node).splitlines()[0] if not isinstance(node, ast.ClassDef) else ""
            self._statement = " ".join(first.split())
        if next(variants(node), None) is not None:
            self.found.append((node, f"{'.'.join(self._inside) or 'module'}: {self._statement}"))
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named:
            self._inside.append(node.name)  # type: ignore[attr-defined]
        statement = self._statement
        self.generic_visit(node)
        if not isinstance(node, ast.stmt):
            self._statement = statement
        if named:
            self._inside.pop()


def _places(source: str) -> tuple[ast.Module, list[tuple[ast.AST, str]]]:
    tree, places = ast.parse(source), _Places()
    places.visit(tree)
    return tree, places.found


def mutants_of(path: str) -> list[Mutant]:
    _, found = _places((ROOT / path).read_text())
    names: Counter[str] = Counter()
    mutants = []
    for place, (node, where) in enumerate(found):
        for variant, changed in enumerate(variants(node)):
            text = f"{where}: {ast.unparse(node)} -> {ast.unparse(changed)}"
            names[text] += 1
            text += f" ({names[text]})" if names[text] > 1 else ""
            mutants.append(Mutant(path, place, variant, text))
    return mutants


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self._old:
            return ast.copy_location(self._new, node)
        return self.generic_visit(node)


def mutate(mutant: Mutant, source: str) -> ast.Module:
    tree, found = _places(source)
    node = found[mutant.place][0]
    new = list(variants(node))[mutant.variant]
    changed = _Replace(node, new).visit(tree)
    return ast.fix_missing_locations(changed)  # type: ignore[no-any-return]


def _dies_by_seeds(seeds: dict[str, int]) -> str:
    for play, count in seeds.items():
        run = resolve(PLAYS[play])
        for seed in range(1, count + 1):
            try:
                violation = run(seed).violation
            except Exception as error:
                violation = f"{type(error).__name__}: {error}"
            if violation:
                return f"{play} seed {seed}: {violation}"
    return ""


def _dies_by_tests(tests: Sequence[str], told: io.StringIO) -> str:
    options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=1")
    if not resolve("pytest:main")([*options, *tests]):
        return ""
    return next((line for line in told.getvalue().splitlines() if line.startswith("FAILED")), "tests")


def trial(mutant: Mutant) -> str:
    """What notices it; empty: nothing does. In a process that has not imported the program."""
    change_imports({mutant.path: lambda source: mutate(mutant, source)})
    os.environ["STORAGED_TESTS"] = "fast"
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        for notice in (
            lambda: _dies_by_tests(QUICK_TESTS, told),
            lambda: _dies_by_seeds(FIRST_SEEDS),
            lambda: _dies_by_tests(TESTS, told),
            lambda: _dies_by_seeds(SEEDS),
        ):
            if died := notice():
                return died
    return ""


def survivors() -> dict[str, str]:
    if not SURVIVORS.exists():
        return {}
    lines = [line for line in SURVIVORS.read_text().splitlines() if line and not line.startswith("#")]
    return {name.strip(): reason.strip() for name, _, reason in (line.rpartition(" | ") for line in lines)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim --mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="as proposer; all if none is named")
    parser.add_argument("--list", action="store_true", help="print them, and try none")
    parser.add_argument("--new", action="store_true", help="leave out the survivors that are listed")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    known, killed, unlisted = survivors(), 0, 0
    paths = [path for path in modules(("consensus",)) if not options.modules or Path(path).stem in options.modules]
    tried = [mutant for path in paths for mutant in mutants_of(path) if not (options.new and mutant.name in known)]
    for mutant in tried:
        if options.list:
            print(mutant.name)
            continue
        outcome = in_child(lambda mutant=mutant: trial(mutant), limit_s=MUTANT_S_MAX)  # type: ignore[misc]
        died = outcome.error or outcome.value
        killed += bool(died)
        if not died:
            unlisted += mutant.name not in known
            print(f"{mutant.name} | {known.get(mutant.name, 'SURVIVES')}", flush=True)
    print(f"{len(tried)} mutants, {killed} noticed, {unlisted} survivors without a reason")
    return 1 if unlisted else 0


if __name__ == "__main__":
    sys.exit(main())
