"""``storaged cluster abort``: takes the last change of the layout back.

Theory of operation. A layout that was decided can't be withdrawn: data may lie already where it put it. So a layout
that follows it takes the change back. Disks and nodes get the places that they had before. Disks that the change added
stay, and only give up what they have (``draining``): what moved to them goes back to where it was, with all of its
replicas meanwhile. The ordinary commands remove them afterwards. Partitions that have not moved stay where they are.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
from msgspec.structs import replace

from storaged.cli.options import AS_JSON, AUTHORITY
from storaged.cli.revoking import jurisdiction_of
from storaged.errors import OperatorError

if TYPE_CHECKING:  # a command imports what it needs when it runs
    from storaged.cli import create as files
    from storaged.cli import planning
    from storaged.cluster import issuing
    from storaged.cluster.layout import Layout

DIRECTORY_OF = re.compile(r'^id = "(?P<id>[^"]+)"\s*\ndirectory = "(?P<directory>[^"]+)"', re.MULTILINE)


class TakenBack(NamedTuple):
    """``back``: disks that get their places again; ``going``: disks that give up what they have; ``nodes``: that are
    named again.
    """

    to: int
    back: tuple[str, ...]
    going: tuple[str, ...]
    nodes: tuple[str, ...]


@click.command("abort")
@AUTHORITY
@click.option("--to", type=int, default=None, metavar="EPOCH", help="The layout whose places are wanted again.")
@click.option("--dry-run", is_flag=True, help="Only say what would be taken back, and what would move.")
@AS_JSON
def abort(directory: Path, to: int | None, dry_run: bool, as_json: bool) -> None:
    """Take back the last change of the layout that moves data: sign layouts with the places that were before.

    Apply them as those of any other change. A change of the profile is taken back by `storaged cluster profile`. For a
    layout that was never applied there is nothing to take back: do not apply it, and change the list of nodes again.
    """
    from storaged.cli import create as files
    from storaged.cli import planning
    from storaged.cli.signing import say_signed, sign_all
    from storaged.cli.succeeding import layouts_after
    from storaged.cluster import issuing

    listed, authority = files.load_plan(directory), issuing.load_authority(directory)
    last = files.last_signed(authority, listed)
    if last is None:
        raise OperatorError("no layout was signed yet, so there is nothing to take back")
    _check_unchanged(listed, last[1])
    if to is None:
        _check_profile(authority, last[1])
    wanted = _wanted(authority, listed, last[1], to)
    found = take_back(listed, last[1], wanted, directory)
    layouts = layouts_after(listed, last, int(time.time() * 1000))
    moves = planning.outlook(last[1], layouts)
    if not moves.moves:
        raise OperatorError(f"layout {last[1].epoch} has the places of layout {wanted.epoch} already")
    if as_json:
        document = {**found._asdict(), "layouts": [layout.epoch for layout in layouts], "signed": not dry_run}
        click.echo(json.dumps({**document, "partitions": moves.partitions, "survives": dict(moves.survives)}, indent=2))
    else:
        _say(found, moves)
        if wanted.profile != last[1].profile:
            click.echo(f"  the profile stays {last[1].profile}: `storaged cluster profile` takes back {wanted.profile}")
    if dry_run:
        return
    sign_all(directory, authority, listed, last, layouts)
    if not as_json:
        say_signed(directory, authority, listed, last, layouts)


def _say(found: TakenBack, moves: planning.Outlook) -> None:
    click.echo(f"the places of layout {found.to} are wanted again")
    for disk in found.back:
        click.echo(f"  disk {disk} gets its places again; it has to answer")
    for disk in found.going:
        click.echo(f"  disk {disk} gives up what it has; remove it when nothing moves any more")
    for node in found.nodes:
        click.echo(f"  node {node} is named again")
    click.echo(f"  at most {moves.partitions} of 1025 partitions go back: those that have moved already")
    if not moves.survives["meanwhile"]:
        click.echo(f"  meanwhile a {moves.domain} may NOT fail")


def _check_unchanged(listed: files.ClusterPlan, last: Layout) -> None:
    """Raises OperatorError when the list has changes that no layout has."""
    from storaged.cli.create import planned
    from storaged.cluster.moves import changes_between

    now = planned(listed, last.epoch)
    now = replace(
        last,
        nodes=now.nodes,
        disks=now.disks,
        profile=now.profile,
        countries=now.countries,
        jurisdictions=now.jurisdictions,
        operators=now.operators,
        spread=now.spread,
    )
    if changes := changes_between(last, now):
        raise OperatorError(
            f"the list of nodes has changes that were not signed: {'; '.join(changes[:5])}. Undo them first, or sign"
            " them."
        )


def _check_profile(authority: issuing.Authority, last: Layout) -> None:
    """Raises OperatorError when the profile has changed since data was moved: that is the last change, and it is not
    one of places.
    """
    from storaged.cli import create as files
    from storaged.cluster.succession import GENERATION

    known = [files.read_layout(authority, path)[1] for path in (authority.directory / "layouts").glob("*.signed")]
    same = [layout for layout in known if layout.epoch // GENERATION == last.epoch // GENERATION]
    before = min(same, key=lambda layout: layout.epoch, default=last)
    if before.profile != last.profile:
        raise OperatorError(
            f"the last change is the profile, {before.profile} to {last.profile}. To take that back: storaged cluster"
            f" profile {authority.directory} {before.profile}. To take back an earlier change of places: --to EPOCH"
        )


def _wanted(authority: issuing.Authority, listed: files.ClusterPlan, last: Layout, to: int | None) -> Layout:
    """The layout whose places are wanted again. Raises OperatorError."""
    from storaged.cli import create as files

    epoch = to if to is not None else listed.before
    if not epoch:
        raise OperatorError(
            "this folder does not know from which layout the last change went out (it was adopted, or signed by an"
            f" earlier version). Name it: storaged cluster abort {authority.directory} --to EPOCH"
        )
    if not 0 < epoch < last.epoch:
        raise OperatorError(f"layout {epoch} is not earlier than the last one, {last.epoch}")
    path = files.layout_path(authority, epoch)
    try:
        return files.read_layout(authority, path)[1]
    except FileNotFoundError:
        raise OperatorError(
            f"layout {epoch} is not in this folder. Copy layouts/layout-{epoch:012d}.signed from the directory of a"
            f" gateway to {path}."
        ) from None


def take_back(listed: files.ClusterPlan, last: Layout, wanted: Layout, directory: Path) -> TakenBack:
    """Changes the list, so that the next layout has the places of ``wanted``; racks keep the names that they have now.
    Raises OperatorError for disks that can't get theirs back.
    """
    from storaged.cli import create as files

    renamed = {node.certified or node.location: (node.location, node.certified) for node in listed.nodes}
    now = {entry.location: renamed.get(entry.certified_location, (entry.location, "")) for entry in wanted.nodes}
    listed.spread = wanted.spread
    if wanted.spread:
        listed.operators.update((now[rack][0] if rack in now else rack, name) for rack, name in wanted.operators)
    nodes = {node.name: node for node in listed.nodes}
    named = []
    for entry in wanted.nodes:
        if entry.name not in nodes:
            location, certified = renamed.get(entry.certified_location, (entry.location, entry.certified))
            jurisdiction = jurisdiction_of(directory, entry.name)
            node = files.NodePlan(
                entry.name, location, tuple(entry.roles), entry.address, jurisdiction, certified=certified
            )
            listed.nodes.append(node)
            nodes[entry.name] = node
            named.append(entry.name)
    back, going = [], []
    for node in listed.nodes:
        for disk in node.disks:
            if disk.id not in wanted.disk_by_id and disk.state == "active":
                disk.state = "draining"
                going.append(disk.id)
    for want in wanted.disks:
        node = nodes[want.node]
        known = next((disk for disk in node.disks if disk.id == want.id), None)
        if known is None:
            known = files.DiskPlan(want.id, _directory_of(directory, node.name, want.id))
            taken = next((disk for disk in node.disks if disk.directory == known.directory), None)
            if taken is not None:
                raise OperatorError(
                    f"disk {want.id} of {node.name} was replaced by {taken.id} in the same directory,"
                    f" {known.directory}: what it had is gone, so that can't be taken back"
                )
            node.disks.append(known)
            back.append(want.id)
        elif (known.weight, known.state, known.rank) != (want.weight, want.state, want.rank):
            back.append(want.id)
        known.weight, known.state, known.rank = want.weight, want.state, want.rank
    return TakenBack(wanted.epoch, tuple(back), tuple(going), tuple(named))


def _directory_of(directory: Path, node: str, disk: str) -> str:
    """Of a disk that is not in the list any more, as the node's issued configuration has it."""
    for name in ("config.toml", "config.issued.toml"):
        try:
            text = (directory / "nodes" / node / name).read_text()
        except FileNotFoundError:
            continue
        for found in DIRECTORY_OF.finditer(text):
            if found["id"] == disk:
                return found["directory"]
    return f"unknown-{disk}"
