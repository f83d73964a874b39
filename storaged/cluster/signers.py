"""Certifies the key with which gateways sign what nodes without keys must believe.

It is an Ed25519 key of the cluster's gateways, certified in two steps from the cluster's authority::

    authority (pinned on every node)  certifies  the node key of a gateway          (X.509, role gateway)
    the node key of a gateway         certifies  the signing key of the cluster     (SignerStatement, register
                                                                                     signer/ID)
    the signing key                   signs      the public part of records         (objects.system.public)

All gateways of a cluster derive the same signing key from their keyring. So a record has the same signature whichever
gateway wrote it, and one statement is enough. The certificate in a statement may have expired: what counts is that the
authority certified this key as one of a gateway of this cluster. So records stay believed after their gateway is gone.
Any gateway writes a lost or damaged statement again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import MsgspecError

from storaged.cluster.identity import NodeSigner, signed_by_node
from storaged.errors import CertificateRefused, DataDamaged, JurisdictionRefused
from storaged.sov1 import pack_context
from storaged.wire import Message, decode, encode

STATEMENT_LABEL = b"sov.signer.v1\0"
SIGNER_ID_BYTES = 16
PREFIX = "signer/"

SIGNERS_KEPT_MAX = 64
"""Keys that a node remembers as certified. A cluster has one, or two after its keyring was exchanged."""


class SignerStatement(Message, frozen=True):
    """The register ``signer/ID``.

    ``public`` (32 bytes) is an Ed25519 key, ``certificate`` (DER) that of a gateway. ``signature`` (ECDSA, P-256,
    SHA-256) is by the certificate's key over the label and lp(cluster, public).
    """

    public: bytes
    certificate: bytes
    signature: bytes


def signer_id(public: bytes) -> bytes:
    """The name of a signer in a record: the first 16 bytes of SHA-256 over the label and the public key."""
    return hashlib.sha256(STATEMENT_LABEL + public).digest()[:SIGNER_ID_BYTES]


def signer_path(signer: bytes) -> str:
    return PREFIX + signer.hex()


def state_signer(node: NodeSigner, cluster: str, public: bytes) -> SignerStatement:
    """A gateway's statement that ``public`` is the signing key of its cluster."""
    return SignerStatement(public, node.certificate, node.sign(_stated(cluster, public)))


def certified_key(body: bytes, signer: bytes, authority: x509.Certificate, cluster: str) -> Ed25519PublicKey:
    """The key of an encoded statement. Raises CertificateRefused, with the reason, when the statement is about another
    key than ``signer`` or not by a gateway of this cluster.
    """
    try:
        statement = decode(body, SignerStatement)
    except MsgspecError as error:
        raise CertificateRefused(f"The statement of signer {signer.hex()} cannot be read: {error}") from None
    if signer_id(statement.public) != signer:
        raise CertificateRefused(f"The statement under {signer.hex()} is about another key.")
    try:
        peer = signed_by_node(authority, statement.certificate, _stated(cluster, statement.public), statement.signature)
    except JurisdictionRefused as error:
        raise CertificateRefused(error.message) from None
    if peer.cluster != cluster or "gateway" not in peer.roles:
        raise CertificateRefused(
            f"Signer {signer.hex()} is certified by {peer.name} of {peer.cluster}, which is no gateway of {cluster}."
        )
    try:
        return Ed25519PublicKey.from_public_bytes(statement.public)
    except ValueError as error:
        raise CertificateRefused(f"The key of signer {signer.hex()} is none: {error}") from None


def is_signed(key: Ed25519PublicKey, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` (64 bytes) is the key's over ``message``."""
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


class Signers:
    """The certified keys, by id, as a node without a keyring learns them."""

    def __init__(
        self, read: Callable[[str], Awaitable[bytes | None]], authority: x509.Certificate, cluster: str
    ) -> None:
        """``read(path)`` returns the settled body of a system register, None when there is none. It raises
        ServiceUnavailable without a majority.
        """
        self._read = read
        self._authority = authority
        self._cluster = cluster
        self._known: dict[bytes, Ed25519PublicKey] = {}

    async def key(self, signer: bytes) -> Ed25519PublicKey:
        """The key of a signer. Raises CertificateRefused when no gateway of this cluster certified it,
        ServiceUnavailable when that can't be known now.
        """
        known = self._known.get(signer)
        if known is not None:
            return known
        try:
            body = await self._read(signer_path(signer)) if len(signer) == SIGNER_ID_BYTES else None
        except (
            DataDamaged
        ) as error:  # the damaged row of one signer must not stop the verification of other signers' records
            raise CertificateRefused(f"The statement of signer {signer.hex()} is damaged: {error.message}") from None
        if body is None:
            raise CertificateRefused(f"No gateway has certified a signer {signer.hex() or 'without a name'}.")
        if len(self._known) >= SIGNERS_KEPT_MAX:
            self._known.clear()
        found = self._known[signer] = certified_key(body, signer, self._authority, self._cluster)
        return found


async def publish(
    read: Callable[[str], Awaitable[bytes | None]],
    write: Callable[[str, bytes], Awaitable[None]],
    node: NodeSigner,
    authority: x509.Certificate,
    cluster: str,
    public: bytes,
) -> bool:
    """Writes this gateway's statement unless there is a valid one. Returns whether it wrote.

    Raises ServiceUnavailable without a majority.
    """
    signer = signer_id(public)
    try:
        body = await read(signer_path(signer))
        if body is not None:
            certified_key(body, signer, authority, cluster)
            return False
    except (CertificateRefused, DataDamaged):
        pass
    await write(signer_path(signer), encode(state_signer(node, cluster, public)))
    return True


def _stated(cluster: str, public: bytes) -> bytes:
    return pack_context(STATEMENT_LABEL, [cluster.encode(), public])
