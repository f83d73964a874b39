"""Orders to end the lock of one version of an object: the break-glass of object lock. Pure.

Two people decide. The holder of the administration key signs an order, which names one version, its reason and its end.
The operator of a gateway, whose configuration must allow that (``[s3] break_glass``), has it carried out. An order is a
JSON document ``{"order": TEXT, "signature": HEX}``: the signature, by the administration key, is over
``sov.unlock.v1\\0`` and the bytes of TEXT, which is itself JSON.
"""

from __future__ import annotations

import json

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519
from msgspec import Struct

from storaged.errors import UnlockRefused

UNLOCK_LABEL = b"sov.unlock.v1\0"
_NO_ORDER = "This is not what `storaged bucket sign-unlock` prints."


class UnlockOrder(Struct, frozen=True, forbid_unknown_fields=True):
    """``until_ms``: the order counts until then, by the wall clock of the gateway. Raises UnlockRefused for an order
    without a version id: it would end the lock of the version that is the newest when the order is carried out."""

    cluster: str
    bucket: str
    key: str
    version: str
    reason: str
    until_ms: int

    def __post_init__(self) -> None:
        if not (self.bucket and self.key and self.version):
            raise UnlockRefused("An order names a bucket, a key and the id of one version.")

    @property
    def words(self) -> str:
        """What both people type."""
        return f"end the lock of version {self.version} of {self.bucket}/{self.key}"


def sign_order(order: UnlockOrder, administration: ed25519.Ed25519PrivateKey) -> str:
    text = msgspec.json.encode(order).decode()
    signature = administration.sign(UNLOCK_LABEL + text.encode())
    return json.dumps({"order": text, "signature": signature.hex()}, indent=2)


def words_in(document: str) -> tuple[str, str]:
    """The bucket of an order, and what is to be typed, without any check of the signature. Raises UnlockRefused."""
    try:
        order = msgspec.json.decode(json.loads(document)["order"], type=UnlockOrder)
    except (ValueError, KeyError, TypeError, msgspec.MsgspecError):
        raise UnlockRefused(_NO_ORDER) from None
    return order.bucket, order.words


def verify_order(document: str, administration: ed25519.Ed25519PublicKey, cluster: str, now_ms: int) -> UnlockOrder:
    """Raises UnlockRefused."""
    try:
        found = json.loads(document)
        text, signature = str(found["order"]).encode(), bytes.fromhex(found["signature"])
        administration.verify(signature, UNLOCK_LABEL + text)
        order = msgspec.json.decode(text, type=UnlockOrder)
    except InvalidSignature:
        raise UnlockRefused("The order is not signed by this cluster's administration key.") from None
    except (ValueError, KeyError, TypeError, msgspec.MsgspecError):
        raise UnlockRefused(_NO_ORDER) from None
    if order.cluster != cluster:
        raise UnlockRefused(f"The order is for cluster {order.cluster!r}, this is {cluster!r}.")
    if now_ms >= order.until_ms:
        raise UnlockRefused("The order has expired. Let the holder of the administration key sign another one.")
    return order
