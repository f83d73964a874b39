"""``storaged accept-blank``: an operator decides that a disk takes part although its promises are unknown."""

from __future__ import annotations

import time
from pathlib import Path

import click

from storaged.errors import OperatorError


@click.command("accept-blank")
@click.argument("config", metavar="CONFIG.toml", type=click.Path(path_type=Path))
@click.argument("disk", metavar="DISK")
def accept_blank(config: Path, disk: str) -> None:
    """Let DISK (its id, or its directory) of the node that CONFIG.toml describes take part once, blank or as it is.

    Only for a disk that `status` names with DISK_BLANK, or with DISK_FOREIGN because its store is gone. Data on other
    disks is safe. But a write that only this disk and an absent disk have acknowledged is lost. The node takes the
    disk within a second, or at its next start.
    """
    from storaged import config as configuration
    from storaged.node.admission import admission, is_blank, write_acceptance
    from storaged.node.forming import Verdict
    from storaged.node.ledger import LEDGER_FILE, Ledger

    found = configuration.load(config)
    section = next((one for one in found.disks if disk in (one.id, one.directory)), None)
    if section is None:
        raise OperatorError(
            f"{disk!r} is no disk of {config}; there are: {', '.join(one.id for one in found.disks) or 'none'}"
        )
    directory = Path(found.node.directory)
    if not (directory / LEDGER_FILE).exists():
        raise OperatorError(
            f"{found.node.name} was never started with {directory}: start it first, and look at `storaged status`"
        )
    if admission(Ledger(directory), section.id, is_blank(Path(section.directory)), Verdict(False)).opening is not None:
        raise OperatorError(
            f"disk {section.id} has the store that its node knows, or may begin already: there is nothing to accept"
        )
    write_acceptance(directory, section.id, time.time_ns() // 1_000_000)
    click.echo(
        f"disk {section.id} in {section.directory} is accepted once: {found.node.name} takes it within a second, or at"
        " its next start"
    )
