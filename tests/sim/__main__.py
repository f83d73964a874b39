"""``python -m tests.sim --seeds N`` plays seeds; ``--help`` has the rest, and the other commands.

    --planted    plants bugs and says how many seeds notice each
    --coverage   says which branches of the program seeds reach
    --liveness   says how many operations get through with one fault at a time, and how long the slowest waits
    --mutants    changes every comparison and constant of the consensus, and prints what nothing notices

A command's module is imported when it is known: those that change the program must come before its first import.
"""

from __future__ import annotations

import sys

from tests.sim.changing import resolve

COMMANDS = {
    "--planted": "tests.sim.planted:main",
    "--coverage": "tests.sim.coverage:main",
    "--liveness": "tests.sim.liveness:main",
    "--mutants": "tests.sim.mutants:main",
}


def main() -> int:
    command = next((argument for argument in sys.argv[1:] if argument in COMMANDS), "")
    rest = [argument for argument in sys.argv[1:] if argument != command]
    outcome: int = resolve(COMMANDS.get(command, "tests.sim.playing:main"))(rest)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
