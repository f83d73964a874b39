"""Who a node is: certificates of the cluster's own authority, TLS contexts that trust nothing else, and the signature
on layouts.

Each node's certificate carries a private extension, under an object identifier of the UUID arc (2.25, ITU-T X.667: no
registration needed)::

    StoragedNode ::= SEQUENCE {
        version       INTEGER (1),
        cluster       UTF8String,   -- id of the cluster
        name          UTF8String,   -- of the node; also the subject's common name
        jurisdiction  UTF8String,   -- ISO 3166-1 code of the country whose law the operating entity is under
        country       UTF8String,   -- where the machine stands
        site          UTF8String,
        rack          UTF8String,
        roles         SEQUENCE OF UTF8String }

It is not marked critical: OpenSSL refuses critical extensions that it does not know, and no other authority is trusted
here anyway. A peer without
it, or with one that does not parse, is refused.

TLS is 1.3 only and mutual. Host names are not checked: a node is who its certificate says, wherever it runs; the RPC
compares
the name in the certificate with the one it meant to reach.

The authority signs with ECDSA on P-256, which every TLS stack and hardware token has. Layouts are signed by the
administration key (Ed25519), whose
private half never lies on a storage node.

Files of an authority: ``authority.key``, ``authority.crt``, ``administration.key``, ``administration.pub``; of a node:
``node.key``, ``node.crt``,
``authority.crt``, ``administration.pub``. Private keys have mode 0600.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import MsgspecError

from storaged.cluster.layout import Layout, Location
from storaged.cluster.policy import KeyHolder, outside_eu_law
from storaged.cluster.ports import PeerIdentity
from storaged.durable import replace_file
from storaged.errors import CertificateRefused, JurisdictionRefused, LayoutRefused, OperatorError
from storaged.wire import Message, decode, encode

NODE_EXTENSION = x509.ObjectIdentifier("2.25.182718496654254107276661388485389692855")
ROLES = frozenset({"storage", "gateway"})

AUTHORITY_DAYS = 3650
NODE_DAYS = 825
BACKDATE = timedelta(hours=1)
"""Certificates are valid from an hour before they were made, for machines whose clock is behind."""

LAYOUT_LABEL = b"sov.layout.v1\0"
LAYOUT_BYTES_MAX = 4 * 1024 * 1024

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@asn1.sequence
class _NodeExtension:
    version: int
    cluster: str
    name: str
    jurisdiction: str
    country: str
    site: str
    rack: str
    roles: list[str]


@dataclass(frozen=True)
class Authority:
    """The cluster's certificate authority and administration key, as they lie in a directory (kept offline, or with the
    operator).
    """

    directory: Path
    cluster: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    administration: ed25519.Ed25519PrivateKey


@dataclass(frozen=True)
class Identity:
    """A node's own: what its certificate says of it, the files that TLS reads, and the key that layouts are verified
    with.
    """

    directory: Path
    peer: PeerIdentity
    expires: datetime
    administration: ed25519.Ed25519PublicKey
    valid_from: datetime

    @property
    def cluster(self) -> str:
        return self.peer.cluster

    @property
    def name(self) -> str:
        return self.peer.name

    @property
    def key_holder(self) -> KeyHolder:
        """What the policy judges when this node asks for a key."""
        from_ms, until_ms = (int(moment.timestamp() * 1000) for moment in (self.valid_from, self.expires))
        return KeyHolder(self.peer.country, self.peer.jurisdiction, from_ms, until_ms)


class SignedLayout(Message, frozen=True):
    """``payload`` is the encoded layout; ``signature`` Ed25519 over ``sov.layout.v1\\0`` and the payload."""

    payload: bytes
    signature: bytes


# --- making
# -------------------------------------------------------------------------------------------------------------


def create_authority(directory: Path, cluster: str, *, now: datetime | None = None) -> Authority:
    """Makes the authority and the administration key of a new cluster. Raises OperatorError when the directory has one
    already.
    """
    if not _CLUSTER.fullmatch(cluster):
        raise OperatorError(
            f"{cluster!r} is not a cluster id: up to 64 letters, digits, '.', '_' and '-', beginning with a letter or"
            " digit."
        )
    if (directory / "authority.key").exists():
        raise OperatorError(
            f"{directory} already holds an authority; it is never replaced, since every node trusts it."
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    now = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "storaged"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{cluster} authority"),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    administration = ed25519.Ed25519PrivateKey.generate()
    replace_file(directory / "administration.key", _private_pem(administration), 0o600)
    replace_file(directory / "administration.pub", _public_pem(administration.public_key()), 0o644)
    replace_file(directory / "authority.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    replace_file(directory / "authority.key", _private_pem(key), 0o600)
    return Authority(directory, cluster, key, certificate, administration)


def load_authority(directory: Path) -> Authority:
    """Raises OperatorError when a file is missing or unreadable."""
    try:
        key = serialization.load_pem_private_key((directory / "authority.key").read_bytes(), None)
        administration = serialization.load_pem_private_key((directory / "administration.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((directory / "authority.crt").read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise OperatorError(f"{directory} holds no usable authority: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(administration, ed25519.Ed25519PrivateKey):
        raise OperatorError(f"{directory} holds keys of another kind than storaged makes.")
    common_names = [
        str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    ]
    cluster = common_names[0].removesuffix(" authority") if common_names else ""
    if not _CLUSTER.fullmatch(cluster):
        raise OperatorError(f"{directory / 'authority.crt'} names no cluster.")
    return Authority(directory, cluster, key, certificate, administration)


def issue(
    authority: Authority,
    directory: Path,
    *,
    name: str,
    location: Location | str,
    roles: tuple[str, ...],
    jurisdiction: str = "",
    days: int = NODE_DAYS,
    now: datetime | None = None,
) -> Identity:
    """Makes a key and a certificate for one node, and puts all that it needs into ``directory``.

    ``jurisdiction`` is the operator's (default: the country where the node stands). What could never be admitted is not
    issued:
    raises JurisdictionRefused; OperatorError for a bad name, place or role. An earlier certificate there is replaced.
    """
    try:
        place = Location.parse(location) if isinstance(location, str) else location
    except ValueError as error:
        raise OperatorError(
            f"No certificate for {name!r}: {location!r} is not a place; write it like FR/par1/a."
        ) from error
    peer = PeerIdentity(
        name,
        place.country,
        place.site,
        place.rack,
        tuple(sorted(roles)),
        jurisdiction or place.country,
        authority.cluster,
    )
    if problem := _problem_of(peer):
        raise OperatorError(f"No certificate for {name!r}: {problem}.")
    for country in (peer.country, peer.jurisdiction):
        if reason := outside_eu_law(country):
            raise JurisdictionRefused(f"No certificate for {name!r}: {reason}.")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify(authority, peer, key.public_key(), days=days, now=now or datetime.now(UTC))
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(directory / "administration.pub", _public_pem(authority.administration.public_key()), 0o644)
    replace_file(directory / "authority.crt", authority.certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    replace_file(directory / "node.key", _private_pem(key), 0o600)
    replace_file(directory / "node.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return _identity(directory, certificate, authority.administration.public_key())


def certify(
    authority: Authority, peer: PeerIdentity, key: ec.EllipticCurvePublicKey, *, days: int, now: datetime
) -> x509.Certificate:
    """Signs what ``peer`` says for ``key``. The caller has judged whether it should be."""
    extension = asn1.encode_der(
        _NodeExtension(
            version=1,
            cluster=peer.cluster,
            name=peer.name,
            jurisdiction=peer.jurisdiction,
            country=peer.country,
            site=peer.site,
            rack=peer.rack,
            roles=list(peer.roles),
        )
    )
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer.name)]))
        .issuer_name(authority.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + timedelta(days=days)) - BACKDATE)
        .not_valid_after(min(now + timedelta(days=days), authority.certificate.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(peer.name)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .add_extension(x509.UnrecognizedExtension(NODE_EXTENSION, extension), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


# --- reading
# ------------------------------------------------------------------------------------------------------------


def load_identity(directory: Path, *, now: datetime | None = None) -> Identity:
    """A node's own identity. Raises CertificateRefused (missing, unreadable, expired) and JurisdictionRefused with the
    file and the reason.
    """
    try:
        certificate = x509.load_pem_x509_certificate((directory / "node.crt").read_bytes())
        administration = serialization.load_pem_public_key((directory / "administration.pub").read_bytes())
        key = serialization.load_pem_private_key((directory / "node.key").read_bytes(), None)
        (directory / "authority.crt").stat()
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateRefused(f"{directory} holds no usable node certificate: {error}") from error
    if not isinstance(administration, ed25519.Ed25519PublicKey):
        raise CertificateRefused(f"{directory / 'administration.pub'} is not an Ed25519 public key.")
    if key.public_key() != certificate.public_key():
        raise CertificateRefused(f"{directory / 'node.key'} is not the key of {directory / 'node.crt'}.")
    if certificate.not_valid_after_utc <= (now or datetime.now(UTC)):
        raise CertificateRefused(
            f"{directory / 'node.crt'} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; issue a new one."
        )
    return _identity(directory, certificate, administration)


def _identity(directory: Path, certificate: x509.Certificate, administration: ed25519.Ed25519PublicKey) -> Identity:
    peer = identity_of(certificate)
    return Identity(directory, peer, certificate.not_valid_after_utc, administration, certificate.not_valid_before_utc)


def identity_of(certificate: x509.Certificate | bytes) -> PeerIdentity:
    """What a certificate (parsed, or DER as TLS hands it over) says of its node. TLS has verified its signature and
    validity.

    Raises CertificateRefused when the extension is missing or malformed, JurisdictionRefused when the place or the
    operator is not under EU law.
    """
    try:
        if not isinstance(certificate, x509.Certificate):
            certificate = x509.load_der_x509_certificate(certificate)
        raw = certificate.extensions.get_extension_for_oid(NODE_EXTENSION).value
        assert isinstance(raw, x509.UnrecognizedExtension)
        found = asn1.decode_der(_NodeExtension, raw.value)
        common_names = [
            str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        ]
    except x509.ExtensionNotFound as error:
        raise CertificateRefused(
            "The certificate does not say what node it is: the storaged extension is missing."
        ) from error
    except (ValueError, TypeError, x509.DuplicateExtension) as error:
        raise CertificateRefused(f"The certificate cannot be read: {error}") from error
    if found.version != 1:
        raise CertificateRefused(f"The certificate's extension has version {found.version}; this daemon reads 1.")
    peer = PeerIdentity(
        found.name, found.country, found.site, found.rack, tuple(found.roles), found.jurisdiction, found.cluster
    )
    if common_names != [peer.name]:
        raise CertificateRefused(
            f"The certificate names {common_names} in its subject and {peer.name!r} in its extension."
        )
    if problem := _problem_of(peer):
        raise CertificateRefused(f"The certificate of {peer.name!r} is malformed: {problem}.")
    for what, country in (("stands", peer.country), ("is operated", peer.jurisdiction)):
        if reason := outside_eu_law(country):
            raise JurisdictionRefused(f"Node {peer.name!r} {what} outside EU law: {reason}.")
    return peer


def _problem_of(peer: PeerIdentity) -> str:
    if not _NAME.fullmatch(peer.name):
        return "a node's name has up to 63 lower-case letters, digits and '-' between them"
    if not _PLACE.fullmatch(peer.site) or not _PLACE.fullmatch(peer.rack):
        return "site and rack have up to 32 letters, digits, '.', '_' and '-', beginning with a letter or digit"
    if not _CLUSTER.fullmatch(peer.cluster):
        return "no cluster is named"
    if not peer.roles or len(set(peer.roles)) != len(peer.roles) or not ROLES.issuperset(peer.roles):
        return f"roles are one or more of {', '.join(sorted(ROLES))}"
    return ""


# --- TLS
# ----------------------------------------------------------------------------------------------------------------


def server_context(identity: Identity) -> ssl.SSLContext:
    """Mutual TLS 1.3 for the side that listens. Raises CertificateRefused when the files do not load."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity)
    context.num_tickets = 0  # connections live for days: a resumption would save nothing, and skip the certificate
    return context


def client_context(identity: Identity) -> ssl.SSLContext:
    """Mutual TLS 1.3 for the side that dials; the caller compares the certified node name with the one it meant."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, identity)


def renew(context: ssl.SSLContext, identity: Identity) -> None:
    """New handshakes on ``context`` use the certificate that lies in the identity's directory now."""
    try:
        context.load_cert_chain(identity.directory / "node.crt", identity.directory / "node.key")
    except (OSError, ssl.SSLError) as error:
        raise CertificateRefused(f"{identity.directory / 'node.crt'} and its key do not load: {error}") from error


_CALLED_PER_RECORD = ("read", "write", "pending")


class _DirectSSLObject(ssl.SSLObject):
    """Called for every record of 16 KiB: without a Python function in between. ``_create`` and ``_sslobj`` are not
    public: where a Python has them not (3.11 to 3.13
    do), this is an SSLObject as any other."""

    @classmethod
    def _create(cls, *arguments: Any, **named: Any) -> _DirectSSLObject:
        made = super()._create(*arguments, **named)  # type: ignore[misc]
        made.__dict__.update(_native_calls(made))
        return made  # type: ignore[no-any-return]


def _native_calls(made: object) -> dict[str, Callable[..., Any]]:
    """What does an SSLObject's work for each record, by its name there; nothing when it is not
    where it is looked for.
    """
    native = getattr(made, "_sslobj", None)
    found = {name: getattr(native, name, None) for name in _CALLED_PER_RECORD}
    return {name: call for name, call in found.items() if call is not None}


def _context(protocol: int, identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.sslobject_class = _DirectSSLObject
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    try:
        context.load_verify_locations(cafile=identity.directory / "authority.crt")
    except (OSError, ssl.SSLError) as error:
        raise CertificateRefused(f"{identity.directory / 'authority.crt'} does not load: {error}") from error
    renew(context, identity)
    return context


# --- layouts
# ------------------------------------------------------------------------------------------------------------


def sign_layout(layout: Layout, administration: ed25519.Ed25519PrivateKey) -> SignedLayout:
    payload = encode(layout)
    return SignedLayout(payload, administration.sign(LAYOUT_LABEL + payload))


def verify_layout(signed: SignedLayout, administration: ed25519.Ed25519PublicKey, cluster: str) -> Layout:
    """The layout, when the administration key of this cluster signed exactly these bytes. Raises LayoutRefused."""
    if len(signed.payload) > LAYOUT_BYTES_MAX:
        raise LayoutRefused(f"The layout has {len(signed.payload)} bytes; the limit is {LAYOUT_BYTES_MAX}.")
    try:
        administration.verify(signed.signature, LAYOUT_LABEL + signed.payload)
        layout = decode(signed.payload, Layout)
    except InvalidSignature as error:
        raise LayoutRefused("The layout's signature is not by this cluster's administration key.") from error
    except MsgspecError as error:
        raise LayoutRefused(f"The signed layout does not decode: {error}") from error
    if layout.cluster != cluster:
        raise LayoutRefused(f"The layout belongs to cluster {layout.cluster!r}, this is {cluster!r}.")
    return layout


# --- signatures of a node
# -----------------------------------------------------------------------------------------------


class NodeSigner:
    """Signs with the key of the node's certificate (ECDSA, P-256, SHA-256), such as the checkpoints
    of its audit log.
    """

    def __init__(self, identity: Identity) -> None:
        """Raises CertificateRefused when the key does not load."""
        try:
            key = serialization.load_pem_private_key((identity.directory / "node.key").read_bytes(), None)
            certificate = x509.load_pem_x509_certificate((identity.directory / "node.crt").read_bytes())
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CertificateRefused(f"{identity.directory} holds no usable node key: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CertificateRefused(f"{identity.directory / 'node.key'} is a key of another kind than storaged makes.")
        self._key = key
        self.certificate = certificate.public_bytes(serialization.Encoding.DER)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))


def authority_of(identity: Identity) -> x509.Certificate:
    """The certificate of the authority that this node is pinned to. Raises CertificateRefused when the file does not
    load.
    """
    file = identity.directory / "authority.crt"
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateRefused(f"{file} does not load: {error}") from error


def signed_by_node(authority: x509.Certificate, certificate: bytes, data: bytes, signature: bytes) -> PeerIdentity:
    """Whose signature this is: of the node that ``certificate`` (DER, issued by ``authority``, expired or not) names.
    Raises CertificateRefused.
    """
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        parsed.verify_directly_issued_by(authority)
        key = parsed.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise CertificateRefused("The signing certificate has a key of another kind than storaged makes.")
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise CertificateRefused("The signature does not hold.") from error
    except (ValueError, TypeError) as error:
        raise CertificateRefused(f"The signing certificate is not of this cluster: {error}") from error
    return identity_of(parsed)


# --- files
# --------------------------------------------------------------------------------------------------------------


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_pem(key: ed25519.Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
