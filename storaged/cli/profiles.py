"""``storaged cluster profile`` and ``sparing``: the target profile and the policy that the next layout has."""

from __future__ import annotations

from pathlib import Path

import click
from msgspec.structs import asdict

from storaged.cli.disks import save, say
from storaged.cli.options import AS_JSON, AUTHORITY, DRY_RUN, parse_time
from storaged.cluster.spread import OPERATORS
from storaged.errors import OperatorError


@click.command("profile")
@AUTHORITY
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
@AS_JSON
def profile(directory: Path, profile: str, spread: str | None, dry_run: bool, as_json: bool) -> None:
    """Let the next layout ask for K data and M parity fragments, such as 4+2.

    When it is in force, new writes use it at once. Repair codes everything else again, after all other work, and keeps
    the old fragments until the new ones are durable and the record names them. Small objects (up to 256 KiB) are whole
    copies and stay as they are.
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
    said = f"profile {before} to {after.profile}, on {len(after.disks)} disks: {stored}"
    if after.spreads:
        said += f"\n  at most {after.target.operator_max} fragments of a block at one operator, and nothing degrades"
    if after.spreads and last is not None and not last[1].spreads:
        said += (
            "\n  Gateways code the small objects (up to 256 KiB) that are there; `storaged status` counts what is left."
        )
        said += "\n  Those with a customer's key (SSE-C) stay whole copies until they are written again."
    if not dry_run:
        files.save_plan(directory, listed)
    document = {"before": before, "profile": after.profile, "spread": after.spread or "racks", "saved": not dry_run}
    say(directory, document, said, as_json=as_json, saved=not dry_run)


@click.command("sparing")
@AUTHORITY
@click.option("--fragments", default="", metavar="TIME", help="Rebuild fragments after so long, such as 10m.")
@click.option("--registers", default="", metavar="TIME", help="Move registers after so long, such as 1h.")
@click.option("--domains", type=click.IntRange(0), help="Replace so many racks at the same time; 0: none.")
@AS_JSON
def sparing(directory: Path, fragments: str, registers: str, domains: int | None, as_json: bool) -> None:
    """Show or set when the cluster replaces a disk that is away by the others, by itself."""
    from storaged.cli import create as files
    from storaged.cluster.layout import Sparing
    from storaged.cluster.moves import sparing_text

    listed = files.load_plan(directory)
    known = Sparing(*listed.sparing)
    wanted = Sparing(
        _delay("--fragments", fragments) if fragments else known.fragments_s,
        _delay("--registers", registers) if registers else known.registers_s,
        known.domains_max if domains is None else domains,
    )
    if wanted != known:
        listed.sparing = (wanted.fragments_s, wanted.registers_s, wanted.domains_max)
        save(directory, listed)
    document = {**asdict(wanted), "saved": wanted != known}
    said = f"Disks that are away are replaced {sparing_text(wanted)}."
    say(directory, document, said, as_json=as_json, saved=wanted != known)


def _delay(option: str, text: str) -> int:
    return parse_time(option, text, 10, 365 * 86400)
