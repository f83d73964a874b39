"""Tickets, by which a server gets a certificate for a key that never leaves it. Pure.

Theory of operation. The administrator makes a *ticket* for one node: what the node will be, which authority signs,
until when, and a secret. It reaches the server as one line of text. There the node makes its key, and a *request*: a
certificate request (PKCS #10, signed by the new key), authenticated by the ticket's secret. The request goes to the
authority as a file. The authority signs the certificate, and puts it into an *answer*, authenticated by the same
secret, with what else the node needs: configuration, authority certificate, layouts. So

* a request for somebody else's key under this name is refused, and so is an answer that was altered on its way;
* a ticket whose text was altered signs nothing: a request names the hash of the ticket, and the authority has its own
  copy;
* who reads the ticket can ask for a certificate until the ticket expires, or is used. It is used once: the authority
  notes that durably before it signs (``cli.joining``).

A ticket may also renew the certificate of a member (``kind``): then the node keeps everything else.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID
from msgspec import MsgspecError
from msgspec.structs import replace

from storaged.cluster.identity import identity_of
from storaged.errors import JoinRefused, TicketExpired, TicketForeign, TicketInvalid
from storaged.wire import Message, decode, encode

JOIN, RENEW = "join", "renew"
VERSION = 1
ID_BYTES = 16
SECRET_BYTES = 32
CHECK_BYTES = 4
PREFIX = "storaged-ticket-"
FILE_BYTES_MAX = 16 * 2**20
"""Of a request and of an answer."""

_REQUEST_LABEL = b"sov.join.request.v1\0"
_ANSWER_LABEL = b"sov.join.answer.v1\0"


class Ticket(Message, frozen=True):
    """``authority``: SHA-256 of the authority's certificate (DER). ``administration``: the public key that signs
    layouts (Ed25519, 32 bytes). ``location`` is that in the certificate. ``until_ms``: wall clock, milliseconds since
    1970.
    """

    version: int
    kind: str
    cluster: str
    authority: bytes
    administration: bytes
    name: str
    location: str
    roles: tuple[str, ...]
    until_ms: int
    id: bytes
    secret: bytes

    @property
    def hash(self) -> bytes:
        return hashlib.sha256(encode(self)).digest()


class JoinRequest(Message, frozen=True):
    """``ticket`` is the ticket's id, ``ticket_hash`` its hash, ``csr`` a PKCS #10 request (DER)."""

    version: int
    cluster: str
    ticket: bytes
    ticket_hash: bytes
    name: str
    csr: bytes
    mac: bytes = b""


class JoinAnswer(Message, frozen=True):
    """``certificate`` and ``authority`` are DER. ``layout`` and ``base``: encoded ``SignedLayout``, empty when there is
    none. ``config``: the configuration, empty for a renewed certificate.
    """

    version: int
    ticket: bytes
    certificate: bytes
    authority: bytes
    config: str = ""
    layout: bytes = b""
    base: bytes = b""
    mac: bytes = b""


@dataclass(frozen=True)
class Joined:
    """What a verified answer has for a node."""

    certificate: x509.Certificate
    authority: x509.Certificate
    administration: ed25519.Ed25519PublicKey
    answer: JoinAnswer


def write_ticket(ticket: Ticket) -> str:
    """The ticket as one line of text."""
    content = encode(ticket)
    check = hashlib.sha256(content).digest()[:CHECK_BYTES]
    return PREFIX + base64.urlsafe_b64encode(content + check).decode().rstrip("=")


def read_ticket(text: str) -> Ticket:
    """Raises TicketInvalid."""
    text = text.strip()
    body = text.removeprefix(PREFIX)
    try:
        content = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        ticket = decode(content[:-CHECK_BYTES], Ticket)
    except (ValueError, MsgspecError):
        raise TicketInvalid("This is no ticket, or a part of it is missing.") from None
    if not text.startswith(PREFIX) or hashlib.sha256(content[:-CHECK_BYTES]).digest()[:CHECK_BYTES] != content[-4:]:
        raise TicketInvalid("The ticket was altered: its check sum is wrong.")
    if ticket.version != VERSION or ticket.kind not in (JOIN, RENEW):
        raise TicketInvalid(f"The ticket has version {ticket.version}; this program knows {VERSION}.")
    if (len(ticket.id), len(ticket.secret)) != (ID_BYTES, SECRET_BYTES):
        raise TicketInvalid("The ticket has no valid id or secret.")
    return ticket


def check_time(ticket: Ticket, now_ms: int, whose_clock: str) -> None:
    """Raises TicketExpired."""
    if ticket.until_ms <= now_ms:
        raise TicketExpired(
            f"The ticket of {ticket.name} expired {max((now_ms - ticket.until_ms) // 1000, 1)} s ago, by the clock of"
            f" {whose_clock}."
        )


def make_request(ticket: Ticket, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The request for a certificate of ``key``, as the file that goes to the authority."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ticket.name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    request = JoinRequest(
        VERSION,
        ticket.cluster,
        ticket.id,
        ticket.hash,
        ticket.name,
        csr.public_bytes(serialization.Encoding.DER),
    )
    return encode(replace(request, mac=_mac(ticket, _REQUEST_LABEL, request)))


def read_request(content: bytes, cluster: str) -> JoinRequest:
    """Raises JoinRefused for what is no request, TicketForeign for one of another cluster."""
    try:
        request = decode(content, JoinRequest)
    except MsgspecError:
        raise JoinRefused("The file is no request of `storaged node join`, or it is damaged.") from None
    if request.version != VERSION:
        raise JoinRefused(f"The request has version {request.version}; this program knows {VERSION}.")
    if request.cluster != cluster:
        raise TicketForeign(f"The request is for cluster {request.cluster!r}; this is the authority of {cluster!r}.")
    return request


def check_request(ticket: Ticket, request: JoinRequest) -> ec.EllipticCurvePublicKey:
    """The key to certify. ``ticket``: the authority's own copy of the ticket that the request names.

    Raises JoinRefused, TicketInvalid.
    """
    if request.ticket != ticket.id or not _is_authentic(ticket, _REQUEST_LABEL, request):
        raise JoinRefused(
            f"The request under the ticket of {ticket.name} was not made with the ticket's secret: it was altered, or"
            " made by somebody else."
        )
    if request.ticket_hash != ticket.hash:
        raise TicketInvalid(f"The request was made with an altered ticket of {ticket.name}.")
    if request.name != ticket.name:
        raise JoinRefused(f"The ticket is for {ticket.name}; the request is from {request.name!r}.")
    try:
        csr = x509.load_der_x509_csr(request.csr)
        key = csr.public_key()
        names = [str(each.value) for each in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        valid = csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise JoinRefused(f"The certificate request can't be read: {error}") from None
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise JoinRefused("The certificate request is not signed by its own key (ECDSA on P-256).")
    if names != [ticket.name]:
        raise JoinRefused(f"The ticket is for {ticket.name}; the certificate request names {names}.")
    return key


def make_answer(ticket: Ticket, answer: JoinAnswer) -> bytes:
    """The answer, authenticated, as the file that goes to the node."""
    return encode(replace(answer, mac=_mac(ticket, _ANSWER_LABEL, replace(answer, mac=b""))))


def read_answer(ticket: Ticket, content: bytes, key: ec.EllipticCurvePublicKey) -> Joined:
    """What the authority answered to the request of ``key``. Raises JoinRefused, CertificateRefused."""
    try:
        answer = decode(content, JoinAnswer)
    except MsgspecError:
        raise JoinRefused("The file is no answer of `storaged node sign`, or it is damaged.") from None
    if answer.ticket != ticket.id:
        raise JoinRefused(f"The answer belongs to another ticket than this one of {ticket.name}.")
    if answer.version != VERSION or not _is_authentic(ticket, _ANSWER_LABEL, answer):
        raise JoinRefused("The answer was not made with the ticket's secret: it was altered, or made by somebody else.")
    if hashlib.sha256(answer.authority).digest() != ticket.authority:
        raise TicketForeign("The answer has the certificate of another authority than the ticket names.")
    try:
        authority = x509.load_der_x509_certificate(answer.authority)
        certificate = x509.load_der_x509_certificate(answer.certificate)
        certificate.verify_directly_issued_by(authority)
        administration = ed25519.Ed25519PublicKey.from_public_bytes(ticket.administration)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise JoinRefused(f"The certificate in the answer does not hold: {error}") from None
    if identity_of(certificate).name != ticket.name:
        raise JoinRefused(f"The answer has the certificate of {identity_of(certificate).name!r}, not of {ticket.name}.")
    if certificate.public_key() != key:
        raise JoinRefused(
            f"The answer certifies another key of {ticket.name} than the one that this directory has made."
        )
    return Joined(certificate, authority, administration, answer)


def _mac(ticket: Ticket, label: bytes, message: JoinRequest | JoinAnswer) -> bytes:
    """HMAC-SHA-256 over the message without its own code."""
    return hmac.digest(ticket.secret, label + encode(message), "sha256")


def _is_authentic(ticket: Ticket, label: bytes, message: JoinRequest | JoinAnswer) -> bool:
    return hmac.compare_digest(message.mac, _mac(ticket, label, replace(message, mac=b"")))
