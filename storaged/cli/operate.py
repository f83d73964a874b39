"""Commands of daily operation: users, explain, doctor, scrub, repair, audit, fsck."""

from __future__ import annotations

import inspect
import json
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import click

from storaged.cli.client import gateway
from storaged.cli.target import find_directory
from storaged.errors import OperatorError, StoragedError, every_error

POLL_S = 0.5


@click.group()
def user() -> None:
    """Add, list and remove S3 users. Each sees its own buckets."""


@user.command("add")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="user_id, access_key, secret_key.")
@click.pass_obj
def user_add(named: str | None, name: str, as_json: bool) -> None:
    """Make a user with random keys. The secret key is shown this once."""
    found = gateway(find_directory(named), "POST", "/v1/users", body={"name": name})
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(f"user_id     {found['user_id']}\naccess_key  {found['access_key']}\nsecret_key  {found['secret_key']}")


@user.command("list")
@click.option("--json", "as_json", is_flag=True, help="A list of user_id, name, access_key.")
@click.pass_obj
def user_list(named: str | None, as_json: bool) -> None:
    """All users, without their secrets."""
    found = gateway(find_directory(named), "GET", "/v1/users")["users"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    for who in () if as_json else found:
        click.echo(f"{who['name']:<24} {who['access_key']:<24} {who['user_id']}")


@user.command("remove")
@click.argument("name")
@click.pass_obj
def user_remove(named: str | None, name: str) -> None:
    """Remove a user, by name or access key. Its buckets stay."""
    gateway(find_directory(named), "DELETE", f"/v1/users/{urllib.parse.quote(name, safe='')}")
    click.echo(f"removed {name}")


def explained(code: str) -> str:
    """Meaning and remedy of a code, from the error classes. Raises OperatorError with what is near when there is none."""
    import difflib

    import storaged.admin.api  # noqa: F401  # codes of its own

    known: dict[str, list[type[StoragedError]]] = {}
    for kind in every_error():
        known.setdefault(kind.code.upper(), []).append(kind)
    kinds = known.get(code.upper().replace("-", "_"))
    if not kinds:
        near = difflib.get_close_matches(code.upper(), known, n=3)
        raise OperatorError(
            f"there is no code {code!r}" + (f"; did you mean {' or '.join(known[name][0].code for name in near)}?" if near else "")
        )
    paragraphs = []
    for kind in dict.fromkeys(kinds):
        status = f" (HTTP {kind.status})" if kind.code != kind.code.upper() else ""
        text = f"{kind.code}{status}\n  {inspect.cleandoc(kind.__doc__ or '')}"
        paragraphs.append(text + (f"\n  {kind.hint}" if kind.hint else ""))
    return "\n\n".join(paragraphs)


@click.command()
@click.argument("code", required=False)
def explain(code: str | None) -> None:
    """What a named error or state means, and what to do; without a CODE, all of them."""
    if code:
        click.echo(explained(code))
        return
    for kind in sorted({kind.code: kind for kind in every_error()}.values(), key=lambda kind: kind.code):
        click.echo(f"{kind.code:<36} {(kind.__doc__ or '').strip().splitlines()[0]}")


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


def _wait(place: Path, name: str) -> None:
    """Until the job has nothing more to do: a bar on a terminal, a line for each change otherwise."""
    from storaged.cli.status import render_job

    last = ""
    while True:
        jobs: list[dict[str, Any]] = [job for job in gateway(place, "GET", "/v1/jobs")["jobs"] if job["name"] == name]
        line = "\n".join(render_job(job) for job in jobs)
        if line != last:
            click.echo(("\r\x1b[K" if sys.stdout.isatty() else "") + line, nl=not sys.stdout.isatty())
            last = line
        if not any(job["state"] == "running" for job in jobs):
            if sys.stdout.isatty():
                click.echo()
            sys.exit(int(any(job["state"] == "failed" for job in jobs)))
        time.sleep(POLL_S)


@click.command()
@click.option("--wait", is_flag=True, help="Return when it is done.")
@click.pass_obj
def scrub(named: str | None, wait: bool) -> None:
    """Read everything on all disks, verify it, and hand damage to repair."""
    place = find_directory(named)
    gateway(place, "POST", "/v1/scrub")
    if wait:
        _wait(place, "scrub")
    click.echo("scrub started; watch it with: storaged status")


@click.group()
def repair() -> None:
    """Repair runs by itself; this shows how it gets on."""


@repair.command("status")
@click.option("--wait", is_flag=True, help="Return when nothing is left to repair.")
@click.pass_obj
def repair_status(named: str | None, wait: bool) -> None:
    """How far repair is, its rate, and when it will be done."""
    from storaged.cli.status import render_job

    place = find_directory(named)
    if wait:
        _wait(place, "repair")
    for job in gateway(place, "GET", "/v1/jobs")["jobs"]:
        click.echo(render_job(job))


@click.group()
def audit() -> None:
    """Check the hash-chained audit log of key use and refusals."""


@audit.command("verify")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path, exists=True))
def audit_verify(files: tuple[Path, ...]) -> None:
    """Check that every entry follows from the one before; the first that does not is named. A directory means all chains in it."""
    from storaged.cluster import audit as chains

    found = [path for file in files for path in (sorted(file.glob("*.jsonl")) if file.is_dir() else [file])]
    report = chains.verify(found)
    click.echo(str(report))


@click.command()
@click.option("--rebuild-index", is_flag=True, help="Make the index anew from the segments.")
@click.argument("disk", type=click.Path(path_type=Path, exists=True, file_okay=False))
def fsck(rebuild_index: bool, disk: Path) -> None:
    """Check DISK (a disk's directory) against its own segments, or rebuild its index. Its node must be stopped."""
    from storaged.fragments import store

    fragments = disk / "fragments" if (disk / "fragments").is_dir() else disk
    if rebuild_index:
        click.echo(str(store.rebuild_index(fragments)))
    else:
        click.echo(str(store.check(fragments)))
