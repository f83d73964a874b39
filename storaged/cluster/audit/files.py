"""Names the files of an audit log, ``audit-ORDINAL-CHAIN-PART.jsonl``, and finds those of each chain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

PATTERN: Final = "audit-*.jsonl"
FILE_NAME: Final = re.compile(r"audit-(\d+)-([0-9a-f]+)-(\d+)\.jsonl")


def file_name(ordinal: int, chain: str, part: int) -> str:
    return f"audit-{ordinal:08d}-{chain}-{part:05d}.jsonl"


def chain_files(directory: Path) -> dict[str, list[Path]]:
    """Chain -> its files in their order; the chains in the order in which their processes started. Ignores
    other files.
    """
    found: dict[str, list[tuple[int, Path]]] = {}
    placed = [
        (match, path) for path in directory.glob(PATTERN) if (match := FILE_NAME.fullmatch(path.name)) is not None
    ]
    for _ordinal, chain, part, path in sorted((int(match[1]), match[2], int(match[3]), path) for match, path in placed):
        found.setdefault(chain, []).append((part, path))
    return {chain: [path for _, path in files] for chain, files in found.items()}
