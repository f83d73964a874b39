"""``storaged cluster certificates`` and ``revoke``: which certificates were signed, and which of them end now.

The folder with the authority's keys has each certificate that was signed with it: ``issued/FINGERPRINT.crt``, and
those of earlier versions in ``nodes/NODE/identity``. A revocation is in the list of the next layout. Nodes follow it as
soon as they know that layout, and for ever (``LayoutBook.is_revoked``); layouts name it until the certificate has
expired.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from storaged.cli.options import AS_JSON, AUTHORITY
from storaged.errors import CertificateRefused, JurisdictionRefused, OperatorError

if TYPE_CHECKING:  # a command imports what it needs when it runs
    from collections.abc import Iterator

    from cryptography import x509

    from storaged.cli import create as files
    from storaged.cluster.ports import PeerIdentity

FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class Issued(NamedTuple):
    """A certificate that was signed here. ``until_ms``: when it expires, in milliseconds since 1970."""

    fingerprint: str
    node: str
    from_ms: int
    until_ms: int

    def document(self, revoked: bool) -> dict[str, Any]:
        return {**self._asdict(), "revoked": revoked}


def _certificates(directory: Path) -> Iterator[tuple[x509.Certificate, PeerIdentity]]:
    """All that this folder has, some of them twice, with what they say. Raises OperatorError."""
    from cryptography import x509

    from storaged.cluster.identity import identity_of

    for path in (*directory.glob("issued/*.crt"), *directory.glob("nodes/*/identity/node.crt")):
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            yield certificate, identity_of(certificate)
        except (ValueError, CertificateRefused, JurisdictionRefused) as error:
            raise OperatorError(f"{path} is no certificate of a node: {error}. Move it away.") from None


def jurisdiction_of(directory: Path, node: str) -> str:
    """Under whose law a node's operator is, as its newest certificate says; empty when there is none."""
    found = [(one.not_valid_before_utc, peer) for one, peer in _certificates(directory) if peer.name == node]
    return max(found, key=lambda one: one[0])[1].jurisdiction if found else ""


def issued(directory: Path) -> list[Issued]:
    """All certificates that this folder knows of, oldest first."""
    from cryptography.hazmat.primitives import hashes

    found = {}
    for certificate, peer in _certificates(directory):
        times = [
            int(when.timestamp() * 1000) for when in (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        ]
        fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
        found[fingerprint] = Issued(fingerprint, peer.name, times[0], times[1])
    return sorted(found.values(), key=lambda one: (one.node, one.from_ms))


def revoked_here(directory: Path, listed: files.ClusterPlan) -> set[str]:
    """The fingerprints that the next layout revokes."""
    from storaged.cli import create as files
    from storaged.cluster import issuing

    last = files.last_signed(issuing.load_authority(directory), listed)
    before = {revoked.fingerprint.hex() for revoked in last[1].revoked} if last is not None else set()
    return before | {revoked.fingerprint for revoked in listed.revoked}


@click.command("certificates")
@AUTHORITY
@AS_JSON
def certificates(directory: Path, as_json: bool) -> None:
    """List the certificates that were signed with AUTHORITY, with their fingerprints (SHA-256).

    Those of one node are in the order in which they were signed.
    """
    from storaged.cli import create as files

    revoked = revoked_here(directory, files.load_plan(directory))
    found = issued(directory)
    if as_json:
        click.echo(json.dumps([one.document(one.fingerprint in revoked) for one in found], indent=2))
        return
    now_ms = int(time.time() * 1000)
    for one in found:
        since = time.strftime("%Y-%m-%d %H:%M", time.gmtime(one.from_ms / 1000))
        until = time.strftime("%Y-%m-%d", time.gmtime(one.until_ms / 1000))
        state = "revoked" if one.fingerprint in revoked else "expired" if one.until_ms <= now_ms else "valid"
        click.echo(f"{one.node:<20} {state:<8} from {since} until {until}  {one.fingerprint}")


@click.command("revoke")
@AUTHORITY
@click.argument("named", metavar="NODE|FINGERPRINT")
@AS_JSON
def revoke(directory: Path, named: str, as_json: bool) -> None:
    """Let the next layout revoke all certificates of NODE, or the one with this FINGERPRINT.

    Nodes end connections with such a certificate as soon as they know that layout. It moves no data. A revocation can't
    be taken back: a member whose only certificate is revoked needs a new one (`storaged cluster renew`).
    """
    from storaged.cli import create as files
    from storaged.cli.succeeding import layouts_after
    from storaged.cluster import issuing

    listed, now_ms = files.load_plan(directory), int(time.time() * 1000)
    known = revoked_here(directory, listed)
    wanted = [one for one in _named(directory, named, now_ms) if one.until_ms > now_ms and one.fingerprint not in known]
    if not wanted:
        raise OperatorError(f"{named}: nothing to revoke: all its certificates have expired, or are revoked already")
    listed.revoked += [files.RevokedPlan(one.fingerprint, one.node, one.until_ms) for one in wanted]
    if (last := files.last_signed(issuing.load_authority(directory), listed)) is not None:
        layouts_after(listed, last)
    files.save_plan(directory, listed)
    if as_json:
        click.echo(json.dumps({"revoked": [one.document(True) for one in wanted]}, indent=2))
        return
    for one in wanted:
        click.echo(f"the next layout revokes {one.fingerprint} of {one.node or 'a node that is not known here'}")
    click.echo(f"  Next: storaged cluster layout {directory}, and apply the layout on a gateway")


def _named(directory: Path, named: str, now_ms: int) -> list[Issued]:
    """The certificates that are meant. Raises OperatorError.

    A fingerprint that this folder does not know may be that of an earlier version. It is revoked for as long as a
    certificate is valid.
    """
    from storaged.cluster.issuing import NODE_DAYS

    found = issued(directory)
    fingerprint = named.lower().replace(":", "")
    if FINGERPRINT.fullmatch(fingerprint):
        one = next((one for one in found if one.fingerprint == fingerprint), None)
        return [one or Issued(fingerprint, "", now_ms, now_ms + NODE_DAYS * 86_400_000)]
    of_node = [one for one in found if one.node == named]
    if not of_node:
        raise OperatorError(
            f"no certificate of {named} is known here. If there is one, name its fingerprint, as on its server: openssl"
            " x509 -in node.crt -noout -fingerprint -sha256"
        )
    return of_node
