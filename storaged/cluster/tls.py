"""TLS contexts of a node: mutual TLS 1.3 that trusts only the cluster's own authority.

Host names are not checked: a node is what its certificate says, at any address. The RPC compares the name in the
certificate with the one that it meant to reach.
"""

from __future__ import annotations

import ssl

from storaged.cluster.identity import Identity
from storaged.errors import CertificateRefused


def server_context(identity: Identity) -> ssl.SSLContext:
    """Mutual TLS 1.3 for the side that listens. Raises CertificateRefused when the files do not load."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity)
    context.num_tickets = 0  # connections live for days: resumption would save nothing, and skip the certificate
    return context


def client_context(identity: Identity) -> ssl.SSLContext:
    """Mutual TLS 1.3 for the side that dials; the caller compares the certified node name with the one it meant."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, identity)


def renew(context: ssl.SSLContext, identity: Identity) -> None:
    """New handshakes on ``context`` use the certificate that is in the identity's directory now.

    Raises CertificateRefused, and changes nothing, when it does not load.
    """
    try:
        context.load_cert_chain(identity.directory / "node.crt", identity.directory / "node.key")
    except (OSError, ssl.SSLError) as error:
        raise CertificateRefused(f"{identity.directory / 'node.crt'} and its key do not load: {error}") from error


def _context(protocol: int, identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
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
