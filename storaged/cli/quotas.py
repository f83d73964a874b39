"""``storaged bucket quota`` and ``storaged user quota``: how many bytes and objects a bucket, or all buckets of a user,
may have. ``storaged bucket copies``: how a bucket keeps its small objects.
"""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

import click

from storaged.cli.client import gateway
from storaged.cli.target import find_directory
from storaged.units import format_size, parse_size


def quota_command(path: str, what: str, help_text: str) -> click.Command:
    """``path``: of the admin API, buckets or users. ``what``: the first field of its answer."""

    @click.command("quota", help=help_text)
    @click.argument("name")
    @click.option(
        "--bytes", "size", metavar="SIZE", default=None, help="At most so much, 500GiB for example; 0: no limit."
    )
    @click.option("--objects", type=click.IntRange(0, 10**18), default=None, help="At most so many; 0: no limit.")
    @click.option("--json", "as_json", is_flag=True, help=f"{what}, bytes, objects.")
    @click.pass_obj
    def quota(named: str | None, name: str, size: str | None, objects: int | None, as_json: bool) -> None:
        place, where = find_directory(named), f"/v1/{path}/{urllib.parse.quote(name, safe='')}/quota"
        found: dict[str, Any] = gateway(place, "GET", where)
        if size is not None or objects is not None:
            body = {
                "bytes": str(_size_of(size) if size is not None else found["bytes"]),
                "objects": str(objects if objects is not None else found["objects"]),
            }
            found = gateway(place, "POST", where, body=body)
        if as_json:
            click.echo(json.dumps(found, indent=2))
            return
        size_text = format_size(found["bytes"]) if found["bytes"] else "no limit"
        click.echo(f"{found[what]}: {size_text}, {found['objects'] or 'no limit of'} objects")

    return quota


def _size_of(text: str) -> int:
    """Raises UsageError."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


SLACK = (
    "It is judged before a write, by a count that is a minute old or more, and what this gateway admitted since: writes"
    " through several gateways may exceed it by what they write in that time."
)

bucket_quota = quota_command(
    "buckets", "bucket", f"Show or set how many bytes and objects (all versions) the bucket NAME may have. {SLACK}"
)
user_quota = quota_command(
    "users", "user", f"Show or set how many bytes and objects all buckets of the user NAME may have together. {SLACK}"
)


@click.command("copies")
@click.argument("name")
@click.option(
    "--up-to",
    "size",
    metavar="SIZE",
    default=None,
    help="New objects of up to this size, 256KiB at most, are whole copies; 0: none.",
)
@click.option("--default", "as_configured", is_flag=True, help="As the gateways are configured.")
@click.option("--json", "as_json", is_flag=True, help="bucket, bytes (null: as the gateways are configured).")
@click.pass_obj
def bucket_copies(named: str | None, name: str, size: str | None, as_configured: bool, as_json: bool) -> None:
    """Show or set up to which size objects of the bucket NAME are kept as three whole copies. Larger ones are coded:
    they take half the space, and more work for each request. A bucket can choose less than the gateways' [limits]
    small_object_bytes_max, and not more. Objects that are there already stay as they are.
    """
    if size is not None and as_configured:
        raise click.UsageError("--up-to or --default, not both")
    place, where = find_directory(named), f"/v1/buckets/{urllib.parse.quote(name, safe='')}/copies"
    found: dict[str, Any]
    if size is not None or as_configured:
        found = gateway(place, "POST", where, body={"bytes": "" if size is None else str(_size_of(size))})
    else:
        found = gateway(place, "GET", where)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif found["bytes"] is None:
        click.echo(f"{found['bucket']}: whole copies as the gateways are configured")
    else:
        click.echo(f"{found['bucket']}: whole copies up to {format_size(found['bytes'])}")
