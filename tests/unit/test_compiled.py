"""What setup.py compiles: modules that mean the same to mypyc as to the interpreter. tests/compiled runs this where they are compiled, too."""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

IN_COMPILED_BUILD = "STORAGED_TEST_COMPILED"
ROOT = Path(__file__).parents[2]
HARMLESS_CALLS = {"len", "min", "max"}


def compiled() -> list[str]:
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILED":
            listed: list[str] = ast.literal_eval(node.value)
            return listed
    raise AssertionError("setup.py lists no COMPILED")


def misunderstood(tree: ast.Module) -> Iterator[str]:
    """What mypyc 2.4 makes something else of than the interpreter, without saying so."""
    for node in ast.walk(tree):
        match node:
            case ast.AsyncFunctionDef():
                yield f"{node.name}: a coroutine; a compiled one was seen to lose its task's cancellation"
            case ast.ClassDef() if node.keywords or any(ast.unparse(base).split(".")[-1] in ("Struct", "Message") for base in node.bases):
                yield f"{node.name}: a class with options, or a struct of msgspec: the options and its fields' types are dropped"
            case ast.Subscript(slice=ast.Slice(lower=lower, upper=upper), ctx=ast.Load()):
                for bound in filter(None, (lower, upper)):
                    for inner in ast.walk(bound):
                        if isinstance(inner, ast.NamedExpr | ast.Yield) or (
                            isinstance(inner, ast.Call) and ast.unparse(inner.func) not in HARMLESS_CALLS
                        ):
                            yield f"{ast.unparse(bound)}: a slice's bound is evaluated twice"


@pytest.mark.skipif(IN_COMPILED_BUILD in os.environ, reason="the sources are elsewhere")
@pytest.mark.parametrize("path", compiled())
def test_a_compiled_module_has_nothing_that_the_compiler_takes_otherwise(path: str) -> None:
    assert list(misunderstood(ast.parse((ROOT / path).read_text()))) == []


@pytest.mark.parametrize(
    "source",
    [
        "async def f(): ...",
        "class Hello(Message): ...",
        "class Hello(Base, frozen=True): ...",
        "class Hello(msgspec.Struct): ...",
        "view[: next(sizes)]",
        "view[(at := at + 1) :]",
    ],
)
def test_what_the_compiler_takes_otherwise_is_noticed(source: str) -> None:
    assert len(list(misunderstood(ast.parse(source)))) == 1


@pytest.mark.skipif(IN_COMPILED_BUILD not in os.environ, reason="this is the build that is not compiled")
@pytest.mark.parametrize("path", compiled())
def test_a_compiled_module_is_native_code_in_a_compiled_build(path: str) -> None:
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert str(module.__file__).endswith(".so")
