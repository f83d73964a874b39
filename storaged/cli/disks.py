"""``storaged disk``: edits the disks in the list that the next layout is made from.

``cli.nodes`` does the same for whole nodes. All commands work on the folder with the authority's keys. They change
nothing when no layout could be made from the result, or when a drain would end what the cluster survives today.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from storaged.cli.options import AS_JSON, AUTHORITY
from storaged.errors import LayoutUnsafe, OperatorError

if TYPE_CHECKING:  # a command imports what it needs when it runs
    from storaged.cli import create as files


@click.group("disk")
def disk() -> None:
    """Add, drain, remove or replace disks in the list that layouts are made from."""


def find_node(listed: files.ClusterPlan, name: str) -> files.NodePlan:
    """Raises OperatorError for a node that the list does not have."""
    found = next((one for one in listed.nodes if one.name == name), None)
    if found is None:
        names = ", ".join(one.name for one in listed.nodes)
        raise OperatorError(f"{name} is no node of this cluster; there are: {names}")
    return found


def edit(directory: Path, node: str) -> tuple[files.ClusterPlan, files.NodePlan]:
    """The list, and a storage node of it. Raises OperatorError."""
    from storaged.cli import create as files

    listed = files.load_plan(directory)
    found = find_node(listed, node)
    if "storage" not in found.roles:
        raise OperatorError(f"{node} is no storage node")
    return listed, found


def _find(node: files.NodePlan, named: str) -> files.DiskPlan:
    """The disk with this id or directory. Raises OperatorError."""
    found = [one for one in node.disks if named in (one.id, one.directory)]
    if len(found) != 1:
        disks = ", ".join(f"{one.directory} ({one.id})" for one in node.disks)
        raise OperatorError(f"{node.name} has no disk {named!r}; there are: {disks}")
    return found[0]


def save(directory: Path, listed: files.ClusterPlan, *, drains: bool = False) -> None:
    """Saves the list if a layout can be made from it.

    ``drains``: the change lets disks that work give up what they have. Then the cluster must survive one failure domain
    meanwhile and afterwards, if it does today. Raises LayoutUnsafe, and changes nothing.
    """
    from storaged.cli import create as files
    from storaged.cli import planning
    from storaged.cli.succeeding import layouts_after
    from storaged.cluster import issuing

    if (last := files.last_signed(issuing.load_authority(directory), listed)) is not None:
        layouts = layouts_after(listed, last)
        found = planning.outlook(last[1], layouts) if drains else None
        if found is not None and found.survives["before"]:
            gaps = [when for when in ("meanwhile", "after") if not found.survives[when]]
            if gaps:
                raise LayoutUnsafe(
                    f"Today any one {found.domain} may fail; {' and '.join(gaps)} that would not be so. Nothing was"
                    " changed."
                )
    files.save_plan(directory, listed)


def say(directory: Path, document: dict[str, Any], said: str, *, as_json: bool, saved: bool = True) -> None:
    """Prints what was done, and the next commands. ``saved``: whether the list was changed."""
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(said)
    if not saved:
        click.echo("  Nothing was changed.")
        return
    click.echo(f"  Next: storaged cluster plan {directory}, and storaged cluster layout {directory}")


def section(one: files.DiskPlan) -> str:
    """A disk in a node's configuration."""
    from storaged.cli import create as files

    return f'[[disks]]\nid = "{one.id}"\ndirectory = {files.quoted(one.directory)}'


def _document(node: str, one: files.DiskPlan, **more: str) -> dict[str, Any]:
    return {"node": node, "disk": one.id, "directory": one.directory, "state": one.state, **more}


def _new(node: files.NodePlan, place: str, goes: files.DiskPlan | None = None) -> files.DiskPlan:
    """A disk in ``place`` (``DIRECTORY`` or ``DIRECTORY:WEIGHT``), where only ``goes`` may be. Raises OperatorError."""
    from storaged.cli import create as files

    (found,) = files.new_disks([place])
    if any(Path(one.directory) == Path(found.directory) for one in node.disks if one is not goes):
        raise OperatorError(f"{node.name} has {'a' if goes is None else 'another'} disk in {found.directory}")
    return found


@disk.command("add")
@AUTHORITY
@click.argument("node")
@click.argument("place", metavar="DISK[:WEIGHT]")
@AS_JSON
def disk_add(directory: Path, node: str, place: str, as_json: bool) -> None:
    """Add a disk to NODE. DISK is its directory on that server, WEIGHT its share."""
    listed, found = edit(directory, node)
    added = _new(found, place)
    found.disks.append(added)
    save(directory, listed)
    said = f"{node}: disk {added.id} is in the list. Add to the configuration of {node}:\n{section(added)}"
    say(directory, _document(node, added, config=section(added)), said, as_json=as_json)


def _set_state(directory: Path, node: str, named: str, state: str, said: str, *, as_json: bool) -> None:
    listed, found = edit(directory, node)
    one = _find(found, named)
    if one.state == state:
        raise OperatorError(f"{node}: disk {one.id} in {one.directory} is {state} already")
    one.state = state
    save(directory, listed, drains=state == "draining")
    said = f"{node}: disk {one.id} in {one.directory} {said}"
    say(directory, _document(node, one), said, as_json=as_json)


@disk.command("drain")
@AUTHORITY
@click.argument("node")
@click.argument("named", metavar="DISK")
@AS_JSON
def disk_drain(directory: Path, node: str, named: str, as_json: bool) -> None:
    """Let a disk of NODE give up what it has. DISK is its id or directory."""
    _set_state(directory, node, named, "draining", "gets nothing new, and gives up what it has", as_json=as_json)


@disk.command("undrain")
@AUTHORITY
@click.argument("node")
@click.argument("named", metavar="DISK")
@AS_JSON
def disk_undrain(directory: Path, node: str, named: str, as_json: bool) -> None:
    """Let a disk of NODE that drains take part again. DISK is its id or directory."""
    _set_state(directory, node, named, "active", "takes part again", as_json=as_json)


@disk.command("remove")
@AUTHORITY
@click.argument("node")
@click.argument("named", metavar="DISK")
@AS_JSON
def disk_remove(directory: Path, node: str, named: str, as_json: bool) -> None:
    """Take a disk of NODE out of the list, because it is empty or dead. DISK is its id or directory."""
    listed, found = edit(directory, node)
    one = _find(found, named)
    found.disks.remove(one)
    save(directory, listed)
    said = (
        f"{node}: disk {one.id} in {one.directory} is no longer in the list. When the layout is in force, take it out"
        f" of the configuration of {node}"
    )
    say(directory, _document(node, one), said, as_json=as_json)


@disk.command("replace")
@AUTHORITY
@click.argument("node")
@click.argument("named", metavar="DISK")
@click.argument("place", metavar="[NEW-DIRECTORY[:WEIGHT]]", default="")
@AS_JSON
def disk_replace(directory: Path, node: str, named: str, place: str, as_json: bool) -> None:
    """Put a new, empty disk in the place of one of NODE. DISK is the old one's id or directory.

    Without NEW-DIRECTORY and WEIGHT the new disk has those of the old one. Its id is its own, also in the same
    directory: what the old one promised is forgotten with it.
    """
    listed, found = edit(directory, node)
    one = _find(found, named)
    new = _new(found, place or one.directory, one)
    weight = new.weight
    new.replaces(one)
    if new.directory != (place or one.directory):  # a weight is named
        new.weight = weight
    found.disks[found.disks.index(one)] = new
    save(directory, listed)
    said = (
        f"{node}: disk {new.id} is in the list for {one.id}. Exchange them in the configuration of {node}:"
        f"\n{section(new)}"
    )
    say(directory, _document(node, new, replaces=one.id, config=section(new)), said, as_json=as_json)
