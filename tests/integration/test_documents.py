"""The documents keep their form: lines of prose end at 120 columns, and every path, link and anchor in them exists."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from storaged.cluster.rpc.authority import METHODS

ROOT = Path(__file__).resolve().parents[2]
COLUMNS_MAX = 120
HISTORY = ("CHANGELOG.md",)
"""Past releases name modules by the names that they had then."""

NAMES_OF_OTHERS = {"CAP_NET_BIND_SERVICE", "_STORAGED_COMPLETE", "bash_source"}
"""Of systemd and of click."""

PATH = re.compile(r"(?<![\w./~<-])((?:\.?[\w-]+/)*[\w.-]+\.(?:py|md|toml|json|lock|yaml|service|target|conf))\b(?!/)")
"""A file by its suffix. A path that begins with ``/`` or ``~`` belongs to the reader's machine."""

PACKAGE = re.compile(r"`((?:storaged|tests|benches|deploy)/(?:[\w-]+/)*[\w-]*)`")
"""A folder, or a file without a suffix, in the source tree."""

THEIRS = {"config.toml", "disks.json"}
"""Files of a running node."""


def documents() -> list[Path]:
    """The markdown files of the tree, without environments and caches."""
    found = [*ROOT.glob("*.md"), *(ROOT / ".github").glob("*.md")]
    for folder in ("storaged", "deploy", "benches", "tests"):
        found += (ROOT / folder).rglob("*.md")
    return sorted(found)


def prose(text: str) -> list[tuple[int, str]]:
    """(number, line) of the lines that are not code, with their numbers from 1."""
    lines, code = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            lines.append((number, line))
    assert not code, "a block of code has no end"
    return lines


def anchors(text: str) -> set[str]:
    """The names under which a forge links to the headings."""
    titles = [line.lstrip("#").strip().lower() for _, line in prose(text) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def exists(name: str, beside: Path) -> bool:
    """Whether a path is in the tree, seen from the root, from the package, or from the document's own folder."""
    if "/" not in name:
        return (ROOT / name).exists() or any(
            any(folder.rglob(name))
            for folder in map(ROOT.joinpath, ("storaged", "tests", "benches", "deploy", ".github"))
        )
    return any((base / name).exists() for base in (ROOT, ROOT / "storaged", beside))


@pytest.fixture(params=documents(), ids=lambda path: str(path.relative_to(ROOT)))
def document(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_prose_ends_at_120_columns(document: Path) -> None:
    long = [
        f"{document.name}:{number} has {len(line)} columns"
        for number, line in prose(document.read_text())
        if len(line) > COLUMNS_MAX and not line.lstrip().startswith("|") and "](" not in line
    ]
    assert not long, "\n".join(long)


def test_every_table_has_its_rows_on_lines_of_their_own(document: Path) -> None:
    heads = [(number, line) for number, line in prose(document.read_text()) if "|---" in line]
    assert [(number, line) for number, line in heads if not re.fullmatch(r"\s*\|(-+\|)+", line)] == []


def test_every_path_that_a_document_names_exists(document: Path) -> None:
    if document.name in HISTORY:
        pytest.skip("its names are those of the time")
    missing = [
        f"{document.name}:{number} names {name}"
        for number, line in prose(document.read_text())
        for name in (*PATH.findall(line), *PACKAGE.findall(line))
        if name not in THEIRS and not exists(name, document.parent)
    ]
    assert not missing, "\n".join(missing)


def test_every_name_with_an_underscore_that_a_document_shows_is_in_the_source(document: Path) -> None:
    if document.name in HISTORY:
        pytest.skip("its names are those of the time")
    missing = [
        f"{document.name}:{number} shows {word}"
        for number, line in prose(document.read_text())
        for word in re.findall(r"\b[A-Za-z_]+_[A-Za-z_]+\b", " ".join(re.findall(r"`([^`]+)`", line)))
        if word not in words_of_the_source() | NAMES_OF_OTHERS
    ]
    assert not missing, "\n".join(missing)


@functools.cache
def words_of_the_source() -> set[str]:
    """The words with an underscore in everything that is no document."""
    found: set[str] = set()
    for folder in ("storaged", "tests", "benches", "deploy"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".md", ".pyc"):
                found.add(path.stem)
                found.update(re.findall(r"\b\w*_\w*\b", path.read_text()))
    return found


def test_every_link_leads_somewhere(document: Path) -> None:
    for number, line in prose(document.read_text()):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            there = (document.parent / name).resolve() if name else document
            assert there.exists(), f"{document.name}:{number} links to {target}"
            if anchor:
                assert anchor in anchors(there.read_text()), f"{document.name}:{number}: no heading for {target}"


@pytest.mark.parametrize(
    ("message", "accepted"),
    [
        ("Add a metric\n", True),
        ("Add a metric\n\nIt counts what was closed.\n# a comment of git\n", True),
        ("# Please enter the commit message\nAdd a metric\n", True),
        ("A" * 72, True),
        ("A" * 73, False),
        ('Revert "' + "A" * 72 + '"', True),
        ("Add a metric.\n", False),
        ("Add a metric\nIt counts\n", False),
        ("\n\n", False),
    ],
)
def test_the_hook_for_commit_messages_holds_subjects_to_72_characters(
    message: str, accepted: bool, tmp_path: Path
) -> None:
    (tmp_path / "message").write_text(message)
    hook = [str(ROOT / ".github" / "check-commit-subject"), str(tmp_path / "message")]
    done = subprocess.run(hook, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == accepted, done.stderr


DOTTED = re.compile(r"``((?:storaged\.)?[a-z_0-9]+(?:\.\w+)+)(?:\(\))?``")
"""A module or a name in one, as docstrings and comments write it."""

SUFFIXES = {"eu", "py", "md", "toml", "json", "key", "crt", "sock", "signed", "jsonl"}


def planes() -> set[str]:
    return {path.parent.name for path in (ROOT / "storaged").glob("*/__init__.py")}


def is_named_in_code(dotted: str) -> bool:
    """Whether ``plane.module.Name`` leads to a module, or to one whose source has the name."""
    place = ROOT / "storaged"
    parts = dotted.removeprefix("storaged.").split(".")
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    module = place / f"{parts.pop(0)}.py" if parts and (place / f"{parts[0]}.py").exists() else place / "__init__.py"
    return not parts or parts[0] in names_in(module)


@functools.cache
def names_in(module: Path) -> set[str]:
    """The names of a module's code, docstrings and comments left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        for attribute in ("name", "asname", "id", "attr", "arg"):
            name = getattr(node, attribute, None)
            if isinstance(name, str):
                found.update(name.split("."))
    return found


@pytest.mark.parametrize("folder", ["storaged", "tests", "benches"])
def test_modules_and_files_that_docstrings_name_exist(folder: str) -> None:
    missing = []
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text()
        names = {
            name for name in PATH.findall(text) if name.startswith(("storaged/", "tests/")) and name.endswith(".py")
        }
        missing += [f"{path.relative_to(ROOT)} names {name}" for name in names if not exists(name, path.parent)]
        for name in set(DOTTED.findall(text)):
            first, last = name.removeprefix("storaged.").split(".")[0], name.rsplit(".", 1)[-1]
            if first in planes() and last not in SUFFIXES and name not in METHODS and not is_named_in_code(name):
                missing.append(f"{path.relative_to(ROOT)} names {name}")
    assert not missing, "\n".join(sorted(missing))


def test_the_picture_of_the_planes_is_the_contract_that_imports_keep() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["name"] == "layers")
    wanted = [{name.strip().removeprefix("storaged.") for name in layer.split("|")} for layer in layers]
    section = (ROOT / "storaged" / "README.md").read_text().split("## Nodes and planes\n")[1]
    lines = section.split("```\n")[1].splitlines()
    for line, names in zip(lines, wanted, strict=True):
        words = re.split(r"[\s|]+", line)
        assert names <= set(words[: len(names)]), f"{line!r} is not the layer {sorted(names)}"
