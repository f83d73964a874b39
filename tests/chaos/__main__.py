"""``python -m tests.chaos kill|copies|rack|flips|forget|change|grow|lose|races``: the long runs, on a cluster of their
own in a temporary folder. The folder stays when something went wrong.

``copies`` has clients that rename buckets, by copies that move no data, while nodes are killed.

``change`` plays steps of administrators and faults on up to six servers, ``grow`` goes from three servers to six and
back under load and measures, ``lose`` loses a disk, servers and a rack for good and measures; ``races`` has clients
race on a few keys through three gateways, which are killed and paused. These four have a cluster of servers
(``tests.servers``), the others one of ``storaged dev``.

Progress goes to standard output while it runs. ``--json FILE`` gets a summary; the exit code is 1 if anything was lost,
stale or corrupt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.changing import Change
from tests.chaos.control import STARTS_MAX
from tests.chaos.copies import rename_buckets
from tests.chaos.forgetful import forget_disks
from tests.chaos.growing import grow, table
from tests.chaos.losing import lose, rates
from tests.chaos.races import Races
from tests.chaos.scenarios import flip_bits, kill_any, kill_nodes, lose_a_rack
from tests.chaos.shelf import clocks_beside
from tests.chaos.steps import STEPS
from tests.cluster import Cluster
from tests.servers import Servers
from tests.worlds.frozen_disk import frozen_disk

HANGING_BYTES = 8 << 30


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the cluster is stopped then, too
    folder = Path(tempfile.mkdtemp(prefix="storaged-chaos-"))
    servers = arguments.scenario in ("change", "grow", "lose", "races")
    cluster = Servers(folder / "servers") if servers else Cluster(folder / "s3", workers=2)
    started = time.time()
    with contextlib.ExitStack() as stack:
        options = forgetful_options(cluster, stack) if arguments.scenario == "forget" else {}
        try:
            if isinstance(cluster, Servers) and arguments.scenario == "races":
                violations, found = play_races(cluster.create(gateways=3), arguments)
            elif isinstance(cluster, Servers):
                violations, found = play_changes(cluster.create(gateways=2), arguments)
            else:
                violations, found = play(start(cluster), arguments, options)
        except BaseException:
            say(f"the cluster's files stay in {folder}")
            raise
        finally:
            cluster.stop()
    if arguments.json:
        about = {"scenario": arguments.scenario, "seed": arguments.seed, "started": int(started)}
        arguments.json.write_text(json.dumps({**about, "seconds": round(time.time() - started), **found}, indent=1))
    if violations:
        say(f"the cluster's files stay in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def start(cluster: Cluster) -> Cluster:
    """A busy machine may need longer than ``storaged dev`` gives to its nodes."""
    for attempt in range(STARTS_MAX):
        try:
            return cluster.start(timeout_s=120)
        except AssertionError as error:
            cluster.stop()
            if attempt == STARTS_MAX - 1:
                raise
            say(f"the cluster did not start, and is started again: {str(error)[:300]}")
    raise AssertionError("not reached")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "scenario", choices=["kill", "copies", "rack", "flips", "forget", "change", "grow", "lose", "races"]
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=600)
    length.add_argument("--minutes", type=float, help="instead of --seconds")
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--waves", type=int, default=25)
    parser.add_argument("--objects", type=int, help="of change (40), grow and lose (2000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for a summary", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.minutes is not None:
        arguments.seconds = 60 * arguments.minutes
    return arguments


def forgetful_options(cluster: Cluster, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Of ``forget_disks``, before the cluster starts. Without root no disk hangs."""
    options: dict[str, Any] = {"clocks": clocks_beside(cluster)}
    try:
        options["hanging"] = stack.enter_context(frozen_disk(HANGING_BYTES))
    except pytest.skip.Exception as reason:
        say(f"no disk will hang: {reason}")
    return options


def play(cluster: Cluster, arguments: argparse.Namespace, options: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Returns the number of violations and the summary."""
    if arguments.scenario == "flips":
        flipped = flip_bits(cluster, arguments.flips, waves=arguments.waves, seed=arguments.seed, say=say)
        return flipped.wrong, asdict(flipped)
    if arguments.scenario == "rack":
        outcome = lose_a_rack(cluster, "par2", arguments.seconds, seed=arguments.seed, say=say)
        say(f"below target (s, objects): {outcome.below_target}")
        return len(outcome.tally.violations()), {**vars(outcome), "tally": outcome.tally.document()}
    if arguments.scenario == "copies":
        wrong, done = rename_buckets(cluster, arguments.seconds, seed=arguments.seed, kills=kill_any, say=say)
        for line in wrong:
            say(f"  {line}")
        return len(wrong), {"wrong": wrong, "done": dict(done)}
    if arguments.scenario == "forget":
        tally = forget_disks(cluster, arguments.seconds, seed=arguments.seed, say=say, **options)
    else:
        tally = kill_nodes(cluster, arguments.seconds, seed=arguments.seed, say=say)
    for line in tally.noted + tally.violations():
        say(f"  {line}")
    return len(tally.violations()), tally.document()


def play_changes(servers: Servers, arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Returns the number of violations and the summary."""
    nemeses = arguments.scenario == "change"
    objects = arguments.objects or (40 if nemeses else 2000)
    change = Change(servers, seed=arguments.seed, objects=objects, nemeses=nemeses, say=say)
    with change.load():
        if nemeses:
            change.run(arguments.seconds, STEPS)
        elif arguments.scenario == "grow":
            grow(change)
        else:
            lose(change)
    change.judge()
    document = change.document()
    for line in change.workload.tally.noted + change.violations():
        say(f"  {line}")
    for line in (*table(document), *(rates(document) if arguments.scenario == "lose" else ())):
        print(line)
    return len(change.violations()), document


def play_races(servers: Servers, arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Returns the number of violations and the summary."""
    races = Races(servers, seed=arguments.seed, say=say)
    races.run(arguments.seconds)
    for line in races.wrong:
        say(f"  {line}")
    return len(races.wrong), races.document()


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
