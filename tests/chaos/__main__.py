"""``python -m tests.chaos kill|rack|flips [--seconds N] [--flips N] [--seed N]``: the long runs, on a cluster of their
own in a temporary folder.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.chaos.scenarios import flip_bits, kill_nodes, lose_a_rack
from tests.cluster import Cluster


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("scenario", choices=["kill", "rack", "flips"])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--waves", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the cluster is stopped then, too

    def say(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory(prefix="storaged-chaos-") as folder:
        cluster = Cluster(Path(folder) / "s3", workers=2).start()
        try:
            if arguments.scenario == "kill":
                return len(kill_nodes(cluster, arguments.seconds, seed=arguments.seed, say=say).violations())
            if arguments.scenario == "rack":
                outcome = lose_a_rack(cluster, "par2", arguments.seconds, seed=arguments.seed, say=say)
                say(f"below target (s, objects): {outcome.below_target}")
                return len(outcome.tally.violations())
            return flip_bits(cluster, arguments.flips, waves=arguments.waves, seed=arguments.seed, say=say).wrong
        finally:
            cluster.stop()


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
