"""``storaged cluster plan``, ``apply``, ``fetch``, ``adopt``: what the next layout is, and how it comes into force.

``plan`` and ``adopt`` work on the folder with the authority's keys, ``apply`` and ``fetch`` ask a gateway.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from storaged.cli.options import AS_JSON, AUTHORITY, FOLDER
from storaged.errors import OperatorError
from storaged.units import format_size

if TYPE_CHECKING:  # a command imports what it needs when it runs
    from storaged.cli import planning
    from storaged.cli.forecast import ClusterFacts, Forecast, Label
    from storaged.cluster.layout import Layout

CHANGES_MAX = 40
"""Lines of changes that are printed; ``--json`` has all."""


@click.command("plan")
@AUTHORITY
@click.option(
    "--status",
    "status_file",
    type=click.File("rb"),
    default=None,
    metavar="FILE",
    help="What `storaged status --json` printed on a gateway (- for standard input): says how many bytes move.",
)
@click.option(
    "--ask",
    type=FOLDER,
    default=None,
    metavar="DIRECTORY",
    help="Instead of --status, where a node runs on this machine: its directory, or the trial cluster's.",
)
@AS_JSON
def plan(directory: Path, status_file: IO[bytes] | None, ask: Path | None, as_json: bool) -> None:
    """Show what the next layout would change and move, and what the cluster survives. Changes nothing.

    With --status or --ask it also says how many bytes move, and refuses what can't work. Exit code: 1 for a plan that
    is refused.
    """
    from storaged.cli import create as files
    from storaged.cli import forecast, planning
    from storaged.cli.succeeding import layouts_after
    from storaged.cluster import issuing

    facts = _facts(status_file, ask)
    listed = files.load_plan(directory)
    last = files.last_signed(issuing.load_authority(directory), listed)
    if facts is not None and last is not None:
        forecast.check_last(facts, last[1])
    layouts = layouts_after(listed, last, int(time.time() * 1000))
    before = last[1] if last is not None else layouts[0]
    found = planning.outlook(before, layouts)
    data = None
    if facts is not None:
        samples = planning.choices(before), planning.choices(layouts[-1])
        growth = planning.growth(before, layouts[-1])
        data = forecast.forecast(facts, *samples, layouts[-1], found.replicas.moved, growth)
    labels = forecast.labels_of(before, layouts, facts, data)
    if as_json:
        click.echo(json.dumps(planning.document(before, layouts, found, labels, data), indent=2))
    else:
        _print_plan(before, layouts, found, first=last is None)
        _print_data(labels, data, recoded=before.target != layouts[-1].target)
        if facts is None and not found.survives["meanwhile"] and found.survives["before"]:
            click.echo("Drain disks that still answer (storaged disk drain), and remove them afterwards.")
    if any(label.refused for label in labels):
        sys.exit(1)


def _facts(status_file: IO[bytes] | None, ask: Path | None) -> ClusterFacts | None:
    """What the cluster says of itself; None when it was not asked. Raises OperatorError."""
    from storaged.cli import forecast
    from storaged.cli.client import gateway

    if status_file is not None and ask is not None:
        raise OperatorError("--status and --ask are two ways to say the same; use one of them")
    if ask is not None:
        return forecast.facts_of(gateway(ask, "GET", "/v1/status"))
    if status_file is None:
        return None
    try:
        return forecast.facts_of(json.load(status_file))
    except ValueError:
        raise OperatorError("the file of --status is not what storaged status --json printed") from None


def _print_plan(before: Layout, layouts: Sequence[Layout], found: planning.Outlook, *, first: bool) -> None:
    from storaged.cli import planning

    after = layouts[-1]
    names = ", ".join(str(layout.epoch) for layout in layouts)
    click.echo(f"layout {names}: {len(after.nodes)} nodes, {len(after.disks)} disks, {after.profile}")
    for change in found.changes[:CHANGES_MAX]:
        click.echo(f"  {change}")
    if len(found.changes) > CHANGES_MAX:
        click.echo(f"  and {len(found.changes) - CHANGES_MAX} more changes")
    if not found.changes:
        click.echo("  the first layout: nothing moves" if first else "  nothing changes")
    if not first and before.target != after.target:
        click.echo(f"all but small objects are coded again: {planning.stored_bytes(before.profile, after.profile)}")
    if found.moves:
        click.echo(f"partitions that move  {found.partitions} of 1025")
        click.echo(f"replicas that move    {found.replicas}")
        click.echo(f"fragments that move   {found.fragments}")
    nodes = {disk: after.node_of(disk) if disk in after.disk_by_id else "nobody" for disk in after.seeds}
    click.echo(f"seed disks            {', '.join(f'{disk} of {node}' for disk, node in nodes.items())}")
    for line in _spares(after):
        click.echo(line)
    for when, survives in found.survives.items():
        click.echo(f"{when:<10} any one {found.domain} may fail: {'yes' if survives else 'NO'}")


def _spares(layout: Layout) -> list[str]:
    """What takes the place of each seed disk when it is lost."""
    from storaged.cli import planning

    found = []
    for number, (seed, disks) in enumerate(planning.seed_spares(layout).items()):
        named = " or ".join(f"{disk} of {layout.node_of(disk)}" for disk in disks)
        head = "when one is lost" if not number else ""
        found.append(f"{head:<21} {seed}: {f'{named} takes its place' if named else 'no other takes its place'}")
    return found


def _print_data(labels: Sequence[Label], data: Forecast | None, *, recoded: bool) -> None:
    if data is not None:
        what = "bytes written anew   " if recoded else "bytes that move      "
        click.echo(f"{what} about {format_size(data.moved)}; stored now: {format_size(data.total)}")
        for job, duration in data.durations.items():
            click.echo(f"  {job:<19} {duration}")
        if data.unknown:
            click.echo(f"  whether {len(data.unknown)} disks that are not in use yet have the room is not known")
    for label in labels:
        click.echo(f"{'REFUSED  ' if label.refused else ''}{label.code}: {label.text}")


@click.command("apply")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="epoch, moves, accepted.")
@click.pass_obj
def apply(named: str | None, file: Path, as_json: bool) -> None:
    """Bring the signed layout FILE into force. Run on a gateway; it may be repeated.

    The system partition decides which layout that moves data is next, and nodes with a majority of the seed disks must
    accept it. Of two administrators one succeeds, the other gets LAYOUT_OVERTAKEN.
    """
    from storaged.cli.client import gateway
    from storaged.cli.target import find_directory

    content = base64.b64encode(file.read_bytes()).decode()
    done = gateway(find_directory(named), "POST", "/v1/layout", body={"layout": content}, timeout_s=120.0)
    if as_json:
        click.echo(json.dumps(done, indent=2))
        return
    click.echo(f"layout {done['epoch']} is in force; the other nodes learn it from this gateway")
    if done["accepted"]:
        click.echo(f"  accepted by {', '.join(done['accepted'])}")


@click.command("fetch")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.pass_obj
def fetch(named: str | None, file: Path) -> None:
    """Write the layout that the cluster decided last to FILE. Run on a gateway."""
    from storaged.cli.client import gateway
    from storaged.cli.target import find_directory
    from storaged.durable import replace_file

    found = gateway(find_directory(named), "GET", "/v1/layout")
    replace_file(file, base64.b64decode(found["layout"]), 0o644)
    state = "in force" if found["in_force"] else f"decided, and not in force yet: storaged cluster apply {file}"
    click.echo(f"layout {found['epoch']} is in {file}; it is {state}")


@click.command("adopt")
@AUTHORITY
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def adopt(directory: Path, file: Path) -> None:
    """Take the layout FILE, which was fetched from the cluster, as the last one of the folder AUTHORITY.

    For a folder whose own layout was overtaken by another administrator's. The list of nodes stays as it is,
    except that a disk that replaces another one gets the rank that FILE gives it, so that its data stays where it is.
    """
    from storaged.cli import create as files
    from storaged.cluster import issuing
    from storaged.wire import encode

    listed = files.load_plan(directory)
    authority = issuing.load_authority(directory)
    signed, layout = files.read_layout(authority, file)
    try:
        own = files.read_layout(authority, directory / files.LAYOUT_NAME)[0].payload
    except (FileNotFoundError, OperatorError):
        own = b""
    for path in directory.glob("nodes/*/identity/layout.signed"):
        if files.read_layout(authority, path)[1].epoch >= layout.epoch:
            files.write_private(path, encode(signed))
    files.keep_layout(authority, signed, layout)
    files.write_private(directory / files.LAYOUT_NAME, encode(signed))
    listed.signed = max(listed.signed, listed.epoch)
    if own != signed.payload:  # where it is the folder's own, `cluster abort` can take it back
        listed.before = 0
    listed.epoch = layout.epoch
    listed.take_ranks(layout)
    files.save_plan(directory, listed)
    click.echo(f"layout {layout.epoch} is the last one of {directory}")
    click.echo(f"  Next: storaged cluster plan {directory}, which shows how the list of nodes differs from it")
