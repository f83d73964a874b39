"""The cluster's signing key, for data that nodes without keys verify. It is derived from the keyring, so all gateways
of a cluster have the same.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from storaged.sov1 import KEY_BYTES

SIGN_LABEL = b"sov.sign.v1\0"


def signing_key(record_key: bytes) -> Ed25519PrivateKey:
    """``record_key`` (32 bytes) is the keyring's. See FORMATS.md, section Public parts."""
    return Ed25519PrivateKey.from_private_bytes(HKDFExpand(SHA512(), KEY_BYTES, SIGN_LABEL).derive(record_key))
