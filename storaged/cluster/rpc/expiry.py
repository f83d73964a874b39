"""Ends connections whose certificates have expired.

TLS checks a certificate's validity once, when the connection is made, and connections live for weeks. So both sides
check again every so often: the listening side its peer's certificate, the dialling side both. They compare with the
wall clock; a timer would not count the time that a machine sleeps. The dialling side makes a new connection one minute
before expiry, and when its own certificate was renewed; calls under way finish on the old connection.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from cryptography import x509

from storaged.errors import CertificateRefused

REDIAL_BEFORE_S: Final = 60.0
"""How long before expiry the dialling side begins to try for a connection under newer certificates: a reload on either
side may have brought one."""

REDIAL_INTERVAL_S: Final = 10.0
"""The time between two such tries. Until a certificate is renewed, each try yields a connection that expires equally
soon."""


def expiry_of(certificate: bytes) -> float:
    """When a certificate (DER) expires, in seconds since 1970. Raises CertificateRefused when it does not parse."""
    try:
        return x509.load_der_x509_certificate(certificate).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise CertificateRefused(f"The certificate cannot be read: {error}") from error


def expired(name: str, expires_s: float) -> CertificateRefused:
    """The error for a certificate that has expired."""
    return CertificateRefused(
        f"The certificate of {name} expired on {datetime.fromtimestamp(expires_s, UTC):%Y-%m-%d %H:%M} UTC."
    )
