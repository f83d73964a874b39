"""Reads a node's certificate and key: what the node is, and its signatures.

Each node's certificate carries a private extension, under an object identifier of the UUID arc (2.25, ITU-T X.667: no
registration needed)::

    StoragedNode ::= SEQUENCE {
        version       INTEGER (1),
        cluster       UTF8String,   -- id of the cluster
        name          UTF8String,   -- of the node; also the subject's common name
        jurisdiction  UTF8String,   -- ISO 3166-1 code of the country whose law the operating entity is under
        country       UTF8String,   -- where the machine is
        site          UTF8String,
        rack          UTF8String,
        roles         SEQUENCE OF UTF8String }

The extension is not marked critical: OpenSSL refuses critical extensions that it does not know, and no other authority
is trusted here anyway. A peer whose extension is missing or does not parse is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from storaged.cluster.policy import KeyHolder, outside_eu_law
from storaged.cluster.ports import PeerIdentity
from storaged.errors import CertificateRefused, JurisdictionRefused

NODE_EXTENSION = x509.ObjectIdentifier("2.25.182718496654254107276661388485389692855")
ROLES = frozenset({"storage", "gateway"})
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
CLUSTER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@asn1.sequence
class NodeExtension:
    version: int
    cluster: str
    name: str
    jurisdiction: str
    country: str
    site: str
    rack: str
    roles: list[str]


@dataclass(frozen=True)
class Identity:
    """A node's own identity: what its certificate says, the directory with its key files, and the key that verifies
    layouts.
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
        """What the policy judges when this node asks for a bucket's key."""
        from_ms, until_ms = (int(moment.timestamp() * 1000) for moment in (self.valid_from, self.expires))
        return KeyHolder(self.peer.country, self.peer.jurisdiction, from_ms, until_ms)


def load_identity(directory: Path, *, now: datetime | None = None) -> Identity:
    """Reads a node's own identity from its directory.

    Raises CertificateRefused (missing, unreadable, expired) and JurisdictionRefused, with the file and the reason.
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
    return identity_from(directory, certificate, administration)


def identity_from(directory: Path, certificate: x509.Certificate, administration: ed25519.Ed25519PublicKey) -> Identity:
    peer = identity_of(certificate)
    return Identity(directory, peer, certificate.not_valid_after_utc, administration, certificate.not_valid_before_utc)


def identity_of(certificate: x509.Certificate | bytes) -> PeerIdentity:
    """What a certificate (parsed, or DER as TLS gives it) says about its node. TLS has verified its signature and
    validity.

    Raises CertificateRefused when the extension is missing or malformed, JurisdictionRefused when the place or the
    operator is not under EU law.
    """
    try:
        if not isinstance(certificate, x509.Certificate):
            certificate = x509.load_der_x509_certificate(certificate)
        raw = certificate.extensions.get_extension_for_oid(NODE_EXTENSION).value
        assert isinstance(raw, x509.UnrecognizedExtension)
        found = asn1.decode_der(NodeExtension, raw.value)
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
        found.name,
        found.country,
        found.site,
        found.rack,
        tuple(found.roles),
        found.jurisdiction,
        found.cluster,
        certificate.fingerprint(hashes.SHA256()),
    )
    if common_names != [peer.name]:
        raise CertificateRefused(
            f"The certificate names {common_names} in its subject and {peer.name!r} in its extension."
        )
    if problem := problem_of(peer):
        raise CertificateRefused(f"The certificate of {peer.name!r} is malformed: {problem}.")
    for what, country in (("is", peer.country), ("is operated", peer.jurisdiction)):
        if reason := outside_eu_law(country):
            raise JurisdictionRefused(f"Node {peer.name!r} {what} outside EU law: {reason}.")
    return peer


def problem_of(peer: PeerIdentity) -> str:
    if not _NAME.fullmatch(peer.name):
        return "a node's name has up to 63 lower-case letters, digits and '-' between them"
    if not _PLACE.fullmatch(peer.site) or not _PLACE.fullmatch(peer.rack):
        return "site and rack have up to 32 letters, digits, '.', '_' and '-', beginning with a letter or digit"
    if not CLUSTER_ID.fullmatch(peer.cluster):
        return "no cluster is named"
    if not peer.roles or len(set(peer.roles)) != len(peer.roles) or not ROLES.issuperset(peer.roles):
        return f"roles are one or more of {', '.join(sorted(ROLES))}"
    return ""


class NodeSigner:
    """Signs with the key of the node's certificate (ECDSA, P-256, SHA-256), for example the checkpoints of its audit
    log.
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
    """The certificate of the authority that this node trusts. Raises CertificateRefused when the file does not load."""
    file = identity.directory / "authority.crt"
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateRefused(f"{file} does not load: {error}") from error


def signed_by_node(authority: x509.Certificate, certificate: bytes, data: bytes, signature: bytes) -> PeerIdentity:
    """Verifies a node's signature over ``data`` and returns who signed.

    ``certificate`` (DER) must be issued by ``authority``; it may have expired. Raises CertificateRefused.
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
