"""Creates a cluster's authority, and issues certificates to its nodes.

The authority signs with ECDSA on P-256, which every TLS stack and hardware token supports. Layouts are signed by the
administration key (Ed25519), whose private half is never on a storage node.

Files of an authority: ``authority.key``, ``authority.crt``, ``administration.key``, ``administration.pub``; of a node:
``node.key``, ``node.crt``, ``authority.crt``, ``administration.pub``. Private keys have mode 0600.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from storaged.cluster.identity import CLUSTER_ID, NODE_EXTENSION, Identity, NodeExtension, identity_from, problem_of
from storaged.cluster.layout import Location
from storaged.cluster.policy import outside_eu_law
from storaged.cluster.ports import PeerIdentity
from storaged.durable import replace_file
from storaged.errors import JurisdictionRefused, OperatorError

AUTHORITY_DAYS = 3650
NODE_DAYS = 825
BACKDATE = timedelta(hours=1)
"""Certificates are valid from one hour before they were made, for machines whose clock is slow."""


@dataclass(frozen=True)
class Authority:
    """The cluster's certificate authority and administration key, in a directory that the operator keeps offline."""

    directory: Path
    cluster: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    administration: ed25519.Ed25519PrivateKey

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the authority's certificate."""
        return self.certificate.fingerprint(hashes.SHA256())


def create_authority(directory: Path, cluster: str, *, now: datetime | None = None) -> Authority:
    """Creates the authority and the administration key of a new cluster.

    Raises OperatorError for a bad cluster id, and when the directory holds an authority already.
    """
    if not CLUSTER_ID.fullmatch(cluster):
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
    replace_file(directory / "administration.key", private_pem(administration), 0o600)
    replace_file(directory / "administration.pub", public_pem(administration.public_key()), 0o644)
    replace_file(directory / "authority.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    replace_file(directory / "authority.key", private_pem(key), 0o600)
    return Authority(directory, cluster, key, certificate, administration)


def load_authority(directory: Path) -> Authority:
    """Reads an authority from its directory. Raises OperatorError when a file is missing or unreadable."""
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
    if not CLUSTER_ID.fullmatch(cluster):
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
    days: float = NODE_DAYS,
) -> Identity:
    """Makes a key and a certificate for one node, and writes all that the node needs into ``directory``.

    ``jurisdiction`` is the operator's (default: the country of the node). ``days`` may be a fraction. An earlier
    certificate there is replaced. Raises JurisdictionRefused for a place or operator that no policy admits,
    OperatorError for a bad name, place or role.
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
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify_node(authority, peer, key.public_key(), days=days)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(directory / "administration.pub", public_pem(authority.administration.public_key()), 0o644)
    replace_file(directory / "authority.crt", authority.certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    replace_file(directory / "node.key", private_pem(key), 0o600)
    replace_file(directory / "node.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return identity_from(directory, certificate, authority.administration.public_key())


def certify_node(
    authority: Authority, peer: PeerIdentity, key: ec.EllipticCurvePublicKey, *, days: float = NODE_DAYS
) -> x509.Certificate:
    """Signs a certificate for ``key``. Raises JurisdictionRefused for a place or operator that no policy admits,
    OperatorError for a bad name, place or role.
    """
    if problem := problem_of(peer):
        raise OperatorError(f"No certificate for {peer.name!r}: {problem}.")
    for country in (peer.country, peer.jurisdiction):
        if reason := outside_eu_law(country):
            raise JurisdictionRefused(f"No certificate for {peer.name!r}: {reason}.")
    return certify(authority, peer, key, days=days, now=datetime.now(UTC))


def certify(
    authority: Authority, peer: PeerIdentity, key: ec.EllipticCurvePublicKey, *, days: float, now: datetime
) -> x509.Certificate:
    """Signs a certificate for ``key`` that says what ``peer`` says. The caller has checked that it may."""
    extension = asn1.encode_der(
        NodeExtension(
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


def private_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: ed25519.Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
