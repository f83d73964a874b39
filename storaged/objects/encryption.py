"""How an object is encrypted, as S3 names it: what a client asks for, and what a version keeps of it. Pure.

Every object is sealed under its own data key, which its bucket's key wraps. SSE-S3 names just that. SSE-KMS names the
keyring, which wraps the bucket's key, by a key id. With SSE-C the client's key wraps the data key too
(``objects.code.customer``).
"""

from __future__ import annotations

from msgspec import Struct

S3 = "AES256"
KMS = "aws:kms"
CUSTOMER = "customer"
"""SSE-C. It is no value of x-amz-server-side-encryption: clients name it by its own headers."""

NO_KEY = b""
"""In place of a customer's key: the request has none."""

CUSTOMER_KEY_BYTES = 32


class Encryption(Struct, frozen=True):
    """The encryption of a new object, if it is not SSE-S3.

    ``kind``: KMS or CUSTOMER. ``key_id``: the ARN of the key of SSE-KMS. ``bucket_key``: the client asked for an S3
    Bucket Key. ``context``: SSE-KMS's encryption context, as the client sent it. ``customer_key``: 32 bytes with
    SSE-C, which are never stored and never logged.
    """

    kind: str
    key_id: str = ""
    bucket_key: bool = False
    context: str = ""
    customer_key: bytes = NO_KEY

    def __repr__(self) -> str:
        return f"Encryption({self.kind!r}, {self.key_id!r})"
