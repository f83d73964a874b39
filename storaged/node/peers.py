"""Decides which peers this node talks to: by the policy, the layout in force, and the revoked certificates.

The checks run when a connection is made, in both directions. Whenever the layout or a revocation changes them, existing
connections are checked again (``RpcServer.recheck_peers``, ``RpcPool.recheck_peers``).
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from storaged.cluster.layout import Layout, confirmed_roles
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.policy import Policy, policy_of
from storaged.cluster.ports import PeerIdentity
from storaged.errors import CertificateRefused, CertificateRevoked

log = structlog.get_logger("node")


class PeerRules:
    """Of one node. ``own()``: what its certificate says now."""

    def __init__(self, own: Callable[[], PeerIdentity], layouts: LayoutBook) -> None:
        self._own = own
        self._layouts = layouts
        self._refused_by: tuple[bytes, str] = (b"", "")
        """The certificate of this node that a peer calls revoked, and the peer."""
        self.policy = Policy(())
        """The policy of the layout in force."""
        self.follow(layouts.current)

    def follow(self, layout: Layout) -> None:
        """Takes over the policy of a layout.

        Raises JurisdictionRefused for a policy that names a country outside EU law; then no peer is admitted.
        """
        self.policy = Policy(())
        self.policy = policy_of(layout)

    def check_revoked(self, peer: PeerIdentity) -> None:
        """Raises CertificateRevoked."""
        if self._layouts.is_revoked(peer.fingerprint):
            raise CertificateRevoked(
                f"The certificate of {peer.name} with the fingerprint {peer.fingerprint.hex()} is revoked."
            )

    def admit(self, peer: PeerIdentity) -> None:
        """An ``Admission``."""
        self.check_revoked(peer)
        self.policy.admit(peer)

    def admit_dialled(self, peer: PeerIdentity) -> None:
        """An ``Admission`` of nodes that this one calls by name: their certificate must agree with the layout in force.

        Raises CertificateRefused, JurisdictionRefused.
        """
        self.admit(peer)
        if not self.roles_of(peer):
            where = f"{peer.country}/{peer.site}/{peer.rack}"
            raise CertificateRefused(
                f"{peer.name} is certified as {', '.join(peer.roles)} in {where}; the layout in force says otherwise."
            )

    def roles_of(self, peer: PeerIdentity) -> frozenset[str]:
        """A ``cluster.ports.RolesOf``."""
        return confirmed_roles(self._layouts.current, peer.name, f"{peer.country}/{peer.site}/{peer.rack}", peer.roles)

    def on_revoked(self, peer: str, fingerprint: bytes) -> None:
        """A peer refuses this node, because the certificate that it presented is revoked. That one may be replaced
        meanwhile.
        """
        if self._refused_by[0] != fingerprint and fingerprint == self._own().fingerprint:
            log.error(
                "this node's certificate is revoked",
                peer=peer,
                fingerprint=fingerprint.hex(),
                code=CertificateRevoked.code,
            )
        self._refused_by = fingerprint, peer

    def on_attempt(self, peer: str, reached: bool) -> None:
        """A peer that takes this node's calls has taken back what it said of the certificate."""
        if reached and self._refused_by[1] == peer:
            self._refused_by = b"", ""

    def own_revocation(self) -> str:
        """Why this node's own certificate is of no use; empty when it is not revoked, as far as this node knows.

        A peer that lies about it can make this node say so while it refuses this node's calls, and nothing else.
        """
        own = self._own()
        if self._layouts.is_revoked(own.fingerprint):
            return f"the layout revokes the certificate {own.fingerprint.hex()} of {own.name}"
        fingerprint, peer = self._refused_by
        return f"{peer} says that the certificate of {own.name} is revoked" if fingerprint == own.fingerprint else ""

    @property
    def is_own_revoked(self) -> bool:
        """Whether a signed layout revokes this node's certificate."""
        return self._layouts.is_revoked(self._own().fingerprint)
