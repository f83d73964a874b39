"""``python -m tests.sim --mutants``: changes each comparison, number and boolean operator of the consensus, one at a
time, and prints the mutants that neither tests nor seeds notice.

Theory of operation
    A process with the program and the collected tests in its memory makes a child for every mutant (``trials``). The
    child replaces the code of one function, and tries the tests and seeds that reach the changed line, the cheapest
    first, until one of them fails. So most mutants cost some milliseconds. Which lines each test and each seed reaches
    is measured once. A mutant outside of functions (a constant, a default, a member of an enumeration) is changed as
    it is imported, which costs a few seconds.

    Results are appended to a file (``--results``) as they come: a run that was stopped goes on where it was, and
    several processes share the work (``--part``). When a function or its tests change, remove its lines from that
    file.

A survivor is listed in ``survivors.txt`` with the reason why nothing has to notice it; any other survivor fails the
run. The switches of ``Rules`` are no mutants: ``--planted`` turns each of them off.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import NamedTuple

from tests.sim.changing import ROOT, change_imports, in_child, resolve
from tests.sim.coverage import modules

SURVIVORS = Path(__file__).with_name("survivors.txt")
"""Lines ``mutant | reason``."""

MUTANT_S_MAX = 1_800
"""A child's CPU is limited much closer; this is for one that sleeps, on a machine that has other things to do."""

CPU_S_MAX = 12.0
"""Of all that is tried on one mutant of a function."""

OUTSIDE_CPU_S_MAX = 120
"""Of one outside of functions, with the import of the program."""

RULES_CLASS = "Rules"

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
    lines: tuple[int, int]
    """From the line where its statement begins to the one where the changed expression ends."""

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
        self.found: list[tuple[ast.AST, str, tuple[int, int]]] = []
        self._inside: list[str] = []
        self._statement = ""
        self._line = 0

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.ClassDef) and node.name == RULES_CLASS:
            return
        before = self._statement, self._line
        if isinstance(node, ast.stmt):
            first = ast.unparse(node).splitlines()[0] if not isinstance(node, ast.ClassDef) else ""
            self._statement, self._line = " ".join(first.split()), node.lineno
        if next(variants(node), None) is not None:
            where = f"{'.'.join(self._inside) or 'module'}: {self._statement}"
            self.found.append((node, where, (self._line, getattr(node, "end_lineno", self._line))))
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named:
            self._inside.append(node.name)  # type: ignore[attr-defined]
        self.generic_visit(node)
        self._statement, self._line = before
        if named:
            self._inside.pop()


def _places(source: str) -> tuple[ast.Module, list[tuple[ast.AST, str, tuple[int, int]]]]:
    tree, places = ast.parse(source), _Places()
    places.visit(tree)
    return tree, places.found


def mutants_of(path: str) -> list[Mutant]:
    _, found = _places((ROOT / path).read_text())
    names: Counter[str] = Counter()
    mutants = []
    for place, (node, where, lines) in enumerate(found):
        for variant, changed in enumerate(variants(node)):
            text = f"{where}: {ast.unparse(node)} -> {ast.unparse(changed)}"
            names[text] += 1
            text += f" ({names[text]})" if names[text] > 1 else ""
            mutants.append(Mutant(path, place, variant, text, lines))
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


def codes(code: CodeType) -> dict[tuple[str, int], CodeType]:
    """A module's functions, by qualified name and line. Functions within functions are part of those."""
    found: dict[tuple[str, int], CodeType] = {}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & 1:  # CO_OPTIMIZED: a function; else the body of a class
                found[inner.co_qualname, inner.co_firstlineno] = inner
            else:
                found |= codes(inner)
    return found


def _outside(code: CodeType) -> list[object]:
    """What a module and its classes do themselves."""
    own: list[object] = [code.co_code, code.co_names]
    for inner in code.co_consts:
        if not isinstance(inner, CodeType):
            own.append(inner)
        elif not inner.co_flags & 1:
            own += _outside(inner)
    return own


def changed_functions(mutant: Mutant) -> dict[tuple[str, int], CodeType] | None:
    """The code that the mutant replaces; None: it is outside of functions, and its module has to be imported anew."""
    source, path = (ROOT / mutant.path).read_text(), str(ROOT / mutant.path)
    before, after = (
        compile(tree, path, "exec", dont_inherit=True) for tree in (ast.parse(source), mutate(mutant, source))
    )
    if _outside(before) != _outside(after):
        return None
    old, new = codes(before), codes(after)
    return {place: new[place] for place in old if old[place] != new[place]}


def all_mutants(names: Sequence[str] = ()) -> list[Mutant]:
    """Of the modules of the consensus that are named, or of all."""
    paths = [path for path in modules(("consensus",)) if not names or Path(path).stem in names]
    return [mutant for path in paths for mutant in mutants_of(path)]


def survivors() -> dict[str, str]:
    if not SURVIVORS.exists():
        return {}
    lines = [line for line in SURVIVORS.read_text().splitlines() if line and not line.startswith("#")]
    return {name.strip(): reason.strip() for name, _, reason in (line.rpartition(" | ") for line in lines)}


def results(path: Path | None) -> dict[str, str]:
    """What noticed each mutant that was tried before; empty: nothing did."""
    if path is None or not path.exists():
        return {}
    return dict(json.loads(line) for line in path.read_text().splitlines())


class Log:
    """What noticed each mutant, in memory and in a file that several processes append to."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.died: dict[str, str] = {}

    def add(self, mutant: Mutant, died: str) -> None:
        self.died[mutant.name] = died
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps([mutant.name, died]) + "\n")


def _try_all(mutants: Sequence[Mutant], log: Log, tests: Sequence[str], reach: Path | None) -> None:
    outcome = in_child(lambda: resolve("tests.sim.trials:try_inside")(mutants, log, tests, reach), limit_s=86_400)
    assert not outcome.error, outcome.error
    died, outside = outcome.value
    log.died |= died
    for mutant in outside:
        trial = in_child(lambda mutant=mutant: _try_outside(mutant, tests), limit_s=MUTANT_S_MAX)  # type: ignore[misc]
        log.add(mutant, trial.error or trial.value)


def _try_outside(mutant: Mutant, tests: Sequence[str]) -> str:
    """What notices it. In a process that has not imported the program."""
    resource.setrlimit(resource.RLIMIT_CPU, (OUTSIDE_CPU_S_MAX, OUTSIDE_CPU_S_MAX))
    source = (ROOT / mutant.path).read_text()
    change_imports({mutant.path: lambda _: mutate(mutant, source)})
    return str(resolve("tests.sim.trials:try_imported")(tests))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim --mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="as proposer; all if none is named")
    parser.add_argument("--list", action="store_true", help="print them, and try none")
    parser.add_argument("--new", action="store_true", help="leave out the survivors that are listed")
    parser.add_argument("--match", default="", metavar="TEXT", help="only mutants with this text in their names")
    parser.add_argument("--results", type=Path, metavar="FILE", help="leave out what is in it, and append to it")
    parser.add_argument("--tests", nargs="+", default=(), metavar="FILE", help="try these tests alone, and no seeds")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every Nth mutant, from the Ith on")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    part, parts = (int(number) for number in options.part.split("/"))
    known, before = survivors(), results(options.results)
    chosen = [
        mutant
        for mutant in all_mutants(options.modules)[part - 1 :: parts]
        if options.match in mutant.name and not (options.new and mutant.name in known)
    ]
    if options.list:
        print(*(mutant.name for mutant in chosen), sep="\n")
        return 0
    tried = [mutant for mutant in chosen if mutant.name not in before]
    reach = options.results and options.results.with_suffix(".reach")
    if tried:
        _try_all(tried, log := Log(options.results), options.tests, None if options.tests else reach)
    after = {**before, **log.died}
    alive = [mutant.name for mutant in chosen if not after[mutant.name]]
    unlisted = [name for name in alive if name not in known]
    for name in alive:
        print(f"{name} | {known.get(name, 'SURVIVES')}")
    print(f"{len(chosen)} mutants, {len(chosen) - len(alive)} noticed, {len(unlisted)} survivors without a reason")
    return 1 if unlisted else 0


if __name__ == "__main__":
    sys.exit(main())
