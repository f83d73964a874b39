"""From three servers to six and back to three under load, without faults: what a change costs the clients, and what it
moves against what it has to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from tests.chaos.changing import RACKS, Change

REST_S = 20.0
"""So long the cluster is measured at rest, before and after."""


def grow(run: Change) -> None:
    """One layout brings the three servers, one takes what they have from the three first ones, one ends these."""
    time.sleep(REST_S)
    first, more = list(run.members), dict(zip(("n4", "n5", "n6"), RACKS[3:], strict=True))
    servers = run.servers
    for name, rack in more.items():
        servers.invite(name, rack)
    with run.moving("3 to 6 servers") as move:
        move.update(servers.plan())
        files = servers.layouts()
        for name in more:
            servers.join(name)
            servers.begin(name)
        for file in files:
            servers.apply(file)
    run.members.update(more)
    for name in more:
        run.wait_whole(name)
    time.sleep(REST_S)
    for name in first:
        servers.drain(name)
    run.change("6 to 3 servers: drain")
    for name in first:
        servers.remove(name)
        del run.members[name]
    run.change("6 to 3 servers: remove")
    for name in first:
        servers.stop_node(name)
    time.sleep(REST_S)


def table(document: Mapping[str, Any]) -> Iterator[str]:
    """The figures of a run, as lines."""
    tally, latency = document["tally"], document["latency_ms"]
    requests = tally["acknowledged"] + tally["reads"] + tally["lists"] + tally["failed"]
    heads = f"{'change':<32} {'seconds':>8} {'partitions':>10} {'replicas':>16} {'fragments':>16}"
    yield f"{heads} {'bytes moved / ideal':>32}"
    for move in document["moves"]:
        moved = move["bytes"]
        factor = f" ({moved['bytes'] / moved['ideal']:.2f})" if moved["ideal"] else ""
        bytes_ = f"{moved['bytes']} / {moved['ideal']}{factor}"
        yield (
            f"{move['what']:<32} {move['seconds']:>8} {move['partitions'] or '':>10} {_of(move['replicas']):>16} "
            f"{_of(move['fragments']):>16} {bytes_:>32}"
        )
    objects = document["objects"]
    twice = tally["failed_twice"] + objects["failed_twice"]
    yield f"objects {objects['count']}, {objects['bytes']} bytes, read meanwhile {objects['reads']}"
    yield f"requests {requests + objects['reads']}, failed {tally['failed']}, failed after one retry {twice}"
    yield f"lost {len(tally['lost'])}, stale {len(tally['stale'])}, corrupt {len(tally['corrupt'])}"
    counters = document["counters"]
    increments = f"{counters['increments']} increments, {counters['conflicts']} conflicts"
    yield f"counters: {increments}, {len(counters['wrong'])} wrong"
    for phase, found in latency.items():
        yield f"p50, p99 {phase:<8} {found['p50']} ms, {found['p99']} ms ({found['requests']} requests)"
    if document["steps"]:
        yield f"steps {document['steps']}"
        yield f"faults {document['faults']}"
    yield f"violations {len(document['violations'])}"


def _of(movement: Mapping[str, Any] | None) -> str:
    return f"{movement['moved']} of {movement['ideal']}" if movement else ""
