"""Certificates of layouts: the acceptances of a majority of the predecessor's seed disks. Pure.

Theory of operation. The register ``layout`` of the system partition decides by compare-and-set which layout follows the
one in force. A storage node that reads this decision signs an *acceptance*: the cluster, the hash of the layout, that
of its predecessor, the epoch. It accepts one successor only. The acceptances of nodes with a majority of the
predecessor's seed disks (of both sets while the system partition moves) are the *certificate*. Two majorities share a
node, so at most one successor of a layout is used anywhere, although nodes learn layouts from each other and not from
the register. Everybody who knows the predecessor can verify a certificate.

The node certificates of acceptances may have expired: what counts is that the authority certified the node, and that
the predecessor names it.
"""

from __future__ import annotations

from collections.abc import Collection

from cryptography import x509

from storaged.cluster.identity import NodeSigner, signed_by_node
from storaged.cluster.layout import Layout, confirmed_roles
from storaged.cluster.signed_layout import Acceptance, SignedLayout
from storaged.errors import CertificateRefused, JurisdictionRefused, LayoutRefused
from storaged.wire import Message, encode

ACCEPTANCE_LABEL = b"sov.accept.v1\0"
ACCEPTANCES_MAX = 32
ACCEPTANCE_BYTES_MAX = 8192


class AcceptedLayout(Message, frozen=True):
    """What an acceptance signs, after ACCEPTANCE_LABEL. ``layout`` and ``predecessor`` are hashes of signed
    payloads.
    """

    cluster: str
    layout: bytes
    predecessor: bytes
    epoch: int


def _stated(signed: SignedLayout, layout: Layout) -> bytes:
    return ACCEPTANCE_LABEL + encode(AcceptedLayout(layout.cluster, signed.hash, layout.predecessor, layout.epoch))


def accept(signer: NodeSigner, signed: SignedLayout, layout: Layout) -> Acceptance:
    """Signs an acceptance. The caller has checked that it may."""
    return Acceptance(signer.certificate, signer.sign(_stated(signed, layout)))


def accepted_by(
    acceptance: Acceptance, signed: SignedLayout, layout: Layout, before: Layout, authority: x509.Certificate
) -> str:
    """The node that accepted ``layout``. ``before``: its predecessor. Raises LayoutRefused, with the reason, for an
    acceptance that does not count.
    """
    name = f"Layout {layout.epoch}: an acceptance does not count"
    if len(acceptance.certificate) + len(acceptance.signature) > ACCEPTANCE_BYTES_MAX:
        raise LayoutRefused(f"{name}: it has more than {ACCEPTANCE_BYTES_MAX} bytes.")
    try:
        peer = signed_by_node(authority, acceptance.certificate, _stated(signed, layout), acceptance.signature)
    except (CertificateRefused, JurisdictionRefused) as error:
        raise LayoutRefused(f"{name}: {error.message}") from None
    place = f"{peer.country}/{peer.site}/{peer.rack}"
    if peer.cluster != layout.cluster or "storage" not in confirmed_roles(before, peer.name, place, peer.roles):
        raise LayoutRefused(f"{name}: {peer.name} is no storage node of layout {before.epoch}.")
    if before.revokes(peer.fingerprint):
        raise LayoutRefused(f"{name}: layout {before.epoch} revokes the certificate of {peer.name}.")
    if peer.name not in seed_nodes(before):
        raise LayoutRefused(f"{name}: {peer.name} has no seed disk by layout {before.epoch}.")
    return peer.name


def seed_nodes(layout: Layout) -> frozenset[str]:
    """The nodes that have a seed disk, of both sets while the system partition moves."""
    return frozenset(layout.node_of(disk) for disk in (*layout.seeds, *layout.seeds_next) if disk in layout.disk_by_id)


def is_enough(before: Layout, nodes: Collection[str]) -> bool:
    """Whether these nodes have a majority of the seed disks of ``before``, of each set."""
    return all(
        2 * sum(disk in before.disk_by_id and before.node_of(disk) in nodes for disk in seeds) > len(seeds)
        for seeds in (before.seeds, before.seeds_next)
        if seeds or seeds is before.seeds
    )


def verify_certificate(signed: SignedLayout, layout: Layout, before: Layout, authority: x509.Certificate) -> None:
    """Raises LayoutRefused, with the reason, unless the layout has the acceptances of a majority. ``before``: the
    predecessor that it names.
    """
    if not signed.certificate:
        raise LayoutRefused(
            f"Layout {layout.epoch} moves data, and has no certificate: the nodes of layout {before.epoch} have not"
            " accepted it."
        )
    if len(signed.certificate) > ACCEPTANCES_MAX:
        raise LayoutRefused(f"Layout {layout.epoch} has more than {ACCEPTANCES_MAX} acceptances.")
    nodes = [accepted_by(acceptance, signed, layout, before, authority) for acceptance in signed.certificate]
    if len(set(nodes)) != len(nodes):
        raise LayoutRefused(f"Layout {layout.epoch} has two acceptances of one node.")
    if not is_enough(before, nodes):
        raise LayoutRefused(
            f"Layout {layout.epoch} was accepted by {', '.join(sorted(nodes))} alone, which have no majority of the"
            f" seed disks of layout {before.epoch}."
        )
