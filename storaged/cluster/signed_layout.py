"""Signs layouts with the cluster's administration key (Ed25519) and verifies them.

A layout that moves data needs more than that signature: a certificate (``cluster.certificates``), which travels with
it. So do the layouts that were signed beforehand to follow it (``cluster.presigned``).
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519
from msgspec import MsgspecError

from storaged.cluster.layout import Layout
from storaged.cluster.sparing import SignedVote
from storaged.errors import LayoutRefused
from storaged.wire import Message, decode, encode

LAYOUT_LABEL = b"sov.layout.v1\0"
LAYOUT_BYTES_MAX = 4 * 1024 * 1024


class Acceptance(Message, frozen=True):
    """A storage node's statement that it accepts a layout (``cluster.certificates``). ``signature`` (ECDSA, P-256,
    SHA-256) is by the key of ``certificate`` (DER).
    """

    certificate: bytes
    signature: bytes


class Presigned(Message, frozen=True):
    """A layout that was signed beforehand. ``cluster.presigned`` makes its content from that of the layout before it.

    ``out``: the seed disk that goes; empty for the layout that ends the exchange. ``comes``: the disk that takes its
    place. ``following``: what was signed to follow it.
    """

    out: str
    comes: str
    signature: bytes
    following: tuple[Presigned, ...] = ()


class SignedLayout(Message, frozen=True):
    """``payload`` is the encoded layout; ``signature`` Ed25519 over ``sov.layout.v1\\0`` and the payload."""

    payload: bytes
    signature: bytes
    certificate: tuple[Acceptance, ...] = ()
    """Of a layout that moves data, once a majority accepted it; else empty."""
    following: tuple[Presigned, ...] = ()
    """Layouts that were signed beforehand to follow it."""
    votes: tuple[SignedVote, ...] = ()
    """That a disk is out, of a layout that was signed beforehand for this case: until it is in force."""

    @property
    def hash(self) -> bytes:
        """SHA-256 of the payload: what a successor names as its predecessor."""
        return hashlib.sha256(self.payload).digest()


def sign_layout(layout: Layout, administration: ed25519.Ed25519PrivateKey) -> SignedLayout:
    payload = encode(layout)
    return SignedLayout(payload, administration.sign(LAYOUT_LABEL + payload))


def verify_layout(signed: SignedLayout, administration: ed25519.Ed25519PublicKey, cluster: str) -> Layout:
    """Returns the layout if the administration key of this cluster signed exactly these bytes. Raises LayoutRefused."""
    if len(signed.payload) > LAYOUT_BYTES_MAX:
        raise LayoutRefused(f"The layout has {len(signed.payload)} bytes; the limit is {LAYOUT_BYTES_MAX}.")
    try:
        administration.verify(signed.signature, LAYOUT_LABEL + signed.payload)
        layout = decode(signed.payload, Layout)
    except InvalidSignature as error:
        raise LayoutRefused("The layout's signature is not by this cluster's administration key.") from error
    except MsgspecError as error:
        raise LayoutRefused(f"The signed layout does not decode: {error}") from error
    if layout.cluster != cluster:
        raise LayoutRefused(f"The layout belongs to cluster {layout.cluster!r}, this is {cluster!r}.")
    return layout
