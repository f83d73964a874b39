"""``storaged audit``: verifies a node's audit log, in itself and against all its witnesses."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from storaged.cli.client import gateway
from storaged.cli.target import find_directory
from storaged.errors import AuditBroken, AuditNotCompared, OperatorError

if TYPE_CHECKING:
    from cryptography import x509

    from storaged.cluster.audit.format import RegisterCheckpoint
    from storaged.cluster.audit.report import AuditReport, WitnessView

LINE_BYTES_MAX = 64 * 1024


@click.group()
def audit() -> None:
    """Check the hash-chained audit log of key use, administration and refusals."""


@audit.command("verify")
@click.argument(
    "files", nargs=-1, required=True, metavar="FILE|DIRECTORY...", type=click.Path(path_type=Path, exists=True)
)
@click.option(
    "--witness",
    "saved",
    multiple=True,
    metavar="FILE|DIRECTORY",
    type=click.Path(path_type=Path, exists=True),
    help=(
        "Compare with these saved files of witnesses (witness/NODE.jsonl of storage nodes) instead of asking the"
        " cluster."
    ),
)
@click.option(
    "--authority",
    "authority_file",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True),
    help="With --witness: authority.crt of the cluster, to verify signatures.",
)
@click.option(
    "--offline", is_flag=True, help="Compare with no witness: then a log that was rewritten whole, or cut, can't show."
)
@click.option("--json", "as_json", is_flag=True, help="ok, problems, witnesses, heads.")
@click.pass_obj
def audit_verify(
    named: str | None,
    files: tuple[Path, ...],
    saved: tuple[Path, ...],
    authority_file: Path | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Check that every entry of one node's log follows from the one before, and that every witness saw this log.

    A DIRECTORY means the whole log: missing parts are named too. The witnesses are the cluster's other storage nodes.

    Exit code 0: it is whole, and all witnesses agree (with --offline: it is whole in itself). 3: entries were
    altered, removed or reordered. 4: nothing is wrong with it, but not every witness could be compared. 1: it could
    not be checked.
    """
    from storaged.cluster.audit import verify as verifier

    found = [path for file in files for path in (sorted(file.glob("audit-*.jsonl")) if file.is_dir() else [file])]
    if not found:
        inside = files[0] / "audit"
        more = f"; the node's log is in {inside}" if inside.is_dir() else ""
        raise OperatorError(f"there is no audit log in {files[0]} (audit-*.jsonl){more}")
    nodes = sorted({node for path in found if (node := node_of(path))})
    if len(nodes) > 1:
        raise OperatorError(f"these are logs of several nodes ({', '.join(nodes)}): verify them one by one")
    node = nodes[0] if nodes else ""
    whole = any(file.is_dir() for file in files)
    views: list[WitnessView] = []
    checkpoints: list[RegisterCheckpoint] = []
    authority, note = None, ""
    if saved:
        views = [view for file in saved if (view := _view_of_file(file, node)) is not None]
        authority = _certificate(authority_file.read_text()) if authority_file else None
        note = "" if authority_file else "signatures are not verified without --authority"
    elif not offline:
        views, checkpoints, authority, note = _ask(named, node)
        chains = {chain for path in found if (chain := chain_of(path))}
        checkpoints = [one for one in checkpoints if one.node == node and (whole or one.chain in chains)]
    report = verifier.verify(found, checkpoints, views, authority=authority, whole=whole)
    if as_json:
        click.echo(json.dumps({"node": node, **report.document()}, indent=2))
    else:
        _show(report, node, note, offline=offline)
    if report.problems:
        error: OperatorError = AuditBroken(
            "\n".join(["the audit log is not what was written:", *(f"  {problem}" for problem in report.problems)])
        )
    elif offline or report.compared:
        return
    else:
        error = AuditNotCompared(_why_not(report, note))
    if as_json:
        sys.exit(error.exit_code)
    raise error


def _show(report: AuditReport, node: str, note: str, *, offline: bool) -> None:
    click.echo(
        f"{report.files} files, {report.entries} entries of {node or 'an unknown node'}{f' ({note})' if note else ''}"
    )
    for head in report.heads:
        click.echo(f"  chain {head.chain} ends with entry {head.sequence}, {head.hash}")
    if report.begins_after:
        click.echo(f"  the log given begins after {report.begins_after}")
    for witness in report.witnesses:
        seen = (
            f"saw {witness.chains} of these chains, the newest up to entry {witness.sequence}" if witness.chains else ""
        )
        click.echo(
            f"  witness {witness.name}:"
            f" {witness.state}{f', {seen}' if seen else ''}{f' ({witness.reason})' if witness.reason else ''}"
        )
    if report.problems:
        return
    if report.torn_bytes and report.compared:
        click.echo(
            f"  {report.torn_bytes} bytes after an end are no entry, as a crash leaves them: no witness saw more than"
            " there is"
        )
    elif report.torn_bytes:
        click.echo(
            f"  {report.torn_bytes} bytes after an end are no entry: a crash leaves that, and so does who cuts a log;"
            " only witnesses can tell"
        )
    how = (
        "offline"
        if offline
        else "and every witness agrees"
        if report.compared
        else "but not every witness was compared"
    )
    click.echo(f"every entry follows from the one before, {how}")


def _why_not(report: AuditReport, note: str) -> str:
    missing = [
        f"{witness.name} ({witness.state}{f': {witness.reason}' if witness.reason else ''})"
        for witness in report.witnesses
        if witness.state not in ("agrees", "differs")
    ]
    return (
        f"not compared with: {', '.join(missing)}"
        if missing
        else f"compared with no witness: {note or 'there is none'}"
    )


@audit.command("witnessed")
@click.argument("node")
@click.argument("directory", metavar="DIRECTORY", type=click.Path(path_type=Path, file_okay=False))
@click.pass_obj
def audit_witnessed(named: str | None, node: str, directory: Path) -> None:
    """Save what every witness has of NODE's audit log in DIRECTORY, a file each. An auditor names each of them:
    audit verify --witness FILE --witness FILE.
    """
    answer = gateway(find_directory(named), "GET", "/v1/audit/witnessed", query={"node": node}, timeout_s=120.0)
    reached = [witness for witness in answer["witnesses"] if witness["reachable"]]
    if reached and not any(witness["lines"] for witness in reached):
        raise OperatorError(
            f"no witness that was reached has seen a log of {node!r}: `storaged status --json` has the names of nodes"
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "authority.crt").write_text(answer["authority"])
    for witness in answer["witnesses"]:
        if witness["reachable"]:
            path = directory / f"{witness['name']}.jsonl"
            path.write_text("".join(f"{line}\n" for line in witness["lines"]))
            click.echo(f"{path}: {len(witness['lines'])} checkpoints")
        else:
            click.echo(f"{witness['name']} was not reached: {witness['reason']}", err=True)
    sys.exit(0 if all(witness["reachable"] for witness in answer["witnesses"]) else 4)


def _ask(
    named: str | None, node: str
) -> tuple[list[WitnessView], list[RegisterCheckpoint], x509.Certificate | None, str]:
    """What the cluster knows of the node's log: witnesses, checkpoints, authority, and a note.

    When the cluster does not answer, the first three are empty and the note says why.
    """
    from storaged.cluster.audit.format import RegisterCheckpoint
    from storaged.cluster.audit.report import WitnessView
    from storaged.cluster.audit.witness_record import read
    from storaged.wire import decode

    try:
        answer: dict[str, Any] = gateway(
            find_directory(named), "GET", "/v1/audit/witnessed", query={"node": node}, timeout_s=120.0
        )
    except OperatorError as error:
        return [], [], None, f"the cluster could not be asked: {error.message}"
    views = [
        WitnessView(
            witness["name"],
            read(line.encode() for line in witness["lines"]) if witness["reachable"] else None,
            witness["reason"],
        )
        for witness in answer["witnesses"]
    ]
    checkpoints = [decode(base64.b64decode(text), RegisterCheckpoint) for text in answer["checkpoints"]]
    return views, checkpoints, _certificate(answer["authority"]), answer["reason"]


def _view_of_file(path: Path, node: str) -> WitnessView | None:
    """Reads a witness's file about ``node``; of a storage node's ``witness`` directory, the file of that node."""
    from storaged.cluster.audit.report import WitnessView
    from storaged.cluster.audit.witness import read_file

    if path.is_dir() and not (path / f"{node}.jsonl").is_file():
        raise OperatorError(
            f"{path} has no {node}.jsonl; name the files that `storaged audit witnessed` saved one by one"
        )
    file = path / f"{node}.jsonl" if path.is_dir() else path
    return WitnessView(str(file), read_file(file))


def _certificate(text: str) -> x509.Certificate:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(text.encode())
    except ValueError as error:
        raise OperatorError(f"the authority's certificate does not load: {error}") from None


def _first_entry(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            entry = json.loads(file.readline(LINE_BYTES_MAX))
    except (OSError, ValueError):
        return {}
    return entry if isinstance(entry, dict) else {}


def chain_of(path: Path) -> str:
    return str(_first_entry(path).get("chain", ""))


def node_of(path: Path) -> str:
    fields = _first_entry(path).get("fields")
    return str(fields.get("node", "")) if isinstance(fields, dict) else ""
