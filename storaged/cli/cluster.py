"""``storaged cluster``: makes the folders with certificate, configuration and layout that go to servers."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path

import click

from storaged.cli import inviting, layouts, profiles, revoking
from storaged.cli.abort import abort
from storaged.cli.disks import find_node
from storaged.cli.options import ADMIN, AS_JSON, AUTHORITY, DISKS, JURISDICTION, NODE, RACK, STATE
from storaged.cli.recovering import losses, recover
from storaged.errors import OperatorError


@click.group()
def cluster() -> None:
    """Make a cluster's certificates, configuration and layout.

    Run where the authority's keys are kept: on an administrator's machine, not on a storage server. `apply` and `fetch`
    run on a gateway.
    """


for command in (
    layouts.plan,
    layouts.apply,
    layouts.fetch,
    layouts.adopt,
    abort,
    profiles.profile,
    profiles.sparing,
    losses,
    recover,
):
    cluster.add_command(command)
for command in (revoking.certificates, revoking.revoke):
    cluster.add_command(command)


@cluster.command("create")
@click.argument("directory", metavar="AUTHORITY", type=click.Path(path_type=Path))
@click.option(
    "--cluster", "name", default=None, help="The cluster's id (default: a random one). It is in every certificate."
)
@click.option("--profile", default="4+2", show_default=True, help="How many data and parity fragments a block has.")
@click.option(
    "--countries",
    default="",
    metavar="FR,DE",
    help="Admit nodes in these countries only, and place no data elsewhere (default: the EU).",
)
@click.option(
    "--jurisdictions",
    default="",
    metavar="FR,DE",
    help="Admit nodes only where their operator is under the law of these (default: the EU).",
)
def create(directory: Path, name: str | None, profile: str, countries: str, jurisdictions: str) -> None:
    """Make the authority and the administration key of a new cluster, in the folder AUTHORITY.

    --countries and --jurisdictions are the cluster's policy: every layout is signed with them, and nodes, placement and
    the release of keys follow it.
    """
    from storaged.cli import create as files
    from storaged.cluster import issuing

    profile = files.parse_profile(profile)
    where, whose = files.parse_countries(countries), files.parse_countries(jurisdictions)
    authority = issuing.create_authority(directory, name or f"c-{secrets.token_hex(6)}")
    files.save_plan(directory, files.ClusterPlan(authority.cluster, profile, countries=where, jurisdictions=whose))
    click.echo(
        f"cluster {authority.cluster}: authority and administration key are in {directory}. Keep this folder offline,"
        " and a copy of it."
    )
    click.echo(
        f"  Next: storaged cluster issue {directory} NODE --rack FR/par1/a --roles storage --address HOST:7400 --disk"
        " /srv/disk1"
    )


@cluster.command("issue")
@AUTHORITY
@NODE
@RACK
@click.option("--roles", required=True, metavar="ROLES", help="storage, gateway, or both with a comma.")
@click.option(
    "--address",
    default="",
    metavar="HOST:PORT",
    help="Where other nodes call it. Storage nodes need one; with one, gateways see each other in `status`.",
)
@DISKS
@JURISDICTION
@STATE
@ADMIN
def issue(
    directory: Path,
    name: str,
    rack: str,
    roles: str,
    address: str,
    disks: tuple[str, ...],
    jurisdiction: str,
    state: str,
    admin: str | None,
) -> None:
    """Make a node's folder, AUTHORITY/nodes/NODE: certificate and configuration, to be copied to /etc/storaged/NODE.

    For a node that is a member already this makes a new certificate. The folder then has config.issued.toml, the
    configuration as it would be now, and no config.toml: so a copy of it keeps the configuration of the server.
    """
    from storaged.cli import create as files
    from storaged.cluster import issuing

    plan = files.load_plan(directory)
    authority = issuing.load_authority(directory)
    known = next((node for node in plan.nodes if node.name == name), None)
    if known is not None and disks:
        raise OperatorError(
            f"{name} is a member already: its disks stay those it has. Without --disk its certificate is renewed."
        )
    node = inviting.new_node(name, rack, roles, address, jurisdiction, disks)
    if known is not None:
        node.disks = known.disks
    folder = directory / "nodes" / name
    text = inviting.config_for(node, folder, state, admin)
    inviting.with_node(authority, plan, node, known)  # raises before anything is made when no layout could name it
    files.issue_node(authority, node, folder, text, member=known is not None)
    files.save_plan(directory, plan)
    if known is not None:
        click.echo(
            f"{name}: a new certificate is in {folder}; config.issued.toml there is what its configuration would be now"
        )
        click.echo(f"  If its address changed: storaged cluster layout {directory}. Then: {_copy(folder, name)}")
        return
    click.echo(f"{name}: certificate and configuration are in {folder}")
    click.echo(f"  When all nodes are there: storaged cluster layout {directory}")


@cluster.command("methods")
@AS_JSON
def methods(as_json: bool) -> None:
    """Print which role may call which RPC method, why, and what a hostile storage node can do with it."""
    from storaged.cluster.rpc import authority
    from storaged.meta.authority import CONTENTS

    rows = [
        {
            "method": name,
            "callers": sorted(row.callers),
            "any_certified_node": row.non_members,
            "served_by": sorted(row.served_by),
            "why": row.why,
            "harm": row.harm,
        }
        for name, row in authority.METHODS.items()
    ]
    if as_json:
        contents = [{"rule": row.what, "refused_with": row.code or "NEWER", "why": row.why} for row in CONTENTS]
        click.echo(json.dumps({"methods": rows, "contents": contents}, indent=2))
        return
    for name, row in authority.METHODS.items():
        click.echo(f"{name:19} {authority.callers_of(row):26} {row.why}")
        if row.harm:
            click.echo(f"{'':46} hostile storage node: {row.harm}")
    click.echo("\nIn every meta.prepare, meta.accept, meta.accepts and meta.create:")
    for content in CONTENTS:
        click.echo(f"{content.what}, else {content.code or 'NEWER'}: {content.why}")


@cluster.command("renew")
@AUTHORITY
@NODE
@inviting.VALID
@AS_JSON
def renew(directory: Path, name: str, valid: str, as_json: bool) -> None:
    """Print a ticket for a new certificate of the member NODE, which makes a new key on its own server.

    Its configuration and disks stay as they are. The old certificate stays valid until it expires, or is revoked.
    """
    from storaged.cli import create as files
    from storaged.cluster import issuing, tickets

    plan = files.load_plan(directory)
    node = find_node(plan, name)
    ticket = inviting.keep_ticket(
        issuing.load_authority(directory), plan, node, tickets.RENEW, "", inviting.parse_valid(valid)
    )
    group = "node" if "storage" in node.roles else "gateway"
    inviting.say_ticket(ticket, f"storaged {group} join", f"/etc/storaged/{name}", as_json=as_json)


def _copy(folder: Path, name: str) -> str:
    """The next step for an operator. It copies signed files only: the server's configuration may have been edited."""
    return f"copy {folder / 'identity'}/ to /etc/storaged/{name}/identity/ on its server, and reload the node"


@cluster.command("layout")
@AUTHORITY
def layout(directory: Path) -> None:
    """Sign a layout of all nodes and disks in the list, and put it into each node's folder.

    A layout that moves data of a cluster in use comes into force by `storaged cluster apply` on a gateway. `storaged
    cluster plan` shows what it moves.
    """
    from storaged.cli import create as files
    from storaged.cli.signing import say_signed, sign_all
    from storaged.cli.succeeding import layouts_after
    from storaged.cluster import issuing

    plan = files.load_plan(directory)
    authority = issuing.load_authority(directory)
    last = files.last_signed(authority, plan)
    made = layouts_after(plan, last, int(time.time() * 1000))
    sign_all(directory, authority, plan, last, made)
    say_signed(directory, authority, plan, last, made)
