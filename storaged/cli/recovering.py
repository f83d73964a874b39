"""``storaged cluster losses`` and ``cluster recover --unsafe``: for partitions that lost their majority for good,
that of the system too.

``losses`` asks a gateway what the loss of disks would lose. ``recover`` works on the folder with the authority's keys:
it signs layouts that call the disks lost, so that these partitions go on from the replicas that are left
(``cluster.partitions``). They come into force as any layout does.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from storaged.cli.options import AUTHORITY
from storaged.errors import LayoutOvertaken, OperatorError, RecoverRefused

SHOWN_MAX = 20


@click.command("losses")
@click.argument("disks", metavar="DISK...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="The document that `cluster recover` wants.")
@click.pass_obj
def losses(named: str | None, disks: tuple[str, ...], as_json: bool) -> None:
    """What would be lost if these disks (their ids) were lost for good. Run on a gateway. Changes nothing."""
    from storaged.cli.client import gateway
    from storaged.cli.target import find_directory

    found = gateway(find_directory(named), "GET", "/v1/losses", query={"disks": ",".join(disks)}, timeout_s=600.0)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for line in describe(found):
            click.echo(line)


def describe(found: dict[str, Any]) -> list[str]:
    """Of the document of ``losses``."""
    rows, lines = found["partitions"], []
    if not rows and not found["nothing_left"] and not found["system_lost"]:
        return ["every partition has a majority without these disks: nothing is lost. Remove them as usual."]
    if found["system_lost"]:
        lines += describe_system(found["system"])
    if found["unknown"]:
        lines.append(f"where {len(found['unknown'])} of 1024 partitions are is not known, so nor is what they lose")
    lines.append(f"{len(rows)} of 1024 partitions have no majority without disk {', '.join(found['disks'])}")
    for row in rows[:SHOWN_MAX]:
        keys = "the keys that it has are not known"
        if row["keys"] is not None:
            keys = f"{'at least ' if row['keys'] >= found['keys_max'] else ''}{row['keys']} keys are there"
        lines.append(f"  partition {row['partition']}: {', '.join(row['left'])} is left; {keys}")
    if len(rows) > SHOWN_MAX:
        lines.append(f"  and {len(rows) - SHOWN_MAX} more (--json has all)")
    known = sum(row["keys"] or 0 for row in rows)
    lines.append(f"  {known} keys are known to the disks that are left. What only the others had is lost: writes,")
    lines.append("  overwritings and deletions that were acknowledged by a majority without the disk that is left.")
    if found["nothing_left"]:
        lines.append(f"{len(found['nothing_left'])} partitions have no disk left at all. They stay stopped, for ever.")
    if found["answering"]:
        lines.append(f"disk {', '.join(found['answering'])} answers; it has to be powered off for ever")
    if found["silent"]:
        lines.append(f"no disk of {', '.join(found['silent'])} answers. Start these servers first: they may know more")
    return lines


def describe_system(found: dict[str, Any]) -> list[str]:
    """Of ``system`` in the document of ``losses``."""
    if not found["left"]:
        return [f"no seed disk is left of {', '.join(found['seeds'])}: the cluster can't be recovered"]
    registers = found["registers"]
    known = "it does not say what they have"
    if registers is not None:
        known = ", ".join(f"{count} {kind}" for kind, count in registers.items()) or "they have no register"
    return [
        f"the system partition has no majority without seed disk {', '.join(found['lost'])}",
        f"  seed disk {', '.join(found['left'])} is left, with {known}",
        "  What only the lost seed disks had is lost, though it was acknowledged: users, buckets and their keys, as",
        "  they were made, changed or deleted last (what was deleted may be back, an older policy or password may hold",
        "  again); the keyring's id and signing keys; where partitions that moved are; which disks are out; pauses and",
        "  paces of moves; a layout that was decided, and that no server uses yet. What the lost servers alone knew of",
        "  other disks is forgotten, too: a disk or server that is put back to an older state may not be noticed.",
    ]


def words_for(found: dict[str, Any]) -> str:
    """What has to be typed."""
    lost = [f"{len(found['partitions'])} partitions"]
    if found["system_lost"]:
        lost.insert(0, "the system partition")
    if found["unknown"]:
        lost.append(f"what {len(found['unknown'])} unknown partitions lose")
    return f"lose {' and '.join(lost)}; {' '.join(found['disks'])} are powered off for ever"


@click.command("recover")
@AUTHORITY
@click.option(
    "--losses",
    "losses_file",
    type=click.File("rb"),
    required=True,
    metavar="FILE",
    help="What `storaged cluster losses DISK... --json` printed on a gateway.",
)
@click.option("--unsafe", is_flag=True, help="Do it. Without this, only say what would be lost.")
@click.option("--words", default=None, help="The words that it asks for, for scripts.")
def recover(directory: Path, losses_file: Any, unsafe: bool, words: str | None) -> None:
    """Go on without disks that are lost for good, although some partitions have no majority without them.

    Acknowledged data is lost: all that only the lost disks had. The lost disks must be powered off for ever: with a
    gateway that has not heard of this, they could go on as if nothing had happened, and what they then accept is lost
    too. It signs layouts; apply them on a gateway.
    """
    from storaged.cli import create as files
    from storaged.cli.signing import say_signed, sign_all
    from storaged.cli.succeeding import layouts_after
    from storaged.cluster import issuing

    found = _read(losses_file)
    listed, authority = files.load_plan(directory), issuing.load_authority(directory)
    last = files.last_signed(authority, listed)
    if last is None or found["cluster"] != listed.cluster:
        raise OperatorError(f"these are losses of cluster {found['cluster']}, and the folder is of {listed.cluster}")
    if found["epoch"] != last[1].epoch:
        raise LayoutOvertaken(f"Layout {found['epoch']} is in force, and the last one here is {last[1].epoch}.")
    _check(found)
    for node in listed.nodes:
        node.disks = [disk for disk in node.disks if disk.id not in found["disks"]]
    made = layouts_after(listed, last, int(time.time() * 1000), lost=found["disks"])
    for line in describe(found):
        click.echo(line)
    if not unsafe:
        click.echo("  Nothing was signed. To do it: --unsafe")
        return
    wanted = words_for(found)
    if words is None:
        words = click.prompt(f"Type exactly: {wanted}\n", default="", show_default=False, prompt_suffix="> ")
    if words != wanted:
        raise RecoverRefused(f"Nothing was signed: these are not the words {wanted!r}.")
    sign_all(directory, authority, listed, last, made)
    say_signed(directory, authority, listed, last, made)


def _read(file: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.load(file)
        describe(found), found["cluster"], found["epoch"]
    except (ValueError, KeyError, TypeError):
        raise OperatorError("the file of --losses is not what storaged cluster losses --json printed") from None
    return found


def _check(found: dict[str, Any]) -> None:
    """Raises RecoverRefused."""
    if not found["partitions"] and not found["system_lost"]:
        raise RecoverRefused("Every partition has a majority without these disks, or has no disk left at all.")
    if found["system_lost"] and not found["system"]["left"]:
        raise RecoverRefused("No seed disk is left: nothing says which users, buckets and keys there were.")
    if found["answering"]:
        raise RecoverRefused(
            f"Disk {', '.join(found['answering'])} still answers. Power its node off for ever, and ask for the losses"
            " again."
        )
