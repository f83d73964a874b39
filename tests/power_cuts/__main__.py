"""``python -m tests.power_cuts --cuts N --first SEED --json F``: cuts the power of a simulated disk N times.

Each seed is a disk of its own, with twenty cuts. A failure names its seed: ``--first SEED --cuts 20`` plays it again.
``--drive failing`` and ``--drive lying`` play drives that return errors, or other bytes than were written (``faulty``).
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import structlog

from tests.power_cuts.runs import CUTS_A_SEED, DRIVES, run
from tests.worlds.lmdb_calls import unavailable


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.power_cuts", description=__doc__)
    parser.add_argument("--cuts", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--drive", choices=DRIVES, default="sound")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what happened, renewed twice a minute")
    given = parser.parse_args()
    if reason := unavailable():
        print(f"can't run here: {reason}", file=sys.stderr)
        return 2
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    outcome = run(given.first, given.cuts, given.json, drive=given.drive)
    for failure in outcome.failures:
        print(f"seed {failure['seed']}, life {failure['life']}: {failure['why']}")
    rate = outcome.cuts / outcome.seconds
    print(f"{outcome.cuts} power cuts, {outcome.seeds} disks, {len(outcome.failures)} failed, {rate:.0f} a second")
    print(", ".join(f"{name}: {count}" for name, count in sorted(outcome.happened.items())))
    print(f"again: --drive {given.drive} --first {given.first} --cuts {given.cuts}  ({CUTS_A_SEED} a disk)")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
