"""A disk is replaced, a server is lost for good, a rack is lost for good and replaced, and a server with a seed disk is
lost while nobody types anything: how long until everything has its full redundancy again, under load, and how fast that
is against what the disk itself writes. Without faults besides.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.chaos.changing import RACKS, Change
from tests.chaos.growing import REST_S
from tests.chaos.steps import has_seed, out, sparing
from tests.servers import DISKS

PROBE_BYTES = 256 << 20
PIECE = bytes(1 << 20)
PROBES = 3
SPARED_S = 300.0


def lose(run: Change) -> None:
    """Six servers in five racks, so that each loss leaves racks enough."""
    for name, rack in (("n4", RACKS[3]), ("n5", RACKS[4]), ("n6", RACKS[0])):
        run.servers.add(name, rack)
        run.members[name] = rack
        run.settle()
    time.sleep(REST_S)
    disk_mb_s = statistics.median(write_mb_s(run.servers.root / "probe") for _ in range(PROBES))
    run.say(f"the disk writes {disk_mb_s:.0f} MB/s beside the load")
    for play in (replace_a_disk, lose_a_server, replace_a_rack, lose_a_seed_disk):
        play(run)
        run.moves[-1]["disk_mb_s"] = round(disk_mb_s, 1)
        time.sleep(REST_S)


def write_mb_s(file: Path) -> float:
    """As ``dd bs=1M conv=fdatasync`` measures it."""
    began = time.monotonic()
    with file.open("wb", buffering=0) as opened:
        for _ in range(PROBE_BYTES // len(PIECE)):
            opened.write(PIECE)
        os.fdatasync(opened.fileno())
    seconds = time.monotonic() - began
    file.unlink()
    return PROBE_BYTES / seconds / 1e6


def replace_a_disk(run: Change) -> None:
    """The disk of n4 is broken, and an empty one is in its place."""
    servers, disk = run.servers, DISKS[0]
    here = servers.servers["n4"].folder / disk
    servers.kill_node("n4")
    here.rename(here.with_suffix(".broken"))
    here.mkdir(mode=0o700)
    with run.moving("a disk is replaced") as move:
        servers.replace_disk("n4", disk)
        move.update(servers.plan())
        files = servers.layouts()
        servers.start_node("n4")
        for file in files:
            servers.apply(file)
    run.wait_whole("n4")


def lose_a_server(run: Change) -> None:
    """n6, one of two servers of its rack."""
    run.servers.kill_node("n6")
    del run.members["n6"]
    with run.moving("a server is lost for good") as move:
        run.servers.remove("n6")
        move.update(run.servers.change())


def replace_a_rack(run: Change) -> None:
    """n2 is all that its rack has. Another server takes its place, in the same rack."""
    rack = run.members.pop("n2")
    run.servers.kill_node("n2")
    with run.moving("a rack is lost for good and replaced") as move:
        run.servers.remove("n2")
        move.update(run.servers.add("n7", rack))
        run.members["n7"] = rack
    run.wait_whole("n7")


def lose_a_seed_disk(run: Change) -> None:
    """Nobody types anything: the others notice it. The seconds begin with the loss: 20 of them are the delay."""
    servers = run.servers
    sparing(run, "10s", "20s")
    seeds = {seed["node"] for seed in servers.status()["sparing"]["seeds"]}
    name = min(seeds & run.members.keys())
    disks = set(run.disks_of(name))
    with run.moving("a server with a seed disk is replaced by itself"):
        servers.kill_node(name)
        servers.wait_until(lambda: out(run) >= disks, SPARED_S, f"the disks of {name} out")
        servers.wait_until(lambda: not has_seed(run, name), SPARED_S, "another seed disk in its place")
    servers.adopt()
    servers.start_node(name)
    servers.wait_until(lambda: not out(run) & disks, SPARED_S, f"the disks of {name} are back")
    run.settle()
    sparing(run, "10m", "1h")


def rates(document: Mapping[str, Any]) -> Iterator[str]:
    """Of the moves of ``lose``, a line each."""
    yield f"{'loss':<50} {'seconds':>8} {'MB of fragments':>16} {'MB/s':>7} {'disk MB/s':>10} {'share':>6}"
    for move in document["moves"]:
        if "disk_mb_s" in move:
            mb = move["bytes"]["bytes"] / 1e6
            rate = mb / move["seconds"]
            share = f"{100 * rate / move['disk_mb_s']:.1f}%"
            yield f"{move['what']:<50} {move['seconds']:>8} {mb:>16.1f} {rate:>7.2f} {move['disk_mb_s']:>10} {share:>6}"
