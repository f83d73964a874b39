"""``storaged node invite`` and ``storaged gateway invite``: tickets for servers that will join.

A ticket is kept in ``tickets/ID.ticket`` of the authority's folder, with all that its node will be. The list of nodes
does not change before a request under the ticket was signed (``cli.joining``).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from storaged.cli.options import (
    ADMIN,
    ADMIN_GATEWAY,
    ADMIN_STORAGE,
    AS_JSON,
    AUTHORITY,
    DISKS,
    JURISDICTION,
    NODE,
    RACK,
    STATE,
    parse_time,
)
from storaged.errors import OperatorError

if TYPE_CHECKING:  # a command imports what it needs when it runs
    from storaged.cli import create as files
    from storaged.cluster import issuing, tickets

VALID_MAX_S = 30 * 86400


def parse_valid(text: str) -> float:
    """Raises OperatorError."""
    return parse_time("--valid", text, 1, VALID_MAX_S)


def check_address(option: str, value: str) -> None:
    """Raises OperatorError for what is not HOST:PORT."""
    from storaged.config import split_address

    try:
        split_address(value)
    except ValueError as error:
        raise OperatorError(f"{option}: {error}") from None


def new_node(
    name: str, rack: str, roles: str, address: str, jurisdiction: str, disks: Sequence[str] = ()
) -> files.NodePlan:
    """The node that the options of a command describe. Raises OperatorError."""
    from storaged.cli import create as files

    role_names = tuple(role.strip() for role in roles.split(","))
    place = files.parse_location(rack)
    return files.NodePlan(name, place, role_names, address, jurisdiction, files.new_disks(list(disks)))


def config_for(node: files.NodePlan, folder: Path, state: str, admin: str | None) -> str:
    """The configuration of a new node, checked. ``state``: its own directory, empty for the usual one. ``admin``: its
    health port, ``none``, or None for the usual one. Raises OperatorError.
    """
    from storaged.config import parse

    if admin is None:
        admin = ADMIN_GATEWAY if "gateway" in node.roles else ADMIN_STORAGE
    if node.address or "storage" in node.roles:
        check_address("--address", node.address)
    if admin != "none":
        check_address("--admin", admin)
    text = _config_of(node, state or f"/var/lib/storaged/{node.name}", admin)
    _, mistakes = parse(text, folder)
    if mistakes:
        lines = [f"  {mistake.message}" for mistake in mistakes]
        if "storage" in node.roles and not node.disks:
            lines.append("  Name its disks: --disk DIRECTORY, once for each")
        raise OperatorError("\n".join(("this node could not run:", *lines)))
    return text


def _config_of(node: files.NodePlan, place: str, admin: str) -> str:
    from storaged.cli import create as files

    health = f"\n[admin]\nlisten = {files.quoted(admin)}\n" if admin != "none" else ""
    if "gateway" not in node.roles:
        return files.storage_config(node, place, node.address, health)
    keys = {"keyring": f"{place}/keys/keyring", "credential": "$CREDENTIALS_DIRECTORY/keyring"}
    text = files.gateway_config(node, place, "127.0.0.1:8333", "eu-fr-1", keys, health)
    if "storage" in node.roles:
        return text + files.storage_config(node, place, node.address).split('identity = "identity"\n', 1)[1]
    return text + (f"\n[rpc]\nlisten = {files.quoted(node.address)}\n" if node.address else "")


def with_node(
    authority: issuing.Authority, plan: files.ClusterPlan, node: files.NodePlan, instead_of: files.NodePlan | None
) -> None:
    """Puts a node into the list, in memory. Raises before that when the policy does not admit it, or when no layout
    could name it.
    """
    from storaged.cli import create as files
    from storaged.cli.succeeding import layouts_after
    from storaged.cluster.identity import problem_of

    node.certified = _certified_in(plan, node, instead_of)
    peer = files.peer_of(plan, node)
    if problem := problem_of(peer):
        raise OperatorError(f"No certificate for {node.name!r}: {problem}.")
    plan.admit(node)
    if instead_of is not None:
        plan.nodes[plan.nodes.index(instead_of)] = node
    else:
        plan.nodes.append(node)
    if (last := files.last_signed(authority, plan)) is not None:
        layouts_after(plan, last)


def _certified_in(plan: files.ClusterPlan, node: files.NodePlan, instead_of: files.NodePlan | None) -> str:
    """What certificates call the rack of a node (``NodePlan.certified``). Raises OperatorError for a rack with the
    former name of another one.
    """
    for known in plan.nodes:
        if known.location == node.location and (known is not instead_of or known.certified):
            return known.certified
    former = next((known.location for known in plan.nodes if known.certified == node.location), None)
    if former is not None:
        raise OperatorError(
            f"{node.location} is what the certificates of rack {former} say, which was renamed. Choose another name."
        )
    return ""


ADDRESS = click.option("--address", required=True, metavar="HOST:PORT", help="Where other nodes call it.")
VALID = click.option(
    "--valid", default="15m", show_default=True, metavar="TIME", help="How long the ticket is valid: 15m, 24h, 2d."
)


@click.command("invite")
@AUTHORITY
@NODE
@RACK
@click.option("--roles", default="storage", show_default=True, metavar="ROLES", help="storage, or storage,gateway.")
@ADDRESS
@DISKS
@JURISDICTION
@STATE
@ADMIN
@VALID
@AS_JSON
def invite_node(
    directory: Path,
    name: str,
    rack: str,
    roles: str,
    address: str,
    disks: tuple[str, ...],
    jurisdiction: str,
    state: str,
    admin: str | None,
    valid: str,
    as_json: bool,
) -> None:
    """Print a ticket for the new storage node NODE. It is used once, by `storaged node join` on the server.

    Anyone who has the ticket can become this node: give it to the server's administrator only.
    """
    node = new_node(name, rack, roles, address, jurisdiction, disks)
    if "storage" not in node.roles:
        raise OperatorError("a node without disks is a gateway: storaged gateway invite")
    _invite(directory, node, state, admin, valid, as_json=as_json)


@click.command("invite")
@AUTHORITY
@NODE
@RACK
@ADDRESS
@JURISDICTION
@STATE
@ADMIN
@VALID
@AS_JSON
def invite_gateway(
    directory: Path,
    name: str,
    rack: str,
    address: str,
    jurisdiction: str,
    state: str,
    admin: str | None,
    valid: str,
    as_json: bool,
) -> None:
    """Print a ticket for the new gateway NODE. It is used once, by `storaged gateway join` on the server.

    The other nodes call it at its address, so that `status` knows whether it is up. Anyone who has the ticket can
    become this gateway, which has the keys: give it to the server's administrator only.
    """
    node = new_node(name, rack, "gateway", address, jurisdiction)
    _invite(directory, node, state, admin, valid, as_json=as_json)


def _invite(directory: Path, node: files.NodePlan, state: str, admin: str | None, valid: str, *, as_json: bool) -> None:
    from storaged.cli import create as files
    from storaged.cluster import issuing, tickets

    plan, authority = files.load_plan(directory), issuing.load_authority(directory)
    if any(known.name == node.name for known in plan.nodes):
        raise OperatorError(
            f"{node.name} is a member already. For a new certificate: storaged cluster renew {directory} {node.name}"
        )
    text = config_for(node, directory / "nodes" / node.name, state, admin)
    with_node(authority, plan, node, None)
    ticket = keep_ticket(authority, plan, node, tickets.JOIN, text, parse_valid(valid))
    group = "node" if "storage" in node.roles else "gateway"
    say_ticket(ticket, f"storaged {group} join", f"/etc/storaged/{node.name}", as_json=as_json)


def keep_ticket(
    authority: issuing.Authority, plan: files.ClusterPlan, node: files.NodePlan, kind: str, config: str, valid_s: float
) -> tickets.Ticket:
    """Makes a ticket, and keeps it in the authority's folder."""
    import msgspec

    from storaged.cli import create as files
    from storaged.cluster import tickets

    peer = files.peer_of(plan, node)
    ticket = tickets.Ticket(
        tickets.VERSION,
        kind,
        authority.cluster,
        authority.fingerprint,
        authority.administration.public_key().public_bytes_raw(),
        node.name,
        f"{peer.country}/{peer.site}/{peer.rack}",
        peer.roles,
        int((time.time() + valid_s) * 1000),
        secrets.token_bytes(tickets.ID_BYTES),
        secrets.token_bytes(tickets.SECRET_BYTES),
    )
    record = files.TicketRecord(tickets.write_ticket(ticket), node, config)
    files.write_private(ticket_path(authority.directory, ticket.id), msgspec.json.encode(record))
    return ticket


def say_ticket(ticket: tickets.Ticket, command: str, place: str, *, as_json: bool) -> None:
    """Prints a ticket, and what to do with it."""
    from storaged.cluster.tickets import write_ticket

    text = write_ticket(ticket)
    if as_json:
        document = {"node": ticket.name, "kind": ticket.kind, "ticket": text, "until_ms": ticket.until_ms}
        click.echo(json.dumps(document, indent=2))
        return
    until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(ticket.until_ms / 1000))
    click.echo(f"{ticket.name}: a ticket, to be used once, until {until}. Keep it secret.")
    click.echo(f"  Next, on the server of {ticket.name}:  {command} - {place}, which asks for this line:")
    click.echo(text)


def ticket_path(directory: Path, ticket: bytes) -> Path:
    return directory / "tickets" / f"{ticket.hex()}.ticket"
