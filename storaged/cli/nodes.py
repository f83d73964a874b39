"""``storaged node`` and ``storaged gateway``: servers that come, drain, go, or come back with empty disks.

``join`` runs on the new server. All other commands work on the folder with the authority's keys. ``cli.inviting``
has ``invite``, ``cli.joining`` has ``join`` and ``sign``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from storaged.cli import inviting, joining
from storaged.cli.disks import edit, find_node, save, say, section
from storaged.cli.options import AS_JSON, AUTHORITY, NODE
from storaged.errors import OperatorError
from storaged.ids import new_disk_id


@click.group("node")
def node() -> None:
    """Invite servers, let them join, drain, remove and replace them."""


@click.group("gateway")
def gateway() -> None:
    """Invite gateways, and let them join."""


node.add_command(inviting.invite_node)
gateway.add_command(inviting.invite_gateway)
node.add_command(joining.sign)
for group in (node, gateway):
    group.add_command(joining.join)


def _set_states(directory: Path, name: str, state: str, said: str, *, as_json: bool) -> None:
    listed, found = edit(directory, name)
    changed = [one for one in found.disks if one.state != state]
    if not changed:
        raise OperatorError(f"{name} has no disk that is not {state} already")
    for one in changed:
        one.state = state
    save(directory, listed, drains=state == "draining")
    document = {"node": name, "disks": [one.id for one in changed], "state": state}
    say(directory, document, f"{name}: {len(changed)} disks {said}", as_json=as_json)


@node.command("drain")
@AUTHORITY
@NODE
@AS_JSON
def drain(directory: Path, name: str, as_json: bool) -> None:
    """Let all disks of NODE give up what they have. It stays readable meanwhile."""
    _set_states(directory, name, "draining", "get nothing new, and give up what they have", as_json=as_json)


@node.command("undrain")
@AUTHORITY
@NODE
@AS_JSON
def undrain(directory: Path, name: str, as_json: bool) -> None:
    """Let all disks of NODE that drain take part again."""
    _set_states(directory, name, "active", "take part again", as_json=as_json)


@node.command("remove")
@AUTHORITY
@NODE
@AS_JSON
def remove(directory: Path, name: str, as_json: bool) -> None:
    """Take NODE out of the list that layouts are made from: the next layout shuts it out.

    What its disks have moves to others, or is rebuilt there when the node is gone. Drain it first if it runs. It works
    for gateways too.
    """
    from storaged.cli import create as files

    listed = files.load_plan(directory)
    found = find_node(listed, name)
    listed.nodes.remove(found)
    save(directory, listed)
    said = (
        f"{name} is no longer in the list. Its certificate stays valid until it expires: `storaged cluster revoke"
        f" {directory} {name}` if it may be in other hands"
    )
    say(directory, {"node": name, "disks": [one.id for one in found.disks]}, said, as_json=as_json)


@node.command("replace")
@AUTHORITY
@NODE
@AS_JSON
def replace(directory: Path, name: str, as_json: bool) -> None:
    """Put new, empty disks in the place of all disks of NODE, which was built again.

    They have the directories and weights of the old ones, and ids of their own.
    """
    from storaged.cli import create as files

    listed, found = edit(directory, name)
    exchanged: list[dict[str, Any]] = []
    for number, old in enumerate(found.disks):
        new = files.DiskPlan(new_disk_id(), old.directory)
        new.replaces(old)
        found.disks[number] = new
        exchanged.append({"disk": new.id, "directory": new.directory, "replaces": old.id, "config": section(new)})
    save(directory, listed)
    sections = "\n".join(each["config"] for each in exchanged)
    said = f"{name}: its disks have new ids. Put them into the configuration of {name} for the old ones:\n{sections}"
    say(directory, {"node": name, "disks": exchanged}, said, as_json=as_json)


@node.command("address")
@AUTHORITY
@NODE
@click.argument("address", metavar="HOST:PORT")
@AS_JSON
def set_address(directory: Path, name: str, address: str, as_json: bool) -> None:
    """Say where the other nodes call NODE from the next layout on. It moves no data. It works for gateways too."""
    from storaged.cli import create as files

    inviting.check_address("HOST:PORT", address)
    listed = files.load_plan(directory)
    found = find_node(listed, name)
    found.address = address
    save(directory, listed)
    said = f"{name} is called at {address} from the next layout on. [rpc] listen in its configuration has to agree"
    say(directory, {"node": name, "address": address}, said, as_json=as_json)
