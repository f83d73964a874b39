"""What a storage node can read is one table of FORMATS.md; a field or a label that is not in it fails here."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import storaged
from storaged.observe import METRICS
from storaged.wire import Message

PACKAGE = Path(storaged.__file__).parent
FORMATS = (PACKAGE / "FORMATS.md").read_text()
ADVICE = (
    "add it to FORMATS.md, section 'What a storage node can read', with its kind; ask first whether it can be computed"
    " from content"
)


def table(marker: str) -> list[list[str]]:
    """The cells of the rows of the table that follows a comment."""
    after = FORMATS.split(f"<!-- {marker} -->\n", 1)[1].splitlines()
    rows = []
    for line in after[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))])
    return rows


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def every_module() -> Iterator[Any]:
    for found in pkgutil.walk_packages(storaged.__path__, "storaged."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


MODULES = tuple(every_module())
"""Imported when tests are collected, for ``objects.code.erasure`` looks for its library with a process."""


def descendants(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def title(kind: type) -> str:
    """``plane.Class``."""
    return f"{kind.__module__.split('.')[1]}.{kind.__qualname__}"


def inside(hint: Any) -> Iterator[type]:
    """Named tuples in an annotation: they travel as arrays, like messages."""
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        yield hint
        for nested in typing.get_type_hints(hint).values():
            yield from inside(nested)
    for argument in typing.get_args(hint):
        yield from inside(argument)


def kinds_of_messages() -> dict[str, type]:
    """All messages of the program, and the named tuples in them, by title."""
    found: dict[str, type] = {}
    for kind in descendants(Message):
        if kind.__module__.startswith("storaged."):
            found[title(kind)] = kind
            for hint in typing.get_type_hints(kind).values():
                found |= {title(nested): nested for nested in inside(hint)}
    return found


def messages() -> dict[str, tuple[str, ...]]:
    """title -> fields."""
    return {name: fields_of(kind) for name, kind in kinds_of_messages().items()}


def fields_of(kind: type) -> tuple[str, ...]:
    """The fields of a message or a named tuple, in their order."""
    found: tuple[str, ...] = getattr(kind, "_fields" if issubclass(kind, tuple) else "__struct_fields__")
    return found


def sealed_messages() -> set[str]:
    return {name for row in table("sealed messages") for name in named(row[0])}


def test_every_field_that_a_storage_node_sees_is_in_the_table_once_and_nothing_else_is() -> None:
    listed: dict[str, list[str]] = {}
    for name, fields in table("readable fields"):
        assert named(name)[0] not in listed, f"{name} has two rows"
        listed[named(name)[0]] = named(fields)
    found = messages()
    sealed = sealed_messages()
    assert sealed <= found.keys(), "a sealed message is named that the program does not have"
    for name, fields in found.items():
        if name in sealed:
            assert name not in listed, f"{name} is called both sealed and readable"
            continue
        assert name in listed, f"{name} is a new message: {ADVICE}"
        missing, gone = set(fields) - set(listed[name]), set(listed[name]) - set(fields)
        assert not missing, f"{name} has the new fields {sorted(missing)}: {ADVICE}"
        assert not gone, f"FORMATS.md says that {name} has the fields {sorted(gone)}"
        assert len(listed[name]) == len(fields), f"{name} has a field in two kinds"
    assert listed.keys() <= found.keys(), (
        f"FORMATS.md lists messages that do not exist: {sorted(listed.keys() - found.keys())}"
    )


def test_every_field_has_a_kind_that_says_why_it_is_in_the_clear() -> None:
    kinds = {row[0] for row in table("readable kinds")}
    for name, fields in table("readable fields"):
        for group in fields.split(";") if fields != "nothing" else ():
            kind, colon, _ = group.strip().partition(":")
            assert colon, name
            assert kind in kinds, f"{name}: {kind} is no kind"


def test_labels_of_metrics_are_those_of_the_table() -> None:
    (row,) = [line for line in FORMATS.splitlines() if line.startswith("| metrics | labels")]
    assert set(named(row)) == {label for metric in METRICS.values() for label in metric.labels}


LABEL = re.compile(r"sov\.[a-z.]+\.v\d+")


def labels_in_code() -> set[str]:
    """String and bytes constants of the program, docstrings left out."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        if "sov." not in source:
            continue  # to parse every module takes seconds
        tree = ast.parse(source)
        prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node not in prose and isinstance(node.value, str | bytes):
                text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
                found |= set(LABEL.findall(text))
    return found


@pytest.mark.slow
def test_every_label_is_in_a_table_and_every_label_of_the_tables_is_used() -> None:
    rows = [line for line in FORMATS.splitlines() if line.startswith("|") and "`sov." in line]
    listed = {label for line in rows for label in LABEL.findall(line)}
    code = labels_in_code()
    assert code - listed == set(), "add these labels to a table of FORMATS.md (use, label, key, context)"
    assert listed - code == set(), "FORMATS.md has labels that the program does not use"
