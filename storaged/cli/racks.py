"""``storaged rack rename``: a rack gets another name, and nothing else changes.

How it moves nothing, and why nodes never refuse each other meanwhile:

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

from storaged.cli.disks import AS_JSON, FOLDER, save
from storaged.errors import OperatorError


@click.group("rack")
def rack() -> None:
    """Rename racks."""


@rack.command("rename")
@click.argument("directory", metavar="AUTHORITY", type=FOLDER)
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
    others = [node for node in listed.nodes if node.location != old]
    if taken := next((node for node in others if new in (node.location, node.certified)), None):
        raise OperatorError(f"{new} is the name of another rack, or was it before: {taken.name} is in {taken.location}")
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
