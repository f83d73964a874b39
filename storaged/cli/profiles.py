"""``storaged cluster profile`` and ``sparing``: the target profile and the policy that the next layout has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from storaged.cluster.spread import OPERATORS
from storaged.errors import OperatorError

if TYPE_CHECKING:  # a command imports what it needs when it runs
    from storaged.cli import create as files

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only show what it changes.")


@click.command("profile")
@click.argument("directory", type=FOLDER)
@click.argument("profile", metavar="K+M")
@click.option(
    "--spread",
    type=click.Choice(["operators", "racks"]),
    default=None,
    help="operators: trust no operator alone. None may hold K fragments of a block, nor so many that the others can't"
    " read it, nor a majority of the replicas of a key; all objects are coded, the smallest too; nothing degrades."
    " racks: as usual.",
)
@DRY_RUN
def profile(directory: Path, profile: str, spread: str | None, dry_run: bool) -> None:
    """Let the next layout of DIRECTORY ask for K data and M parity fragments, such as 4+2.

    When it is in force, new writes use it at once. Repair codes everything else again, after all other work, and keeps
    the old fragments until the new ones are durable and the record names them. Objects up to 16 KiB are whole copies
    and stay as they are.
    """
    from storaged.cli import create as files
    from storaged.cli import planning
    from storaged.cli.succeeding import layouts_after
    from storaged.cluster import issuing

    listed = files.load_plan(directory)
    before, listed.profile = listed.profile, files.parse_profile(profile)
    if spread is not None:
        listed.spread = OPERATORS if spread == "operators" else ""
    last = files.last_signed(issuing.load_authority(directory), listed)
    if last is None and not listed.nodes:
        raise OperatorError(f"{directory} has no node yet: {listed.profile} can't be compared with the disks")
    after = layouts_after(listed, last)[-1]
    before = last[1].profile if last is not None else before
    stored = planning.stored_bytes(before, after.profile)
    click.echo(f"profile {before} to {after.profile}, on {len(after.disks)} disks: {stored}")
    if after.spreads:
        click.echo(f"  at most {after.target.operator_max} fragments of a block at one operator, and nothing degrades")
    if after.spreads and last is not None and not last[1].spreads:
        click.echo("  Objects of up to 16 KiB that are there stay whole copies until they are written again.")
    _save(directory, listed, dry_run)


def _save(directory: Path, listed: files.ClusterPlan, dry_run: bool) -> None:
    from storaged.cli import create as files

    if dry_run:
        click.echo("  Nothing was changed.")
        return
    files.save_plan(directory, listed)
    click.echo(f"  Next: storaged cluster plan {directory}, and storaged cluster layout {directory}")


@click.command("sparing")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--fragments", default="", metavar="TIME", help="Rebuild fragments after so long, such as 10m.")
@click.option("--registers", default="", metavar="TIME", help="Move registers after so long, such as 1h.")
@click.option("--domains", type=click.IntRange(0), help="Replace so many racks at the same time; 0: none.")
def sparing(directory: Path, fragments: str, registers: str, domains: int | None) -> None:
    """Show or set when the cluster replaces a disk that is away by the others, by itself."""
    from storaged.cli import create as files
    from storaged.cli.disks import save
    from storaged.cluster.layout import Sparing
    from storaged.cluster.moves import sparing_text

    listed = files.load_plan(directory)
    known = Sparing(*listed.sparing)
    wanted = Sparing(
        _seconds("--fragments", fragments) if fragments else known.fragments_s,
        _seconds("--registers", registers) if registers else known.registers_s,
        known.domains_max if domains is None else domains,
    )
    if wanted != known:
        listed.sparing = (wanted.fragments_s, wanted.registers_s, wanted.domains_max)
        save(directory, listed)
    click.echo(f"Disks that are away are replaced {sparing_text(wanted)}.")
    if wanted != known:
        click.echo(f"  Next: storaged cluster plan {directory}, and storaged cluster layout {directory}")


def _seconds(option: str, text: str) -> int:
    """Raises OperatorError."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    if not number.isdigit() or not 10 <= int(number) * units[unit] <= 365 * 86400:
        raise OperatorError(f"{option}: {text!r} is not a time from 10s to 365d, such as 90s, 10m or 2h")
    return int(number) * units[unit]
