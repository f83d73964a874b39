"""Chooses the smallest inputs that together reach all code that all inputs reach, for the corpus in the tree."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.fuzz import corpus
from tests.fuzz.bounds import branches_of
from tests.fuzz.driver import seeds_of
from tests.fuzz.mutator import Mutator
from tests.fuzz.target import Target

BYTES_MAX = 48 * 1024
"""Of one target's inputs."""
LOOKED_AT_MAX = 4000


def minimise(target: Target, folder: Path | None, inputs: int) -> None:
    """Writes the corpus of a target, from the inputs in the tree and in the folder of a run, and from the first
    ``inputs`` of our own mutator. Inputs that fail are left out: they become tests of their own.
    """
    seeds = seeds_of(target, folder)
    mutator = Mutator(target.name, seeds, target.tokens, target.size_max)
    seeds = sorted({*seeds, *map(mutator.input, range(inputs))}, key=lambda data: (len(data), data))[:LOOKED_AT_MAX]
    for data in seeds[:50]:  # caches are full, so that each branch belongs to the input that takes it
        with contextlib.suppress(Exception):
            target.run(data)
    reached: set[tuple[str, int, int]] = set()
    kept: list[bytes] = []
    size = 0
    for data in seeds:
        try:
            found = branches_of(lambda data=data: target.run(data))  # type: ignore[misc]
        except Exception as error:
            print(f"{target.name}: an input fails ({error!r}): {data!r}")
            continue
        if not found <= reached and size + len(data) <= BYTES_MAX:
            reached |= found
            if data not in target.seeds:  # these are tried anyway
                kept.append(data)
                size += len(data)
    corpus.save(target.name, kept)
    print(f"{target.name}: {len(kept)} of {len(seeds)} inputs, {size} bytes, {len(reached)} branches")
