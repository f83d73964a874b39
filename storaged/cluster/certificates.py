"""Certificates of layouts: the acceptances of a majority of the predecessor's seed disks. Pure.

Theory of operation. The register ``layout`` of the system partition decides by compare-and-set which layout follows the
one in force. A storage node that reads this decision signs an *acceptance*: the cluster, the hash of the layout, that
of its predecessor, the epoch. It accepts one successor only. The acceptances of nodes with a majority of the
predecessor's seed disks (of both sets while the system partition moves) are the *certificate*. Two majorities share a
node, so at most one successor of a layout is used anywhere, although nodes learn layouts from each other and not from
the register. Everybody who knows the predecessor can verify a certificate.

A layout that recovers the system partition needs the acceptances of all seed disks that are left, by what it says
itself (``cluster.succession``). A lost seed disk counts for nothing.

The node certificates of acceptances may have expired: what counts is that the authority certified the node, and that
the predecessor names it.
"""

from __future__ import annotations

from collections.abc import Collection

from cryptography import x509

from storaged.cluster.identity import NodeSigner, signed_by_node
from storaged.cluster.layout import Layout, confirmed_roles
from storaged.cluster.signed_layout import Acceptance, SignedLayout
from storaged.cluster.succession import recovers
from storaged.cluster.voters import is_quorum
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
    if peer.name not in seed_nodes(before, layout):
        raise LayoutRefused(f"{name}: {peer.name} has no seed disk by layout {before.epoch}.")
    return peer.name


def seed_nodes(before: Layout, after: Layout) -> frozenset[str]:
    """The nodes with a seed disk of ``before`` that may accept ``after``: of both sets while the system partition
    moves. A lost seed disk does not count.
    """
    lost = {*before.seeds_lost, *after.lost}
    seeds = (disk for disk in (*before.seeds, *before.seeds_next) if disk not in lost)
    return frozenset(before.node_of(disk) for disk in seeds if disk in before.disk_by_id)


def is_enough(before: Layout, after: Layout, nodes: Collection[str]) -> bool:
    """Whether the acceptances of these nodes bring ``after`` into force: they have a quorum of the seed disks of
    ``before``; for a recovery, all that are left of them.
    """
    accepted = {disk.id for disk in before.disks if disk.node in nodes}
    if recovers(after):
        left = {*before.seeds, *before.seeds_next}.difference(before.seeds_lost, after.lost)
        return bool(left) and left <= accepted
    sets = tuple(seeds for seeds in (before.seeds, before.seeds_next) if seeds or seeds is before.seeds)
    return is_quorum(sets, before.seeds_lost, accepted)


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
    if not is_enough(before, layout, nodes):
        wanted = (
            "do not have all seed disks that are left" if recovers(layout) else "have no majority of the seed disks"
        )
        raise LayoutRefused(
            f"Layout {layout.epoch} was accepted by {', '.join(sorted(nodes))} alone, which {wanted} of layout"
            f" {before.epoch}."
        )
