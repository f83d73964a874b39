"""Commands of daily operation: explain, doctor, scrub, repair, audit, fsck."""

from __future__ import annotations

import difflib
import inspect
import json
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from storaged.cli.client import RemoteRefusal, gateway
from storaged.cli.target import find_directory
from storaged.errors import Condition, OperatorError, PeerError, Refusal, S3Error, StoragedError, every_error
from storaged.units import format_size

POLL_S = 0.5
QUIET_POLLS = 6
LOOK_POLLS_MAX = 120
FAMILIES = (S3Error, OperatorError, Condition, PeerError, Refusal, RemoteRefusal)
"""Base classes: no answer carries their code."""


def explained(code: str) -> str:
    """Meaning and remedy of a code, from the error classes.

    Raises OperatorError for an unknown code, with the codes that look like it.
    """
    import storaged.admin.api  # noqa: F401  # it defines codes

    known: dict[str, list[type[StoragedError]]] = {}
    for kind in every_error():
        known.setdefault(kind.code.upper(), []).append(kind)
    kinds = known.get(code.upper().replace("-", "_"))
    if not kinds:
        near = difflib.get_close_matches(code.upper(), known, n=3)
        raise OperatorError(
            f"there is no code {code!r}"
            + (f"; did you mean {' or '.join(known[name][0].code for name in near)}?" if near else "")
            + ("" if near else "; `storaged explain` lists them")
        )
    paragraphs = []
    for kind in dict.fromkeys(kinds):
        status = f" (HTTP {kind.status})" if kind.code != kind.code.upper() else ""
        text = f"{kind.code}{status}\n{textwrap.indent(inspect.cleandoc(kind.__doc__ or ''), '  ')}"
        paragraphs.append(text + (f"\n  {kind.hint}" if kind.hint else ""))
    return "\n\n".join(paragraphs)


@click.command()
@click.argument("code", required=False)
def explain(code: str | None) -> None:
    """What a named error or state means, and what to do; without a CODE, all of them."""
    if code:
        click.echo(explained(code))
        return
    for kind in sorted(
        {kind.code: kind for kind in every_error() if kind not in FAMILIES}.values(), key=lambda kind: kind.code
    ):
        said = " ".join(inspect.cleandoc(kind.__doc__ or kind.code).split("\n\n")[0].split())
        click.echo(f"{kind.code:<36} {said.partition('. ')[0].rstrip('.')}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A list of name, state, detail, hint.")
@click.pass_obj
def doctor(named: str | None, as_json: bool) -> None:
    """Look for what will hurt later: clocks, disks, certificates, key backup. Exit code 1 when something will."""
    checks: list[dict[str, str]] = gateway(find_directory(named), "GET", "/v1/doctor")["checks"]
    if as_json:
        click.echo(json.dumps(checks, indent=2))
    for check in () if as_json else checks:
        click.echo(f"{check['state']:<5} {check['name']:<28} {check['detail']}")
        if check["state"] != "ok" and check["hint"]:
            click.echo(f"      {check['hint']}")
    sys.exit(int(any(check["state"] != "ok" for check in checks)))


def _wait(place: Path, goes_on: Callable[[dict[str, Any]], bool], name: str, *, quiet: bool = False) -> dict[str, Any]:
    """Polls the jobs until ``goes_on`` is false for the answer, and returns that answer.

    Prints the jobs called ``name``: on a terminal one line that changes, otherwise a line for each change, with
    ``quiet`` nothing.
    """
    from storaged.cli.status import render_job

    terminal, last = sys.stdout.isatty(), ""
    while True:
        found: dict[str, Any] = gateway(place, "GET", "/v1/jobs")
        lines = [render_job(job) for job in found["jobs"] if job["name"] == name]
        line = (" | " if terminal else "\n").join(lines)
        if line and line != last and not quiet:
            click.echo(("\r\x1b[K" if terminal else "") + line, nl=not terminal)
            last = line
        if not goes_on(found):
            if terminal and last:
                click.echo()
            return found
        time.sleep(POLL_S)


@click.command()
@click.option(
    "--wait",
    is_flag=True,
    help="Return when it is done, and repair has looked at what it found. A pause only makes it longer.",
)
@click.option("--json", "as_json", is_flag=True, help="nodes; with --wait also the jobs as they ended.")
@click.pass_obj
def scrub(named: str | None, wait: bool, as_json: bool) -> None:
    """Read everything on all disks, verify it, and hand damage to repair."""
    place = find_directory(named)
    nodes = gateway(place, "POST", "/v1/scrub")["nodes"]
    if not nodes:
        raise OperatorError("no storage node answered; see `storaged status`")
    answer: dict[str, Any] = {"nodes": nodes}
    if not as_json:
        click.echo(f"scrub of {', '.join(nodes)} started")
        if not wait and gateway(place, "GET", "/v1/jobs")["settings"]["scrub"]["paused"]:
            click.echo("  It is paused, and goes on after: storaged job resume scrub")
    if wait:
        polls, said = 0, set[str]()

        def goes_on(answer: dict[str, Any]) -> bool:
            """Repair is waited for a while only: where disks are away it may be busy for long. A pause is waited for
            to its end, since an operator can end it. With --json nothing else would say so.
            """
            nonlocal polls
            running = [job for job in answer["jobs"] if _scrubs(job)]
            why = {job["detail"] for job in running if job["detail"]} if as_json else set[str]()
            for detail in sorted(why - said):
                click.echo(f"scrub: {detail}", err=True)
            said.update(why)
            if running:
                return True
            polls += 1
            return bool(answer["busy"]) and polls < LOOK_POLLS_MAX

        found = _wait(place, goes_on, "scrub", quiet=as_json)
        if any(job["name"] == "scrub" and job["state"] == "failed" for job in found["jobs"]):
            raise OperatorError("scrub could not finish; see `storaged status`")
        answer["jobs"] = [job for job in found["jobs"] if job["name"] == "scrub"]
    if as_json:
        click.echo(json.dumps(answer, indent=2))


def _scrubs(job: dict[str, Any]) -> bool:
    return bool(job["name"] == "scrub" and job["state"] == "running")


@click.group()
def repair() -> None:
    """Repair runs by itself; this shows how it gets on."""


@repair.command("status")
@click.option("--wait", is_flag=True, help="Return when nothing more can be repaired now.")
@click.option("--json", "as_json", is_flag=True, help="The counts and jobs.")
@click.pass_obj
def repair_status(named: str | None, wait: bool, as_json: bool) -> None:
    """How far repair is, its rate, and when it will be done. Exit code 1 while objects are below
    target or not counted.
    """
    from storaged.cli.status import render_job

    place = find_directory(named)
    quiet = 0

    def goes_on(answer: dict[str, Any]) -> bool:
        """Waits some polls more while objects are below target: repair needs a second or two to notice a node that
        came back.
        """
        nonlocal quiet
        quiet = 0 if answer["busy"] else quiet + 1
        return quiet < (QUIET_POLLS if answer["objects_below_target"] else 1)

    found = _wait(place, goes_on, "repair", quiet=as_json) if wait else gateway(place, "GET", "/v1/jobs")
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for job in () if wait else found["jobs"]:
            click.echo(render_job(job))
        counting = "" if found["objects_counted"] else " (still counting)"
        click.echo(f"{found['objects_below_target']} objects below target, {found['objects_lost']} lost{counting}")
        if outdated := found.get("objects_outdated", 0):
            click.echo(f"{outdated} objects and parts get the new profile")
        if moved := found["objects_misplaced"] - outdated:
            click.echo(f"{moved} objects and parts move to where the layout wants them")
        if found["objects_below_target"]:
            _print_waits(found["waits"])
    sys.exit(int(bool(found["objects_below_target"]) or not found["objects_counted"]))


def _print_waits(waits: dict[str, Any]) -> None:
    """Why objects below target are not repaired now."""
    if waits["reason"]:
        click.echo(waits["reason"] + ("" if waits["gateway"] else " (set by: storaged cluster sparing)"))
    for one in waits["unrepaired"]:
        click.echo(f"{one['objects']} not repaired: {one['reason']}")


@click.command()
@click.option("--rebuild-index", is_flag=True, help="Make the index anew from the segments.")
@click.argument("disk", type=click.Path(path_type=Path, exists=True, file_okay=False))
def fsck(rebuild_index: bool, disk: Path) -> None:
    """Check DISK (a disk's directory) against its own segments, or rebuild its index. Its node must be stopped."""
    from storaged.fragments import offline

    fragments = disk / "fragments" if (disk / "fragments").is_dir() else disk
    if not (fragments / "segments").is_dir():
        raise OperatorError(
            f"{disk} is not a disk's directory: it has no fragments/segments (`storaged status --json` names the"
            " directories)"
        )
    if rebuild_index:
        done = offline.rebuild_index(fragments)
        click.echo(f"{fragments}: the index was made anew: {done.records} records, up to segment {done.last}")
        return
    found = offline.check(fragments)
    name = f"disk {found.disk_id}" if found.disk_id else "a disk that never got a fragment"
    click.echo(f"{fragments}: {name}, {found.fragments} fragments, {format_size(found.bytes)}")
    for fragment, cells in found.damaged:
        where = "head" if -1 in cells else f"cells {', '.join(map(str, cells))}"
        click.echo(
            f"  damaged: data {fragment.data_id.hex()} block {fragment.block} position {fragment.position}: {where}"
        )
    for segment, offset, length in found.gaps:
        click.echo(f"  segment {segment}: {length} bytes at {offset} are no record")
    for segment in found.lost_segments:
        click.echo(f"  segment {segment} is missing")
    sys.exit(int(bool(found.damaged or found.gaps or found.lost_segments)))
