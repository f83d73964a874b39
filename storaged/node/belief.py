"""Which values of the registers ``layout``, ``signer/ID`` and ``cluster`` are genuine. ``objects.system.belief`` judges
buckets and users.

Layouts and statements carry signatures that every node can verify. The record of the cluster carries an authenticator
of the keyring.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from cryptography import x509

from storaged.cluster.identity import Identity
from storaged.cluster.signed_layout import SignedLayout, verify_layout
from storaged.cluster.signers import PREFIX, certified_key
from storaged.errors import CertificateRefused, JurisdictionRefused, LayoutRefused
from storaged.meta.names import RegisterName, Value
from storaged.node.binding import CLUSTER
from storaged.wire import decode


class NodeBelief:
    """``believes(name, value)`` of a node (``meta.client``). ``others`` judges all other registers."""

    def __init__(
        self, own: Identity, authority: x509.Certificate, others: Callable[[RegisterName, Value], bool]
    ) -> None:
        self._own = own
        self._authority = authority
        self._others = others
        self.is_binding: Callable[[Value], bool] = lambda value: True
        """Whether a gateway wrote this record of the cluster, as far as this process can know now."""

    def __call__(self, name: RegisterName, value: Value) -> bool:
        if value.sequence == 0:
            return True  # the register was never written
        try:
            if name.key == b"layout":
                verify_layout(decode(value.body, SignedLayout), self._own.administration, self._own.cluster)
            elif name.key.startswith(PREFIX.encode()):
                certified_key(
                    value.body, bytes.fromhex(name.key.decode()[len(PREFIX) :]), self._authority, self._own.cluster
                )
            elif name == CLUSTER:
                return self.is_binding(value)
            else:
                return self._others(name, value)
        except (msgspec.MsgspecError, ValueError, LayoutRefused, CertificateRefused, JurisdictionRefused):
            return False
        return True
