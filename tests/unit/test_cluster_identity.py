"""Certificates, their extension, and the signature on layouts."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from storaged.cluster import identity, issuing, signed_layout, tls
from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.errors import CertificateRefused, JurisdictionRefused, LayoutRefused, OperatorError
from tests.worlds.authority import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_node_certificate_says_where_the_node_stands_and_who_runs_it(world: World) -> None:
    own = issuing.issue(
        world.authority,
        world.directory / "n1",
        name="n1",
        location="FR/par1/a",
        roles=("storage", "gateway"),
        jurisdiction="DE",
    )
    again = identity.load_identity(own.directory)
    assert again.peer == own.peer
    assert len(own.peer.fingerprint) == 32
    assert own.peer._replace(fingerprint=b"")._asdict() == {
        "fingerprint": b"",
        "name": "n1",
        "country": "FR",
        "site": "par1",
        "rack": "a",
        "roles": ("gateway", "storage"),
        "jurisdiction": "DE",
        "cluster": "c1",
    }


def test_private_keys_are_readable_by_their_owner_alone(world: World) -> None:
    world.node("n1")
    for path in (
        world.directory / "authority" / "authority.key",
        world.directory / "authority" / "administration.key",
        world.directory / "n1" / "node.key",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not (world.directory / "n1" / "administration.key").exists()
    assert not (world.directory / "n1" / "authority.key").exists()


def test_an_authority_is_never_replaced_and_loads_as_it_was_made(world: World) -> None:
    with pytest.raises(OperatorError, match="already holds an authority"):
        issuing.create_authority(world.authority.directory, "c2")
    assert issuing.load_authority(world.authority.directory).cluster == "c1"


@pytest.mark.parametrize(
    ("name", "location", "roles", "error"),
    [
        ("n1", "US/nyc/a", ("storage",), JurisdictionRefused),
        ("n1", "NC/nou/a", ("storage",), JurisdictionRefused),
        ("n1", "fr/par1/a", ("storage",), JurisdictionRefused),
        ("N1", "FR/par1/a", ("storage",), OperatorError),
        ("n1", "FR/par1", ("storage",), OperatorError),
        ("n1", "FR/par 1/a", ("storage",), OperatorError),
        ("n1", "FR/par1/a", ("root",), OperatorError),
        ("n1", "FR/par1/a", (), OperatorError),
        ("../n1", "FR/par1/a", ("storage",), OperatorError),
    ],
)
def test_what_could_never_be_admitted_is_not_issued(
    world: World, name: str, location: str, roles: tuple[str, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        issuing.issue(world.authority, world.directory / "x", name=name, location=location, roles=roles)
    assert not (world.directory / "x").exists()


def certificate_with(world: World, extension: bytes | None, common_name: str = "n1") -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)]))
        .issuer_name(world.authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    if extension is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(identity.NODE_EXTENSION, extension), critical=False)
    return builder.sign(world.authority.key, hashes.SHA256())


def test_a_certificate_without_the_extension_is_refused(world: World) -> None:
    with pytest.raises(CertificateRefused, match="extension is missing"):
        identity.identity_of(certificate_with(world, None))


def extension_of(world: World, **changes: str) -> bytes:
    own = world.node("n1")
    values = {**own.peer._asdict(), **changes, "roles": list(own.peer.roles), "version": 1}
    del values["fingerprint"]
    encoded: bytes = asn1.encode_der(identity.NodeExtension(**values))
    return encoded


@pytest.mark.parametrize("damage", ["truncated", "trailing", "empty", "text"])
def test_a_malformed_extension_is_refused(world: World, damage: str) -> None:
    good = extension_of(world)
    bad = {"truncated": good[:-3], "trailing": good + b"\0", "empty": b"", "text": b"FR/par1/a"}[damage]
    assert identity.identity_of(certificate_with(world, good)).name == "n1"
    with pytest.raises(CertificateRefused):
        identity.identity_of(certificate_with(world, bad))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"country": "US"}, JurisdictionRefused),
        ({"country": ""}, JurisdictionRefused),
        ({"jurisdiction": "US"}, JurisdictionRefused),
        ({"jurisdiction": ""}, JurisdictionRefused),
        ({"name": "n2"}, CertificateRefused),
        ({"cluster": ""}, CertificateRefused),
        ({"rack": "a/b"}, CertificateRefused),
    ],
)
def test_an_extension_that_says_something_wrong_is_refused(
    world: World, changes: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        identity.identity_of(certificate_with(world, extension_of(world, **changes)))


def test_bytes_that_are_no_certificate_are_refused() -> None:
    with pytest.raises(CertificateRefused):
        identity.identity_of(b"")


def test_a_key_of_another_certificate_is_refused_at_load(world: World) -> None:
    world.node("n1")
    world.node("n2")
    (world.directory / "n1" / "node.key").write_bytes((world.directory / "n2" / "node.key").read_bytes())
    with pytest.raises(CertificateRefused, match="is not the key of"):
        identity.load_identity(world.directory / "n1")


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    with pytest.raises(CertificateRefused, match=r"node\.crt"):
        identity.load_identity(tmp_path)


def test_contexts_speak_tls_1_3_and_demand_a_certificate(world: World) -> None:
    own = world.node("n1")
    for context in (tls.server_context(own), tls.client_context(own)):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert [entry["subject"] for entry in context.get_ca_certs()] == [
            ((("organizationName", "storaged"),), (("commonName", "c1 authority"),))
        ]


def layout(cluster: str = "c1", epoch: int = 1) -> Layout:
    return Layout(
        cluster,
        epoch,
        (NodeEntry("n1", "FR/par1/a", "127.0.0.1:1", ("storage",)),),
        (DiskEntry("d1", "n1", 1),),
        ("d1",),
    )


def test_a_signed_layout_verifies_with_the_public_key_that_nodes_have(world: World) -> None:
    own = world.node("n1")
    assert (
        signed_layout.verify_layout(
            signed_layout.sign_layout(layout(), world.authority.administration), own.administration, "c1"
        )
        == layout()
    )


def test_a_layout_changed_in_any_byte_is_refused(world: World) -> None:
    own = world.node("n1")
    signed = signed_layout.sign_layout(layout(), world.authority.administration)
    for index in range(len(signed.payload)):
        changed = bytearray(signed.payload)
        changed[index] ^= 1
        with pytest.raises(LayoutRefused):
            signed_layout.verify_layout(
                signed_layout.SignedLayout(bytes(changed), signed.signature), own.administration, "c1"
            )


def test_a_layout_by_another_key_or_of_another_cluster_is_refused(world: World, tmp_path: Path) -> None:
    own = world.node("n1")
    other = World(tmp_path / "other")
    with pytest.raises(LayoutRefused, match="not by this cluster's administration key"):
        signed_layout.verify_layout(
            signed_layout.sign_layout(layout(), other.authority.administration), own.administration, "c1"
        )
    with pytest.raises(LayoutRefused, match="belongs to cluster 'c2'"):
        signed_layout.verify_layout(
            signed_layout.sign_layout(layout("c2"), world.authority.administration), own.administration, "c1"
        )
