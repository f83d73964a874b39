"""``storaged cluster profile``: the target profile that the next layout has."""

from __future__ import annotations

from pathlib import Path

import click

from storaged.errors import OperatorError


@click.command("profile")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("profile", metavar="K+M")
@click.option("--dry-run", is_flag=True, help="Only show what it changes.")
def profile(directory: Path, profile: str, dry_run: bool) -> None:
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
    last = files.last_signed(issuing.load_authority(directory), listed)
    if last is None and not listed.nodes:
        raise OperatorError(f"{directory} has no node yet: {listed.profile} can't be compared with the disks")
    after = layouts_after(listed, last)[-1]
    before = last[1].profile if last is not None else before
    stored = planning.stored_bytes(before, after.profile)
    click.echo(f"profile {before} to {after.profile}, on {len(after.disks)} disks: {stored}")
    if dry_run:
        click.echo("  Nothing was changed.")
        return
    files.save_plan(directory, listed)
    click.echo(f"  Next: storaged cluster plan {directory}, and storaged cluster layout {directory}")
