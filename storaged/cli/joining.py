"""``storaged node invite``, ``join`` and ``sign``, and the same for gateways: no private key leaves its server.

Theory of operation. Files carry everything, since the folder with the authority's keys is offline:

1. ``invite AUTHORITY NODE`` keeps a ticket in ``tickets/ID.ticket`` of the authority's folder, with all that the node
   will be, and prints it. The list of nodes does not change yet.
2. ``join TICKET DIRECTORY`` on the new server makes a key in DIRECTORY/identity and writes DIRECTORY/request.
3. ``sign AUTHORITY REQUEST`` checks the request against its own copy of the ticket. Then, in this order, each durable
   before the next: the ticket is used (``tickets/ID.used``, made exclusively, so that of two signatures one succeeds);
   the certificate is among those issued (``issued/``); the answer is in ``nodes/NODE/answer``; the node is in the
   list. After a crash in between the ticket is used and the node can be invited again.
4. ``join TICKET DIRECTORY ANSWER`` verifies the answer and puts certificate, configuration and layouts in their place.

``storaged cluster renew`` makes such a ticket for a member; the other steps are the same (``cluster.tickets``).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from storaged.cli import inviting
from storaged.cli.options import AS_JSON, AUTHORITY
from storaged.errors import JoinRefused, OperatorError, TicketForeign, TicketUsed

if TYPE_CHECKING:  # a command imports what it needs when it runs
    from cryptography.hazmat.primitives.asymmetric import ec

    from storaged.cli import create as files
    from storaged.cluster import issuing, tickets

REQUEST_NAME = "request"
ANSWER_NAME = "answer"
PENDING_KEY = "node.key.pending"
"""In a node's identity directory: the key that no certificate was put beside yet."""


@click.command("sign")
@AUTHORITY
@click.argument("request_file", metavar="REQUEST", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@AS_JSON
def sign(directory: Path, request_file: Path, as_json: bool) -> None:
    """Sign the certificate that REQUEST asks for, which `join` wrote on the server, and use up its ticket."""
    from storaged.cli import create as files
    from storaged.cluster import issuing, tickets

    plan, authority = files.load_plan(directory), issuing.load_authority(directory)
    request = tickets.read_request(_read(request_file), authority.cluster)
    ticket, record = _kept(authority, request.ticket)
    key = tickets.check_request(ticket, request)
    used = inviting.ticket_path(directory, ticket.id).with_suffix(".used")
    if used.exists():
        raise _used(ticket)
    tickets.check_time(ticket, int(time.time() * 1000), "this machine")
    node = _wanted(plan, ticket, record)
    if ticket.kind == tickets.JOIN:
        inviting.with_node(authority, plan, node, None)
    peer = files.peer_of(plan, node)
    certificate = issuing.certify_node(authority, peer, key)
    last = files.last_signed(authority, plan)
    answer = files.answer_for(authority, ticket.id, certificate, record.config, last)
    try:
        _create(used, request.csr)
    except FileExistsError:
        raise _used(ticket) from None
    files.keep_certificate(authority, certificate)
    place = directory / "nodes" / node.name / ANSWER_NAME
    files.write_private(place, tickets.make_answer(ticket, answer))
    if ticket.kind == tickets.JOIN:
        files.save_plan(directory, plan)
    document = {
        "node": node.name,
        "kind": ticket.kind,
        "answer": str(place),
        "expires": certificate.not_valid_after_utc.isoformat(),
    }
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(f"{node.name}: its certificate is signed; the answer is in {place}")
    group = "node" if "storage" in node.roles else "gateway"
    click.echo(f"  Next: copy the answer to the server, and there:  storaged {group} join - DIRECTORY answer")
    if ticket.kind == tickets.JOIN:
        click.echo(f"  Then, here: storaged cluster plan {directory}, and storaged cluster layout {directory}")


def _read(path: Path) -> bytes:
    from storaged.cluster.tickets import FILE_BYTES_MAX

    if path.stat().st_size > FILE_BYTES_MAX:
        raise JoinRefused(f"{path} is too long for a request or an answer.")
    return path.read_bytes()


def _kept(authority: issuing.Authority, id_: bytes) -> tuple[tickets.Ticket, files.TicketRecord]:
    """This authority's own copy of a ticket. Raises TicketForeign."""
    import msgspec

    from storaged.cli import create as files
    from storaged.cluster.tickets import ID_BYTES, read_ticket

    path = inviting.ticket_path(authority.directory, id_)
    try:
        if len(id_) != ID_BYTES:
            raise FileNotFoundError
        record = msgspec.json.decode(path.read_bytes(), type=files.TicketRecord)
    except FileNotFoundError:
        raise TicketForeign(f"The ticket of this request was not made with the folder {authority.directory}.") from None
    except msgspec.MsgspecError as error:
        raise OperatorError(f"{path} cannot be read: {error}. Invite the node again.") from None
    return read_ticket(record.ticket), record


def _wanted(plan: files.ClusterPlan, ticket: tickets.Ticket, record: files.TicketRecord) -> files.NodePlan:
    """The node that gets the certificate. Raises JoinRefused."""
    from storaged.cluster.tickets import JOIN

    known = next((node for node in plan.nodes if node.name == ticket.name), None)
    if ticket.kind == JOIN:
        if known is not None:
            raise JoinRefused(f"{ticket.name} has joined already, with another ticket.")
        return record.node
    if known is None:
        raise JoinRefused(f"{ticket.name} is no member any more.")
    return known


def _used(ticket: tickets.Ticket) -> TicketUsed:
    return TicketUsed(f"The ticket of {ticket.name} was used already.")


def _create(path: Path, content: bytes) -> None:
    """Makes a file durably. Raises FileExistsError when it is there already, also an unfinished one."""
    from storaged.durable import sync_path

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_path(path.parent)


# --- join


@click.command("join")
@click.argument("text", metavar="TICKET")
@click.argument("directory", metavar="DIRECTORY", type=click.Path(path_type=Path, file_okay=False))
@click.argument(
    "answer_file",
    metavar="[ANSWER]",
    required=False,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)
@AS_JSON
def join(text: str, directory: Path, answer_file: Path | None, as_json: bool) -> None:
    """Run on the new server: make this node's key in DIRECTORY, and a request for a certificate.

    DIRECTORY is where the node's configuration will be, such as /etc/storaged/n4. TICKET is the line that `invite` or
    `renew` printed. With `-` the command asks for it, or reads it from a pipe: so no other user of this server sees it
    in the list of processes. Carry DIRECTORY/request to the authority, where `storaged node sign` makes the answer.
    Then run this command again with the answer: it puts certificate and configuration in their place. The private key
    stays here.
    """
    from storaged.cluster import tickets

    if text == "-":
        text = click.prompt("Ticket", hide_input=True) if sys.stdin.isatty() else sys.stdin.read()
    ticket = tickets.read_ticket(text)
    _check_place(ticket, directory / "identity", finishing=answer_file is not None)
    if answer_file is not None:
        _finish(ticket, directory, answer_file, as_json=as_json)
        return
    tickets.check_time(ticket, int(time.time() * 1000), "this server")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    request = directory / REQUEST_NAME
    _write(request, tickets.make_request(ticket, _pending_key(directory / "identity")), 0o644)
    if as_json:
        click.echo(json.dumps({"node": ticket.name, "kind": ticket.kind, "request": str(request)}, indent=2))
        return
    click.echo(f"{ticket.name}: the key is in {directory / 'identity'}, and stays there; the request is in {request}")
    click.echo("  Next: copy the request to the authority's machine, and there:  storaged node sign AUTHORITY request")
    click.echo(f"  Then, with the answer from there:  storaged node join - {directory} ANSWER")


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    from storaged.durable import replace_file

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_file(path, content, mode)


def _check_place(ticket: tickets.Ticket, identity: Path, *, finishing: bool) -> None:
    """Raises JoinRefused when the directory is another node's, or this node has joined already."""
    from cryptography import x509

    from storaged.cluster.identity import identity_of
    from storaged.cluster.tickets import JOIN

    try:
        own = identity_of(x509.load_pem_x509_certificate((identity / "node.crt").read_bytes()))
    except FileNotFoundError:
        return
    except ValueError as error:
        raise JoinRefused(f"{identity / 'node.crt'} can't be read: {error}. Move it away.") from None
    if (own.name, own.cluster) != (ticket.name, ticket.cluster):
        raise JoinRefused(
            f"{identity} is the identity of {own.name} of cluster {own.cluster}; the ticket is for {ticket.name} of"
            f" cluster {ticket.cluster}."
        )
    _check_authority(ticket, identity)
    if ticket.kind == JOIN and not (finishing and (identity / PENDING_KEY).exists()):
        raise JoinRefused(
            f"{own.name} has its certificate already, in {identity}. Another one: `storaged cluster renew` where the"
            " authority's keys are."
        )


def _check_authority(ticket: tickets.Ticket, identity: Path) -> None:
    """A member keeps the authority and the administration key that it trusts, whatever a ticket names. Raises
    TicketForeign.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    try:
        authority = x509.load_pem_x509_certificate((identity / "authority.crt").read_bytes())
        administration = serialization.load_pem_public_key((identity / "administration.pub").read_bytes())
    except (OSError, ValueError) as error:
        raise JoinRefused(f"{identity} can't be read: {error}. Restore it, or move the directory away.") from None
    known = administration.public_bytes_raw() if isinstance(administration, ed25519.Ed25519PublicKey) else b""
    if (authority.fingerprint(hashes.SHA256()), known) != (ticket.authority, ticket.administration):
        raise TicketForeign(f"The ticket names another authority, or administration key, than {identity} has.")


def _pending_key(identity: Path) -> ec.EllipticCurvePrivateKey:
    """The key of this node's request: the one that an earlier call made, or a new one."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from storaged.cluster.issuing import private_pem

    path = identity / PENDING_KEY
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        made = ec.generate_private_key(ec.SECP256R1())
        _write(path, private_pem(made))
        return made
    except (ValueError, TypeError) as error:
        raise JoinRefused(f"{path} can't be read: {error}. Remove it, and begin again.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise JoinRefused(f"{path} is a key of another kind than storaged makes. Remove it, and begin again.")
    return key


def _finish(ticket: tickets.Ticket, directory: Path, answer_file: Path, *, as_json: bool) -> None:
    """Verifies the answer, and puts what it has in its place. It may be repeated after a crash: the pending key goes
    last.
    """
    from cryptography.hazmat.primitives import serialization

    from storaged.cli import create as files
    from storaged.cluster import issuing, tickets

    identity = directory / "identity"
    if not (identity / PENDING_KEY).exists():
        raise JoinRefused(f"{identity} has no key that waits for a certificate: run this command without ANSWER first.")
    key = _pending_key(identity)
    joined = tickets.read_answer(ticket, _read(answer_file), key.public_key())
    answer = joined.answer
    _write(identity / "administration.pub", issuing.public_pem(joined.administration), 0o644)
    _write(identity / "authority.crt", joined.authority.public_bytes(serialization.Encoding.PEM), 0o644)
    if answer.layout:
        _write(identity / files.LAYOUT_NAME, answer.layout)
    if answer.base:
        _write(identity / files.BASE_NAME, answer.base)
    config = directory / "config.toml"
    if answer.config and (not config.exists() or config.read_text() != answer.config):
        config = directory / "config.issued.toml" if config.exists() else config
        _write(config, answer.config.encode())
    _write(identity / "node.key", issuing.private_pem(key))
    _write(identity / "node.crt", joined.certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    (identity / PENDING_KEY).unlink()
    (directory / REQUEST_NAME).unlink(missing_ok=True)
    _say_joined(ticket, directory, bool(answer.layout), config, as_json=as_json)


def _say_joined(ticket: tickets.Ticket, directory: Path, layout: bool, config: Path, *, as_json: bool) -> None:
    from storaged.cluster.tickets import JOIN

    if as_json:
        document = {"node": ticket.name, "kind": ticket.kind, "config": str(config) if ticket.kind == JOIN else None}
        click.echo(json.dumps({**document, "layout": layout}, indent=2))
        return
    if ticket.kind != JOIN:
        click.echo(f"{ticket.name}: the new certificate is in {directory / 'identity'}")
        click.echo("  Next: give the files there to the user of the node, and reload the node")
        return
    click.echo(f"{ticket.name}: certificate and configuration are in {directory}")
    if not layout:
        click.echo(f"  First copy the authority's layout.signed to {directory / 'identity'}: none was signed before")
    click.echo(f"  Next: give the files to the user of the node, storaged config check {config}, and start the node")
