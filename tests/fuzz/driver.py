"""Runs targets for a while, in this process, and reports the result.

With atheris, coverage decides which inputs are kept (libFuzzer); half of them are changed by our own mutator, which
knows the target's language. Atheris starts slowly, since it instruments each function of the product, so one process
has all targets: an input there is the name of a target, a line end, and the target's own input. Without atheris, the
mutator alone makes inputs, in order of their numbers, for one target after the other. Findings do not end a run: each
is kept with its shortest input, once for each place where it is raised.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz import corpus
from tests.fuzz.mutator import Mutator
from tests.fuzz.target import Target

HANG_S = 300
"""One input that takes longer is a finding of its own: the process ends, and prints where it was."""
OURS = 0.5
"""The share of inputs that our own mutator makes for atheris."""


class Run:
    """Counts the executions of a target, and collects what it found."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.executions = 0
        self.seconds = 0.0
        self.findings: dict[str, dict[str, Any]] = {}

    def execute(self, data: bytes) -> None:
        self.executions += 1
        began_s = time.monotonic()
        try:
            self.target.run(data)
        except Exception as error:
            self._keep(data, error)
        self.seconds += time.monotonic() - began_s

    def _keep(self, data: bytes, error: Exception) -> None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        key = f"{type(error).__name__} {Path(where.filename).name}:{where.name}"
        known = self.findings.get(key)
        if known is None or len(data) < len(known["input"]):
            self.findings[key] = {
                "input": data.decode("latin-1"),
                "trace": "".join(traceback.format_exception(error))[-4000:],
            }

    def report(self) -> dict[str, Any]:
        return {"executions": self.executions, "seconds": round(self.seconds, 1), "findings": self.findings}


def seeds_of(target: Target, folder: Path | None) -> list[bytes]:
    """The inputs of the target, of the corpus, and of the folder of an earlier run."""
    found = [*target.seeds, *corpus.load(target.name)]
    if folder is not None and folder.exists():
        mark = target.name.encode() + b"\n"
        kept = (path.read_bytes() for path in sorted(folder.iterdir()))
        found += [data.removeprefix(mark) for data in kept if data.startswith(mark)]
    return found


def mutate(run: Run, first: int, over: Callable[[], bool]) -> None:
    """Executes the inputs of our own mutator, from the number ``first`` on, until it is ``over``."""
    target, number = run.target, first
    mutator = Mutator(target.name, seeds_of(target, None), target.tokens, target.size_max)
    while not over():
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        run.execute(mutator.input(number))
        number += 1
    faulthandler.cancel_dump_traceback_later()


def cover(runs: Sequence[Run], seconds: float, first: int, folder: Path, done: Callable[[], None]) -> None:
    """Lets atheris choose the inputs, and keep in ``folder`` those that reach new code. Ends the process, after
    ``done()``."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    until_s = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    of_name = {run.target.name.encode(): run for run in runs}
    mutators = {}
    for name, run in of_name.items():
        target, seeds = run.target, seeds_of(run.target, folder)
        mutators[name] = Mutator(target.name, seeds, target.tokens, target.size_max)
        for data in seeds:
            whole = name + b"\n" + data
            (folder / hashlib.sha1(whole).hexdigest()).write_bytes(whole)

    def one(whole: bytes) -> None:
        name, _, data = whole.partition(b"\n")
        if name in of_name:
            of_name[name].execute(data)
        if time.monotonic() >= until_s:
            done()
            sys.stdout.flush()
            os._exit(0)

    def change(whole: bytes, size_max: int, seed: int) -> bytes:
        rng = random.Random(seed)
        name, _, data = whole.partition(b"\n")
        if name not in of_name:
            name, data = rng.choice(sorted(of_name)), b""
        if rng.random() < OURS:
            data = mutators[name].changed(data, rng)
        else:
            data = bytes(atheris.Mutate(data, size_max - len(name) - 1))
        return name + b"\n" + data[: of_name[name].target.size_max]

    size_max = max(run.target.size_max for run in runs) + 32
    options = [
        f"-max_len={size_max}",
        f"-seed={first + 1}",
        f"-timeout={HANG_S}",
        "-rss_limit_mb=4096",
        "-len_control=0",
    ]
    atheris.Setup([sys.argv[0], str(folder), *options, "-verbosity=0"], one, custom_mutator=change)
    atheris.Fuzz()


def write(path: Path, report: Any) -> None:
    """The whole file, or none of it."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    new.replace(path)
