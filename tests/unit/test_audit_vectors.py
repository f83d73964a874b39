"""The audit log's formats against vectors that were computed from FORMATS.md with SHA-256 and msgpack alone, and by
that description once more.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import storaged
from storaged.cluster.audit.chains import PRUNED
from storaged.cluster.audit.format import (
    Checkpoint,
    Event,
    first_link,
    make_line,
    next_link,
    parse_line,
    predecessor_of,
)
from storaged.cluster.audit.links import read_links
from storaged.cluster.audit.verify import verify

PACKAGE = Path(storaged.__file__).parent
FORMATS = (PACKAGE / "FORMATS.md").read_text()
VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "audit.json").read_text())


def described(line: str) -> str:
    """The hash of an entry, by FORMATS.md: over the line's bytes before ``,"hash":``."""
    return hashlib.sha256(b"sov.audit.v1\0" + line.rpartition(',"hash":')[0].encode()).hexdigest()


def links_described(chain: str, hashes: list[str]) -> list[str]:
    link, found = hashlib.sha256(b"sov.audit.link.v1\0" + chain.encode()).digest(), []
    for entry_hash in hashes:
        link = hashlib.sha256(b"sov.audit.link.v1\0" + link + bytes.fromhex(entry_hash)).digest()
        found.append(link.hex())
    return found


@pytest.mark.parametrize("chain", VECTORS["chains"], ids=lambda chain: chain["chain"])
def test_entries_and_links_are_those_of_the_description_and_of_the_program(chain: dict[str, Any]) -> None:
    entries = [parse_line(line.encode()) for line in chain["lines"]]
    hashes = [entry.hash for entry in entries]
    assert hashes == [described(line) for line in chain["lines"]]
    assert chain["links"] == links_described(chain["chain"], hashes)
    link = first_link(chain["chain"])
    for entry, line, expected in zip(entries, chain["lines"], chain["links"], strict=True):
        link = next_link(link, bytes.fromhex(entry.hash))
        assert link.hex() == expected
        event = Event(entry.kind, entry.actor, entry.target, entry.outcome, entry.fields)
        assert (
            make_line(entry.chain, entry.sequence, entry.time_ms, event, entry.previous, entry.salt)[0].decode()
            == line + "\n"
        )


def test_the_second_chain_follows_the_first_and_both_verify(tmp_path: Path) -> None:
    first, second = VECTORS["chains"]
    named = predecessor_of(parse_line(second["lines"][0].encode()))
    last = parse_line(first["lines"][-1].encode())
    assert named is not None
    assert (named.chain, named.sequence, named.hash) == (last.chain, last.sequence, last.hash)
    for ordinal, chain in enumerate((first, second), start=1):
        path = tmp_path / f"audit-{ordinal:08d}-{chain['chain']}-00001.jsonl"
        path.write_text("".join(f"{line}\n" for line in chain["lines"]))
        assert [link.link.hex() for link in read_links(chain["chain"], [path])] == chain["links"]
    report = verify(tmp_path.iterdir(), whole=True)
    assert (report.ok, report.entries, report.begins_after) == (True, 5, "")


def test_what_is_signed_of_a_checkpoint() -> None:
    given = VECTORS["checkpoint"]
    fields = {
        name: bytes.fromhex(given[name]) if name in ("hash", "link", "certificate") else given[name]
        for name in given
        if name != "signed_bytes"
    }
    checkpoint = Checkpoint(**fields)
    expected = b"sov.audit.checkpoint.v2\0" + msgspec.msgpack.encode([*fields.values(), b""])
    assert checkpoint.signed_bytes() == expected == bytes.fromhex(given["signed_bytes"])


CALLS = {"append", "note", "refused", "audited", "recorded", "_audit", "_audited", "Event"}


def kinds_in_code() -> set[str]:
    """First text with a dot that a call which writes an entry is given; and the constants that stand for one."""
    found = {PRUNED, "start", "continue"}
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        if not re.search(r"[\"'][a-z0-9]+\.[a-z_]+[\"']", source):
            continue  # to parse every module takes seconds
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            if name in CALLS and texts and re.fullmatch(r"[a-z0-9]+\.[a-z_]+", texts[0]):
                found.add(texts[0])
    return found


@pytest.mark.slow
def test_the_document_lists_every_kind_of_entry() -> None:
    (listed,) = re.findall(r"^Kinds: (.*?)\.$", FORMATS, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`([a-z0-9_.]+)`", listed)) == kinds_in_code()
