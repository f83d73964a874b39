"""Signs layouts, and says what to do with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from storaged.cli import create as files
from storaged.cluster import issuing
from storaged.cluster.layout import Layout, weaknesses
from storaged.cluster.signed_layout import SignedLayout
from storaged.cluster.succession import is_numbered_as_moving

Last = tuple[SignedLayout, Layout] | None


def sign_all(
    directory: Path, authority: issuing.Authority, plan: files.ClusterPlan, last: Last, made: Sequence[Layout]
) -> None:
    """Signs the layouts that follow ``last``, keeps them, and puts the last of them into each node's folder."""
    if last is not None:
        files.keep_layout(authority, *last)
        if is_moving(last, made):
            plan.before = last[1].epoch
    for each in made:
        files.sign_layout(authority, each, [directory / "nodes" / node.name for node in plan.nodes])
        plan.take_ranks(each)
        plan.epoch = each.epoch
        plan.signed = max(plan.signed, each.epoch)
        files.save_plan(directory, plan)


def is_moving(last: Last, made: Sequence[Layout]) -> bool:
    return last is not None and is_numbered_as_moving(made[-1])


def say_signed(
    directory: Path, authority: issuing.Authority, plan: files.ClusterPlan, last: Last, made: Sequence[Layout]
) -> None:
    """Prints which layouts were signed, and the next commands."""
    for each in made:
        click.echo(
            f"layout {each.epoch}: {len(each.nodes)} nodes, {len(each.disks)} disks, {each.profile}, a failure"
            f" domain is a {each.domain_kind}"
        )
    for text in weaknesses(made[-1]):
        click.echo(f"  LAYOUT_WEAK: {text}")
    named = {node.name for node in last[1].nodes} if last is not None else set()
    moving = is_moving(last, made)
    if moving:
        click.echo("  These layouts move data. On a gateway, one after the other:")
        for each in made:
            click.echo(_apply(authority, each))
        click.echo(f"  (they are in {directory / 'layouts'})")
    for node in plan.nodes:
        if node.name in named or not (directory / "nodes" / node.name / "config.toml").exists():
            continue  # its server has a folder already, and perhaps an edited configuration
        click.echo(f"  copy {directory / 'nodes' / node.name}/ to /etc/storaged/{node.name}/ on its server")
    if named and not moving:
        signed_file = directory / files.LAYOUT_NAME
        click.echo(
            f"  copy {signed_file} to /etc/storaged/NODE/identity/ on one server that runs, and reload that node:"
        )
        click.echo("  the others learn the layout from it. Or, on a gateway that runs:")
        click.echo(_apply(authority, made[-1]))


def _apply(authority: issuing.Authority, layout: Layout) -> str:
    name = files.layout_path(authority, layout.epoch).name
    return f"  storaged --dir /var/lib/storaged/GATEWAY cluster apply {name}"
