"""TLS contexts of a node: mutual TLS 1.3 that trusts only the cluster's own authority.

Host names are not checked: a node is what its certificate says, at any address. The RPC compares the name in the
certificate with the one that it meant to reach.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

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


_CALLED_PER_RECORD = ("read", "write", "pending")


class _DirectSSLObject(ssl.SSLObject):
    """Calls OpenSSL for each record of 16 KiB without a Python function in between.

    ``_create`` and ``_sslobj`` are not public. Python 3.11 to 3.13 have them; where a Python lacks them, this is an
    ordinary SSLObject.
    """

    @classmethod
    def _create(cls, *arguments: Any, **named: Any) -> _DirectSSLObject:
        made = super()._create(*arguments, **named)  # type: ignore[misc]
        made.__dict__.update(_native_calls(made))
        return made  # type: ignore[no-any-return]


def _native_calls(made: object) -> dict[str, Callable[..., Any]]:
    """The methods of the native object that do an SSLObject's work for each record, by name; empty when there
    is none.
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
