"""Signs and verifies the votes by which a disk is out (``cluster.sparing``). Pure.

A node signs a vote with the key of its certificate. The certificate may have expired: what counts is that the authority
certified the node, and that the layout of the vote names it as a storage node with a disk, and does not revoke the
certificate. The votes of one question share its nonce. A disk is out by the votes of one question alone, so what nodes
said at different times is not added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cryptography import x509
from msgspec import MsgspecError

from storaged.cluster.identity import NodeSigner, signed_by_node
from storaged.cluster.layout import Layout, confirmed_roles
from storaged.cluster.sparing import DISKS_MAX, VOTES_MAX, DisksOut, OutDisk, SignedVote, Vote, verdict_on, voters_of
from storaged.errors import CertificateRefused, JurisdictionRefused, VoteRefused
from storaged.wire import decode, encode

VOTE_LABEL = b"sov.vote.v1\0"
VOTE_BYTES_MAX = 64 * 1024
STATE_CHARS_MAX = 32

LayoutAt = Callable[[int], Layout]
"""``layout_at(epoch)``: a layout that this node knows; raises KeyError."""


def sign_vote(signer: NodeSigner, vote: Vote) -> SignedVote:
    payload = encode(vote)
    return SignedVote(payload, signer.certificate, signer.sign(VOTE_LABEL + payload))


def verify_vote(signed: SignedVote, layout_at: LayoutAt, authority: x509.Certificate, cluster: str) -> Vote:
    """Raises VoteRefused, with the reason, unless a storage node of the vote's layout signed it."""
    if len(signed.payload) + len(signed.certificate) + len(signed.signature) > VOTE_BYTES_MAX:
        raise VoteRefused(f"A vote has more than {VOTE_BYTES_MAX} bytes.")
    try:
        vote = decode(signed.payload, Vote)
        peer = signed_by_node(authority, signed.certificate, VOTE_LABEL + signed.payload, signed.signature)
        layout = layout_at(vote.epoch)
    except (MsgspecError, CertificateRefused, JurisdictionRefused) as error:
        raise VoteRefused(f"A vote does not count: {error}") from None
    except KeyError:
        raise VoteRefused("A vote does not count: its layout is not known here.") from None
    place = f"{peer.country}/{peer.site}/{peer.rack}"
    if (peer.cluster, peer.name, vote.cluster) != (cluster, vote.node, cluster):
        raise VoteRefused(f"The vote of {vote.node} is signed by {peer.name} of {peer.cluster}.")
    if "storage" not in confirmed_roles(layout, peer.name, place, peer.roles) or peer.name not in voters_of(layout):
        raise VoteRefused(f"{peer.name} has no vote by layout {layout.epoch}.")
    if layout.revokes(peer.fingerprint):
        raise VoteRefused(f"Layout {layout.epoch} revokes the certificate of {peer.name}.")
    if len({opinion.disk for opinion in vote.opinions}) != len(vote.opinions):
        raise VoteRefused(f"The vote of {vote.node} names a disk twice.")
    if any(len(opinion.state) > STATE_CHARS_MAX for opinion in vote.opinions):
        raise VoteRefused(f"The vote of {vote.node} has a state of more than {STATE_CHARS_MAX} characters.")
    return vote


def check_votes(record: DisksOut, layout_at: LayoutAt, authority: x509.Certificate, cluster: str) -> None:
    """Raises VoteRefused unless a majority of the storage nodes of a layout voted each of its disks out, each node
    after the delay that this layout says.
    """
    if len(record.votes) > VOTES_MAX or len(record.out) > DISKS_MAX:
        raise VoteRefused("The record of disks that are out has too many disks or votes.")
    rounds: dict[tuple[int, bytes], dict[str, Vote]] = {}
    for signed in record.votes:
        vote = verify_vote(signed, layout_at, authority, cluster)
        rounds.setdefault((vote.epoch, vote.nonce), {})[vote.node] = vote
    for entry in record.out:
        if not any(_is_out(entry.disk, votes.values(), layout_at(epoch)) for (epoch, _), votes in rounds.items()):
            raise VoteRefused(f"No majority voted disk {entry.disk} out.")


def check_said_out(
    disk: str, votes: tuple[SignedVote, ...], since: int, layout_at: LayoutAt, authority: x509.Certificate, cluster: str
) -> None:
    """Raises VoteRefused unless these votes say that a disk is out, under layouts from the epoch ``since`` on."""
    check_votes(DisksOut(0, (OutDisk(disk, 0, ""),), votes), layout_at, authority, cluster)
    oldest = min(decode(vote.payload, Vote).epoch for vote in votes)
    if oldest < since:
        raise VoteRefused(f"A vote is of layout {oldest}, from before the last layout that moved data.")


def _is_out(disk: str, votes: Iterable[Vote], layout: Layout) -> bool:
    delay_s = layout.sparing.registers_s
    return verdict_on(disk, votes, layout, lambda opinion: opinion.says_away(delay_s)) is not None
