"""Fuzzes the parsers of everything that unauthenticated clients and storage nodes send.

    python -m tests.fuzz --list
    python -m tests.fuzz --target xml --seconds 60
    python -m tests.fuzz --seconds 3600 --json hours.json --work folder    # all targets; goes on where it was
    python -m tests.fuzz --target xml --input FILE                         # one input: its error and trace
    python -m tests.fuzz --minimise --work folder                          # what the folder has, into the tree's corpus

One process works at a time. Exits with 1 when something was found.
"""

# Modules are imported late: atheris has to be imported before the modules that it instruments.

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SLICE_S = 900.0
AGAIN_S = 900.0
"""A child that runs so much longer than its time is killed. It may start slowly on a busy machine."""
TREE = Path(__file__).parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the targets, and what each makes sure of")
    parser.add_argument("--target", action="append", help="only this one; may be given more than once")
    parser.add_argument("--seconds", type=float, default=60.0, help="of all targets together (60)")
    parser.add_argument("--slice", type=float, default=SLICE_S, help="seconds after which --json is written (900)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the number of the first input (0)")
    parser.add_argument("--json", type=Path, help="executions, seconds and findings, added to what the file has")
    parser.add_argument("--work", type=Path, help="folder of inputs that reach new code; default: a temporary one")
    parser.add_argument("--engine", choices=("atheris", "own"), help="default: atheris where it is installed")
    parser.add_argument("--input", type=Path, help="run the target on the bytes of this file")
    parser.add_argument("--minimise", action="store_true", help="make the tree's corpus from the folder --work")
    parser.add_argument("--inputs", type=int, default=0, metavar="N", help="and from N inputs of our own mutator (0)")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    options.engine = options.engine or ("atheris" if importlib.util.find_spec("atheris") else "own")
    if options.here is not None:
        return one_slice(options)
    from tests.fuzz.targets import TARGETS

    names = options.target or list(TARGETS)
    for name in names:
        if name not in TARGETS:
            print(f"There is no target {name}. python -m tests.fuzz --list names all.", file=sys.stderr)
            return 2
    if options.list:
        for name in names:
            print(f"{name}: {' '.join((TARGETS[name].run.__doc__ or '').split())}")
    elif options.input is not None:
        TARGETS[names[0]].run(options.input.read_bytes())
        print("Nothing was found.")
    elif options.minimise:
        from tests.fuzz.minimise import minimise

        for name in names:
            minimise(TARGETS[name], options.work, options.inputs)
    else:
        with tempfile.TemporaryDirectory(prefix="storaged-fuzz-") as temporary:
            return in_slices(options, names, options.work or Path(temporary))
    return 0


def one_slice(options: argparse.Namespace) -> int:
    """Some targets, in this process; the report goes to ``--here``."""
    if options.engine == "atheris":
        import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

        with atheris.instrument_imports(include=["storaged"]):
            from tests.fuzz.targets import TARGETS
    else:
        from tests.fuzz.targets import TARGETS
    from tests.fuzz import driver

    runs = [driver.Run(TARGETS[name]) for name in options.target]
    began_s = time.monotonic()

    def done() -> None:
        driver.write(
            options.here,
            {
                "seconds": round(time.monotonic() - began_s, 1),
                "cpu_seconds": round(time.process_time(), 1),
                "targets": {run.target.name: run.report() for run in runs},
            },
        )

    if options.engine == "atheris":
        driver.cover(runs, options.seconds, options.first, options.work, done)
    else:
        for number, run in enumerate(runs, 1):
            until_s = began_s + options.seconds * number / len(runs)
            driver.mutate(run, options.first, lambda until_s=until_s: time.monotonic() >= until_s)  # type: ignore[misc]
        done()
    return 0


def in_slices(options: argparse.Namespace, names: list[str], work: Path) -> int:
    """Children run one after the other until the time is over."""
    from tests.fuzz.driver import write

    total = new_total()
    if options.json is not None and options.json.exists():
        total = json.loads(options.json.read_text(encoding="utf-8"))
    until_s = time.monotonic() + options.seconds
    first = options.first + total["executions"]
    while (left := until_s - time.monotonic()) > 0:
        report = _child(options, names, work, min(options.slice, max(left, 1.0)), first)
        add(total, report, options.engine)
        first += sum(each["executions"] for each in report["targets"].values())
        if options.json is not None:
            write(options.json, total)
    hours = total["seconds"] / 3600
    print(f"{total['executions']} executions in {hours:.2f} h, {len(total['findings'])} findings")
    for key, finding in total["findings"].items():
        print(f"\n{key}\ninput: {finding['input']!r}\n{finding['trace']}")
    return 1 if total["findings"] else 0


def new_total() -> dict[str, Any]:
    return {"seconds": 0.0, "cpu_seconds": 0.0, "executions": 0, "targets": {}, "findings": {}}


def add(total: dict[str, Any], report: dict[str, Any], engine: str) -> None:
    total["engine"] = engine
    for name in ("seconds", "cpu_seconds"):
        total[name] = round(total[name] + report[name], 1)
    for name, run in report["targets"].items():
        mine = total["targets"].setdefault(name, {"executions": 0, "seconds": 0.0})
        mine["executions"] += run["executions"]
        mine["seconds"] = round(mine["seconds"] + run["seconds"], 1)
        total["executions"] += run["executions"]
        for key, finding in run["findings"].items():
            total["findings"].setdefault(f"{name}: {key}", finding)


def _child(options: argparse.Namespace, names: list[str], work: Path, seconds: float, first: int) -> dict[str, Any]:
    """The report of one slice. A child that crashed or hung is a finding."""
    with tempfile.TemporaryDirectory(prefix="storaged-fuzz-") as folder:
        here = Path(folder) / "report.json"
        command = [sys.executable, "-m", "tests.fuzz", "--engine", options.engine, "--seconds", str(seconds)]
        command += ["--first", str(first), "--work", str(work), "--here", str(here)]
        for name in names:
            command += ["--target", name]
        try:
            ended = subprocess.run(command, capture_output=True, timeout=seconds + AGAIN_S, cwd=TREE, check=False)
            said = ended.stderr[-4000:].decode("utf-8", "replace")
        except subprocess.TimeoutExpired:
            said = "it did not end"
        if here.exists():
            report: dict[str, Any] = json.loads(here.read_text(encoding="utf-8"))
            return report
    crash = {"executions": 0, "seconds": 0.0, "findings": {"crash": {"input": "", "trace": said}}}
    return {"seconds": 0.0, "cpu_seconds": 0.0, "targets": {"all": crash}}


if __name__ == "__main__":
    sys.exit(main())
