"""Messages stay compatible: their fields are positional, so a stored record and a peer of the release before are read
by the order of the fields.

``tests/vectors/message_fields.json`` has the fields of every message in their order. A field may only be appended, with
a default. To rename a class or a field changes no byte: rename it in the vectors too.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.test_formats_readable import fields_of, kinds_of_messages

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "message_fields.json"


def test_fields_of_messages_are_only_appended_and_have_defaults() -> None:
    kinds = kinds_of_messages()
    known: dict[str, list[str]] = json.loads(VECTORS.read_text())
    assert known.keys() <= kinds.keys(), f"gone, or renamed: {sorted(known.keys() - kinds.keys())}"
    for name, kind in kinds.items():
        fields = list(fields_of(kind))
        defaults = getattr(kind, "__struct_defaults__", ()) or getattr(kind, "_field_defaults", {})
        assert name in known, f"{name} is new: add it to {VECTORS.name} with the fields {json.dumps(fields)}"
        before = known[name]
        assert fields[: len(before)] == before, f"{name}: fields are positional, append new ones at the end"
        added = fields[len(before) :]
        assert len(added) <= len(defaults), f"{name}: the new fields {added} need defaults"
        assert not added, f"{name} has the new fields {added}: append them to its line in {VECTORS.name}"
