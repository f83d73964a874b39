"""Arguments and options that several commands share, so that they have one name and one meaning everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import click

from storaged.errors import OperatorError

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
AUTHORITY = click.argument("directory", metavar="AUTHORITY", type=FOLDER)
"""The folder with the authority's keys."""
NODE = click.argument("name", metavar="NODE")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only show what it changes.")

ADMIN_GATEWAY = "127.0.0.1:8334"
ADMIN_STORAGE = "127.0.0.1:8335"
RACK = click.option("--rack", required=True, metavar="RACK", help="COUNTRY/SITE/RACK, such as FR/par1/a.")
DISKS = click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="DIRECTORY[:WEIGHT]",
    help="A disk's directory on that server; once a disk.",
)
JURISDICTION = click.option(
    "--jurisdiction",
    default="",
    metavar="COUNTRY",
    help="Country whose law the operator is under (default: the rack's).",
)
STATE = click.option(
    "--state", default="", metavar="DIRECTORY", help="The node's own directory (default: /var/lib/storaged/NODE)."
)
ADMIN = click.option(
    "--admin",
    default=None,
    metavar="HOST:PORT",
    help=(
        f"Loopback address of health and metrics (default {ADMIN_GATEWAY}, of a storage node {ADMIN_STORAGE}; 'none':"
        " no such port)."
    ),
)


def parse_time(option: str, text: str, least_s: int, most_s: int) -> int:
    """Seconds of ``90s``, ``15m``, ``24h``, ``2d``. Raises OperatorError."""
    match = re.fullmatch(r"(\d{1,9})(s|m|h|d)", text.strip())
    seconds = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else -1
    if not least_s <= seconds <= most_s:
        raise OperatorError(
            f"{option}: {text!r} is not a time from {least_s}s to {most_s // 86400}d, such as 90s, 15m, 24h or 2d"
        )
    return seconds
