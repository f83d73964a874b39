"""``storaged status`` and ``storaged where``: is the data safe, what to do now, where are an object's fragments."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from storaged.admin.place import running_pid
from storaged.cli.client import gateway
from storaged.cli.target import command_for, find_directory, nodes_of, read_dev
from storaged.errors import NotRunning, OperatorError
from storaged.units import format_duration, format_size

EXIT_CODES = {"HEALTHY": 0, "DEGRADED": 1, "AT_RISK": 1, "DOWN": 2}
WATCH_S = 1.0


def fetch(place: Path) -> dict[str, Any]:
    """The gateway's status document, with the pids and directories that this machine knows.

    When the gateway does not answer, the document comes from the lock files and configurations.
    """
    dev = read_dev(place)
    try:
        found: dict[str, Any] = gateway(place, "GET", "/v1/status")
    except NotRunning as error:
        found = _down(place, dev, str(error))
    for node in found["nodes"]:
        if dev is not None:
            node["directory"] = str(place / node["name"])
            node["pid"] = running_pid(place / node["name"])
            for disk in node["disks"]:
                disk["directory"] = disk["directory"] or _disk_directory(place / node["name"], disk["id"])
    return found


def _disk_directory(node_directory: Path, disk_id: str) -> str:
    """Reads the node's configuration, as a node that is down does not report its directories."""
    return next((directory for known, directory in _configured_disks(node_directory) if known == disk_id), "")


def _configured_disks(node_directory: Path) -> list[tuple[str, str]]:
    from storaged import config
    from storaged.errors import ConfigInvalid

    try:
        return [(disk.id, disk.directory) for disk in config.load(node_directory / "config.toml").disks]
    except ConfigInvalid:
        return []


def _start(place: Path, dev: dict[str, Any] | None, name: str) -> str:
    if dev is None:
        return "systemctl start storaged-gateway"
    return f"{command_for(place)} dev start {name}" if running_pid(place) else f"storaged dev {shlex.quote(str(place))}"


def _down(place: Path, dev: dict[str, Any] | None, reason: str) -> dict[str, Any]:
    now_ms = int(time.time() * 1000)
    nodes: list[dict[str, Any]] = []
    problems = [_problem("NOT_RUNNING", "gateway", now_ms, f"Start it: {_start(place, dev, 'gateway')}", reason)]
    for node in nodes_of(dev) if dev is not None else []:
        pid = running_pid(place / node.name)
        state = "up" if pid else "down"
        known = {"state": "unknown" if pid else "down", "bytes_used": 0, "bytes_free": 0}
        configured = _configured_disks(place / node.name)
        disks = [{"id": disk_id, "directory": directory, **known} for disk_id, directory in configured]
        row = {"name": node.name, "rack": node.location, "roles": list(node.roles), "state": state}
        nodes.append({**row, "pid": pid, "disks": disks})
        if pid is None and "storage" in node.roles:
            hint = f"Start it: {_start(place, dev, node.name)}"
            problems.append(_problem("NODE_DOWN", f"{node.location}/{node.name}", now_ms, hint, ""))
    return {
        "verdict": "DOWN",
        "time_ms": now_ms,
        "metadata": "unknown",
        "reads": "stopped",
        "writes": None,
        "writes_reason": "the gateway does not answer",
        "objects_below_target": 0,
        "objects_at_risk": 0,
        "objects_lost": 0,
        "objects_unreadable": 0,
        "objects_counted": False,
        "nodes": nodes,
        "problems": problems,
        "warnings": [],
        "jobs": [],
    }


def _problem(code: str, subject: str, since: int, hint: str, detail: str) -> dict[str, Any]:
    return {"code": code, "subject": subject, "since": since, "hint": hint, "detail": detail}


def render(found: dict[str, Any], command: str = "") -> str:
    """The text of ``storaged status``: verdict, each problem with its next command, running jobs.

    ``command``: the beginning of a command about this trial cluster; empty for servers, where systemd starts the nodes.
    """
    known = "" if found["objects_counted"] else " (still counting)"
    away = f"{found['objects_unreadable']} waiting for disks that are away, " if found["objects_unreadable"] else ""
    counts = f"{found['objects_lost']} lost, {away}{_count(found['objects_below_target'])} below target{known}"
    answered = found["metadata"] != "unknown"
    if not answered:
        counts = "objects not counted"
    writes = (
        f"writes OK ({found['writes']})"
        if found["writes"]
        else f"writes refused{': ' + found['writes_reason'] if found['writes_reason'] else ''}"
    )
    storage = [node for node in found["nodes"] if "storage" in node["roles"]]
    disks = [disk for node in storage for disk in node["disks"]]
    used = sum(disk["bytes_used"] for disk in disks)
    lines = [f"{found['verdict'].replace('_', ' ')}  {counts}; reads {found['reads']}, {writes}"]
    up, good = sum(node["state"] == "up" for node in storage), sum(disk["state"] in ("ok", "full") for disk in disks)
    lines.append(
        f"  nodes {up}/{len(storage)}   disks {good}/{len(disks)}   metadata {found['metadata']}   used"
        f" {format_size(used)}"
    )
    lines.extend(_next_failure(found))
    lines.extend(f"  LAYOUT_WEAK: {text}" for text in found.get("weaknesses", ()))
    steps = [_next_step(entry, command if answered else "") for entry in found["problems"]]
    for index, (entry, step) in enumerate(zip(found["problems"], steps, strict=True)):
        age = format_duration(max(0.0, (found["time_ms"] - entry["since"]) / 1000))
        detail = f": {entry['detail']}" if entry["detail"] else ""
        what = "down" if entry["code"] == "NODE_DOWN" else entry["code"]
        lines.append(f"  {entry['subject']}  {what} {age}{detail}")
        if steps[index + 1 : index + 2] != [step]:  # once for neighbours with the same step
            lines.append(f"  Next: {step}")
    lines.extend(_warning(entry) for entry in found.get("warnings", ()))
    lines.extend(_moving(found.get("moving"), counted=bool(found.get("objects_counted"))))
    lines.extend(_sparing(found.get("sparing")))
    shown = [job for job in found["jobs"] if job["state"] != "done" and (job["state"] != "waiting" or job["detail"])]
    lines.extend(f"  {render_job(job)}" for job in shown)
    return "\n".join(map(_plain, lines))


def _warning(entry: dict[str, Any]) -> str:
    return f"  {entry['subject']}  {entry['code']} (a warning): {entry['detail']}"


def _moving(found: dict[str, Any] | None, *, counted: bool) -> list[str]:
    """What the jobs do not say. ``found``: as ``status`` has it; None while the gateway does not answer. ``counted``:
    all nodes have looked at all objects, perhaps by a layout before.
    """
    lines = []
    if found is not None and found["system"]:
        lines.append("  the system partition gets another seed disk: apply the layout that follows")
    if found is not None and found["partitions"] is None:
        lines.append("  how many partitions have to move is not known yet")
    if found is not None and found["objects"] is None and counted:
        lines.append(
            "  how many objects have to move is not known yet: not all nodes have looked since the last layout"
        )
    settings = found.get("settings") if found is not None else None
    if settings is not None and settings["known"]:
        paused = [name for name in ("partitions", "fragments") if settings[name]["paused"]]
        lines.extend(f"  moves of {name} are paused; let them go on: storaged job resume {name}" for name in paused)
        if settings["collection"]["paused"]:
            lines.append(
                "  garbage collection is paused: deleted data takes room; let it go on: storaged job resume collection"
            )
    return lines


def _sparing(found: dict[str, Any] | None) -> list[str]:
    """``found``: as ``status`` has it; None while the gateway does not answer."""
    if found is None:
        return []
    lines = []
    if found["waiting"]:
        first = min(found["waiting"], key=lambda one: one["out_in_s"])
        others = f" and {len(found['waiting']) - 1} more" if len(found["waiting"]) > 1 else ""
        lines.append(
            f"  disk {first['disk']}{others} away: the registers move to other disks in"
            f" {format_duration(first['out_in_s'])}, if racks allow"
        )
    if found["reason"]:
        lines.append(f"  disks are not replaced: {found['reason']}")
    return lines


def _plain(line: str) -> str:
    """Removes control characters: other nodes choose some of the texts, and none may control the terminal."""
    return line if line.isprintable() else "".join(sign if sign.isprintable() else "?" for sign in line)


def _next_step(entry: dict[str, Any], command: str) -> str:
    """What to do about one problem, and where to read more. ``command``: see ``render``."""
    name = entry["subject"].split("/")[-1]
    todo = f"{command} dev start {name}" if command and entry["code"] == "NODE_DOWN" else entry["hint"]
    return f"{todo}       Why: storaged explain {entry['code']}"


def _next_failure(found: dict[str, Any]) -> list[str]:
    """Lines that warn when the loss of one more disk or failure domain would stop a part of the ring."""
    risk = found.get("next_failure")
    if not risk or not risk["disk_partitions"]:
        return []
    share = f"of the {risk['partitions']} partitions of the ring stop"
    lines = [f"  one more disk: {risk['disk_partitions']} {share} (if it is {risk['disk']})"]
    if risk["domain_kind"] != "disk":
        lines.append(
            f"  one more {risk['domain_kind']}: {risk['domain_partitions']} {share} (if it is {risk['domain']})"
        )
    return lines


def _count(number: int) -> str:
    return f"{number} object{'' if number == 1 else 's'}"


def render_job(job: dict[str, Any]) -> str:
    """``repair  n1  running  40%  12 MiB/s  eta 3 min  detail``."""
    percent = "" if job["percent"] is None else f"{job['percent']:.0f}%"
    eta = "" if job["eta_s"] is None else f"eta {format_duration(job['eta_s'])}"
    return "  ".join(
        part for part in (job["name"], job["node"], job["state"], percent, job["rate"], eta, job["detail"]) if part
    )


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="The whole document.")
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
@click.pass_obj
def status(named: str | None, as_json: bool, watch: bool) -> None:
    """Is the data safe, and what to do now. Exit code: 0 healthy, 1 degraded or at risk, 2 down."""
    place = find_directory(named)
    command = command_for(place) if read_dev(place) is not None else ""
    while True:
        found = fetch(place)
        text = json.dumps(found, indent=None if watch else 2) if as_json else render(found, command)
        if watch and not as_json and sys.stdout.isatty():
            click.clear()
        click.echo(text)
        if not watch:
            sys.exit(EXIT_CODES[found["verdict"]])
        time.sleep(WATCH_S)


@click.command("where")
@click.argument("url", metavar="s3://BUCKET/KEY")
@click.option("--json", "as_json", is_flag=True, help="The whole document.")
@click.pass_obj
def where(named: str | None, url: str, as_json: bool) -> None:
    """Which disk and rack holds which fragment of an object, and how many more may fail. The key is written as it is,
    not URL-encoded.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket or not key:
        raise OperatorError(f"{url!r} is not s3://BUCKET/KEY")
    query = {"bucket": bucket, "key": key.encode("utf-8", "surrogateescape").hex()}
    found = gateway(find_directory(named), "GET", "/v1/where", query=query, timeout_s=60.0)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_where(found, url)


def print_where(found: dict[str, Any], url: str) -> None:
    """Prints what may fail, then a table of fragments and replicas. Blocks with the same disks share their lines."""
    click.echo(f"{url}  {format_size(found['size'])}")
    click.echo(f"  {_may_fail(found)}")
    if found.get("whole"):
        why = found.get("whole_because") or "it waits to be coded"
        click.echo(f"  some of it lies whole where no operator should have all of it; {why}")
    columns = ["disk", "node", "rack", "state"]
    if any(row.get("operator") for row in (*found["fragments"], *found["replicas"])):
        columns.insert(3, "operator")
    rows = [["part", "blocks", "profile", "fragment", *columns]]
    for row in found["fragments"]:
        last = row["block"] + row["blocks"] - 1
        blocks = str(row["block"]) if row["blocks"] == 1 else f"{row['block']}-{last}"
        rows.append([str(row["part"]), blocks, row["profile"], str(row["position"]), *(row[name] for name in columns)])
    rows.extend(["", "", "", "record", *(row[name] for name in columns)] for row in found["replicas"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for line in rows:
        click.echo("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _may_fail(found: dict[str, Any]) -> str:
    if found["disks_may_fail"] < 0:
        return "it cannot be read now: too few of its fragments are there"
    disks, racks = _more(found["disks_may_fail"], "disk"), _more(found["racks_may_fail"], found["domain"])
    lost = f"{disks} or {racks} may fail before data is lost"
    if found["replicas_may_fail"] < 0:
        return f"{lost}; its record has no majority of its replicas now, so it can be neither read nor written"
    return f"{lost}; {_more(found['replicas_may_fail'], 'replica')} of its record before it cannot be read or written"


def _more(number: int, what: str) -> str:
    return f"{number} more {what}{'' if number == 1 else 's'}"
