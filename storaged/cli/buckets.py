"""``storaged bucket``: buckets of all users, for the operator."""

from __future__ import annotations

import json
import sys
import urllib.parse
from datetime import UTC, datetime

import click

from storaged.cli.client import gateway
from storaged.cli.quotas import bucket_copies, bucket_quota
from storaged.cli.target import find_directory
from storaged.cli.unlocking import forget_lost, sign_unlock, unlock
from storaged.units import format_size

WAITING_SHOWN_MAX = 10


@click.group()
def bucket() -> None:
    """Make, list, count, hand over and delete buckets of any user. (S3 clients make, list and delete their own as
    well.)
    """


@bucket.command("list")
@click.option("--user", "owner", default="", metavar="NAME", help="Only those of this user's id.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A list of bucket, id, owner, owners, created_ms, state, formerly, region, countries.",
)
@click.pass_obj
def bucket_list(named: str | None, owner: str, as_json: bool) -> None:
    """All buckets of the cluster, with their owners.

    One that is «lending» was deleted while copies in other buckets use its data: it goes with the last of these.
    """
    found = gateway(find_directory(named), "GET", "/v1/buckets")["buckets"]
    shown = [one for one in found if not owner or owner in (*one["owners"], one["owner"])]
    if as_json:
        click.echo(json.dumps(shown, indent=2))
        return
    for one in shown:
        whose = ", ".join(one["owners"]) or f"user id {one['owner']}, removed"
        state = "" if one["state"] == "active" else f"  {one['state']}"
        if one.get("formerly"):
            state += f", was {one['formerly']}"
        made = datetime.fromtimestamp(one["created_ms"] / 1000, UTC)
        click.echo(
            f"{one['bucket']:<40} {whose:<24} {made:%Y-%m-%d}  {', '.join(one['countries']) or 'any country'}{state}"
        )


@bucket.command("usage")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="bucket, objects, versions, bytes.")
@click.pass_obj
def bucket_usage(named: str | None, name: str, as_json: bool) -> None:
    """How many objects a bucket has and their size, counted now: it walks all of the bucket's keys."""
    place, path = find_directory(named), f"/v1/buckets/{urllib.parse.quote(name, safe='')}/usage"
    total = {"objects": 0, "versions": 0, "bytes": 0}
    after: str | None = ""
    while after is not None:
        piece = gateway(place, "GET", path, query={"after": after}, timeout_s=300.0)
        for field in total:
            total[field] += piece[field]
        after = piece["next_after"]
        if sys.stderr.isatty() and after is not None:
            click.echo(f"\r{total['objects']} objects so far", nl=False, err=True)
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    if as_json:
        click.echo(json.dumps({"bucket": name, **total}, indent=2))
        return
    more = f" ({total['versions']} versions)" if total["versions"] != total["objects"] else ""
    count = f"{total['objects']} object{'' if total['objects'] == 1 else 's'}"
    click.echo(f"{name}: {count}{more}, {format_size(total['bytes'])}")


bucket.add_command(bucket_quota)
bucket.add_command(bucket_copies)


@bucket.command("lifecycle")
@click.argument("name")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="bucket, rules, walk_began_ms, walked_ms, objects_walked, expired, noncurrent, markers, early, locked,"
    " waiting, all_counted.",
)
@click.pass_obj
def bucket_lifecycle(named: str | None, name: str, as_json: bool) -> None:
    """The lifecycle rules of a bucket, and how far they are carried out."""
    path = f"/v1/buckets/{urllib.parse.quote(name, safe='')}/lifecycle"
    found = gateway(find_directory(named), "GET", path, timeout_s=60.0)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    enabled = sum(rule["enabled"] for rule in found["rules"])
    click.echo(f"{name}: {len(found['rules'])} rules, {enabled} of them enabled")
    if found["walk_began_ms"] is None:
        return
    walked = found["walked_ms"]
    when = f"ended {_moment(walked)}" if walked else f"under way since {_moment(found['walk_began_ms'])}"
    click.echo(f"  walk over the bucket: {when}, {found['objects_walked']} keys")
    click.echo(
        f"  expired: {found['expired']} objects, {found['noncurrent']} noncurrent versions,"
        f" {found['markers']} delete markers; kept by a lock: {found['locked']}"
    )
    more = "" if found["all_counted"] else ", and more"
    for one in found["waiting"][:WAITING_SHOWN_MAX]:
        click.echo(f"  to be looked at from {_moment(one['at_ms'])} on: {one['keys']} keys{more}")


@bucket.command("inventory")
@click.argument("name")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="bucket, inventories: id, enabled, format, frequency, versions, target, folder, began_ms, finished_ms, rows,"
    " files, unreadable, manifest.",
)
@click.pass_obj
def bucket_inventory(named: str | None, name: str, as_json: bool) -> None:
    """The inventories of a bucket, and their last reports."""
    path = f"/v1/buckets/{urllib.parse.quote(name, safe='')}/inventories"
    found = gateway(find_directory(named), "GET", path, timeout_s=60.0)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found["inventories"]:
        click.echo(f"{name}: no inventories")
    for one in found["inventories"]:
        state = "" if one["enabled"] else ", disabled"
        kind = f"{one['frequency'].lower()}, {one['format']}, {one['versions'].lower()} versions"
        click.echo(f"{one['id']}: {kind}, to {one['target']}/{one['folder']}{state}")
        if one["began_ms"] is None:
            click.echo("  no report yet")
        elif one["finished_ms"] is None:
            click.echo(f"  report under way since {_moment(one['began_ms'])}")
        else:
            left_out = f", {one['unreadable']} can't be read" if one["unreadable"] else ""
            click.echo(
                f"  last report {_moment(one['began_ms'])}: {one['rows']} rows in {one['files']} files{left_out}:"
                f" {one['manifest']}"
            )


def _moment(ms: int) -> str:
    """As text; the last moment of the calendar, if the days of a rule lead beyond it."""
    seconds = min(ms / 1000, datetime.max.replace(microsecond=0, tzinfo=UTC).timestamp())
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


@bucket.command("owner")
@click.argument("name")
@click.option("--user", "owner", required=True, metavar="NAME", help="The new owner: a user's name or access key.")
@click.pass_obj
def bucket_owner(named: str | None, name: str, owner: str) -> None:
    """Hand a bucket over to another user. Its former owner loses access."""
    path = f"/v1/buckets/{urllib.parse.quote(name, safe='')}/owner"
    found = gateway(find_directory(named), "POST", path, body={"user": owner})
    click.echo(f"{found['bucket']} is {found['owner']}'s")


@bucket.command("delete")
@click.argument("name")
@click.pass_obj
def bucket_delete(named: str | None, name: str) -> None:
    """Delete an empty bucket. Its name is free at once."""
    found = gateway(
        find_directory(named), "DELETE", f"/v1/buckets/{urllib.parse.quote(name, safe='')}", timeout_s=120.0
    )
    click.echo(f"deleted {found['deleted']}")


@bucket.command("create")
@click.argument("name")
@click.option("--user", "owner", required=True, metavar="NAME", help="The owner: a user's name or access key.")
@click.option(
    "--countries",
    default="",
    metavar="FR,DE",
    help="Keep its data in these countries of the EU (default: wherever the cluster has disks).",
)
@click.option("--json", "as_json", is_flag=True, help="bucket, owner, countries, racks.")
@click.pass_obj
def bucket_create(named: str | None, name: str, owner: str, countries: str, as_json: bool) -> None:
    """Make a bucket; with --countries its fragments and records never leave them, and a write that can't be placed
    inside is refused.

    An S3 client can ask for the same with the header x-storaged-countries when it creates a bucket.
    """
    wanted = ",".join(code.strip() for code in countries.split(",") if code.strip())
    found = gateway(
        find_directory(named), "POST", "/v1/buckets", body={"name": name, "user": owner, "countries": wanted}
    )
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(
            f"{found['bucket']} of {found['owner']}, in {', '.join(found['countries']) or 'any country of the cluster'}"
        )
        if found["countries"]:
            click.echo(f"  its data lies in {', '.join(found['racks'])}")


bucket.add_command(sign_unlock)
bucket.add_command(unlock)
bucket.add_command(forget_lost)
