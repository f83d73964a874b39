"""``storaged job``: long work of the cluster; the pause and pace of scrubs, of garbage collection, and of what moves
data after a layout.
"""

from __future__ import annotations

import json
from typing import Any

import click

from storaged.cli.client import gateway
from storaged.cli.target import find_directory
from storaged.errors import OperatorError
from storaged.units import format_size, parse_size

JOBS = ("partitions", "fragments", "scrub", "collection")
COUNTED = ("partitions", "collection")
"""Jobs whose pace is no number of bytes."""
NO_PACE = "none"


@click.group()
def job() -> None:
    """Show long work; pause, resume and pace scrubs, garbage collection, and the moves of partitions and fragments.

    After a layout that moves data, gateways move the replicas of partitions (job `partitions`), and storage nodes move
    fragments (job `fragments`). Storage nodes also verify their data (job `scrub`), and delete data that is out of use
    (job `collection`). The settings are the cluster's: they hold on all nodes, and after restarts.
    """


@job.command("list")
@click.option("--json", "as_json", is_flag=True, help="The jobs, and the settings of those that can be paused.")
@click.pass_obj
def job_list(named: str | None, as_json: bool) -> None:
    """All jobs, and the settings of those that can be paused."""
    from storaged.cli.status import render_job

    found = gateway(find_directory(named), "GET", "/v1/jobs")
    if as_json:
        click.echo(json.dumps({"jobs": found["jobs"], "settings": found["settings"]}, indent=2))
        return
    for one in found["jobs"]:
        click.echo(render_job(one))
    for text in describe(found["settings"]):
        click.echo(text)


def describe(settings: dict[str, Any]) -> list[str]:
    """A line for each job that can be paused. ``settings``: as in the document of status."""
    if not settings["known"]:
        return ["The settings are not known yet: a majority of the seed disks has them, and has not answered."]
    partitions, fragments, scrub = settings["partitions"], settings["fragments"], settings["scrub"]
    collection = settings["collection"]
    paces = {
        "partitions": f"{partitions['per_min']} exchanges of a replica a minute" if partitions["per_min"] else "",
        "fragments": f"{format_size(fragments['bytes_per_s'])}/s a storage node" if fragments["bytes_per_s"] else "",
        "scrub": f"{format_size(scrub['bytes_per_s'])}/s a storage node" if scrub["bytes_per_s"] else "",
        "collection": f"{collection['per_s']} data ids a second a storage node" if collection["per_s"] else "",
    }
    return [
        f"{name}: {'paused' if settings[name]['paused'] else 'not paused'}; pace: {paces[name] or 'none is set'}"
        for name in JOBS
    ]


def _set(named: str | None, name: str, as_json: bool, **change: str) -> None:
    found = gateway(find_directory(named), "POST", "/v1/moves", body={"job": name, **change})
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for text in describe(found["settings"]):
        click.echo(text)
    click.echo("  All nodes follow this within 10 s.")


_NAME = click.argument("name", metavar="JOB", type=click.Choice(JOBS))
_JSON = click.option("--json", "as_json", is_flag=True, help="The settings.")


@job.command("pause")
@_NAME
@_JSON
@click.pass_obj
def pause(named: str | None, name: str, as_json: bool) -> None:
    """Begin no more of JOB: partitions, fragments, scrub or collection. What has begun ends.

    Nothing is left in between, and lost fragments are rebuilt all the same. A scrub stops where it is, and goes on
    there. A pause of partitions also holds up those that leave a disk that is out, and those that `cluster recover`
    lets go on. While collection is paused, disks get no room back from deleted data.
    """
    _set(named, name, as_json, paused="true")


@job.command("resume")
@_NAME
@_JSON
@click.pass_obj
def resume(named: str | None, name: str, as_json: bool) -> None:
    """Let JOB go on: partitions, fragments, scrub or collection."""
    _set(named, name, as_json, paused="false")


@job.command("pace")
@_NAME
@click.argument("pace", metavar="PACE")
@_JSON
@click.pass_obj
def set_pace(named: str | None, name: str, pace: str, as_json: bool) -> None:
    """Set how fast JOB works: partitions, fragments, scrub or collection.

    PACE is, for partitions, how many exchanges of a replica all gateways together begin in a minute, such as 30. For
    fragments and scrub it is the bytes a second that each storage node moves or verifies, such as 20MiB. For collection
    it is how many data ids each storage node judges in a second, such as 500. `none`: as fast as disks and network
    allow; a scrub that starts by itself has a pace of its own then.
    """
    try:
        number = 0 if pace == NO_PACE else int(pace) if name in COUNTED else parse_size(pace)
    except ValueError:
        example = "a number such as 30" if name in COUNTED else "a size such as 20MiB"
        raise OperatorError(f"{pace!r} is no pace of {name}: write {example}, or {NO_PACE}") from None
    if pace != NO_PACE and number < 1:
        raise OperatorError(f"a pace is 1 or more. To stop the job: storaged job pause {name}")
    _set(named, name, as_json, pace=str(number))
