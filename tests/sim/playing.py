"""``python -m tests.sim --seeds N [--first S] [--break RULE]``: plays seeds, reports violations, the rate, and how soon
a broken rule was caught. See also ``--planted --help``, ``--coverage --help`` and ``--mutants --help``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields, replace

from storaged.meta.consensus.register import RULES, Rules
from tests.sim.changing import resolve
from tests.sim.happened import Happened
from tests.sim.planted import PLAYS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, metavar="N")
    parser.add_argument("--first", type=int, default=1, metavar="SEED")
    parser.add_argument("--break", dest="broken", choices=[field.name for field in fields(Rules)], metavar="RULE")
    parser.add_argument(
        "--hostile",
        action="store_const",
        const="hostile",
        dest="play",
        default="ring",
        help="play those of ``hostile``",
    )
    parser.add_argument("--play", choices=PLAYS, help="play these")
    parser.add_argument("--trace", action="store_true", help="print each seed's trace digest")
    parser.add_argument("--go-on", action="store_true", help="do not stop at the first violation")
    options = parser.parse_args(arguments)
    rules = replace(RULES, **{options.broken: False}) if options.broken else RULES
    play = resolve(PLAYS[options.play])
    began = time.perf_counter()
    happened = Happened()
    played = operations = violations = messages = unknown = refused = 0
    for seed in range(options.first, options.first + options.seeds):
        found = play(seed, rules)
        played += 1
        happened.add(found)
        operations += found.operations
        messages += found.messages
        unknown += found.unknown
        refused += found.refused
        if options.trace:
            print(f"seed {seed}: {found.trace}")
        if found.violation:
            violations += 1
            print(f"seed {seed}: {found.violation} ({', '.join(found.faults) or 'no faults'})")
            if not options.go_on:
                break
    seconds = time.perf_counter() - began
    print(
        f"{played} seeds in {seconds:.1f} s ({played / seconds:.1f}/s), {operations} operations "
        f"({unknown} of unknown outcome, {refused} refused), {messages} messages: {violations} violations"
    )
    also = "".join(f", {count} {what}" for what, count in sorted(happened.done.items()))
    print(f"{happened.acknowledged} operations acknowledged, {happened.a_minute:.0f} a virtual minute{also}")
    if options.broken:
        print(f"rule {options.broken} broken: " + (f"caught after {played} seeds" if violations else "NOT caught"))
        return 0 if violations else 1
    if too_little := happened.too_little(options.play):
        print(f"too little happened: {too_little}")
    return 1 if violations or too_little else 0
