"""The corpus: for each target a file of inputs, as texts of Latin-1, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"


def load(name: str) -> list[bytes]:
    """The inputs of a target; none for a new one."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return []
    return [str(text).encode("latin-1") for text in json.loads(path.read_text(encoding="ascii"))]


def save(name: str, inputs: Iterable[bytes]) -> None:
    lines = ",\n".join(
        json.dumps(data.decode("latin-1")) for data in sorted(set(inputs), key=lambda data: (len(data), data))
    )
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="ascii")
