"""When a connection has to end because a certificate that it was made under is over. TLS looks at that once, when the
connection is made, and connections live for weeks.

Both sides look: the listening one at its peer's certificate, the dialling one at both. They compare with the wall
clock every so often (a timer would not count the time that a machine sleeps). The dialling side makes a new connection
a minute before, and when its own certificate was renewed; calls that are under way end on the old one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from cryptography import x509

from storaged.errors import CertificateRefused

FRESH_BEFORE_S: Final = 60.0
"""So long before the end the dialling side tries for a connection under newer certificates: a reload on either side may
have brought one."""

FRESH_AGAIN_S: Final = 10.0
"""Between two such tries: until somebody renews his certificate each brings one that ends as soon."""


def expiry_of(certificate: bytes) -> float:
    """Seconds since 1970 at which a certificate (DER) is over. Raises CertificateRefused when it does not parse."""
    try:
        return x509.load_der_x509_certificate(certificate).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise CertificateRefused(f"The certificate cannot be read: {error}") from error


def expired(name: str, expires_s: float) -> CertificateRefused:
    """The refusal of a certificate that is over."""
    return CertificateRefused(
        f"The certificate of {name} expired on {datetime.fromtimestamp(expires_s, UTC):%Y-%m-%d %H:%M} UTC."
    )
