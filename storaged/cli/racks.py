"""``storaged rack rename``: a rack gets another name, and nothing else changes. ``storaged rack operator``: who
operates it.

How a rename moves nothing, and why nodes never refuse each other meanwhile:

* Placement depends on which disks are in one rack, not on what the rack is called (``Layout.domain_by_disk``). Nodes
  compare layouts by names that a rename does not change (``layout.rack_labels``). So the layout that renames moves
  nothing, needs no acceptances, and a ledger's digest of places stays.
* A certificate names the rack of its node, and nodes compare that with the layout (``layout.confirmed_roles``). The
  certificates of a renamed rack keep its first name: the layout says for each node what its certificates say
  (``NodeEntry.certified``), and so do later certificates, also those of nodes that join this rack. Nodes on the layout
  before the rename and nodes on the one after it therefore accept the same certificates. None has to be renewed.

A rack keeps its country. One that moves to another country is other servers: drain them, and invite them there.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from storaged.cli.disks import save, say
from storaged.cli.options import AS_JSON, AUTHORITY, DRY_RUN
from storaged.errors import OperatorError

NAME_MAX = 64


@click.group("rack")
def rack() -> None:
    """Rename racks, and say who operates them."""


@rack.command("rename")
@AUTHORITY
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@AS_JSON
def rename(directory: Path, old: str, new: str, as_json: bool) -> None:
    """Call rack OLD from the next layout on NEW. Both are COUNTRY/SITE/RACK, of one country. It moves no data."""
    from storaged.cli import create as files
    from storaged.cluster.layout import Location

    listed = files.load_plan(directory)
    old, new = files.parse_location(old), files.parse_location(new)
    renamed = [node for node in listed.nodes if node.location == old]
    if not renamed:
        racks = ", ".join(sorted({node.location for node in listed.nodes}))
        raise OperatorError(f"no node is in rack {old}; there are: {racks}")
    if Location.parse(old).country != Location.parse(new).country:
        raise OperatorError(
            f"{old} and {new} are in two countries: that is no other name of the same place. Invite servers there, and"
            " drain those here."
        )
    if old == new:
        raise OperatorError(f"rack {old} has that name already")
    others = [node for node in listed.nodes if node.location != old]
    if taken := next((node for node in others if new in (node.location, node.certified)), None):
        raise OperatorError(f"{new} is the name of another rack, or was it before: {taken.name} is in {taken.location}")
    if old in listed.operators:
        listed.operators[new] = listed.operators.pop(old)
    for node in renamed:
        node.certified = "" if node.certified == new else node.certified or node.location
        node.location = new
    save(directory, listed)
    names = [node.name for node in renamed]
    if as_json:
        click.echo(json.dumps({"old": old, "new": new, "nodes": names}, indent=2))
        return
    click.echo(f"rack {old} is called {new} in the list, with {', '.join(names)}")
    click.echo(f"  Next: storaged cluster layout {directory}, and apply the layout on a gateway")


@rack.command("operator")
@AUTHORITY
@click.argument("rack", metavar="RACK")
@click.argument("name", metavar="[NAME]", default="")
@DRY_RUN
@AS_JSON
def rack_operator(directory: Path, rack: str, name: str, dry_run: bool, as_json: bool) -> None:
    """Let the next layout name who operates RACK, such as FR/par1/a. Without NAME the rack has no operator.

    The rack may have no server yet. Operators decide something only if the profile is spread over them (`storaged
    cluster profile --spread operators`).
    """
    from storaged.cli import create as files
    from storaged.cli.succeeding import layouts_after
    from storaged.cluster import issuing

    listed, rack = files.load_plan(directory), files.parse_location(rack)
    if len(name) > NAME_MAX or not name.isprintable() or name != name.strip():
        raise OperatorError(f"the name of an operator has up to {NAME_MAX} printable characters")
    before = listed.operators.pop(rack, "")
    if name:
        listed.operators[rack] = name
    last = files.last_signed(issuing.load_authority(directory), listed)
    if last is not None or listed.spread:
        layouts_after(listed, last)
    servers = sum(node.location == rack for node in listed.nodes)
    if not dry_run:
        files.save_plan(directory, listed)
    document = {"rack": rack, "operator": name, "before": before, "servers": servers, "saved": not dry_run}
    said = f"rack {rack}, {servers} servers: operated by {name or 'nobody'} (before: {before or 'nobody'})"
    say(directory, document, said, as_json=as_json, saved=not dry_run)
